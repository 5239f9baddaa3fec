"""How much memory a bundle takes to run on this machine, told before it is taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from internvl_edge.bundle import contract
from internvl_edge.bundle.contract import (
    LANGUAGE_FILES,
    LANGUAGE_GRAPH,
    VISION_FILES,
    VISION_GRAPH,
)
from internvl_edge.bundle.errors import CapacityError
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.bundle.remedies import Remedy, without_gains
from internvl_edge.runtime.backends.prepared import WIDEST_BYTES, part_count
from internvl_edge.runtime.decoding.passes import prefill_chunk, vision_batch
from internvl_edge.runtime.free_memory import RESERVE_BYTES, available_memory

#: Interpreter, libraries, two sessions of a model without weights, and what a first answer leaves.
PROCESS_BYTES = 80 << 20
#: Of the weights' bytes, what sessions hold besides them: scales, norms, the graphs.
SESSION_SHARE = 0.0055
#: A packed matrix beside the one in the file: column sums and scales lie between the values.
PACKED_GROWTH = 1.05
#: Packing the head or a part of it: the block it is packed into, and that it is hashed in.
PACKING_SHARE = 1.4
#: Packing in each other part of prepared graphs, which open at once, in units of its largest
#: matrix, at most: its transpose, the packed form, and free blocks that the C library keeps (all of
#: the 26B's load: 0.55 to 1.09 GiB in 13 runs, 1.19 by this).
PACKING_COPIES = 5
#: Of a weight.
WEIGHT_BYTES = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5}
#: Activations of a pass in units of the MLP's widest, which is there before and after its
#: activation function, and narrower ones beside it: about what ONNX Runtime's arenas grow to (by
#: doubling: 1.9 to 4.1 were seen in vision towers, 6.4 to 9.5 in language models).
VISION_WIDE, LANGUAGE_WIDE = 4.0, 8.0
#: Rows of the images. Pixels: the picture as given, about as large as its tiles, and these.
ROW_COPIES, PIXEL_COPIES = 1, 2


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes one conversation takes on the CPU, by what takes them.

    Attributes:
        sessions: both graphs, beside their matrices.
        packing: of the largest matrices, while sessions open.
        vision_weights: as ONNX Runtime packs them; 0 where prepared weights are mapped.
        language_weights: the same.
        vision: activations of the largest pass over tiles.
        language: activations of the largest prefill pass.
        images: rows and pixels of the images in the prompt.
        kv_cache: of all positions asked for.
        low_memory: whether the two graphs are held one at a time.
        process: interpreter, libraries, sessions.
    """

    sessions: int
    packing: int
    vision_weights: int
    language_weights: int
    vision: int
    language: int
    images: int
    kv_cache: int
    low_memory: bool
    process: int = PROCESS_BYTES

    @property
    def total(self) -> int:
        """Peak anonymous memory."""
        weights = self.vision_weights, self.language_weights
        # A graph gives its activations back before the other one runs.
        vision, language = self.vision, self.language + self.kv_cache
        if self.low_memory:
            answer = max(weights[0] + vision, weights[1] + language)
            load = max(weights)
        else:
            answer = sum(weights) + max(vision, language)
            load = sum(weights)
        return self.process + self.sessions + max(load + self.packing, self.images + answer)


def plan_memory(
    manifest: Manifest, *, tokens: int, tiles: int, prepared: bool, low_memory: bool
) -> MemoryPlan:
    """Plan the memory that running a bundle takes.

    Args:
        manifest: of the bundle.
        tokens: positions of the KV cache that will be filled: prompt, image rows and answer.
        tiles: of all images in one prompt.
        prepared: whether the weights are mapped; see `runtime.prepared`.
        low_memory: hold one graph at a time.
    """
    spec = manifest.spec
    vision, language = spec.vision, spec.language
    batch = min(tiles, vision_batch(spec))
    wide = vision.sequence_length * vision.intermediate_size * 4
    chunk = min(tokens, prefill_chunk(spec, tokens))
    pixels = tiles * vision.tile_size**2 * 3
    rows = tiles * vision.tokens_per_tile * language.hidden_size
    files = sum(manifest.files[name].bytes for name in (*VISION_FILES, *LANGUAGE_FILES))
    item = np.dtype(contract.compute_dtype(manifest.vision, manifest.dialect)).itemsize
    return MemoryPlan(
        sessions=int(SESSION_SHARE * files),
        packing=_packing(manifest, prepared),
        vision_weights=0 if prepared else _weights(manifest, VISION_FILES),
        language_weights=0 if prepared else _weights(manifest, LANGUAGE_FILES),
        vision=int(VISION_WIDE * batch * wide),
        language=int(LANGUAGE_WIDE * chunk * language.intermediate_size * 4),
        images=ROW_COPIES * rows * item + PIXEL_COPIES * pixels,
        kv_cache=tokens * position_bytes(manifest),
        low_memory=low_memory,
    )


