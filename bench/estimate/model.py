"""Memory and speed of a model on a machine one does not have: arithmetic and a roofline.

    seconds = max(operations / (rate * arithmetic), bytes / (bandwidth * memory))

`arithmetic` and `memory` are the shares of the data sheet's figures that are assumed to be reached;
`published.py` holds what others measured, and the tests say how far off the prediction is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from internvl_edge.bench.common.ceilings import Ceilings
from internvl_edge.bench.common.limits import Weights
from internvl_edge.bench.common.roofline import Ceiling, Work, cache_token_bytes
from internvl_edge.bundle.contract import CachePrecision, LanguagePrecision, VisionPrecision
from internvl_edge.bundle.errors import UsageError
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.export.calibration.decisions import QuantOptions, Recipe
from internvl_edge.export.sizes import bundle_bytes
from internvl_edge.export.tensorrt.targets import GIB, PowerMode, Target
from internvl_edge.runtime.decoding.passes import MAX_CHUNK, SCORE_BYTES, VISION_BYTES

#: Tokens of an answer that a context should have room for.
ANSWER = 1024
#: A CUDA context with its libraries and kernels, as processes with an empty engine show it.
RUNTIME_BYTES = GIB
#: Above this many bytes a second a card has stacked memory.
STACKED = 1.5e12

#: The tensor cores' dtype of a linear layer stored so. Weight-only formats are multiplied in half
#: precision there; W8A8 is for the vision part only.
GPU_VISION = {"fp32": "float32", "fp16": "float16", "int8": "int8"}
GPU_LANGUAGE = {"fp32": "float32", "fp16": "float16", "int8": "float16", "int4": "float16"}


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peak rate and of the peak bandwidth that are reached."""

    arithmetic: float
    memory: float


#: Of a data sheet, by kind of memory. Published decode figures come to 62 to 77 % of an AGX Orin's
#: bandwidth, but to 42 to 69 % of an A100's, whose kernels are too short to fill it; prefill to
#: 40 to 60 % of the float16 rate.
ORDINARY_MEMORY = Efficiency(0.5, 0.7)
STACKED_MEMORY = Efficiency(0.5, 0.5)
#: Of ceilings that were measured with kernels like those that run.
MEASURED = Efficiency(0.7, 0.85)


@dataclass(frozen=True)
class Request:
    """A wish: precisions, pictures, lengths. `context` bounds prompt and answer."""

    vision: VisionPrecision
    language: LanguagePrecision
    kv: CachePrecision
    tiles: int
    text_tokens: int
    context: int
    block: int = 128

    def recipe(self) -> Recipe:
        return Recipe(self.vision, self.language, self.kv, QuantOptions(block=self.block))

    def prompt_tokens(self, spec: ModelSpec) -> int:
        return self.tiles * spec.vision.tokens_per_tile + self.text_tokens


@dataclass(frozen=True)
class Device:
    """A machine that runs passes: a ceiling for each graph and the shares of it assumed."""

    vision: Ceiling
    language: Ceiling
    efficiency: Efficiency

    @classmethod
    def of_target(
        cls, target: Target, mode: PowerMode, request: Request, efficiency: Efficiency | None
    ) -> Device:
        """A GPU by its data sheet."""

        def ceiling(dtype: str) -> Ceiling:
            attention = "float32" if dtype == "float32" else "float16"
            return Ceiling(target.rate(dtype, mode), target.rate(attention, mode), mode.bandwidth)

        usual = STACKED_MEMORY if mode.bandwidth > STACKED else ORDINARY_MEMORY
        return cls(
            ceiling(GPU_VISION[request.vision]),
            ceiling(GPU_LANGUAGE[request.language]),
            efficiency or usual,
        )

    @classmethod
    def of_ceilings(cls, ceilings: Ceilings, weights: Weights) -> Device:
        """A machine whose ceilings were measured."""
        return cls(ceilings.ceiling(weights.vision), ceilings.ceiling(weights.language), MEASURED)

    def seconds(self, work: Work, ceiling: Ceiling) -> float:
        share = self.efficiency
        return replace(
            ceiling,
            linear=ceiling.linear * share.arithmetic,
            attention=ceiling.attention * share.arithmetic,
            bandwidth=ceiling.bandwidth * share.memory,
        ).seconds(work)


@dataclass(frozen=True)
class Speed:
    """Predicted seconds, and rates in tokens a second."""

    vision_s: float
    prefill_s: float
    token_s: float
    prompt_tokens: int

    @property
    def ttft_s(self) -> float:
        """Without decoding and cutting the picture, which a CPU does in milliseconds."""
        return self.vision_s + self.prefill_s

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prefill_s

    @property
    def decode_tokens_per_s(self) -> float:
        return 1 / self.token_s


def predict(weights: Weights, device: Device, *, tiles: int, prompt_tokens: int) -> Speed:
    """Vision over all tiles, the prompt's prefill, and one token behind it."""
    vision = device.seconds(weights.vision_pass(tiles), device.vision) if tiles else 0.0
    return Speed(
        vision_s=vision,
        prefill_s=device.seconds(weights.language_pass(prompt_tokens, 0), device.language),
        token_s=device.seconds(weights.language_pass(1, prompt_tokens), device.language),
        prompt_tokens=prompt_tokens,
    )


