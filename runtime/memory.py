"""How much memory a bundle takes to run on this machine, told before it is taken."""

from __future__ import annotations

import math
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
from internvl_edge.bundle.remedies import Remedies, Remedy, without_gains
from internvl_edge.bundle.specs import LanguageSpec, VisionSpec
from internvl_edge.runtime.decoding.passes import prefill_chunk, scores_of_pass, vision_batch
from internvl_edge.runtime.free_memory import RESERVE_BYTES, available_memory

#: Interpreter, libraries, two sessions of a model without weights, and what a first answer leaves.
PROCESS_BYTES = 80 << 20
#: glibc keeps so much free at the end of a heap: twice the largest block it takes from one (32 MiB,
#: `mallopt(3)`). The host's thread is one heap, each thread that opens a graph another.
KEPT_BYTES = 64 << 20
#: A packed matrix beside the one in the file: at block 128 the sums of its blocks, 4 bytes beside
#: 64 of weights and 4 of scales.
PACKED_GROWTH = 1 + 4 / 68
#: Float32 of a float16 weight: ONNX Runtime has few float16 products for the CPU, and computes the
#: others in float32. While a graph opens, both are there.
WIDENED = 2
#: What is no matrix of a product (norms, positions, the patches' convolution) is copied, and the
#: convolution packed.
OTHER_COPIES = 2
#: While a graph opens, forms of one matrix that are there at once: the packed one, and in W8A8 and
#: float products, whose weights are stored by output, their transpose.
PACKED_COPIES = {"fp32": 2, "fp16": 2, "int8": 2, "int4": 1}
#: Of a weight.
WEIGHT_BYTES = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5}
#: Weights of a decoder that are stored in blocks, as a manifest names them.
BLOCK_PRECISIONS = ("int4", "int8")
#: The memory of a pass is taken in blocks, each twice as large as the last: at most half is unused.
DOUBLING = 2
#: Values of the MLP's inner width that are there at once: before and after the activation function;
#: in a gated MLP gate, its sigmoid, their product, and what it is multiplied with.
VISION_WIDE, LANGUAGE_WIDE = 2, 4
#: Rows of the images. Pixels: the picture as given, about as large as its tiles, and these.
ROW_COPIES, PIXEL_COPIES = 1, 2


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes one conversation takes on the CPU, by what takes them.

    Attributes:
        sessions: both graphs beside their matrices, and what the C library keeps of opening them.
        packing: of the largest matrices, while sessions open; or float16 weights beside their
            copies.
        vision_weights: as ONNX Runtime packs them; 0 where they are mapped.
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
    manifest: Manifest,
    *,
    tokens: int,
    tiles: int,
    prepared: bool,
    low_memory: bool,
    mapped: frozenset[str] = frozenset(),
    scores: bool = True,
) -> MemoryPlan:
    """Plan the memory that running a bundle takes.

    Args:
        manifest: of the bundle.
        tokens: positions of the KV cache that will be filled: prompt, image rows and answer.
        tiles: of all images in one prompt.
        prepared: whether the weights are mapped; see `runtime.backends.prepared`.
        low_memory: hold one graph at a time.
        mapped: graphs whose matrices our kernels map as they are; see `runtime.backends`.
        scores: see `Backend.holds_scores`.
    """
    spec = manifest.spec
    vision, language = spec.vision, spec.language
    batch = min(tiles, vision_batch(spec))
    wide = vision.sequence_length * vision.intermediate_size * 4
    chunk = min(tokens, prefill_chunk(spec, tokens, scores=scores))
    # A layer's attention is over when its MLP begins.
    mlp = chunk * _inner_values(language) * 4
    pass_bytes = max(mlp, scores_of_pass(spec, tokens)) if scores else mlp
    pixels = tiles * vision.tile_size**2 * 3
    rows = tiles * vision.tokens_per_tile * language.hidden_size
    item = np.dtype(contract.compute_dtype(manifest.vision, manifest.dialect)).itemsize
    maps_vision = prepared or VISION_GRAPH in mapped
    return MemoryPlan(
        sessions=2 * KEPT_BYTES + OTHER_COPIES * _part_bytes(manifest, "other"),
        packing=_packing(manifest, mapped) if prepared else _half_bytes(manifest),
        vision_weights=0 if maps_vision else _weights(manifest, VISION_GRAPH),
        language_weights=_language_weights(manifest, prepared, LANGUAGE_GRAPH in mapped),
        vision=DOUBLING * VISION_WIDE * batch * wide,
        language=DOUBLING * pass_bytes,
        images=ROW_COPIES * rows * item + PIXEL_COPIES * pixels,
        kv_cache=tokens * position_bytes(manifest),
        low_memory=low_memory,
    )


