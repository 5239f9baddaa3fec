"""What the C library does with large blocks that are freed (glibc; elsewhere nothing changes)."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator

#: mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
#: Free blocks between others, for a matrix, its transpose and its packed form: larger than these,
#: so that they still fit when small things have come to lie in them (else up to 2 s of the 26B's
#: load). Memory is committed when it is written. Heaps of threads have 64 MB.
_HOLES, _PIN, _HOLE = 5, 64 << 10, 61 << 20
#: Blocks from this size on go back to the system when they are freed, smaller ones when twice as
#: much is free at a heap's end. Left to itself glibc moves these up to 32 and 64 MB, and keeps
#: activations that ONNX Runtime gives back: 526 MB instead of 423 for 13 tiles of the 2B. With 4 MB
#: tiny_ocr's arenas are cut from the heap anew each pass, which grew by 1 % in fifty turns.
_RETURNED = 256 << 10


@contextlib.contextmanager
def large_blocks_returned() -> Iterator[None]:
    """Give large blocks that are freed back to the system, after the block of code and on."""
    try:
        yield
    finally:
        library = ctypes.CDLL(None)
        if _is_glibc(library):
            _return_large_blocks(library)


@contextlib.contextmanager
def large_blocks_reused() -> Iterator[Callable[[], None] | None]:
    """Let the C library keep large blocks that are freed, and give them back at the end.

    Even for prepared weights ONNX Runtime packs every matrix to find the stored form by its hash.
    Each time that takes a new block from the system, which clears its pages; kept blocks bring the
    load of the 26B from 11.0 to 4.7 s.

    Yields:
        what another thread calls once before it does the same; or None.
    """
    library = ctypes.CDLL(None)
    if not _is_glibc(library):
        yield None
        return
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    pins: list[int] = []

    def make_holes() -> None:
        blocks = []
        for _ in range(_HOLES):
            blocks.append(library.malloc(_HOLE))
            pins.append(library.malloc(_PIN))
        for block in blocks:
            library.free(block)

    library.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    library.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    try:
        yield make_holes
    finally:
        for pin in pins:
            library.free(pin)
        _return_large_blocks(library)


def _is_glibc(library: ctypes.CDLL) -> bool:
    return hasattr(library, "mallopt") and hasattr(library, "malloc_trim")


def _return_large_blocks(library: ctypes.CDLL) -> None:
    library.mallopt(_M_MMAP_THRESHOLD, _RETURNED)
    library.mallopt(_M_TRIM_THRESHOLD, 2 * _RETURNED)
    library.malloc_trim(0)
