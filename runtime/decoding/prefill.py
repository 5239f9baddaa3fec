"""A prompt on its way into a KV cache: its images first, then its tokens, a pass each time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from internvl_edge.runtime.answering import Answering
from internvl_edge.runtime.backends import Cache
from internvl_edge.runtime.decoding.passes import Run
from internvl_edge.runtime.decoding.request import Request
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
    ) -> None:
        self._means, self._request, self._cache = means, request, cache
        self._images = [
            PendingImage(image.identity, means.inputs.rows(image)) for image in request.images
        ]
        prompt = TokenSequence.build(ids, means.inputs.context_id, self._images)
        self._sequence = prompt.then(answered) if answered else prompt
        self._rows: ImageRows | None = None
        self._encoding = self._encoded()

    @property
    def done(self) -> bool:
        return self._cache.state.length == len(self._sequence)

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

    def _encoded(self) -> Iterator[bool]:
        """Encode the images that are needed, a pass each time."""
        request, means = self._request, self._means
        reused = means.engine.begin(self._cache, self._sequence)
        needed = [index for index, _ in self._sequence.needed(reused)]
        total = sum(request.images[index].tiles for index in needed)
        done = 0
        if needed:
            request.tell("tiles", done, total)
        for index in needed:
            image, before = request.images[index], request.timings.tiles
            for rows in means.encoder.steps(image, request.timings):
                if rows is None:
                    request.tell("tiles", done + request.timings.tiles - before, total)
                    yield True
                else:
                    self._images[index].encoded(rows)
            done += image.tiles
            if request.timings.tiles == before:  # its rows were known
                request.tell("tiles", done, total)
