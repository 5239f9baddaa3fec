"""Building one graph with TensorRT for RTX, in a process of its own, and what that tells.

TensorRT for RTX parses ONNX and builds plans on a machine without a GPU; its plans load in itself
only. The process makes the builder's peak memory measurable and turns a crash inside it into one
error. What the builder decided is read from its own log: at verbose level it lists every layer of
the engine with the types of its inputs and constants, which an engine inspector would only give
on a GPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from internvl_edge.bundle.errors import EngineBuildError, MissingExtraError
from internvl_edge.bundle.quoting import named

#: Compute capabilities TensorRT for RTX 1.7 can build for without a GPU, of those in use.
CAPABILITIES = (80, 86, 89, 120)
#: Seconds between looks at the builder's memory.
SAMPLING_S = 0.02
#: Lines of the builder's complaints that go into an error.
SHOWN_ERRORS = 4

#: Figures the builder only logs.
_LOGGED = {"weight_bytes": "Total Weights Memory: ", "scratch_bytes": "Total Activation Memory: "}
_LAYERS = "Layers:"
_LAYER = re.compile(
    r"Name: (?P<name>.*), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*)\],"
    r" Constants: \[(?P<constants>.*)\], Outputs: \[(?P<outputs>.*)\], TacticName: .*,"
    r" Metadata: (?P<nodes>.*)"
)
_OPERAND = re.compile(r"{ Name: (.*?), Dimensions: \[([-\d,]*)\],.*?Datatype: (\w+),")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\]")


@dataclass(frozen=True)
class ShapeRange:
    """An input's smallest, typical and largest shape: one optimisation profile's part."""

    smallest: tuple[int, ...]
    typical: tuple[int, ...]
    largest: tuple[int, ...]


@dataclass(frozen=True)
class Operand:
    """A value an engine layer reads or makes."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine as its builder listed it.

    Attributes:
        kind: the builder's name for it: gemm, kgen, runtime_fusion, ...
        nodes: names of the ONNX nodes it computes.
    """

    name: str
    kind: str
    inputs: tuple[Operand, ...]
    constants: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Build:
    """The outcome of a build.

    Attributes:
        parsed_layers: layers of the parsed network.
        layers: of the engine.
        plan_bytes: size of the plan.
        weight_bytes: weights in the engine, as the builder counts them.
        scratch_bytes: device memory for activations at the profile's largest shapes.
        peak_bytes: the process's largest anonymous resident memory beyond what it had before
            parsing; None where the system does not tell. Weights mapped from their file come
            on top, and can be dropped.
        seconds: parsing and building.
    """

    parsed_layers: int
    layers: tuple[EngineLayer, ...]
    plan_bytes: int
    weight_bytes: int
    scratch_bytes: int
    peak_bytes: int | None
    seconds: float


def require_builder() -> str:
    """Version of the installed builder.

    Raises:
        DeviceError: it is not installed.
    """
    if importlib.util.find_spec("tensorrt_rtx") is None:
        raise MissingExtraError(
            "checking a TensorRT graph needs TensorRT for RTX (no GPU), for Linux on x86-64 or"
            " Windows",
            extra="tensorrt",
        )
    return importlib.metadata.version("tensorrt_rtx")


def build(model: bytes, path: Path, profile: Mapping[str, ShapeRange], capability: int) -> Build:
    """Parse and build a graph.

    Args:
        model: the serialised ONNX graph, weights outside.
        path: where the graph lies; its weights are found beside it.
        profile: a range for each input that has a symbolic dimension.
        capability: one of `CAPABILITIES`.

    Raises:
        DeviceError: the builder is not installed.
        EngineBuildError: it does not take the graph, or died.
    """
    require_builder()
    request = {
        "path": str(path),
        "capability": capability,
        "profile": {name: asdict(shapes) for name, shapes in profile.items()},
    }
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=errors,
        )
        try:
            peak = _feed_and_watch(process, model)
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        errors.seek(0)
        return _result(path, process.returncode, output.read(), errors.read(), peak)


def _feed_and_watch(process: subprocess.Popen[bytes], model: bytes) -> int | None:
    """Hand the model over and return the largest anonymous memory seen until the end."""
    assert process.stdin is not None
    try:
        process.stdin.write(model)
        process.stdin.close()
    except BrokenPipeError:
        pass  # it died: its exit status says how
    peak = None
    while process.poll() is None:
        now = _anonymous_bytes(process.pid)
        peak = now if peak is None else max(peak, now or 0)
        time.sleep(SAMPLING_S)
    return peak


def _anonymous_bytes(pid: int | str) -> int | None:
    """Resident memory that belongs to no file; None where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return int(found[0]) * 1024 if found else None


