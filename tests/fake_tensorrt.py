"""A stand-in for TensorRT's runtime: plans name a graph, ONNX Runtime's CPU computes it.

Contexts hold TensorRT to its documented rules: every tensor has an address, shapes are within the
profile, the scratch memory is there, present and past are one place where the graph updates its
cache, and what is captured has been run with the same shapes before.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from host_driver import HostDriver
from onnx import helper

from internvl_edge.export.graphs.dialects.engine_form import engine_form
from internvl_edge.export.tensorrt.builder import Built, Progress, Request
from internvl_edge.runtime.backends.sessions import Provider, open_session
from internvl_edge.runtime.backends.tensorrt_library import Library

SCRATCH = 4096
VERSION = "10.16.2"
_NAMES = {"float32": "FLOAT", "float16": "HALF"}


def fake_build(request: Request, form: bytes, progress: Progress) -> Built:
    """A plan that `FakeTensorRt` loads."""
    graph = onnx.load_from_string(form).graph
    table = next((v for v in graph.input if v.name == "rope.cos"), None)
    context = 1 if table is None else table.type.tensor_type.shape.dim[-2].dim_value
    largest = {name: shapes.largest for name, shapes in request.profile.items()}
    plan = {"graph": request.graph, "context": context, "largest": largest}
    Path(request.plan).write_text(json.dumps(plan))
    progress("Building", 1, 1)
    return Built((), 1 << 20, 0.1)


class FakeContext:
    """See the module's text; what was queued is in `FakeTensorRt.passes`."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.scratch = 0
        self.flushed: dict[str, tuple[int, ...]] | None = None

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= SCRATCH
        assert address % 16 == 0
        self.scratch = address

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.values

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        largest = self.engine.plan["largest"][name]
        self.shapes[name] = tuple(shape)
        return all(1 <= got <= most for got, most in zip(shape, largest, strict=True))

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.trt.capturable(self)

    def execute_async_v3(self, stream: int) -> bool:
        bindings = self.engine.trt.bindings
        assert self.addresses.keys() == self.engine.values.keys()
        assert self.scratch in bindings.memory
        if stream in bindings.captured:
            assert self.flushed == self.shapes
        self.flushed = dict(self.shapes)
        self.engine.trt.passes.append((self, dict(self.shapes), stream in bindings.captured))
        work = partial(self.engine.compute, dict(self.addresses), dict(self.shapes))
        bindings.queue(stream, work)
        return True


class FakeEngine:
    """One graph; `values` are its inputs and outputs by name: mode, dtype, dims."""

    device_memory_size_v2 = SCRATCH

    def __init__(self, trt: FakeTensorRt, plan: dict[str, Any]) -> None:
        self.trt, self.plan = trt, plan
        path = Path(plan["graph"])
        graph = onnx.load_from_string(engine_form(path, plan["context"])).graph
        self.values = {
            value.name: (mode, _dtype(value), _dims(value))
            for values, mode in ((graph.input, "INPUT"), (graph.output, "OUTPUT"))
            for value in values
        }
        self.session = open_session(path.parent, path.name, Provider(optimise="basic"), 1)
        self.in_place = any(node.op_type == "TensorScatter" for node in graph.node)

    @property
    def num_io_tensors(self) -> int:
        return len(self.values)

    def get_tensor_name(self, index: int) -> str:
        return list(self.values)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return SimpleNamespace(name=self.values[name][0])

    def get_tensor_dtype(self, name: str) -> Any:
        dtype = self.values[name][1].name
        return SimpleNamespace(name=_NAMES.get(dtype, dtype.upper()))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(dim if isinstance(dim, int) else -1 for dim in self.values[name][2])

    def get_tensor_location(self, name: str) -> str:
        return "device"

    def create_execution_context(self, strategy: str) -> FakeContext:
        assert strategy == "user managed"
        context = FakeContext(self)
        self.trt.contexts.append(context)
        return context

    def compute(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        """What the device does when it gets to the pass."""
        sizes: dict[str, int] = {}
        for name, shape in shapes.items():
            sizes |= {d: s for d, s in zip(self.values[name][2], shape, strict=True) if d != s}
        binding = self.session.io_binding()
        for name, (mode, dtype, dims) in self.values.items():
            shape = tuple(dim if isinstance(dim, int) else sizes[dim] for dim in dims)
            past = name.replace("present.", "past.")
            if self.in_place and past != name:
                assert addresses[past] == addresses[name]
            bind = binding.bind_input if mode == "INPUT" else binding.bind_output
            bind(name, "cpu", 0, dtype.type, shape, addresses[name])
        self.session.run_with_iobinding(binding)


@dataclass
class FakeTensorRt:
    """The module `tensorrt`.

    Attributes:
        passes: context, shapes and whether captured, of every pass that was queued.
        capturable: what contexts answer when they are asked.
    """

    bindings: HostDriver
    passes: list[tuple[FakeContext, dict[str, tuple[int, ...]], bool]] = field(default_factory=list)
    contexts: list[FakeContext] = field(default_factory=list)
    capturable: Callable[[FakeContext], bool] = lambda context: True
    __version__: str = VERSION

    def __post_init__(self) -> None:
        self.__name__ = "tensorrt"

    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")
    TensorLocation = SimpleNamespace(DEVICE="device")

    class ILogger:
        ERROR, INTERNAL_ERROR = "error", "internal error"

    def Runtime(self, logger: Any) -> Any:
        def deserialize(plan: Any) -> FakeEngine | None:
            try:
                return FakeEngine(self, json.loads(bytes(plan)))
            except ValueError:
                logger.log("error", "magic tag does not match")
                return None

        return SimpleNamespace(deserialize_cuda_engine=deserialize)

    @property
    def library(self) -> Library:
        return Library.of(self)


def _dtype(value: onnx.ValueInfoProto) -> np.dtype[Any]:
    return np.dtype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))


def _dims(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_param or dim.dim_value for dim in dims)
