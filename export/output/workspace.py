"""Where a calibration keeps its progress, so that it can be interrupted and go on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from internvl_edge.bundle.json_reader import read_object
from internvl_edge.bundle.manifest import sha256_file
from internvl_edge.export.calibration.decisions import Decisions
from internvl_edge.export.formats.quantize import Floats

_KEY = "key.txt"
#: In each finished unit: sha256 of its files by name, activations included.
_SEAL = "seal.json"
_PARTIAL = ".partial"


class Workspace:
    """A directory of finished units, within a work folder. Belongs to one run: the key.

    Only the newest activations are kept; they are what the next unit starts from.

    Args:
        path: the directory; emptied where it is of another run, or damaged.
        key: identifies everything that decisions depend on.

    Attributes:
        resumed: how many units an earlier run finished.
        discarded: why an earlier run's progress was removed; empty where there was none to remove.

    Raises:
        OSError: the directory cannot be written.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self.discarded = self._why_useless(key) if path.exists() else ""
        if self.discarded or not path.exists():
            self.remove()
            path.mkdir()
            (path / _KEY).write_text(key, encoding="utf-8")
        self.resumed = self.finished
        self._latest: Path | None = None

    @property
    def finished(self) -> int:
        """How many units are finished."""
        return len(self._units()) if self._path.exists() else 0

    def load(self, unit: str) -> tuple[Decisions, Floats] | None:
        """What a finished unit left, memory-mapped, or None."""
        done = self._path / unit
        if not done.is_dir():
            return None
        decisions = {path.stem: np.load(path, mmap_mode="r") for path in sorted(done.glob("*.npy"))}
        activations = self._activations(unit)
        if activations.exists():
            self._latest = activations
            return decisions, np.load(activations, mmap_mode="r")
        # A later unit is finished too: nobody will read these activations.
        return decisions, np.empty((0, 0), np.float32)

    def save(self, unit: str, decisions: Decisions, activations: Floats) -> None:
        """Record a unit: activations first, then the decisions that declare it finished."""
        target = self._activations(unit)
        partial = self._path / f"{unit}{_PARTIAL}.npy"
        _save(partial, activations)
        os.replace(partial, target)
        aside = self._path / f"{unit}{_PARTIAL}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for name, array in decisions.items():
            _save(aside / f"{name}.npy", np.asarray(array))
        seal = {path.name: sha256_file(path) for path in (target, *sorted(aside.iterdir()))}
        (aside / _SEAL).write_text(json.dumps(seal), encoding="utf-8")
        aside.rename(self._path / unit)
        if self._latest is not None and self._latest != target:
            self._latest.unlink(missing_ok=True)
        self._latest = target

    def remove(self) -> None:
        """Progress is no longer needed. The key goes first: without it, what a kill leaves of the
        rest is nobody's."""
        (self._path / _KEY).unlink(missing_ok=True)
        shutil.rmtree(self._path, ignore_errors=True)

    def _why_useless(self, key: str) -> str:
        """Why what is there cannot be gone on with; empty where it can."""
        file = self._path / _KEY
        if not file.exists() or file.read_text(encoding="utf-8", errors="replace") != key:
            return "it is of other weights, data, options or versions"
        units = self._units()
        if not all(self._is_whole(unit) for unit in units):
            return "it is damaged"
        if units and not any(self._activations(unit.name).exists() for unit in units):
            return "it is damaged"
        return ""

    def _units(self) -> list[Path]:
        finished = (path for path in sorted(self._path.iterdir()) if (path / _SEAL).exists())
        return [path for path in finished if path.suffix != _PARTIAL]

    def _is_whole(self, unit: Path) -> bool:
        """Whether a unit's files are those that were saved; older activations may be gone."""
        try:
            seal = read_object(unit / _SEAL)
            activations = self._activations(unit.name)
            files = {path.name: path for path in unit.glob("*.npy")} | {
                path.name: path for path in (activations,) if path.exists()
            }
            return seal.keys() - {activations.name} == files.keys() - {activations.name} and all(
                sha256_file(path) == seal[name] for name, path in files.items()
            )
        except (OSError, ValueError, AttributeError):
            return False

    def _activations(self, unit: str) -> Path:
        return self._path / f"{unit}.activations.npy"


def _save(path: Path, array: NDArray[Any]) -> None:
    """Write an array as .npy; on a full disk NumPy's own function raises an error without a code.

    Raises:
        OSError: it cannot be written.
    """
    whole = np.ascontiguousarray(array).reshape(array.shape)
    with path.open("wb") as stream:
        header = npy_format.header_data_from_array_1_0(whole)
        npy_format.write_array_header_1_0(stream, header)
        stream.write(whole.reshape(-1).view(np.uint8).data)
