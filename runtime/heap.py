"""Giving memory that nothing uses any more back to the system."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Return free pages of the C library's heaps, where it can (glibc; others keep few).

    glibc takes arrays of up to 32 MB from its heaps, one for some threads each, once it has freed
    one as large, and returns only what lies free at their ends.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