def _packing(manifest: Manifest, prepared: bool) -> int:
    """Bytes that hold matrices while they are packed."""
    head = manifest.parts["head"].bytes if "head" in manifest.parts else 0
    if not prepared:
        return int(PACKING_SHARE * head)
    others = 0.0
    for graph, spec, precision, opened_beside in (
        (VISION_GRAPH, manifest.spec.vision, manifest.vision, 0),
        (LANGUAGE_GRAPH, manifest.spec.language, manifest.language, 1),  # the head's part
    ):
        matrix = spec.hidden_size * spec.intermediate_size * WEIGHT_BYTES[precision]
        others += (part_count(manifest, graph) - opened_beside) * PACKING_COPIES * matrix
    return int(PACKING_SHARE * min(head, WIDEST_BYTES) + others)


def position_bytes(manifest: Manifest) -> int:
    """Bytes of one position of the KV cache, all layers."""
    language = manifest.spec.language
    item = np.dtype(contract.CACHE_DTYPE[manifest.kv]).itemsize
    return 2 * language.num_hidden_layers * math.prod(contract.cache_shape(language, 1)) * item


@dataclass(frozen=True)
class MemoryGuard:
    """Refuses what would not fit before anything is computed.

    Attributes:
        manifest: of the bundle.
        prepared: whether its weights are mapped.
        low_memory: whether one graph is held at a time.
    """

    manifest: Manifest
    prepared: bool
    low_memory: bool

    def check_load(self) -> None:
        """Raise CapacityError unless the weights, and a prompt with one tile, fit."""
        tokens = self.manifest.spec.vision.tokens_per_tile
        self._check(self._plan(tokens, 1), tokens, "loading this bundle")

    def check_prompt(self, tokens: int, tiles: int) -> None:
        """Raise CapacityError unless so many new positions and tiles fit beside what is loaded."""
        plan = replace(
            self._plan(tokens, tiles),
            process=0,
            sessions=0,
            packing=0,
            vision_weights=0,
            language_weights=0,
        )
        self._check(plan, tokens, "this prompt")

    def _plan(self, tokens: int, tiles: int) -> MemoryPlan:
        return plan_memory(
            self.manifest,
            tokens=tokens,
            tiles=tiles,
            prepared=self.prepared,
            low_memory=self.low_memory,
        )

    def _check(self, plan: MemoryPlan, tokens: int, what: str) -> None:
        available = available_memory()
        if plan.total + RESERVE_BYTES > available:
            raise CapacityError(
                f"{what} takes {_gib(plan.total)} of memory (weights"
                f" {_gib(plan.vision_weights + plan.language_weights)}, KV cache of {tokens} tokens"
                f" {_gib(plan.kv_cache)}), {_gib(available)} are free",
                plan.total + RESERVE_BYTES,
                available,
                _remedies(self.manifest, plan),
            )


def _weights(manifest: Manifest, files: Sequence[str]) -> int:
    return int(PACKED_GROWTH * sum(manifest.files[name].bytes for name in files))


def _remedies(manifest: Manifest, plan: MemoryPlan) -> dict[Remedy, str]:
    """Return what would take less, with what it saves where that is known."""
    weights = plan.vision_weights, plan.language_weights
    found: dict[Remedy, str] = {}
    if all(weights) and "fp16" not in (manifest.vision, manifest.language):
        found[Remedy.PREPARE] = f"maps {_gib(sum(weights))} of weights"
    if not plan.low_memory:
        saved = plan.total - replace(plan, low_memory=True).total
        found[Remedy.LOW_MEMORY] = f"saves {_gib(saved)}"
    if plan.kv_cache:
        smaller = [Remedy.LOWER_CONTEXT, Remedy.FEWER_IMAGES, Remedy.LOWER_TILES]
        if manifest.kv != "int8":
            smaller.append(Remedy.INT8_CACHE)
        found |= without_gains(smaller)
    return found | without_gains([Remedy.CLOSE_PROGRAMS])


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
