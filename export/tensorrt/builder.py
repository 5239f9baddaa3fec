"""One TensorRT build, in a process of its own: its memory goes back whole, a crash is one error.

The parent writes the graph to the child's stdin and reads JSON lines: phases as they go on, then
the result. The plan goes straight to its file. A child whose parent is gone cannot tell it so and
ends.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from internvl_edge.bundle.errors import EngineBuildError
from internvl_edge.bundle.quoting import named
from internvl_edge.export.tensorrt.layers import LAYERS, EngineLayer, parse_layers
from internvl_edge.runtime.backends.tensorrt_library import Library, error_logger

#: Called with the phase's name, steps done and steps in all.
Progress = Callable[[str, int, int], None]

#: Complaints of the builder that go into an error.
SHOWN_ERRORS = 4
#: Seconds between looks at the builder's memory.
SAMPLING_S = 0.02
#: Figures the builder only logs.
_LOGGED = {"weight_bytes": "Total Weights Memory: ", "scratch_bytes": "Total Activation Memory: "}


@dataclass(frozen=True)
class ShapeRange:
    """An input's smallest, typical and largest shape: one optimisation profile's part."""

    smallest: tuple[int, ...]
    typical: tuple[int, ...]
    largest: tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """One build: the graph, and what it is built with.

    Attributes:
        library: module to build with.
        graph: the ONNX file; weights lie beside it.
        profile: a range for each input that has a symbolic dimension.
        capability: compute capability without the dot; None is the GPU that is here.
        workspace: most bytes of scratch memory a layer may take; None leaves it to the builder.
        flags: names of builder flags.
        timing_cache: file to begin with and to update; None: the library has none.
        plan: file to write.
    """

    library: str
    graph: str
    profile: Mapping[str, ShapeRange]
    capability: int | None
    workspace: int | None
    flags: tuple[str, ...]
    timing_cache: str | None
    plan: str


@dataclass(frozen=True)
class Built:
    """The outcome of a build, beside the plan.

    Attributes:
        layers: of the engine; empty where the builder lists them in a way not known here.
        peak_bytes: the process's largest resident memory, mapped weights included.
        seconds: parsing and building.
        parsed_layers: layers of the parsed network.
        weight_bytes: weights in the engine, as the builder counts them; 0 where it does not.
        scratch_bytes: device memory for activations at the profile's largest shapes; the same.
        own_bytes: the process's largest anonymous resident memory beyond what it had before
            parsing; None where the system does not tell. Weights mapped from their file come on
            top, and can be dropped.
    """

    layers: tuple[EngineLayer, ...]
    peak_bytes: int
    seconds: float
    parsed_layers: int = 0
    weight_bytes: int = 0
    scratch_bytes: int = 0
    own_bytes: int | None = None


def build_in_process(request: Request, model: bytes, progress: Progress) -> Built:
    """Parse and build a graph.

    Args:
        model: the graph in the form TensorRT takes, weights outside.

    Raises:
        EngineBuildError: the builder does not take the graph, or died.
        OSError: the plan cannot be written.
    """
    command = [sys.executable, "-m", __name__, json.dumps(asdict(request))]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        )
        try:
            with _watched(process.pid) as seen:
                result = _converse(process, model, progress)
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        tail = errors.read().decode(errors="replace").strip().splitlines()[-SHOWN_ERRORS:]
    if result is None:
        raise EngineBuildError(
            f"{named(Path(request.graph))}: {request.library} ended with status"
            f" {process.returncode} (-9: killed, most often for memory): {' | '.join(tail)}"
        )
    if (code := result.get("errno")) is not None:
        raise OSError(code, os.strerror(code), request.plan)
    if result["errors"]:
        raise EngineBuildError(
            f"{named(Path(request.graph))}: {request.library} does not build it:"
            f" {' | '.join(result['errors'][:SHOWN_ERRORS])}"
        )
    before = result["before_bytes"]
    return Built(
        parse_layers(result["layers"]),
        result["peak_bytes"],
        result["seconds"],
        parsed_layers=result["parsed_layers"],
        weight_bytes=result["weight_bytes"],
        scratch_bytes=result["scratch_bytes"],
        own_bytes=max(0, max(seen) - before) if seen and before is not None else None,
    )


@contextmanager
def _watched(pid: int) -> Iterator[list[int]]:
    """Collect, while a process runs, its anonymous resident bytes every `SAMPLING_S`."""
    seen: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLING_S):
            if (now := _anonymous_bytes(pid)) is not None:
                seen[:] = [max([now, *seen])]

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def _converse(
    process: subprocess.Popen[bytes], model: bytes, progress: Progress
) -> dict[str, Any] | None:
    """Hand the model over and follow the build; the result, or None where there is none."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(model)
        process.stdin.close()
    except BrokenPipeError:
        pass  # it died: its exit status says how
    for line in process.stdout:
        try:
            said = json.loads(line)
        except ValueError:
            continue  # a library that prints
        if "phase" in said:
            progress(said["phase"], said["done"], said["steps"])
        elif "errors" in said or "errno" in said:
            process.wait()
            return dict(said)
    process.wait()
    return None


