"""Killed at any moment, an export leaves nothing that loads wrongly, and the next is the same."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import KV8, small_config, write_checkpoint

from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.calib_data.generator import generate
from internvl_edge.runtime import BundleError

KILLS = 20
EXPORT = [str(Path(sys.executable).with_name("internvl-edge")), "export"]


@pytest.mark.slow(seconds=30)
def test_twenty_kills(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", small_config(hidden=64, layers=3))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, item in enumerate(generate(4)):
        item.image.save(pictures / f"{number}.png")
    command = [*EXPORT, str(checkpoint), "--vision", "int8", "--language", "int4", "--block", "32"]
    command += ["--calibration", str(pictures)]
    command += ["--kv", "int8"] if KV8 else []
    began = time.perf_counter()
    subprocess.run([*command, "-o", str(tmp_path / "whole")], check=True, capture_output=True)
    whole = time.perf_counter() - began
    moments = random.Random(0)
    finished = 0
    for _ in range(KILLS):
        output = tmp_path / "killed"
        child = subprocess.Popen(
            [*command, "-o", str(output), "--overwrite"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            child.wait(moments.uniform(0.2, 1.0) * whole)
            finished += 1
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        if not output.exists():
            with pytest.raises(BundleError, match="is not a bundle"):
                open_bundle(output)
            continue
        open_bundle(output)  # whole: every hash is right
    assert finished < KILLS
    subprocess.run([*command, "-o", str(tmp_path / "killed"), "--overwrite"], check=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def contents(bundle: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bundle.iterdir()}