def _language_weights(manifest: Manifest, prepared: bool, mapped: bool) -> int:
    if mapped and manifest.parts:
        return sum(_copied(manifest, part) for part in ("decoder_linears", "head"))
    return 0 if prepared else _weights(manifest, LANGUAGE_GRAPH)


def _inner_values(language: LanguageSpec) -> int:
    """Return the floats of a token in its MLP at once; experts have its input, or output, too."""
    chosen = language.experts_per_token or 1
    return max(
        chosen * (LANGUAGE_WIDE * language.mlp_size(layer) + language.hidden_size)
        if language.has_experts(layer)
        else LANGUAGE_WIDE * language.mlp_size(layer)
        for layer in range(language.num_hidden_layers)
    )


def _copied(manifest: Manifest, part: str) -> int:
    """Bytes of a part whose weights in blocks are mapped."""
    if (entry := manifest.parts.get(part)) is None:
        return 0
    others = sum(
        count for name, count in entry.precision.items() if not name.startswith(BLOCK_PRECISIONS)
    )
    return int(PACKED_GROWTH * entry.bytes * others / max(1, sum(entry.precision.values())))


def _packing(manifest: Manifest, mapped: frozenset[str]) -> int:
    """Return the bytes of what packing gives while both graphs open, to find the stored form by:
    of the largest matrix of each that is packed."""
    vision, language = (
        PACKED_COPIES[precision] * WEIGHT_BYTES[precision] * _mlp_weights(part)
        for part, precision in (
            (manifest.spec.vision, manifest.vision),
            (manifest.spec.language, manifest.language),
        )
    )
    if VISION_GRAPH in mapped:
        vision = 0
    if LANGUAGE_GRAPH in mapped:
        return int(PACKED_GROWTH * vision) + _copied(manifest, "head")
    return int(PACKED_GROWTH * (vision + max(_part_bytes(manifest, "head"), language)))


def _mlp_weights(part: VisionSpec | LanguageSpec) -> int:
    """Return the number of weights of a layer's largest matrix; experts have one for all of them,
    of gate and up."""
    size = part.hidden_size * part.intermediate_size
    experts = part.experts if isinstance(part, LanguageSpec) else None
    return size if experts is None else 2 * experts * size


def _part_bytes(manifest: Manifest, part: str) -> int:
    """Return the bytes of a part of the weights; 0 where an old bundle does not tell."""
    return manifest.parts[part].bytes if part in manifest.parts else 0


def position_bytes(manifest: Manifest) -> int:
    """Bytes of one position of the KV cache, all layers."""
    language = manifest.spec.language
    item = np.dtype(contract.CACHE_DTYPE[manifest.kv]).itemsize
    return 2 * language.num_hidden_layers * math.prod(contract.cache_shape(language, 1)) * item


def claim_bytes(manifest: Manifest, tokens: int, tiles: int) -> int:
    """Bytes that a request takes for itself: its positions in the KV cache and its images. What
    passes take, requests take in turns."""
    plan = plan_memory(manifest, tokens=tokens, tiles=tiles, prepared=True, low_memory=False)
    return plan.kv_cache + plan.images


