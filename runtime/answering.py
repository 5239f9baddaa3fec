"""What answers are made with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from internvl_edge.bundle.tokenizer import Tokenizer
from internvl_edge.runtime.decoding.encoding import ImageEncoder
from internvl_edge.runtime.decoding.finite import FiniteCheck
from internvl_edge.runtime.decoding.inputs import Inputs
from internvl_edge.runtime.decoding.lane import VisionLane
from internvl_edge.runtime.decoding.passes import Engine
from internvl_edge.runtime.decoding.policy import Policy
from internvl_edge.runtime.decoding.reservations import Reservations
from internvl_edge.runtime.decoding.reuse import PrefixStore
from internvl_edge.runtime.decoding.sequence import EncodedImage, TokenSequence
from internvl_edge.runtime.images.identity import TiledImage
from internvl_edge.runtime.process import HomeProcess


@dataclass(frozen=True)
class Answering:
    """What answers are made with: one for each model.

    Attributes:
        inputs: checks prompts.
        engine: runs them.
        tokenizer: makes text of tokens.
        encoder: makes rows of images.
        lane: encodes images beside others' answers; None: there is memory for one graph at a time.
        prefixes: KV caches that are kept.
        reservations: promise memory, and refuse what would not fit.
        policy: how requests share all this.
        finite: refuses what is no number.
        max_context: most tokens of a prompt and its answer.
        home: the process all this is in.
    """

    inputs: Inputs
    engine: Engine
    tokenizer: Tokenizer
    encoder: ImageEncoder
    lane: VisionLane | None
    prefixes: PrefixStore
    reservations: Reservations
    policy: Policy
    finite: FiniteCheck
    max_context: int
    home: HomeProcess

    def sequence(self, ids: Sequence[int], tiled: Sequence[TiledImage]) -> TokenSequence:
        """Join checked ids and images, which are encoded now."""
        rows = [self.encoder.rows(image) for image in tiled]
        named = [image.identity.signatures(self.inputs.rows(image)) for image in tiled]
        images = [EncodedImage(*pair) for pair in zip(rows, named, strict=True)]
        return TokenSequence.build(ids, self.inputs.context_id, images)
