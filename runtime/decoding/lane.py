"""The vision lane: a thread that encodes images while others decode, each of them once."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from weakref import WeakValueDictionary

import numpy as np

from internvl_edge.runtime.decoding.encoding import Encoding, ImageEncoder
from internvl_edge.runtime.decoding.failures import without_locals
from internvl_edge.runtime.decoding.policy import Policy
from internvl_edge.runtime.decoding.request import Request
from internvl_edge.runtime.decoding.worker import Worker
from internvl_edge.runtime.images.identity import PendingImage, TiledImage
from internvl_edge.runtime.niceness import give_way

#: What a request does to hear that something has changed.
Wake = Callable[[], object]


@dataclass(frozen=True, eq=False)
class Waiter:
    """A request that waits for an image, and how it is woken.

    Each is equal to itself alone, so that no Python runs where a list of them changes.
    """

    request: Request
    wake: Wake


class Asked(Encoding):
    """An encoding, and who waits for it: where nobody does, it is given up between two passes."""

    def __init__(self, image: TiledImage) -> None:
        super().__init__(image)
        self.waiting: list[Waiter] = []


class VisionLane:
    """Encodes what it is asked for in a thread of its own, by priority and age; see `Policy.rank`.

    A picture that several ask for at once is encoded once. Passes take tiles of several pictures,
    as many as a pass takes. The thread waits while there is nothing to do, and ends with the lane.

    Args:
        encoder: encodes.
        policy: which request comes first.
    """

    def __init__(self, encoder: ImageEncoder, policy: Policy) -> None:
        self._encoder, self._policy = encoder, policy
        self._thread = Worker("vision", give_way)
        self._lock = threading.Lock()
        self._working = False
        self._queue: list[Asked] = []
        #: By identity, for as long as somebody holds it: rows need not be stored to be shared.
        self._known: WeakValueDictionary[bytes, Asked] = WeakValueDictionary()

    def ask(self, image: TiledImage, waiter: Waiter) -> tuple[Encoding, bool]:
        """Ask for the rows of an image.

        Args:
            waiter: woken after each of its passes, from the lane's thread.

        Returns:
            the encoding, and whether this is the first to ask for it.
        """
        name = image.identity.digest
        known = self._encoder.begin(image)
        with self._lock:
            asked = self._known.get(name)
            if asked is None or asked.error is not None or self._left_behind(asked):
                if known.rows is not None:
                    return known, False
                asked = self._known[name] = Asked(image)
                self._queue.append(asked)
            if not asked.ended:
                self._work()
            asked.waiting.append(waiter)
            return asked, len(asked.waiting) == 1

    def leave(self, encoding: Encoding, waiter: Waiter) -> None:
        """Wait for an encoding no longer; where nobody else does, it is given up.

        Nothing is locked: a prompt that is collected leaves, too, and Python collects in the midst
        of anything, this lane's own methods included.
        """
        if isinstance(encoding, Asked):
            encoding.waiting.remove(waiter)

    def close(self) -> None:
        """End the thread after the pass under way; another goes on with what is still waited for,
        or begins when something is asked for."""
        with self._lock:
            thread, self._thread = self._thread, Worker("vision", give_way)
        thread.close()

    def _left_behind(self, asked: Asked) -> bool:
        """Whether it was given up half done."""
        return not asked.ended and asked not in self._queue

    def _work(self) -> None:
        """Have the thread look for work; where an interrupt came in between, twice."""
        if not self._working:
            self._thread.submit(partial(self._until_done, self._thread))
            self._working = True

    def _until_done(self, thread: Worker) -> None:
        while batch := self._next(thread):
            self._pass(batch)
            for asked, _ in batch:
                if asked.error is not None:
                    without_locals(asked.error)
                self._tell(asked)

    def _next(self, thread: Worker) -> list[tuple[Asked, int]]:
        """Return what the next pass takes: pictures, and how many tiles of each. A thread that was
        closed takes none, and hands on what there is."""
        with self._lock:
            self._queue = [asked for asked in self._queue if asked.waiting]
            if thread is not self._thread:
                self._working = False
                if self._queue:
                    self._work()
                return []
            left = self._encoder.tiles_at_once
            found: list[tuple[Asked, int]] = []
            for asked in self._ranked():
                if left and (not found or _together(found[0][0], asked)):
                    count = min(left, asked.left)
                    found.append((asked, count))
                    left -= count
            self._working = bool(found)
            return found

    def _ranked(self) -> list[Asked]:
        """Return what is asked for, the first to be encoded first; of equals who came first."""
        now, policy = time.perf_counter(), self._policy

        def rank(asked: Asked) -> float:
            waiting = [one.request for one in asked.waiting[:]]  # some may leave meanwhile
            ranks = (policy.rank(one.priority, now - one.started) for one in waiting)
            return -max(ranks, default=-math.inf)

        return sorted(self._queue, key=rank)

    def _pass(self, batch: Sequence[tuple[Asked, int]]) -> None:
        """Encode some tiles together; where that fails, each picture's alone."""
        before = time.perf_counter()
        try:
            tiles = [asked.image.pixels()[asked.tiles :][:count] for asked, count in batch]
            with self._encoder.beside():
                rows = self._encoder.run(np.concatenate(tiles) if len(tiles) > 1 else tiles[0])
        except Exception as error:  # noqa: BLE001 - raised where the rows are waited for
            if len(batch) == 1:
                batch[0][0].error = error
            else:
                for one in batch:
                    self._pass([one])
            return
        seconds = time.perf_counter() - before
        each, start = len(rows) // sum(count for _, count in batch), 0
        for (asked, count), own in zip(batch, tiles, strict=True):
            part = rows[start : start + each * len(own)]
            start += len(part)
            share = seconds * len(part) / len(rows)
            try:
                self._encoder.took(asked, part if len(batch) == 1 else part.copy(), count, share)
            except Exception as error:  # noqa: BLE001 - raised where the rows are waited for
                asked.error = error

    def _tell(self, asked: Asked) -> None:
        with self._lock:
            if asked.ended and asked in self._queue:
                self._queue.remove(asked)
            waiting = list(asked.waiting)
        for waiter in waiting:
            waiter.wake()


