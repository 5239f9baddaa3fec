"""How a command ends that Ctrl-C interrupts."""

from __future__ import annotations

import sys

INTERRUPTED = 130


def say_interrupted() -> int:
    """Say that the user ended the command; returns the exit status."""
    print("\ninterrupted", file=sys.stderr)
    return INTERRUPTED
