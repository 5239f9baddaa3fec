"""An interrupted calibration goes on only where nothing that decides has changed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import small_config, write_checkpoint
from PIL import Image
from safetensors.numpy import load_file, save_file

from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration.decisions import QuantOptions
from internvl_edge.runtime import CheckpointError, InternVLEdgeWarning

RECIPE: dict[str, Any] = {
    "vision": "int8",
    "language": "int4",
    "options": QuantOptions(block=32),
    "sensitivity": False,
}
pytestmark = [
    pytest.mark.slow(seconds=1),
    pytest.mark.filterwarnings("ignore:kept the calib", "ignore:removed the calib"),
]
WEIGHTS = "model.safetensors"
Change = Callable[[Path, dict[str, Any]], None]


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A checkpoint and two pictures, to be changed."""
    write_checkpoint(tmp_path / "checkpoint", small_config(layers=1, vision_layers=1))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(2):
        save_picture(pictures / f"{number}.bmp", number)
    lines = [{"image": f"{number}.bmp", "prompt": "What?", "answer": "It."} for number in range(2)]
    (pictures / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def save_picture(path: Path, seed: int) -> None:
    """A BMP: all have the same size in bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (56, 56, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def export(room: Path, name: str, stop_after: int | None = None, **changed: Any) -> Path:
    """Export, perhaps interrupted once so many units are done."""

    def stop(total: int) -> Callable[[int], None]:
        left = iter(range(stop_after or total + 1, 0, -1))

        def advance(count: int) -> None:
            if next(left) == 1:
                raise KeyboardInterrupt

        return advance

    return export_bundle(
        room / "checkpoint",
        room / name,
        calibration=room / "pictures",
        calibration_progress=stop,
        **(RECIPE | changed),
    )


def scale_weights(room: Path, settings: dict[str, Any]) -> None:
    """Other weights in place, of the same size, and the file claims to be as old as before."""
    path = room / "checkpoint" / WEIGHTS
    times = path.stat()
    state = load_file(path)
    name = "language_model.model.layers.0.feed_forward.w1.weight"
    state[name] = state[name] * state[name].dtype.type(1.5)
    aside = room / "aside"
    save_file(state, aside)
    assert aside.stat().st_size == times.st_size
    path.write_bytes(aside.read_bytes())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace_weights(room: Path, settings: dict[str, Any]) -> None:
    """Another file takes the name, as old as the first one."""
    path = room / "checkpoint" / WEIGHTS
    times = path.stat()
    other = write_checkpoint(room / "other", small_config(layers=1, vision_layers=1), seed=1)
    os.utime(other / WEIGHTS, ns=(times.st_atime_ns, times.st_mtime_ns))
    (other / WEIGHTS).replace(path)
    assert path.stat().st_size == times.st_size


def another_picture(room: Path, settings: dict[str, Any]) -> None:
    save_picture(room / "pictures" / "1.bmp", 7)


def another_answer(room: Path, settings: dict[str, Any]) -> None:
    path = room / "pictures" / "list.jsonl"
    path.write_text(path.read_text().replace("It.", "Is."))


def another_epsilon(room: Path, settings: dict[str, Any]) -> None:
    path = room / "checkpoint" / "config.json"
    path.write_text(path.read_text().replace("1e-05", "2e-05"))


def another_block(room: Path, settings: dict[str, Any]) -> None:
    settings["options"] = replace(RECIPE["options"], block=64)


def another_cache(room: Path, settings: dict[str, Any]) -> None:
    settings["kv"] = "fp16"


CHANGES = (
    scale_weights,
    replace_weights,
    another_picture,
    another_answer,
    another_epsilon,
    another_block,
    another_cache,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_after_a_change_it_begins_anew(room: Path, change: Change) -> None:
    """The bundle is that of an export which was never interrupted."""
    with pytest.raises(KeyboardInterrupt):
        export(room, "resumed", stop_after=4)
    settings: dict[str, Any] = {}
    change(room, settings)
    resumed = export(room, "resumed", **settings)
    assert contents(resumed) == contents(export(room, "whole", **settings))


def test_without_a_change_it_goes_on(room: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        export(room, "resumed", stop_after=4)
    with pytest.warns(InternVLEdgeWarning, match="going on with .*resumed.work: 4 layers are done"):
        resumed = export(room, "resumed")
    assert contents(resumed) == contents(export(room, "whole"))


@pytest.mark.parametrize("unit", ["vision.0", "language.0.activations.npy"])
def test_damage_is_not_taken_up(room: Path, unit: str) -> None:
    """One flipped bit in what was decided, or in what the next unit would start from."""
    with pytest.raises(KeyboardInterrupt):
        export(room, "resumed", stop_after=4)
    path = room / "resumed.work" / "calibration" / unit
    file = max(path.glob("*.npy"), key=lambda p: p.stat().st_size) if path.is_dir() else path
    content = bytearray(file.read_bytes())
    content[-2] ^= 0x40
    file.write_bytes(content)
    with pytest.warns(InternVLEdgeWarning, match="removed the calibration in .*: it is damaged"):
        resumed = export(room, "resumed")
    assert contents(resumed) == contents(export(room, "whole"))


def test_another_version_of_the_code_begins_anew(
    room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        export(room, "resumed", stop_after=4)
    monkeypatch.setattr("internvl_edge.export.calibration.run._code_digest", lambda: "newer")
    with pytest.warns(InternVLEdgeWarning, match="it is of other weights, data, options or vers"):
        export(room, "resumed")


def test_weights_that_change_while_they_are_read(room: Path) -> None:
    def change(total: int) -> Callable[[int], None]:
        scale_weights(room, {})
        return lambda _: None

    with pytest.raises(CheckpointError, match="was changed while it was read; export again"):
        export_bundle(room / "checkpoint", room / "bundle", progress=change)
    assert not (room / "bundle").exists()
    assert not (room / "bundle.work").exists()


def contents(bundle: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bundle.iterdir()}
