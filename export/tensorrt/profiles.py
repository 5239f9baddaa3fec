"""What engines are built for, and what that takes: shapes, the GPU, memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from internvl_edge.bundle.contract import EMBEDDING_TABLE, LANGUAGE_GRAPH, compute_dtype
from internvl_edge.bundle.errors import CapacityError, DeviceError, UsageError
from internvl_edge.bundle.manifest import Bundle, Manifest
from internvl_edge.bundle.remedies import Remedy
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.export.tensorrt.built import weight_bytes
from internvl_edge.export.tensorrt.gate import takes_batch
from internvl_edge.export.tensorrt.targets import (
    CARD_RESERVED_BYTES,
    SHARED_SYSTEM_BYTES,
    get_target,
)
from internvl_edge.runtime.backends.cuda import Cuda
from internvl_edge.runtime.backends.plans import PLANS, Limits, Machine
from internvl_edge.runtime.backends.tensorrt_library import Library
from internvl_edge.runtime.decoding.passes import vision_batch
from internvl_edge.runtime.free_memory import available_memory
from internvl_edge.runtime.memory import plan_memory

GIB = 1 << 30
#: Tokens of text and answer beside the tiles, unless a context is given.
TEXT_TOKENS = 2048
CONTEXT_MULTIPLE = 256
#: The builder's anonymous memory: RTX 1.7 took 2.1 to 2.4 times the weights for one and two layers
#: at true width (`bench kernels engines`). TensorRT's own builder was not measured.
BUILDER_FACTOR, BUILDER_BYTES = 2.2, 128 << 20
#: A CUDA context with the library and its kernels.
RUNTIME_BYTES = GIB


@dataclass(frozen=True)
class Place:
    """The GPU that engines will run on.

    Attributes:
        name: for people.
        machine: what they will depend on.
        usable_bytes: memory a process can have there.
        shared: whether that is the host's memory too.
    """

    name: str
    machine: Machine
    usable_bytes: int
    shared: bool


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that building and running takes.

    Attributes:
        weights: by graph.
        kv_cache: of as many conversations as share a pass, as long as they may get.
        activations: of the largest pass.
        other: the CUDA context; where memory is shared, also the embedding table.
        usable: what there is on the device.
    """

    weights: dict[str, int]
    kv_cache: int
    activations: int
    other: int
    usable: int

    @property
    def running(self) -> int:
        return sum(self.weights.values()) + self.kv_cache + self.activations + self.other

    @property
    def workspace(self) -> int:
        """Scratch memory the builder may plan with: what is left, activations included."""
        return self.usable - self.running + self.activations

    @property
    def building(self) -> int:
        """The builder's peak: graphs are built one after the other."""
        return int(BUILDER_FACTOR * max(self.weights.values())) + BUILDER_BYTES

    @property
    def parts(self) -> str:
        """Say what running takes, part by part."""
        return (
            f"{gib(self.running)} (weights {gib(sum(self.weights.values()))}, KV cache"
            f" {gib(self.kv_cache)}, activations {gib(self.activations)}, other"
            f" {gib(self.other)})"
        )

    def describe(self) -> str:
        """Say what building and running will take."""
        return (
            f"building takes about {gib(self.building)} of host memory; running {self.parts} of"
            f" {gib(self.usable)}; workspace at most {gib(self.workspace)}"
        )