class Beside:
    """Encodes the images of prompts in the lane, while its scheduler goes on; see `Vision`.

    Args:
        lane: of the model.
        wake: called when something has changed.
    """

    def __init__(self, lane: VisionLane, wake: Wake) -> None:
        self._lane, self._wake = lane, wake

    def encode(self, request: Request, pending: Sequence[PendingImage]) -> Iterator[bool]:
        """See `Vision`."""
        asked: list[tuple[Encoding, bool]] = []
        waiter = Waiter(request, self._wake)
        try:
            for image in pending:
                asked.append(self._lane.ask(image.image, waiter))
            yield from self._waited(request, [encoding for encoding, _ in asked])
        finally:
            for encoding, _ in asked:
                self._lane.leave(encoding, waiter)
        for image, (encoding, first) in zip(pending, asked, strict=True):
            image.encoded(encoding)
            if first:
                request.timings.vision_s += encoding.seconds
                request.timings.tiles += encoding.tiles

    def _waited(self, request: Request, asked: Sequence[Encoding]) -> Iterator[bool]:
        """Wait for all of them; say how many tiles are done when that has changed."""
        total, told = sum(encoding.image.tiles for encoding in asked), None
        while True:
            ended = all(encoding.ended for encoding in asked)
            for encoding in asked:
                if encoding.error is not None:
                    raise encoding.error
            left = sum(encoding.left for encoding in asked)
            if asked and left != told:
                request.tell("tiles", total - left, total)
                told = left
            if ended:
                return
            yield False


def _together(first: Asked, other: Asked) -> bool:
    """Whether the tiles of two pictures can be in one pass: both are on the host."""
    return all(isinstance(one.image.pixels(), np.ndarray) for one in (first, other))
