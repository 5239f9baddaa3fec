"""Running parts of the float model through ONNX Runtime while watching every linear's input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.contract import CachePrecision, Tensor
from internvl_edge.bundle.errors import DeviceError
from internvl_edge.bundle.quoting import reason
from internvl_edge.export.calibration.experts import ExpertInputs
from internvl_edge.export.calibration.gptq import moments
from internvl_edge.export.calibration.ranges import RangeCollector, RangeProbes
from internvl_edge.export.calibration.search import InputStats
from internvl_edge.export.checkpoint.weights import Weight, WeightReader
from internvl_edge.export.formats.plan import QuantPlan
from internvl_edge.export.formats.quantize import Floats
from internvl_edge.export.graphs.dialects import Experts
from internvl_edge.export.graphs.dialects.onnxruntime import OnnxRuntimeDialect
from internvl_edge.export.graphs.graph import GraphBuilder
from internvl_edge.export.output.marker import scratch_folder
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.products import use_exact_products
from internvl_edge.runtime.heap import give_back

if TYPE_CHECKING:
    import onnxruntime as ort

Feeds = Mapping[str, NDArray[np.generic]]
Arrays = dict[str, NDArray[Any]]
Build = Callable[[OnnxRuntimeDialect, WeightReader, CachePrecision], None]

#: Where the float model runs, and ONNX Runtime's provider for it. Operators a provider has no
#: kernel for (GroupQueryAttention in float32, on CUDA) are placed on the CPU by ONNX Runtime.
Device = Literal["cpu", "cuda"]
PROVIDERS: Mapping[Device, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class Site:
    """Where parts of the model run.

    Attributes:
        device: of the float ones; quantised ones run on the CPU.
        scratch: folder for the weights of the part that runs; None is the system's.
    """

    device: Device = "cpu"
    scratch: Path | None = None


HERE = Site()

#: Inputs kept per layer for the search.
SAMPLE_ROWS = 128
_PREFIX = "observed:"
_ROUTED = "routed:"


class ObservingDialect(OnnxRuntimeDialect):
    """Float graphs whose linear layers' inputs leave the graph as well."""

    def __init__(self, graph: GraphBuilder) -> None:
        super().__init__(graph)
        self.probes = RangeProbes(graph)
        self._inputs: dict[str, list[Weight]] = {}
        self._mixture: tuple[str, Experts] | None = None  # a unit is one layer at most

    def linear(
        self, x: str, weight: Weight, bias: Weight | None, name: str, gain: Weight | None = None
    ) -> str:
        self._inputs.setdefault(x, []).append(weight)
        y = super().linear(x, weight, bias, name, gain)
        product = y if gain is None else self.graph.sources(y)[0]
        self.probes.linear(weight.name, x, product)
        return y

    def layer_norm(self, x: str, weight: Weight, bias: Weight, eps: float, name: str) -> str:
        self.probes.norm(weight.name, x)
        return super().layer_norm(x, weight, bias, eps, name)

    def rms_norm(self, x: str, weight: Weight, eps: float, name: str) -> str:
        self.probes.norm(weight.name, x)
        return super().rms_norm(x, weight, eps, name)

    def add_rms_norm(
        self, x: str, residual: str, weight: Weight, eps: float, name: str
    ) -> tuple[str, str]:
        y, total = super().add_rms_norm(x, residual, weight, eps, name)
        self.probes.norm(weight.name, total)
        return y, total

    def mixture(self, x: str, experts: Experts, name: str) -> str:
        y = super().mixture(x, experts, name)
        _, logits, *_ = self.graph.sources(y)
        self._mixture = logits, experts
        return y

    def expose_router(self, experts: ExpertInputs) -> str | None:
        """Make the router's logits an output for what looks into experts; return its name."""
        if self._mixture is None:
            return None
        logits, experts.experts = self._mixture
        router = experts.experts.router
        name = f"{_ROUTED}{router.name}"
        self.graph.output(logits, Tensor(name, "float32", ("rows", router.shape[0])))
        return name

    def expose(self) -> dict[str, list[str]]:
        """Make the inputs outputs; returns output name -> names of the weights that read it."""
        exposed = {}
        for value, weights in self._inputs.items():
            name = f"{_PREFIX}{weights[0].name}"
            self.graph.output(value, Tensor(name, "float32", ("rows", weights[0].shape[1])))
            exposed[name] = [weight.name for weight in weights]
        return exposed


