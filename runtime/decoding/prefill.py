"""A prompt on its way into a KV cache: its images first, then its tokens, a pass each time."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from internvl_edge.runtime.answering import Answering
from internvl_edge.runtime.backends import Cache
from internvl_edge.runtime.decoding.encoding import Vision
from internvl_edge.runtime.decoding.passes import Run
from internvl_edge.runtime.decoding.request import Request
from internvl_edge.runtime.decoding.reuse import LEAST_SHARED
from internvl_edge.runtime.decoding.sequence import ImageRows, TokenSequence
from internvl_edge.runtime.images.identity import PendingImage


class Prefill:
    """Brings a cache to a prompt, and to what was answered before its request was dropped.

    Args:
        means: what it is run with.
        request: whose prompt it is.
        ids: of the prompt, as they were checked.
        answered: tokens generated so far, but for the last one.
        cache: where the positions go.
        vision: encodes the images.

    Attributes:
        done: whether the cache holds all of it.
    """

    def __init__(
        self,
        means: Answering,
        request: Request,
        ids: Sequence[int],
        answered: Sequence[int],
        cache: Cache,
        vision: Vision,
    ) -> None:
        self._means, self._request, self._cache = means, request, cache
        self._images = [PendingImage(image, means.inputs.rows(image)) for image in request.images]
        prompt = TokenSequence.build(ids, means.inputs.context_id, self._images)
        self._sequence = prompt.then(answered) if answered else prompt
        self._rows: ImageRows | None = None
        self._encoding = self._encoded(vision)

    @property
    def done(self) -> bool:
        return self._cache.state.length == len(self._sequence)

    def follows(self, other: Prefill) -> bool:
        """Whether another prompt under way will soon have more of this one's beginning, to be
        copied, than this one has."""
        base = self._means.engine.base
        if base(self._sequence) != base(other._sequence):
            return False
        alike = self._sequence.common(other._sequence)
        return alike - LEAST_SHARED > max(self._held, other._held)

    @property
    def _held(self) -> int:
        return self._cache.state.length

    def encode(self) -> bool | None:
        """Do what is next of the images.

        Returns:
            whether that was a pass; None where all rows are there.

        Raises:
            PrecisionError: the rows of one are not finite numbers.
        """
        return next(self._encoding, None)

    def run(self, most: int, beside: Sequence[Cache]) -> Run:
        """Return the next positions, at most so many, once the images are encoded.

        Args:
            beside: caches of other answers under way, of which one may by now have more.
        """
        if self._rows is None:
            reused = self._means.engine.begin(self._cache, self._sequence, beside)
            self._rows = self._sequence.image_rows(reused)
            self._request.timings.cached_tokens = reused
            self._request.tell("prompt", reused, len(self._sequence))
        return self._means.engine.chunk(self._cache, self._sequence, self._rows, most)

    def ran(self) -> None:
        """Say how far it is."""
        self._request.tell("prompt", self._cache.state.length, len(self._sequence))

    def close(self) -> None:
        """Wait for no image any more."""
        self._encoding.close()

    def _encoded(self, vision: Vision) -> Generator[bool, None, None]:
        """Encode the images that are needed, a pass each time."""
        reused = self._means.engine.begin(self._cache, self._sequence)
        needed = [self._images[index] for index, _ in self._sequence.needed(reused)]
        yield from vision.encode(self._request, needed)
