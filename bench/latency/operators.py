"""Where the time of each phase goes: ONNX Runtime's own profile, summed by block and operator.

    internvl-edge bench latency profile BUNDLE [--tiles N] [--prompt N] [--repeat N] [--top N]

Three phases are run: vision over some tiles, one prefill pass, one decode step behind it. Each node
is counted once a pass, so the n-th event of a node belongs to the n-th pass. Operations come from
the shapes the profiler saw, not from the spec: the tests hold the roofline's formulas to them.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from internvl_edge.bench.common.summaries import percentile
from internvl_edge.bundle import contract
from internvl_edge.bundle.errors import BundleError, UsageError
from internvl_edge.bundle.manifest import Bundle, open_bundle
from internvl_edge.bundle.quoting import named
from internvl_edge.bundle.specs import MAX_TILES
from internvl_edge.export.output.marker import scratch_folder
from internvl_edge.runtime.backends import Cache, Slice
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.ort_cache import allocated
from internvl_edge.runtime.backends.ort_passes import language_pass
from internvl_edge.runtime.backends.own_kernels import bundle_kernels, vision_kernels
from internvl_edge.runtime.backends.products import use_exact_products
from internvl_edge.runtime.backends.rope_table import RopeTable
from internvl_edge.runtime.options import add_threads, at_least

if TYPE_CHECKING:
    import onnxruntime as ort

#: Operators that multiply matrices: (rows, inner) by (inner, columns).
PRODUCTS = frozenset(
    {"Gemm", "MatMul", "QGemm", "MatMulNBits", "FusedMatMul", "FusedGemm", "MatMulInteger"}
    | {"MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "GemmFloat8"}
    | {"FloatProduct", "IntegerProduct", "IntegerProductGeluRounded"}
)
INTEGER_ATTENTIONS = frozenset({"IntegerAttention", "IntegerAttentionRounded"})
#: ONNX Runtime's causal attention, and ours.
CAUSAL = frozenset({"GroupQueryAttention", "CachedAttention", "CachedAttentionOfHalves"})
ATTENTIONS = CAUSAL | {"MultiHeadAttention", "Attention", "QAttention"} | INTEGER_ATTENTIONS
#: Products whose float input is rounded to integers inside.
INTEGER_INSIDE = frozenset({"MatMulNBits", "DynamicQuantizeMatMul"}) | INTEGER_ATTENTIONS
KERNEL = "_kernel_time"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """One node of a pass: median seconds, and what it computes."""

    name: str
    operator: str
    dtype: str
    seconds: float
    operations: float

    @property
    def block(self) -> str:
        """Return its place without the layer's number: `layers/attention`, `projector/fc1`."""
        place = re.sub(r"^/[^/]+/", "", self.name)
        place = re.sub(r"layers\.\d+", "layers", place)
        return "/".join(place.split("/")[:2]).split(".")[0]

    @property
    def float_product(self) -> bool:
        """Tell whether it multiplies floating-point numbers."""
        multiplies = self.operator in PRODUCTS | ATTENTIONS
        return multiplies and "float" in self.dtype and self.operator not in INTEGER_INSIDE


@dataclass(frozen=True)
class Phase:
    """All nodes of one pass."""

    name: str
    precision: str
    nodes: tuple[Node, ...]

    @property
    def seconds(self) -> float:
        return math.fsum(node.seconds for node in self.nodes)

    @property
    def operations(self) -> float:
        return math.fsum(node.operations for node in self.nodes)


def profile_bundle(
    bundle: Bundle, *, tiles: int, tokens: int, runs: int, threads: int | None
) -> list[Phase]:
    """Profile vision over `tiles`, a prefill of `tokens`, and a decode step behind it.

    Raises:
        BundleError: the bundle was not written for ONNX Runtime.
    """
    manifest = bundle.manifest
    if manifest.traits.engines:
        raise BundleError(
            f"{named(bundle.path)} was written for {manifest.dialect!r}; ONNX Runtime's profile"
            " says nothing of it: export with --for onnxruntime"
        )
    with scratch_folder() as folder:
        vision = _profile_vision(bundle, tiles, runs, threads, folder)
        prefill, decode = _profile_language(bundle, tokens, runs, threads, folder)
    return [
        Phase(f"vision, {tiles} tiles", manifest.vision, _nodes(vision, 0, 0)),
        Phase(f"prefill, {tokens} tokens", manifest.language, _nodes(prefill, tokens, 0)),
        Phase(f"decode at {tokens} keys", manifest.language, _nodes(decode, 1, tokens)),
    ]


