"""Progress of a calibration is taken up whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internvl_edge.export.output.workspace import Workspace

UNITS = ("vision.0", "vision.1", "projector")


def fill(path: Path) -> Workspace:
    workspace = Workspace(path, "key")
    for number, unit in enumerate(UNITS):
        workspace.save(unit, {"d": np.full(2, number)}, np.full((3, 2), number, np.float32))
    return workspace


def test_finished_units_come_back_and_the_newest_activations(tmp_path: Path) -> None:
    fill(tmp_path / "progress")
    again = Workspace(tmp_path / "progress", "key")
    for number, unit in enumerate(UNITS):
        done = again.load(unit)
        assert done is not None
        assert done[0]["d"].tolist() == [number, number]
        assert done[1].size == (6 if unit == UNITS[-1] else 0)
    assert again.load("language.0") is None


def test_another_key_begins_anew(tmp_path: Path) -> None:
    fill(tmp_path / "progress")
    other = Workspace(tmp_path / "progress", "another")
    assert [other.load(unit) for unit in UNITS] == [None] * 3


@pytest.mark.parametrize("survivor", UNITS)
@pytest.mark.parametrize("key", ["key", "another"])
def test_killed_while_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survivor: str, key: str
) -> None:
    """What is left would miss the activations the next unit starts from."""
    path = tmp_path / "progress"
    workspace = fill(path)

    def killed(folder: Path, **_: Any) -> None:
        for unit in set(UNITS) - {survivor}:
            remove(folder / unit)
        for file in folder.glob("*.npy"):
            file.unlink()
        raise KeyboardInterrupt

    remove = shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            workspace.remove() if key == "key" else Workspace(path, key)
    again = Workspace(path, "key")
    assert [again.load(unit) for unit in UNITS] == [None] * 3
