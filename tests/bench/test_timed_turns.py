"""Calls that are timed in turns."""

from __future__ import annotations

from collections.abc import Callable

from internvl_edge.bench.common.turns import in_turns


def test_calls_take_turns_after_one_to_warm_up() -> None:
    made: list[str] = []

    def call(name: str) -> Callable[[], int]:
        def run() -> int:
            made.append(name)
            return len(made)

        return run

    timed = in_turns({"one": call("one"), "other": call("other")}, 3)
    assert made == ["one", "other"] * 4
    assert (timed["one"].result, timed["other"].result) == (7, 8)