def weights_of(spec: ModelSpec, request: Request) -> Weights:
    """Bytes by part under a request's precisions."""
    parts = bundle_bytes(spec, request.recipe())
    return Weights(spec, parts, request.vision, request.language, request.kv)


def memory_bytes(spec: ModelSpec, request: Request, *, shared: bool) -> dict[str, int]:
    """Device memory by part.

    The embedding table stays on the host; it counts where host and device share their memory.
    Activations are the larger of one vision pass (its widest layer's input and output) and one
    prefill pass (attention scores and the MLP's rows), the bounds the runtime keeps to.

    Raises:
        UsageError: the prompt does not fit the context, or the context not the model.
    """
    language = spec.language
    check_lengths(spec, request)
    parts = bundle_bytes(spec, request.recipe())
    chunk = MAX_CHUNK * (2 * language.intermediate_size + language.hidden_size) * 4
    memory = {
        "vision weights": parts["vision_linears"] + parts["projector"],
        "decoder weights": parts["decoder_linears"] + parts["head"],
        "other weights": parts["other"],
        "embedding table": parts["embedding"] if shared else 0,
        "KV cache": request.context * cache_token_bytes(language, request.kv),
        "image rows": request.prompt_tokens(spec) * language.hidden_size * 4,
        "activations": max(2 * VISION_BYTES, SCORE_BYTES + chunk),
        "runtime": RUNTIME_BYTES,
    }
    return {name: size for name, size in memory.items() if size}


def check_lengths(spec: ModelSpec, request: Request) -> None:
    """Raise UsageError unless the prompt fits the context, and the context the model."""
    prompt, limit = request.prompt_tokens(spec), spec.language.max_context
    if request.tiles < 0 or request.text_tokens < 1:
        raise UsageError(
            f"{request.tiles} tiles and {request.text_tokens} tokens of text; at least 0 and 1"
        )
    if prompt > request.context:
        raise UsageError(
            f"the prompt has {prompt} tokens ({request.tiles} tiles), the context"
            f" {request.context}; raise --context or lower --tiles"
        )
    if request.context > limit:
        raise UsageError(f"--context is {request.context}, this model ends at {limit}")


@dataclass(frozen=True)
class SmallerRequest:
    """A smaller request that fits, what changed, and the bytes it takes."""

    text: str
    total: int


def remedies(
    spec: ModelSpec, request: Request, usable: int, *, shared: bool
) -> list[SmallerRequest]:
    """Return requests that fit: fewer tokens, or lower precision; both where neither is enough.

    Of each kind the mildest; empty where nothing this project offers fits.
    """

    def first(changes: Iterator[tuple[Request, str]]) -> list[SmallerRequest]:
        for smaller, text in changes:
            total = sum(memory_bytes(spec, smaller, shared=shared).values())
            if total <= usable:
                return [SmallerRequest(text, total)]
        return []

    found = first(_shorter(spec, request)) + first(_lighter(spec, request))
    return found or first(_both(spec, request))


#: Milder precisions first.
_VISION: tuple[VisionPrecision, ...] = ("fp32", "fp16", "int8")
_LANGUAGE: tuple[LanguagePrecision, ...] = ("fp32", "fp16", "int8", "int4")
_KV: tuple[CachePrecision, ...] = ("fp32", "fp16", "int8")


def _lighter(spec: ModelSpec, request: Request) -> Iterator[tuple[Request, str]]:
    """Lower precisions, by the number of bytes they take: the largest that fits comes first."""
    options = [
        replace(request, vision=vision, language=language, kv=kv)
        for vision, language, kv in product(
            _VISION[_VISION.index(request.vision) :],
            _LANGUAGE[_LANGUAGE.index(request.language) :],
            _KV[_KV.index(request.kv) :],
        )
    ]
    options.sort(key=lambda item: -sum(memory_bytes(spec, item, shared=False).values()))
    for item in options:
        yield item, f"--vision {item.vision} --language {item.language} --kv {item.kv}"


def _shorter(spec: ModelSpec, request: Request) -> Iterator[tuple[Request, str]]:
    """A shorter answer, down to `ANSWER` tokens; then fewer tiles as well."""
    answer = request.context - request.prompt_tokens(spec)
    room = [answer >> halved for halved in range(answer.bit_length())]
    least = min(answer, ANSWER)
    pairs = [(request.tiles, tokens) for tokens in room[1:] if tokens > least]
    pairs += [(tiles, least) for tiles in range(request.tiles, min(1, request.tiles) - 1, -1)]
    for tiles, tokens in pairs:
        smaller = replace(request, tiles=tiles)
        smaller = replace(smaller, context=smaller.prompt_tokens(spec) + tokens)
        yield smaller, f"--tiles {tiles} --context {smaller.context}"


def _both(spec: ModelSpec, request: Request) -> Iterator[tuple[Request, str]]:
    for lighter, how in _lighter(spec, request):
        for shorter, length in _shorter(spec, lighter):
            yield shorter, f"{how} {length}"
