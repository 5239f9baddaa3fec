"""Errors that outlive what raised them."""

from __future__ import annotations

import traceback

from internvl_edge.bundle.errors import InternVLEdgeError


def without_locals(error: Exception) -> Exception:
    """Return an error that holds nothing of where it came from: caches and pictures would stay
    until the interpreter looks for circles. One that is not ours still says which lines it passed.
    """
    if isinstance(error, InternVLEdgeError):
        return error.with_traceback(None)
    traceback.clear_frames(error.__traceback__)
    return error
