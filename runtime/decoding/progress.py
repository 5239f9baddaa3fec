"""How far a prompt is, told as it is worked through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

Stage: TypeAlias = Literal["tiles", "prompt"]


@dataclass(frozen=True)
class Progress:
    """How far a prompt is.

    Attributes:
        stage: "tiles" while images are encoded, then "prompt" while tokens are read.
        done: tiles or tokens so far, with those whose rows are known from earlier; at last `total`.
        total: tiles of the images that the KV cache lacks; tokens of the whole prompt.
    """

    stage: Stage
    done: int
    total: int


#: What is called as a prompt is worked through, between its passes; what it raises ends the answer.
ProgressCallback: TypeAlias = Callable[[Progress], object]
