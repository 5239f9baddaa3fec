"""Errors that outlive what raised them."""

from __future__ import annotations

import traceback

from internvl_edge.bundle.errors import InternVLEdgeError
from internvl_edge.runtime.decoding.progress import Progress, ProgressCallback


class Escaped(Exception):
    """Carries what is no `Exception`, such as SystemExit, out of a caller's function.

    Attributes:
        error: what it raised.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


def contained(progress: ProgressCallback) -> ProgressCallback:
    """Return a function that raises nothing which would end a thread of ours; see `Escaped`."""

    def told(how_far: Progress) -> object:
        try:
            return progress(how_far)
        except Exception:
            raise
        except BaseException as error:
            raise Escaped(error) from error

    return told


def without_locals(error: Exception) -> Exception:
    """Return an error that holds nothing of where it came from: caches and pictures would stay
    until the interpreter looks for circles. One that is not ours still says which lines it passed.
    """
    if isinstance(error, InternVLEdgeError):
        return error.with_traceback(None)
    traceback.clear_frames(error.__traceback__)
    return error
