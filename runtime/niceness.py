"""Threads that let others go first."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress

#: Added to a thread's niceness: where others want the same core, Linux then gives it a quarter.
GIVE_WAY = 5


def give_way() -> None:
    """Let this thread, and those that it begins, get less of a core that others want.

    Linux alone has niceness by thread; elsewhere nothing happens, nor where it is forbidden.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            own = threading.get_native_id()
            nice = os.getpriority(os.PRIO_PROCESS, own) + GIVE_WAY
            os.setpriority(os.PRIO_PROCESS, own, min(nice, 19))