def _profile_vision(
    bundle: Bundle, tiles: int, runs: int, threads: int | None, folder: Path
) -> list[list[Mapping[str, Any]]]:
    session = _session(bundle, contract.VISION_GRAPH, threads, folder)
    side = bundle.spec.vision.tile_size
    random = np.random.default_rng(0)
    picture = random.integers(0, 255, (tiles, side, side, 3), np.uint8)
    for _ in range(runs + 1):
        session.run(None, {contract.TILES: picture})
    return _passes(Path(session.end_profiling()))[1:]


def _profile_language(
    bundle: Bundle, tokens: int, runs: int, threads: int | None, folder: Path
) -> tuple[list[list[Mapping[str, Any]]], list[list[Mapping[str, Any]]]]:
    """Passes of the prefill and of the decode step, warm-up left out."""
    session = _session(bundle, contract.LANGUAGE_GRAPH, threads, folder)
    attends = bundle_kernels(bundle).attention.library is not None
    manifest, language = bundle.manifest, bundle.spec.language
    rope = contract.rope_dtype(manifest.language, manifest.kv, manifest.dialect)
    table = RopeTable(language, tokens + 1, rope)
    cache = allocated(language, contract.CACHE_DTYPE[manifest.kv], tokens + 1, table)
    for length, start in [(tokens, 0)] * (runs + 1) + [(1, tokens)] * (runs + 1):
        cache.state.truncate(start)
        new = language_pass([_random_rows(bundle, cache, length)], language, attends)
        binding = new.bound(session)
        binding.bind_output(contract.LOGITS)
        session.run_with_iobinding(binding)
        cache.state.extend(np.zeros(length, np.int64), language.rope_theta)
    passes = _passes(Path(session.end_profiling()))
    return passes[1 : runs + 1], passes[runs + 2 :]


def _random_rows(bundle: Bundle, cache: Cache, count: int) -> Slice:
    language, manifest = bundle.spec.language, bundle.manifest
    rows = np.random.default_rng(0).standard_normal((count, language.hidden_size))
    dtype = contract.compute_dtype(manifest.language, manifest.dialect)
    return Slice(cache, rows.astype(dtype), language.rope_theta, np.array([count - 1], np.int64))


def _session(bundle: Bundle, graph: str, threads: int | None, folder: Path) -> ort.InferenceSession:
    """A session that computes a graph as the runtime does, and profiles itself."""
    ort = load_onnxruntime()

    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / Path(graph).stem)
    options.log_severity_level = 3
    use_exact_products(options)
    if threads is not None:
        options.intra_op_num_threads = threads
    language = graph == contract.LANGUAGE_GRAPH
    own = bundle_kernels(bundle) if language else vision_kernels(bundle)
    model = own.give(bundle.file(graph), options)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _passes(profile: Path) -> list[list[Mapping[str, Any]]]:
    """Kernel events pass by pass."""
    passes: list[list[Mapping[str, Any]]] = []
    seen: defaultdict[str, int] = defaultdict(int)
    for event in json.loads(profile.read_text(encoding="utf-8")):
        if event.get("cat") != "Node" or not event["name"].endswith(KERNEL):
            continue
        number = seen[event["name"]]
        seen[event["name"]] += 1
        if number == len(passes):
            passes.append([])
        passes[number].append(event)
    return passes


def _nodes(
    passes: Sequence[Sequence[Mapping[str, Any]]], tokens: int, cached: int
) -> tuple[Node, ...]:
    """One node per name, its median over the passes."""
    times: defaultdict[str, list[float]] = defaultdict(list)
    for events in passes:
        for event in events:
            times[event["name"]].append(event["dur"] / 1e6)
    return tuple(
        Node(
            name=event["name"].removesuffix(KERNEL),
            operator=event["args"]["op_name"],
            dtype=next(iter(_tensors(event, "input")), ("", ()))[0],
            seconds=percentile(times[event["name"]], 50),
            operations=node_operations(event, tokens, cached),
        )
        for event in passes[0]
    )


