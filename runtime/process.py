"""Where a loaded model may be used: in the process that loaded it, and as itself."""

from __future__ import annotations

import os
from typing import NoReturn

from internvl_edge.bundle.errors import ProcessError


class HomeProcess:
    """The process a model was loaded in. In one forked from it there are neither the threads that
    compute nor, where one of them held a lock, anybody to give it back."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def here(self) -> bool:
        """Whether this is it."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Raise ProcessError in any other process."""
        if not self.here:
            raise ProcessError(
                f"the model was loaded in process {self._pid}, this one ({os.getpid()}) was forked"
                " from it; load the bundle here, or start processes by 'spawn'"
            )


class NotCopied:
    """A base of what is bound to threads, sessions and memory: no copy would have them."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse `pickle`, `copy.copy` and `copy.deepcopy`.

        Raises:
            ProcessError: always.
        """
        raise ProcessError(
            f"{type(self).__name__} objects cannot be pickled or copied; load the bundle where it"
            " is needed (threads may share one model)"
        )
