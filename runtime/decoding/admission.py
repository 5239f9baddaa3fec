"""Which requests are under way, and which wait until there is room."""

from __future__ import annotations

import time
from collections.abc import Iterator

from internvl_edge.bundle.errors import CapacityError
from internvl_edge.runtime.answering import Answering
from internvl_edge.runtime.backends import Cache
from internvl_edge.runtime.decoding.encoding import Vision
from internvl_edge.runtime.decoding.handle import Handle
from internvl_edge.runtime.decoding.prefill import Prefill
from internvl_edge.runtime.decoding.reservations import Claim


class Admission:
    """Lets requests begin: by priority and age, when the memory they take is there.

    A request that waits for memory is overtaken by none. One that begins was promised its prompt
    and `Policy.ahead` tokens of its answer; where a longer answer finds no more, the newest request
    is dropped, waits, and is read again.

    Args:
        answering: what answers are made with.
        vision: encodes images.

    Attributes:
        admitted: requests under way, in the order in which they began.
    """

    def __init__(self, answering: Answering, vision: Vision) -> None:
        self._answering, self._vision = answering, vision
        self.admitted: list[Handle] = []
        self._waiting: list[Handle] = []

    def handles(self) -> list[Handle]:
        """All requests that have not ended."""
        return [*self.admitted, *self._waiting]

    def add(self, handle: Handle) -> None:
        """Take a request, which begins at once where nobody else is there.

        Raises:
            LimitError: there is no memory for it, even alone.
        """
        held = sum(other.taken_bytes for other in self.admitted)
        self._answering.reservations.check(_claim(handle, handle.positions), held)
        if not self.handles():
            self._begin(handle)
        else:
            self._waiting.append(handle)

    def remove(self, handle: Handle) -> None:
        """Forget a request, wherever it is."""
        for handles in (self.admitted, self._waiting):
            if handle in handles:
                handles.remove(handle)
        self._answering.reservations.release(handle)

    def admit(self) -> list[Exception]:
        """Let those begin for which there is room.

        Returns:
            why some cannot begin, even alone: they have failed.
        """
        errors: list[Exception] = []
        for handle in self._ranked(self._waiting):
            if len(self.admitted) >= self._answering.policy.most_running:
                break
            try:
                self._begin(handle)
            except CapacityError as error:
                if self.admitted:
                    break
                handle.fail(error)
                errors.append(error)
            self._waiting.remove(handle)
        return errors

    def prompts(self) -> list[Handle]:
        """Requests whose prompts are not read yet, in the order in which they should be."""
        return self._ranked([handle for handle in self.admitted if handle.prefill is not None])

    def caches(self, handle: Handle) -> list[Cache]:
        """Return the caches of the other requests under way."""
        return [
            other.cache for other in self.admitted if other.cache is not None and other != handle
        ]

    def read(self, handle: Handle) -> None:
        """Note that a prompt is read: its images take no more memory."""
        if handle.request.images:
            reservations = self._answering.reservations
            reservations.insist(handle, Claim(_claim(handle, handle.reserved).positions, 0))

    def grow(self) -> None:
        """Promise running answers what they are about to take; drop the newest for that."""
        for handle in self.admitted[:]:
            cache = handle.cache
            if cache is not None and handle.prefill is None:
                while cache.state.length >= handle.reserved and not self._reserve_more(handle):
                    pass

    def _begin(self, handle: Handle) -> None:
        means, request = self._answering, handle.request
        reserved = self._ahead(handle, len(handle.prompt_ids) + len(handle.ids))
        means.reservations.take(handle, _claim(handle, reserved))
        cache = request.cache
        try:
            if cache is None:
                cache = means.engine.new_cache(handle.positions)
        except CapacityError:  # it waits: others may have what it was promised
            means.reservations.release(handle)
            raise
        handle.had_bytes = cache.held_bytes if request.cache is not None else 0
        handle.cache, handle.reserved = cache, reserved
        ids, answered = handle.prompt_ids, handle.ids[:-1]
        handle.prefill = Prefill(means, request, ids, answered, cache, self._vision)
        self.admitted.append(handle)

    def _ahead(self, handle: Handle, positions: int) -> int:
        return min(positions + self._answering.policy.ahead, handle.positions)

    def _reserve_more(self, handle: Handle) -> bool:
        """Promise a running answer more positions, or drop somebody; whether that is settled."""
        reservations = self._answering.reservations
        assert handle.cache is not None
        reserved = self._ahead(handle, handle.cache.state.length)
        claim = Claim(_claim(handle, reserved).positions, 0)
        try:
            reservations.take(handle, claim)
        except CapacityError:
            newest = next(self._droppable(), None)
            if newest is None or len(self.admitted) == 1:
                reservations.insist(handle, claim)
            else:
                self._drop(newest)
                return newest is handle
        handle.reserved = reserved
        return True

    def _droppable(self) -> Iterator[Handle]:
        """Requests whose cache is their own, the newest first."""
        return (handle for handle in reversed(self.admitted) if handle.request.cache is None)

    def _drop(self, handle: Handle) -> None:
        """Let a request wait again; what it has computed is forgotten, but for its tokens."""
        self.admitted.remove(handle)
        handle.let_go()
        self._answering.reservations.release(handle)
        self._waiting.append(handle)

    def _ranked(self, handles: list[Handle]) -> list[Handle]:
        """Return handles by rank, the first to be served first."""
        if len(handles) < 2:
            return handles[:]
        now, policy = time.perf_counter(), self._answering.policy

        def rank(handle: Handle) -> float:
            request = handle.request
            return -policy.rank(request.priority, now - request.started)

        return sorted(handles, key=rank)


def _claim(handle: Handle, positions: int) -> Claim:
    """Return what a request takes that fills so many positions of its cache."""
    tiles = sum(image.tiles for image in handle.request.images)
    return Claim(max(positions - handle.had, 0), tiles)