def _build_here(request: Mapping[str, Any], model: bytes) -> dict[str, Any]:
    """Build in the child process; return a result ready for JSON."""
    library = Library.open(request["library"])
    trt, start, listed = library.module, time.monotonic(), [""]
    figures = dict.fromkeys(_LOGGED, 0)

    def listen(message: str) -> None:
        if message.startswith(LAYERS):
            listed[0] = message
        for name, prefix in _LOGGED.items():
            if message.startswith(prefix):
                figures[name] = int(message[len(prefix) :].split()[0])

    before = _anonymous_bytes("self")
    log = error_logger(trt, listen)
    builder = trt.Builder(log)
    strong = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strong if library.api.strong_flag else 0)
    parser = trt.OnnxParser(network, log)
    plan = None
    if parser.parse(model, path=request["graph"]):
        config = _config(library, builder, request)
        cache = _timing_cache(config, request["timing_cache"])
        plan = builder.build_serialized_network(network, config)
        if plan is not None:
            try:
                Path(request["plan"]).write_bytes(plan)
            except OSError as error:  # the parent raises it: it knows what that means
                return {"errno": error.errno}
            _keep(cache, request["timing_cache"])
    parse_errors = [_parse_error(parser.get_error(i)) for i in range(parser.num_errors)]
    return {
        "errors": [] if plan is not None else parse_errors or log.errors or ["no reason given"],
        "layers": listed[0],
        "parsed_layers": network.num_layers,
        **figures,
        "before_bytes": before,
        "peak_bytes": _peak_bytes(),
        "seconds": time.monotonic() - start,
    }


def _parse_error(error: Any) -> str:
    place = f"{error.node_operator()} {error.node_name()}".strip()
    return f"{place}: {error.desc().strip()}" if place else str(error.desc()).strip()


def _config(library: Library, builder: Any, request: Mapping[str, Any]) -> Any:
    """One profile for all shapes: with two, RTX stores FP16 and INT8 weights twice."""
    trt, config = library.module, builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names layers and their types
    if request["workspace"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace"])
    config.progress_monitor = _monitor(trt)
    for flag in request["flags"]:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if library.api.names_gpu:
        name = "CURRENT" if request["capability"] is None else f"SM{request['capability']}"
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)
    profile = builder.create_optimization_profile()
    for name, shapes in request["profile"].items():
        profile.set_shape(name, shapes["smallest"], shapes["typical"], shapes["largest"])
    config.add_optimization_profile(profile)
    return config


def _timing_cache(config: Any, path: str | None) -> Any:
    """A cache from a file, or a new one: a file from elsewhere is no reason to fail."""
    if path is None:
        return None
    file = Path(path)
    cache = config.create_timing_cache(file.read_bytes() if file.exists() else b"")
    if not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _keep(cache: Any, path: str | None) -> None:
    if cache is None or path is None:
        return
    aside = Path(f"{path}.{secrets.token_hex(4)}.partial")
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_bytes(cache.serialize())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError:  # timings only save the next build some time
        return


def _monitor(trt: Any) -> Any:
    """Reports the phases that have no parent; ends the build when nobody listens."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.steps[phase_name] = num_steps
                self.step_complete(phase_name, 0)

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.steps:
                self.step_complete(phase_name, self.steps[phase_name])
                del self.steps[phase_name]

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name not in self.steps:
                return True
            said = {"phase": phase_name, "done": step, "steps": self.steps[phase_name]}
            return _say(said)

    return Monitor()


def _say(message: Mapping[str, Any]) -> bool:
    """One line to the parent; False: it is gone."""
    try:
        os.write(1, json.dumps(message).encode() + b"\n")
    except BrokenPipeError:
        return False
    return True


def _anonymous_bytes(pid: int | str) -> int | None:
    """Return resident memory that belongs to no file; None where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return int(found[0]) * 1024 if found else None


def _peak_bytes() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    _say(_build_here(json.loads(sys.argv[1]), sys.stdin.buffer.read()))
