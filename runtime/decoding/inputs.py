"""What the decoder is given: token ids and tiled images, checked before anything is computed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.errors import ContextError, PromptError, UsageError
from internvl_edge.bundle.prompt import (
    END_TOKENS,
    IMAGE_CONTEXT,
    THINK_END,
    THINKING_MESSAGE,
    expand_images,
    get_template,
    place_images,
)
from internvl_edge.bundle.quoting import quoted
from internvl_edge.bundle.segments import joined
from internvl_edge.bundle.specs import MAX_TILES, ModelSpec
from internvl_edge.bundle.tokenizer import Tokenizer
from internvl_edge.runtime.arguments import token_ids, whole_or
from internvl_edge.runtime.decoding.passes import shortening
from internvl_edge.runtime.decoding.request import MAX_NEW_TOKENS
from internvl_edge.runtime.decoding.sampling import Sampling
from internvl_edge.runtime.decoding.sequence import check_slots
from internvl_edge.runtime.images.identity import TiledImage
from internvl_edge.runtime.images.preprocess import Content, Tiler, Tiling, check_tiles
from internvl_edge.runtime.images.sources import (
    EncodedBytes,
    EncodedPicture,
    ImageLike,
    Picture,
    encoded_image,
)


class Inputs:
    """Makes a model's inputs.

    Args:
        spec: the model.
        tokenizer: its tokenizer.
        tiler: cuts images where the backend takes them.
        max_context: most tokens of a prompt.
        encoder: names what encodes images; see `ImageIdentity`.

    Attributes:
        context_id: token id of image slots.
        stop_ids: token ids that end an answer, the template's first.
        extra_stop_ids: those that end answers of other models and stand in this vocabulary.
        sampling: how tokens are chosen unless told otherwise.
        max_new_tokens: where an answer ends unless told otherwise.
    """

    def __init__(
        self, spec: ModelSpec, tokenizer: Tokenizer, tiler: Tiler, max_context: int, encoder: str
    ) -> None:
        self._spec = spec
        self._tokenizer = tokenizer
        self._tiler = tiler
        self._max_context = max_context
        self._encoder = encoder
        self._template = get_template(spec.prompt.template)
        self.context_id = tokenizer.token_id(IMAGE_CONTEXT)
        stop = tokenizer.token_id(self._template.stop)
        self.stop_ids = (stop, *(one for one in spec.prompt.stop_ids if one != stop))
        found = (tokenizer.added.get(text) for text in END_TOKENS)
        self.extra_stop_ids = tuple(token.id for token in found if token and token.special)
        self.sampling = Sampling.of_checkpoint(spec.generation)
        self.max_new_tokens = spec.generation.max_new_tokens or MAX_NEW_TOKENS

    def tile(self, image: ImageLike, max_tiles: int | None) -> TiledImage:
        """Decode, hash and cut an image; see `InternVL.tile`."""
        how = image if isinstance(image, Picture) else Picture(image)
        tiling = self.tiling(max_tiles if how.max_tiles is None else how.max_tiles)
        given = encoded_image(how)
        source = given.source if isinstance(given, Picture) else given
        kept = None
        if isinstance(source, EncodedBytes):
            kept = EncodedPicture(source, how.frame, how.upright, tiling.max_tiles)
        return TiledImage(partial(self._tiler, given, tiling), tiling, self._encoder, kept)

    def tiles(self, tiles: NDArray[np.uint8], size: tuple[int, int] | None = None) -> TiledImage:
        """Take pictures that are cut already, as if they were one; see `InternVL.tile`.

        Args:
            size: width and height in pixels of what they were cut from.

        Raises:
            ImageError: other than uint8 `(tiles, S, S, 3)`.
        """
        check_tiles(tiles, self._spec.vision.tile_size)
        held = np.ascontiguousarray(tiles)
        content = Content(hashlib.sha256(held.data).digest(), size)
        return TiledImage(lambda: (held, content), None, self._encoder)

    def tiling(self, max_tiles: int | None) -> Tiling:
        """How images are cut; see `InternVL.tile`.

        Raises:
            LimitError: `max_tiles` is no such number.
        """
        told = self._spec.tiling
        limit = whole_or("max_tiles", max_tiles, told.max_tiles)
        if not 1 <= limit <= MAX_TILES:
            raise UsageError(
                f"is {quoted(limit)}, it must be in 1..{MAX_TILES}", option="max_tiles"
            )
        return Tiling(
            tile_size=self._spec.vision.tile_size,
            min_tiles=min(told.min_tiles, limit) if told.dynamic else 1,
            max_tiles=limit if told.dynamic else 1,
            thumbnail=told.thumbnail,
            resize=told.resize,
        )

    def question(self, prompt: str, new_images: int, earlier_images: int) -> str:
        """Give a prompt its `<image>` markers as the model's template has them.

        Raises:
            PromptError: see `place_images`.
        """
        numbered = self._template.numbers_images
        return place_images(prompt, new_images, earlier_images, numbered=numbered)

    def system_message(self, told: str | None, *, thinking: bool) -> str | None:
        """Return what a conversation begins with: what asks for reasoning, unless another is told.

        Raises:
            UsageError: reasoning is asked of a model that has no token to end it with.
        """
        if thinking and THINK_END not in self._tokenizer.added:
            raise UsageError(
                f"needs the token {THINK_END}, which InternVL 3.5 has and this model lacks;"
                " leave it out",
                option="thinking",
            )
        return THINKING_MESSAGE if thinking and told is None else told

    def conversation(
        self,
        turns: Sequence[tuple[str, str | None]],
        tiled: Sequence[TiledImage],
        system_message: str | None,
        *,
        control_tokens: bool = False,
    ) -> list[int]:
        """Token ids of a conversation whose `<image>` markers stand for `tiled`, in order.

        Args:
            control_tokens: whether those that the texts spell are live; see `InternVL.stream`.
        """
        if system_message is None:
            system_message = self._spec.prompt.system_message
        rows = iter([self.rows(image) for image in tiled])
        # Question by question, so that an answer which happens to contain "<image>" stays text.
        expanded = [(expand_images(question, rows), answer) for question, answer in turns]
        segments = self._template.segments(expanded, system_message)
        if control_tokens:
            return self._tokenizer.encode(joined(segments))
        return self._tokenizer.encode_segments(segments)

    def rows(self, image: TiledImage) -> int:
        """Positions an image takes in a prompt."""
        return image.tiles * self._spec.vision.tokens_per_tile

    def checked(self, ids: Sequence[int], tiled: Sequence[TiledImage]) -> list[int]:
        """Token ids that the model can run with these images.

        Raises:
            PromptError: no ids, ids the vocabulary lacks, or not one slot for each image row.
            ContextError: more than the context holds.
        """
        checked, vocab = token_ids("prompt", ids), self._spec.language.vocab_size
        if not checked:
            raise PromptError("the prompt has no tokens")
        if not 0 <= min(checked) <= max(checked) < vocab:
            raise PromptError(
                f"token ids must be in 0..{vocab - 1}, got {quoted(min(checked))} to"
                f" {quoted(max(checked))}"
            )
        if len(checked) > self._max_context:
            raise ContextError(
                f"the prompt has {len(checked)} tokens, the context holds {self._max_context}",
                shortening(self._spec.language, self._max_context),
            )
        check_slots(checked.count(self.context_id), sum(map(self.rows, tiled)))
        return checked
