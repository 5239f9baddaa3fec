"""Where a calibration keeps its progress, so that it can be interrupted and go on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from internvl_edge.export.decisions import Decisions
from internvl_edge.export.quantize import Floats

_KEY = "key.txt"


class Workspace:
    """A directory of finished units. Belongs to one (checkpoint, data, recipe): the key.

    Only the newest activations are kept; they are what the next unit starts from.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        key_file = path / _KEY
        if not key_file.exists() or key_file.read_text(encoding="utf-8") != key:
            self.remove()
            path.mkdir(parents=True)
            key_file.write_text(key, encoding="utf-8")
        self._latest: Path | None = None

    def load(self, unit: str) -> tuple[Decisions, Floats] | None:
        """What a finished unit left, memory-mapped, or None."""
        done = self._path / unit
        if not done.is_dir():
            return None
        decisions = {path.stem: np.load(path, mmap_mode="r") for path in done.glob("*.npy")}
        activations = self._activations(unit)
        if activations.exists():
            self._latest = activations
            return decisions, np.load(activations, mmap_mode="r")
        # A later unit is finished too: nobody will read these activations.
        return decisions, np.empty((0, 0), np.float32)

    def save(self, unit: str, decisions: Decisions, activations: Floats) -> None:
        """Record a unit: activations first, then the decisions that declare it finished."""
        target = self._activations(unit)
        partial = self._path / f"{unit}.partial.npy"
        np.save(partial, activations)
        os.replace(partial, target)
        aside = self._path / f"{unit}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for name, array in decisions.items():
            np.save(aside / f"{name}.npy", array)
        aside.rename(self._path / unit)
        if self._latest is not None and self._latest != target:
            self._latest.unlink(missing_ok=True)
        self._latest = target

    def remove(self) -> None:
        """Progress is no longer needed. The key goes first: without it, what a kill leaves of the
        rest is nobody's."""
        (self._path / _KEY).unlink(missing_ok=True)
        shutil.rmtree(self._path, ignore_errors=True)

    def _activations(self, unit: str) -> Path:
        return self._path / f"{unit}.activations.npy"