def _result(path: Path, status: int, output: bytes, errors: bytes, peak: int | None) -> Build:
    try:
        result: dict[str, Any] = json.loads(output)
    except ValueError as error:
        tail = errors.decode(errors="replace").strip().splitlines()[-SHOWN_ERRORS:]
        raise EngineBuildError(
            f"{named(path)}: TensorRT for RTX ended with status {status}: {' | '.join(tail)}"
        ) from error
    if result["errors"]:
        raise EngineBuildError(
            f"{named(path)}: TensorRT for RTX does not build it: {' | '.join(result['errors'])}"
        )
    layers = parse_layers(result["layers"])
    if not layers:
        raise EngineBuildError(
            f"{named(path)} builds, but the layers TensorRT for RTX lists cannot be read; use the"
            " version internvl-edge was tested with (constraints.txt)"
        )
    before = result["before_bytes"]
    return Build(
        parsed_layers=result["parsed_layers"],
        layers=layers,
        plan_bytes=result["plan_bytes"],
        weight_bytes=result["weight_bytes"],
        scratch_bytes=result["scratch_bytes"],
        peak_bytes=None if peak is None or before is None else max(0, peak - before),
        seconds=result["seconds"],
    )


def parse_layers(listing: str) -> tuple[EngineLayer, ...]:
    """The layers of an engine from the text the builder logs about them."""
    return tuple(
        EngineLayer(
            name=match["name"],
            kind=match["kind"],
            inputs=_operands(match["inputs"]),
            constants=_operands(match["constants"]),
            outputs=_operands(match["outputs"]),
            nodes=tuple(_NODE.findall(match["nodes"])),
        )
        for match in map(_LAYER.match, listing.splitlines())
        if match is not None
    )


def _operands(text: str) -> tuple[Operand, ...]:
    return tuple(
        Operand(name, dtype.lower(), tuple(int(size) for size in shape.split(",") if size))
        for name, shape, dtype in _OPERAND.findall(text)
    )


def _build_here(request: Mapping[str, Any], model: bytes) -> dict[str, Any]:
    """Build in the child process; return a result ready for JSON."""
    import tensorrt_rtx as trt

    log = _logger(trt)
    before = _anonymous_bytes("self")
    start = time.monotonic()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    plan = None
    if parser.parse(model, path=request["path"]):
        plan = builder.build_serialized_network(network, _config(trt, builder, request))
    parse_errors = [_parse_error(parser.get_error(i)) for i in range(parser.num_errors)]
    failed = plan is None
    return {
        "errors": (parse_errors or log.errors or ["no reason given"])[:SHOWN_ERRORS] * failed,
        "parsed_layers": network.num_layers,
        "layers": log.layers,
        "plan_bytes": 0 if plan is None else plan.nbytes,
        **log.figures,
        "before_bytes": before,
        "seconds": time.monotonic() - start,
    }


def _parse_error(error: Any) -> str:
    place = f"{error.node_operator()} {error.node_name()}".strip()
    return f"{place}: {error.desc().strip()}" if place else str(error.desc()).strip()


def _config(trt: Any, builder: Any, request: Mapping[str, Any]) -> Any:
    """One profile for all shapes: with two, the weights of the plan are stored twice."""
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{request['capability']}"), 0)
    profile = builder.create_optimization_profile()
    for name, shapes in request["profile"].items():
        profile.set_shape(name, shapes["smallest"], shapes["typical"], shapes["largest"])
    config.add_optimization_profile(profile)
    return config


def _logger(trt: Any) -> Any:
    """Keeps the few messages that are wanted of the many thousand at verbose level."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.layers = ""
            self.figures = dict.fromkeys(_LOGGED, 0)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif message.startswith(_LAYERS):
                self.layers = message
            for name, prefix in _LOGGED.items():
                if message.startswith(prefix):
                    self.figures[name] = int(message[len(prefix) :].split()[0])

    return Log()


if __name__ == "__main__":
    print(json.dumps(_build_here(json.loads(sys.argv[1]), sys.stdin.buffer.read())))
