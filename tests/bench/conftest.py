"""A small quantised bundle and one real latency result of it, once per session."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from calibrating import few_items
from checkpoints import KV8, small_config, write_checkpoint

from internvl_edge.bench.common import ceilings
from internvl_edge.cli.main import main
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration.decisions import QuantOptions


@pytest.fixture(scope="session", autouse=True)
def _small_ceilings() -> Iterator[None]:
    """What this machine can do is measured on little: no test is about how much that is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ceilings, "ARRAY_BYTES", 1 << 24)
        patch.setattr(ceilings, "PRODUCT", (64, 256, 512))
        yield


@pytest.fixture(scope="session")
def float_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float32, with widths that are all different."""
    folder = tmp_path_factory.mktemp("float")
    config = small_config(hidden=128, heads=8, kv_heads=2)
    return export_bundle(write_checkpoint(folder / "checkpoint", config), folder / "bundle")


@pytest.fixture(scope="session")
def integer_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, W8A8 and INT4."""
    folder = tmp_path_factory.mktemp("integer")
    checkpoint = write_checkpoint(
        folder / "checkpoint", small_config(hidden=128, heads=8, kv_heads=2)
    )
    options = QuantOptions(block=32, naive=True)
    with few_items():
        return export_bundle(
            checkpoint,
            folder / "bundle",
            vision="int8",
            language="int4",
            options=options,
            sensitivity=False,
            **KV8,
        )


@pytest.fixture(scope="session")
def latency_files(integer_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `result.json`, `report.html`, `plots.png`: once, no picture, and four tiles."""
    folder = tmp_path_factory.mktemp("latency")
    options = {"--prompt": 8, "--new-tokens": 4, "--rounds": 2, "--repeat": 2, "--threads": 1}
    files = {"--json": "result.json", "--html": "report.html", "--png": "plots.png"}
    given = options | {option: folder / name for option, name in files.items()}
    words = [str(word) for option in given.items() for word in option]
    assert main(["bench", "latency", str(integer_bundle), "--tiles", "0", "4", *words]) == 0
    return folder


@pytest.fixture(scope="session")
def _stored_result(latency_files: Path) -> dict[str, Any]:
    return dict(json.loads((latency_files / "result.json").read_text(encoding="utf-8")))


@pytest.fixture
def result(_stored_result: dict[str, Any]) -> dict[str, Any]:
    """A copy of the result, to be changed."""
    return copy.deepcopy(_stored_result)
