"""The library of operators, called on this thread: for the tests, and to know its paths."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path


class OperatorLibrary:
    """One kernel in a build of the library.

    Args:
        path: of the library; see `build.operator_library`.
        kernel: the folder of its sources.

    Attributes:
        paths: names of the paths that run on this CPU, the fastest first; "plain" is the last.

    Raises:
        OSError: it cannot be loaded.
        AttributeError: it has no such kernel.
    """

    def __init__(self, path: Path, kernel: str) -> None:
        self._library, self._kernel = ctypes.CDLL(str(path)), kernel
        path_at = self._entry("path")
        path_at.restype, path_at.argtypes = ctypes.c_char_p, [ctypes.c_int32]
        names = itertools.takewhile(bool, map(path_at, itertools.count()))
        self.paths = [name.decode() for name in names]

    def call(self, entry: str, given: ctypes.Structure, path: str) -> int:
        """Run an entry by one of `paths`; return its status.

        Raises:
            ValueError: there is no such path.
        """
        status: int = self._entry(entry)(ctypes.byref(given), self.paths.index(path))
        return status

    def _entry(self, name: str) -> ctypes._NamedFuncPointer:
        function: ctypes._NamedFuncPointer = getattr(self._library, f"ive_{self._kernel}_{name}")
        return function
