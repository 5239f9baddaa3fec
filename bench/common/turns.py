"""Calls timed in turns, so that what else the machine does comes to each, and their sessions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.products import AS_STORED, Form

if TYPE_CHECKING:
    import onnxruntime as ort

T = TypeVar("T")


@dataclass(frozen=True)
class Timed(Generic[T]):
    """What came of a call that was repeated.

    Attributes:
        seconds: the median.
        result: of the last.
    """

    seconds: float
    result: T


def in_turns(calls: Mapping[str, Callable[[], T]], runs: int) -> dict[str, Timed[T]]:
    """Make every call so many times, and once before, to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    results: dict[str, T] = {}
    for _ in range(runs + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            results[name] = call()
            times[name].append(time.perf_counter() - started)
    return {name: Timed(statistics.median(times[name][1:]), results[name]) for name in calls}


def session_options(threads: int, form: Form = AS_STORED) -> ort.SessionOptions:
    """Return the options of a session that is run in turns with others."""
    options = load_onnxruntime().SessionOptions()
    options.intra_op_num_threads = threads
    # The other sessions' threads would spin into this one's first milliseconds.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    for key, value in form.entries.items():
        options.add_session_config_entry(key, value)
    return options