def limits_of(
    spec: ModelSpec,
    max_tiles: int | None,
    max_context: int | None,
    max_sequences: int = 1,
) -> Limits:
    """Shapes of the engines from what one wants to ask.

    Args:
        max_tiles: of one picture, without thumbnail; None is the checkpoint's own.
        max_context: tokens of prompt and answer; None: the tiles' and `TEXT_TOKENS`.
        max_sequences: that are decoded in one pass; memory for so many contexts is taken with the
            first.

    Raises:
        UsageError: not positive, beyond the model, or the tiles do not fit the context.
    """
    tiles = spec.tiling.max_tiles if max_tiles is None else max_tiles
    if tiles < 1:
        raise UsageError(f"is {tiles}, it must be at least 1", option="max_tiles")
    tiles += int(spec.tiling.thumbnail and tiles > 1)
    rows, most = tiles * spec.vision.tokens_per_tile, spec.language.max_context
    if max_context is None:
        wanted = -(-(rows + TEXT_TOKENS) // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE
        context = min(wanted, most)
    else:
        context = max_context
    if not 1 <= context <= most:
        raise UsageError(f"is {context}, outside 1..{most} of this model", option="max_context")
    if max_tiles is not None and rows >= context:
        raise UsageError(
            f"{tiles} tiles with thumbnail are {rows} tokens, the context holds {context}",
            [*([Remedy.RAISE_CONTEXT] if context < most else []), Remedy.LOWER_TILES],
        )
    defaults = Limits(context)
    tokens = min(defaults.tokens, context)
    if not 1 <= max_sequences <= tokens:
        raise UsageError(f"is {max_sequences}, outside 1..{tokens}", option="max_sequences")
    return Limits(
        context,
        tokens=tokens,
        tiles=min(vision_batch(spec), tiles),
        rows=max(min(defaults.rows, context), max_sequences),
        sequences=max_sequences,
    )


def this_place(cuda: Cuda, library: Library) -> Place:
    """The GPU that is here."""
    with cuda.active():
        machine, shared = library.machine(cuda), cuda.integrated
        reserved = SHARED_SYSTEM_BYTES if shared else CARD_RESERVED_BYTES
        return Place(machine.gpu or "", machine, cuda.memory_bytes - reserved, shared)


def target_place(name: str, library: Library, open_cuda: Callable[[], Cuda] = Cuda.open) -> Place:
    """A GPU by its name in `export/tensorrt/targets.py`.

    RTX builds for a GPU that is elsewhere; others measure kernels on the one that is here, so it
    must be of that kind.

    Raises:
        UsageError: unknown name.
        DeviceError: it cannot be built for here.
    """
    target = get_target(name)
    if library.api.names_gpu:
        if not hasattr(library.module.ComputeCapability, f"SM{target.sm}"):
            known = [n for n in dir(library.module.ComputeCapability) if n.startswith("SM")]
            raise DeviceError(
                f"{library.name} {library.version} does not build for {name} (sm_{target.sm}), only"
                f" for {', '.join(known)}; build on the device with its own TensorRT"
            )
        machine = Machine(target.sm, library.name, library.version)
    else:
        machine = this_place(open_cuda(), library).machine
        if machine.sm != target.sm:
            raise DeviceError(
                f"{library.name} builds for the GPU it runs on, here sm_{machine.sm}; {name} is"
                f" sm_{target.sm}: run the build there"
            )
    return Place(target.title, machine, target.usable_bytes, target.shared)


def plan_build(
    bundle: Bundle,
    limits: Limits,
    place: Place,
    *,
    device_memory: int | None = None,
    available: Callable[[], int] | None = None,
) -> MemoryNeed:
    """Plan the memory of building and running; refuse what is not there.

    Args:
        device_memory: bytes that may be used of the device's; None: all that is usable.
        available: bytes of host memory that are free now; None asks the system, swap included.

    Raises:
        CapacityError: it does not fit; it says what it takes and what would make it fit.
        UsageError: the bundle's graph takes fewer sequences.
    """
    manifest = bundle.manifest
    graphs = {name: _graph(bundle, name) for name in PLANS}
    if limits.sequences > 1 and not takes_batch(graphs[LANGUAGE_GRAPH]):
        raise UsageError(
            f"is {limits.sequences}; this bundle was written when a pass took one sequence: export"
            " the checkpoint anew",
            option="max_sequences",
        )
    need = plan_memory(
        manifest,
        tokens=limits.context,
        tiles=limits.tiles,
        prepared=True,
        low_memory=True,
        scores=False,
    )
    table = bundle.file(EMBEDDING_TABLE).stat().st_size
    usable = min(place.usable_bytes, device_memory or place.usable_bytes)
    memory = MemoryNeed(
        weights={name: weight_bytes(graph) for name, graph in graphs.items()},
        kv_cache=limits.sequences * need.kv_cache,
        activations=max(need.vision, need.language + attention_bytes(manifest, limits)),
        other=RUNTIME_BYTES + (table if place.shared else 0),
        usable=usable,
    )
    if memory.running > usable:
        raise CapacityError(
            f"the engines take {memory.parts}, {place.name} has {gib(usable)} for them",
            memory.running,
            usable,
            [
                *([Remedy.LOWER_SEQUENCES] if limits.sequences > 1 else []),
                Remedy.LOWER_CONTEXT,
                Remedy.LOWER_TILES,
                Remedy.SMALL_WEIGHTS,
            ],
        )
    free = (available or _free_memory)()
    if memory.building > free:
        raise CapacityError(
            f"building takes about {gib(memory.building)} of host memory, {gib(free)} are free",
            memory.building,
            free,
            [Remedy.CLOSE_PROGRAMS, Remedy.ADD_SWAP, Remedy.SMALL_WEIGHTS],
        )
    return memory


def attention_bytes(manifest: Manifest, limits: Limits) -> int:
    """Bytes of what attention holds at the largest shapes, which are those of a prompt for every
    sequence, though no pass has them: the builder takes each dimension by itself."""
    language, rows = manifest.spec.language, limits.sequences * limits.tokens
    if manifest.traits.modern:  # fused: queries, keys, values and results
        item = np.dtype(compute_dtype(manifest.language, manifest.dialect)).itemsize
        return 4 * rows * language.query_size * item
    # Scores of cached and new keys, before and after the softmax.
    return 2 * rows * language.num_attention_heads * (limits.context + limits.tokens) * 4


def _graph(bundle: Bundle, name: str) -> onnx.GraphProto:
    return onnx.load(str(bundle.file(name)), load_external_data=False).graph


def _free_memory(root: Path = Path("/")) -> int:
    """Memory and swap: the builder's copies of weights are written and read once or twice."""
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    swap = [int(line.split()[1]) * 1024 for line in lines if line.startswith("SwapFree:")]
    return available_memory() + sum(swap)


def gib(size: int) -> str:
    """Return a size in GiB as text."""
    return f"{size / GIB:.2f} GiB"