@dataclass(frozen=True)
class MemoryGuard:
    """Refuses what would not fit before anything is computed.

    Attributes:
        manifest: of the bundle.
        prepared: whether its weights are mapped.
        low_memory: whether one graph is held at a time.
        mapped: graphs whose matrices our kernels map as they are.
        scores: see `Backend.holds_scores`.
    """

    manifest: Manifest
    prepared: bool
    low_memory: bool
    mapped: frozenset[str] = frozenset()
    scores: bool = True

    def check_load(self) -> None:
        """Raise CapacityError unless the weights, and a prompt with one tile, fit."""
        tokens = self.manifest.spec.vision.tokens_per_tile
        self._check(self._plan(tokens, 1), tokens, "loading this bundle")

    def check_prepare(self) -> None:
        """Raise CapacityError unless each graph's weights fit: all are packed in memory once.

        A guard of one graph at a time is asked.
        """
        tokens = self.manifest.spec.vision.tokens_per_tile
        remedies = without_gains([Remedy.CLOSE_PROGRAMS, Remedy.PREPARE_ELSEWHERE])
        _check(self._plan(tokens, 1), tokens, "preparing this bundle", remedies)

    def check_prompt(self, tokens: int, tiles: int, promised: int = 0) -> None:
        """Raise CapacityError unless so many new positions and tiles fit beside what is loaded.

        Args:
            promised: bytes that others will take; below 0: that they will give back.
        """
        plan = self._answer(tokens, tiles)
        self._check(plan, tokens, "this prompt", promised)

    def _answer(self, tokens: int, tiles: int) -> MemoryPlan:
        """Plan an answer beside what is loaded."""
        return replace(
            self._plan(tokens, tiles),
            process=0,
            sessions=0,
            packing=0,
            vision_weights=0,
            language_weights=0,
        )

    def _plan(self, tokens: int, tiles: int) -> MemoryPlan:
        return plan_memory(
            self.manifest,
            tokens=tokens,
            tiles=tiles,
            prepared=self.prepared,
            low_memory=self.low_memory,
            mapped=self.mapped,
            scores=self.scores,
        )

    def _check(self, plan: MemoryPlan, tokens: int, what: str, promised: int = 0) -> None:
        _check(plan, tokens, what, _remedies(self.manifest, plan, self.mapped), promised)


def _check(plan: MemoryPlan, tokens: int, what: str, remedies: Remedies, promised: int = 0) -> None:
    """Raise CapacityError unless a plan fits into the memory that is free and not promised."""
    available = max(available_memory() - promised, 0)
    if plan.total + RESERVE_BYTES > available:
        raise CapacityError(
            f"{what} takes {gib(plan.total)} of memory (weights"
            f" {gib(plan.vision_weights + plan.language_weights)}, KV cache of {tokens} tokens"
            f" {gib(plan.kv_cache)}), {gib(available)} are free",
            plan.total + RESERVE_BYTES,
            available,
            remedies,
        )


def _weights(manifest: Manifest, graph: str) -> int:
    """Return the bytes of a graph's weights, as they are held."""
    copies = WIDENED if _precision(manifest, graph) == "fp16" else 1
    return int(PACKED_GROWTH * copies * _graph_bytes(manifest, graph))


def _half_bytes(manifest: Manifest) -> int:
    """Return the bytes of float16 weights: they are there beside their copies while graphs open."""
    graphs = (VISION_GRAPH, LANGUAGE_GRAPH)
    halves = (graph for graph in graphs if _precision(manifest, graph) == "fp16")
    return sum(_graph_bytes(manifest, graph) for graph in halves)


def _precision(manifest: Manifest, graph: str) -> str:
    return manifest.vision if graph == VISION_GRAPH else manifest.language


def _graph_bytes(manifest: Manifest, graph: str) -> int:
    files = VISION_FILES if graph == VISION_GRAPH else LANGUAGE_FILES
    return sum(manifest.files[name].bytes for name in files)


def _remedies(manifest: Manifest, plan: MemoryPlan, mapped: frozenset[str]) -> dict[Remedy, str]:
    """Return what would take less, with what it saves where that is known."""
    weights = {VISION_GRAPH: plan.vision_weights, LANGUAGE_GRAPH: plan.language_weights}
    packed = [weight for graph, weight in weights.items() if graph not in mapped]
    found: dict[Remedy, str] = {}
    if packed and all(packed) and "fp16" not in (manifest.vision, manifest.language):
        found[Remedy.PREPARE] = f"maps {gib(sum(packed))} of weights"
    if not plan.low_memory:
        saved = plan.total - replace(plan, low_memory=True).total
        found[Remedy.LOW_MEMORY] = f"saves {gib(saved)}"
    if plan.kv_cache:
        smaller = [Remedy.LOWER_CONTEXT, Remedy.FEWER_IMAGES, Remedy.LOWER_TILES]
        if manifest.kv != "int8":
            smaller.append(Remedy.INT8_CACHE)
        found |= without_gains(smaller)
    return found | without_gains([Remedy.CLOSE_PROGRAMS])


def gib(size: int) -> str:
    """Return a size as people read it."""
    return f"{size / 2**30:.2f} GiB"