class Collector:
    """Statistics of the inputs of several linear layers, over many runs."""

    def __init__(self, seed: int, *, with_moments: bool = False) -> None:
        self._with_moments = with_moments
        self._moments: dict[str, list[Floats]] = {}
        self._random = np.random.default_rng(seed)
        self._seen: dict[str, int] = {}
        self._sums: dict[str, tuple[Floats, Floats, Floats]] = {}
        self._rows: dict[str, Floats] = {}

    def add(self, name: str, x: Floats) -> None:
        """Take in a batch of inputs `(rows, columns)`."""
        size = np.abs(x)
        largest, mean, square = self._sums.get(name, (0.0, 0.0, 0.0))
        self._sums[name] = (
            np.maximum(largest, size.max(axis=0)),
            mean + size.sum(axis=0, dtype=np.float64),
            square + (x.astype(np.float64) ** 2).sum(axis=0),
        )
        if self._with_moments:
            new = moments(x)
            held = self._moments.get(name)
            self._moments[name] = [a + b for a, b in zip(held, new, strict=True)] if held else new
        self._keep(name, x)
        self._seen[name] = self._seen.get(name, 0) + len(x)

    def moments(self, name: str) -> list[Floats]:
        """Second moments of the inputs, by chunks of columns; see `gptq.moments`."""
        return self._moments[name]

    def stats(self, name: str) -> InputStats:
        largest, mean, square = self._sums[name]
        count = self._seen[name]
        return InputStats(
            largest.astype(np.float32),
            (mean / count).astype(np.float32),
            (square / count).astype(np.float32),
            self._rows[name],
        )

    def _keep(self, name: str, x: Floats) -> None:
        """Reservoir sampling (Vitter 1985): every row seen so far is kept with equal chance."""
        held = self._rows.get(name, np.empty((0, x.shape[1]), np.float32))
        room = max(SAMPLE_ROWS - len(held), 0)
        held = np.concatenate([held, x[:room]])
        late = x[room:]
        seen = self._seen.get(name, 0) + room + 1 + np.arange(len(late))
        slots = self._random.integers(seen)
        chosen = slots < SAMPLE_ROWS
        held[slots[chosen]] = late[chosen]
        self._rows[name] = held


@dataclass(frozen=True)
class Watch:
    """What looks on while a float unit runs.

    Attributes:
        inputs: sees the input of every linear layer.
        ranges: sees how large values get, where anything is to be float16: probes take half of a
            run's time, and of its memory.
        experts: sees what experts are given, where a unit has any and somebody asks.
    """

    inputs: Collector
    ranges: RangeCollector | None = None
    experts: ExpertInputs | None = None


def run_float(
    build: Build,
    feeds: Iterable[Feeds],
    reader: WeightReader,
    watch: Watch,
    site: Site = HERE,
) -> Iterator[Arrays]:
    """Run one float unit over all feeds, while `watch` looks on."""
    dialect = ObservingDialect(GraphBuilder("unit"))
    build(dialect, reader, "fp32")
    exposed = dialect.expose()
    measured = dialect.probes.expose() if watch.ranges else []
    routed = dialect.expose_router(watch.experts) if watch.experts else None
    for outputs in _run(dialect.graph, feeds, site):
        if watch.experts and routed:
            x = outputs[f"{_PREFIX}{routed.removeprefix(_ROUTED)}"]
            watch.experts.add(x, outputs.pop(routed))
        for name, readers in exposed.items():
            watch.inputs.add(readers[0], outputs.pop(name))
        if watch.ranges is not None:
            for name in measured:
                watch.ranges.add(name, outputs.pop(name))
        yield outputs


def run_planned(
    build: Build,
    feeds: Iterable[Feeds],
    reader: WeightReader,
    plan: QuantPlan,
    cache: CachePrecision,
    site: Site = HERE,
) -> Iterator[Arrays]:
    """Run one unit as `plan` stores it; an empty plan is the float unit."""
    dialect = OnnxRuntimeDialect(GraphBuilder("unit"), plan)
    build(dialect, reader, cache)
    # MatMulNBits rounds its inputs to int8 only where its weights are packed, as in the runtime.
    # Without, the 8-bit head of tiny_ocr measures 57.7 dB instead of 52.3.
    yield from _run(dialect.graph, feeds, site, pack=bool(plan.linears))


def check_device(device: Device) -> None:
    """Raise DeviceError unless the installed ONNX Runtime has the device's provider."""
    ort = load_onnxruntime()

    available = ort.get_available_providers()
    if PROVIDERS[device] not in available:
        raise DeviceError(
            f"calibration on {device} needs {PROVIDERS[device]}, this onnxruntime"
            f" {ort.__version__} has {', '.join(available)}; install internvl-edge[gpu] or"
            " calibrate on the cpu"
        )


def _run(
    graph: GraphBuilder, feeds: Iterable[Feeds], site: Site, *, pack: bool = False
) -> Iterator[Arrays]:
    """Outputs of each run of a graph whose weights are on disk while it lasts."""
    with scratch_folder(site.scratch) as folder:
        graph.save(folder, lambda _: None)
        give_back()  # what the last unit took, before the weights of this one are mapped
        session = _session(folder / "unit.onnx", site.device, pack)
        names = [output.name for output in session.get_outputs()]
        for feed in feeds:
            yield dict(zip(names, session.run(names, feed), strict=True))


def _session(graph: Path, device: Device, pack: bool) -> ort.InferenceSession:
    ort = load_onnxruntime()

    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Float weights stay where they are mapped: packing would hold a second copy of the layer.
    options.add_session_config_entry("session.disable_prepacking", "0" if pack else "1")
    if pack:
        use_exact_products(options)
    # Between runs NumPy works: threads that spin for the next one would be in its way.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    check_device(device)
    providers = list(dict.fromkeys([PROVIDERS[device], PROVIDERS["cpu"]]))
    try:
        # Falling back, it would print.
        session = ort.InferenceSession(
            str(graph), options, providers=providers, enable_fallback=False
        )
    except Exception as error:
        if device == "cpu":
            raise
        raise _not_started(device, reason(error)) from error
    if (got := session.get_providers())[0] != PROVIDERS[device]:
        raise _not_started(device, f"got {', '.join(got)}")
    return session


def _not_started(device: Device, cause: str) -> DeviceError:
    return DeviceError(
        f"{PROVIDERS[device]} is installed but did not start ({cause}); check the driver and CUDA"
        " libraries, or calibrate on the cpu"
    )
