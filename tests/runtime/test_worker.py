"""Jobs are done one after the other, and whoever is interrupted leaves nobody waiting."""

from __future__ import annotations

import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from queue import SimpleQueue

import pytest
from campaign.interrupts import Moments

from internvl_edge.runtime.decoding.worker import Worker

#: What never comes would be waited for so long.
LONG_S = 60.0


def interrupt() -> None:
    raise KeyboardInterrupt


def test_jobs_are_done_in_order_in_a_thread_of_their_own() -> None:
    said: SimpleQueue[object] = SimpleQueue()
    worker = Worker("worker", lambda: said.put("begin"))
    for number in range(3):
        worker.submit(lambda number=number: said.put((number, threading.current_thread().name)))
    worker.close()
    got = [said.get(timeout=LONG_S) for _ in range(4)]
    assert got == ["begin", (0, "worker"), (1, "worker"), (2, "worker")]


def test_a_job_that_fails_is_told_and_the_next_is_done(caplog: pytest.LogCaptureFixture) -> None:
    said: SimpleQueue[str] = SimpleQueue()
    worker = Worker("worker")
    worker.submit(lambda: 1 // 0)
    worker.submit(lambda: said.put("next"))
    assert said.get(timeout=LONG_S) == "next"
    worker.close()
    assert "ZeroDivisionError" in caplog.text


def test_a_job_may_close_its_worker() -> None:
    """As a model is closed by what is told of its progress."""
    said: SimpleQueue[str] = SimpleQueue()
    worker = Worker("worker")

    def close() -> None:
        worker.close()
        said.put("closed")

    worker.submit(close)
    assert said.get(timeout=10) == "closed"


def test_the_thread_ends_with_its_worker_and_holds_nothing_that_was_done() -> None:
    class Held:
        def do(self) -> None:
            done.put(threading.current_thread())

    done: SimpleQueue[threading.Thread] = SimpleQueue()
    worker, held = Worker("worker"), Held()
    worker.submit(held.do)
    thread, gone = done.get(timeout=LONG_S), weakref.ref(held)
    worker.submit(lambda: done.put(threading.current_thread()))
    assert done.get(timeout=LONG_S) is thread
    del held
    assert gone() is None
    del worker
    thread.join(LONG_S)
    assert not thread.is_alive()


def test_whoever_is_interrupted_leaves_nobody_waiting() -> None:
    for at in range(1, 200):
        done: SimpleQueue[str] = SimpleQueue()
        worker = Worker("worker")
        counted = Moments(at, interrupt)
        with suppress(KeyboardInterrupt), counted:
            worker.submit(lambda done=done: done.put("first"))
        worker.submit(lambda done=done: done.put("second"))
        while done.get(timeout=LONG_S) != "second":
            pass
        worker.close()
        if counted.seen < at:
            break
    assert 2 < at < 199


def test_the_process_waits_for_the_job_under_way() -> None:
    script = (
        "import time; from internvl_edge.runtime.decoding.worker import Worker; w = Worker('w')\n"
        "began = []; w.submit(lambda: (began.append(1), time.sleep(0.3), print('done')))\n"
        "while not began: time.sleep(0.001)\n"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert said.stdout.strip() == b"done"
