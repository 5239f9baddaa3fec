"""What `internvl-edge` starts: Ctrl-C while the command line itself is imported is no traceback."""

from __future__ import annotations

from internvl_edge.bundle.signals import signals_held
from internvl_edge.cli.interrupted import say_interrupted


def main() -> int:
    """Run the command line; returns the exit status."""
    try:
        with signals_held():
            from internvl_edge.cli.main import main as command_line
        return command_line()
    except KeyboardInterrupt:
        return say_interrupted()