def node_operations(event: Mapping[str, Any], tokens: int, cached: int) -> float:
    """Multiply and add operations of one kernel event, from the shapes it ran on.

    Args:
        tokens, cached: of a causal attention, whose shapes do not tell how much it skips.
    """
    operator = event["args"]["op_name"]
    if operator in PRODUCTS:
        (_, rows), (_, result) = _tensors(event, "input")[0], _tensors(event, "output")[0]
        return 2.0 * math.prod(rows) * result[-1]  # (.., inner) x (inner, columns)
    if operator in CAUSAL:
        width = _tensors(event, "output")[0][1][-1]
        return 4.0 * width * (tokens * cached + tokens * (tokens + 1) / 2)
    if operator in ATTENTIONS:
        batch, length, width = _tensors(event, "output")[0][1]
        return 4.0 * batch * length**2 * width
    return 0.0


def _tensors(event: Mapping[str, Any], side: str) -> list[tuple[str, Shape]]:
    """(dtype, shape) of the inputs or outputs."""
    return [
        (dtype, tuple(shape))
        for tensor in event["args"][f"{side}_type_shape"]
        for dtype, shape in tensor.items()
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    for option, default, most, told in (
        ("--tiles", 1, MAX_TILES + 1, "of the vision phase"),
        ("--prompt", 256, None, "tokens of a prefill"),
        ("--repeat", 3, None, "measured runs of each phase"),
        ("--top", 8, None, "lines of each list"),
    ):
        number = at_least(1, option, most=most)
        parser.add_argument(option, type=number, default=default, metavar="N", help=told)
    add_threads(parser)
    parser.add_argument("--json", action="store_true")


def run(arguments: argparse.Namespace) -> int:
    """Profile and print; returns the exit status.

    Raises:
        UsageError: a prompt beyond the model's context.
        BundleError: not a bundle, or not one of ONNX Runtime's.
    """
    bundle = open_bundle(arguments.bundle, verify="size")
    tokens, top = arguments.prompt, arguments.top
    if tokens >= (limit := bundle.spec.language.max_context):
        raise UsageError(f"--prompt is {tokens}, this model ends at {limit}; lower it")
    phases = profile_bundle(
        bundle,
        tiles=arguments.tiles,
        tokens=tokens,
        runs=arguments.repeat,
        threads=arguments.threads,
    )
    if arguments.json:
        print(json.dumps([_phase_dict(phase, top) for phase in phases], indent=1))
    else:
        print("\n\n".join(_render(phase, top) for phase in phases))
    return 0


def _phase_dict(phase: Phase, top: int) -> dict[str, Any]:
    return {
        "phase": phase.name,
        "precision": phase.precision,
        "seconds": phase.seconds,
        "operations": phase.operations,
        "blocks": shares(phase, "block"),
        "operators": shares(phase, "operator"),
        "top": [vars(node) for node in _costliest(phase.nodes, top)],
        "float_products": [vars(node) for node in in_float(phase)],
    }


def shares(phase: Phase, key: str) -> dict[str, float]:
    """Seconds by `block` or `operator`, the costliest first."""
    sums: defaultdict[str, float] = defaultdict(float)
    for node in phase.nodes:
        sums[getattr(node, key)] += node.seconds
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def in_float(phase: Phase) -> list[Node]:
    """Products that run in floating point although the part is stored as integers."""
    if phase.precision not in ("int8", "int4"):
        return []
    return _costliest([node for node in phase.nodes if node.float_product], None)


def _costliest(nodes: Sequence[Node], top: int | None) -> list[Node]:
    return sorted(nodes, key=lambda node: -node.seconds)[:top]


def _render(phase: Phase, top: int) -> str:
    total = phase.seconds
    rate = phase.operations / total / 1e9
    lines = [
        f"{phase.name} ({phase.precision}): {total * 1e3:.2f} ms in {len(phase.nodes)} nodes,"
        f" {phase.operations / 1e9:.2f} GOP, {rate:.0f} GOP/s"
    ]
    for key in ("block", "operator"):
        lines.append(f"  by {key}")
        for name, seconds in list(shares(phase, key).items())[:top]:
            lines.append(f"    {name:42} {seconds * 1e3:9.3f} ms {100 * seconds / total:5.1f}%")
    lines.append("  costliest nodes")
    for node in _costliest(phase.nodes, top):
        lines.append(
            f"    {node.name:42} {node.seconds * 1e3:9.3f} ms {100 * node.seconds / total:5.1f}%"
            f"  {node.operator} {node.dtype}"
        )
    if floats := in_float(phase):
        share = 100 * math.fsum(node.seconds for node in floats) / total
        operators = ", ".join(sorted({node.operator for node in floats}))
        lines.append(f"  in float though stored as integers: {share:.1f}% ({operators})")
    return "\n".join(lines)
