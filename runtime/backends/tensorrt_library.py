"""TensorRT's Python API, 10.3 to 11 and TensorRT for RTX: one shim, the differences as data.

What is the same in all of them is called directly; see `APIS` for what is not.
"""

from __future__ import annotations

import importlib
import importlib.util
import mmap
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_edge.bundle.contract import DIALECTS, DialectName, Tensor
from internvl_edge.bundle.errors import BundleError, DeviceError, MissingExtraError
from internvl_edge.bundle.files import open_regular
from internvl_edge.bundle.quoting import named, quoted, reason
from internvl_edge.bundle.remedies import Remedy
from internvl_edge.bundle.signals import signals_held
from internvl_edge.runtime.backends.cuda import Cuda
from internvl_edge.runtime.backends.plans import Machine

#: Messages of the library that go into an error.
SHOWN = 3


@dataclass(frozen=True)
class Api:
    """How a library differs, from a version on until the table's next row for it.

    Attributes:
        library: the module's name.
        since: first version.
        strong_flag: networks are strongly typed only if told; from 11 on there are no others.
        modern: the parser takes the "tensorrt" dialect (RotaryEmbedding, RMSNormalization,
            TensorScatter: 10.15), not only "tensorrt-portable".
        timing_cache: timings of kernels are kept between builds. RTX compiles its kernels where
            they run, and has none.
        names_gpu: the builder is told which GPU to build for, and needs none; others build for
            the one that is there.
        asks_capturable: whether a pass can be captured is the context's to say, as kernels may
            still have to be compiled; elsewhere every pass after the first of its shape can.
    """

    library: str
    since: tuple[int, int]
    strong_flag: bool
    modern: bool
    timing_cache: bool
    names_gpu: bool
    asks_capturable: bool


APIS = (
    Api("tensorrt", (10, 3), True, False, True, False, False),
    Api("tensorrt", (10, 15), True, True, True, False, False),
    Api("tensorrt", (11, 0), False, True, True, False, False),
    Api("tensorrt_rtx", (1, 2), False, True, False, True, True),
)
#: In order of preference: on a GPU that both support, TensorRT has measured its kernels.
LIBRARIES = ("tensorrt", "tensorrt_rtx")

#: The libraries' names of the contract's types.
_DTYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "int8": "INT8",
    "int32": "INT32",
    "int64": "INT64",
    "uint8": "UINT8",
}


def api_of(library: str, version: str) -> Api:
    """The table's row for a version.

    Raises:
        DeviceError: it is older than what this runtime works with.
    """
    numbers = re.findall(r"\d+", version)[:2]
    got = tuple(int(number) for number in numbers)
    rows = [row for row in APIS if row.library == library and row.since <= got]
    if not rows:
        oldest = min(row.since for row in APIS if row.library == library)
        raise DeviceError(
            f"{library} {version} is too old; {oldest[0]}.{oldest[1]} or later is needed"
        )
    return rows[-1]


@dataclass(frozen=True)
class Library:
    """An installed TensorRT.

    Attributes:
        module: the imported package.
        api: its row of the table.
    """

    module: Any
    api: Api

    @classmethod
    def open(cls, name: str | None = None) -> Library:
        """Import a library; None takes the first that is installed.

        Raises:
            DeviceError: none is installed, it does not load, or it is too old.
        """
        names = LIBRARIES if name is None else (name,)
        for candidate in names:
            if importlib.util.find_spec(candidate) is not None:
                return cls.of(_imported(candidate))
        raise MissingExtraError(
            f"engines need {' or '.join(names)}, which is not installed: on a Jetson it comes with"
            " JetPack (make the environment with --system-site-packages), elsewhere by the extra",
            extra="tensorrt",
        )

    @classmethod
    def of(cls, module: Any) -> Library:
        """A library by its module."""
        return cls(module, api_of(module.__name__, module.__version__))

    @property
    def name(self) -> str:
        return self.api.library

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    def check_dialect(self, dialect: DialectName) -> None:
        """Raise DeviceError unless the parser takes graphs of this dialect."""
        if not DIALECTS[dialect].engines:
            raise DeviceError(
                "a bundle of the onnxruntime dialect has no engines",
                [Remedy.FOR_TENSORRT, Remedy.FOR_PORTABLE],
            )
        if DIALECTS[dialect].modern and not self.api.modern:
            raise DeviceError(
                f"graphs of the tensorrt dialect need TensorRT 10.15, this is {self.version}",
                [Remedy.FOR_PORTABLE],
            )

    def machine(self, cuda: Cuda) -> Machine:
        """What engines depend on here."""
        major, minor = cuda.capability
        return Machine(
            sm=10 * major + minor,
            library=self.name,
            version=self.version,
            gpu=cuda.name,
            driver=int(cuda.driver("cuDriverGetVersion")),
        )

    def read_plan(self, path: Path) -> Plan:
        """An engine from a plan whose hash has been checked.

        Raises:
            BundleError: the library does not take it.
        """
        logger = error_logger(self.module)
        runtime = self.module.Runtime(logger)
        try:
            with (
                open_regular(path) as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan,
            ):
                engine = runtime.deserialize_cuda_engine(plan)
        except (OSError, ValueError) as error:  # ValueError: nothing to map
            raise BundleError(
                f"cannot read {named(path)}: {reason(error)}; build the engines again"
            ) from error
        if engine is None:
            reasons = " | ".join(logger.errors[-SHOWN:]) or "no reason given"
            raise BundleError(
                f"{named(path)}: {self.name} {self.version} does not load it: {reasons};"
                " build the engines again with 'internvl-edge build'"
            )
        return Plan(self, path, engine, runtime)


@dataclass(frozen=True)
class Plan:
    """A loaded engine, and the runtime it must not outlive."""

    library: Library
    path: Path
    engine: Any
    runtime: Any

    @property
    def scratch_bytes(self) -> int:
        """Memory a context needs for activations at the largest shapes."""
        return int(self.engine.device_memory_size_v2)

    def rank(self, name: str) -> int:
        """Dimensions of an input or output; 0 where there is none of this name."""
        names = map(self.engine.get_tensor_name, range(self.engine.num_io_tensors))
        return len(self.engine.get_tensor_shape(name)) if name in names else 0

    def context(self, scratch: int) -> Context:
        """An execution context that works in memory at address `scratch`.

        Contexts may share that memory if their passes follow one another on one stream.
        """
        strategy = self.library.module.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self.engine.create_execution_context(strategy)
        if context is None:
            raise DeviceError(
                f"{named(self.path)}: no execution context; is there enough device memory?"
            )
        context.set_device_memory(scratch, self.scratch_bytes)
        return Context(self, context)

    def check(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], **fixed: int) -> None:
        """Raise BundleError unless names, types and shapes are the contract's.

        Args:
            fixed: symbolic dimensions that are numbers in an engine.
        """
        engine, trt = self.engine, self.library.module
        wanted = {
            (tensor.name, mode, _DTYPES[tensor.dtype], _dims(tensor.shape, fixed))
            for tensors, mode in ((inputs, "INPUT"), (outputs, "OUTPUT"))
            for tensor in tensors
        }
        got = set()
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            mode, dtype = engine.get_tensor_mode(name), engine.get_tensor_dtype(name)
            got.add((name, mode.name, dtype.name, tuple(engine.get_tensor_shape(name))))
            if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise BundleError(
                    f"{named(self.path)}: {named(name)} is wanted in host memory; build it again"
                )
        if got != wanted:
            raise BundleError(
                f"{named(self.path)} is not of this bundle: engine"
                f" {quoted(sorted(got - wanted)[:2])}, contract"
                f" {quoted(sorted(wanted - got)[:2])}; build the engines again"
            )


@dataclass(frozen=True)
class Context:
    """One execution context; its shapes and addresses stay until they are set again."""

    plan: Plan
    raw: Any

    def bind(self, addresses: Mapping[str, int]) -> None:
        """Tell where inputs and outputs lie."""
        for name, address in addresses.items():
            if not self.raw.set_tensor_address(name, address):
                raise DeviceError(
                    f"{named(self.plan.path)}: it does not take an address for {name}"
                )

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Set shapes of inputs."""
        for name, shape in shapes.items():
            if not self.raw.set_input_shape(name, shape):
                raise DeviceError(
                    f"{named(self.plan.path)}: {name} {shape} is outside what the engine was"
                    " built for"
                )

    def execute(self, stream: int) -> None:
        """Queue a pass."""
        if not self.raw.execute_async_v3(stream):
            raise DeviceError(
                f"{named(self.plan.path)}: {self.plan.library.name} refused a pass; its messages"
                " say why"
            )

    def capturable(self, stream: int) -> bool:
        """Whether a pass whose shapes have been run before can be captured now."""
        if not self.plan.library.api.asks_capturable:
            return True
        return bool(self.raw.is_stream_capturable(stream))


def error_logger(trt: Any, listen: Callable[[str], None] | None = None) -> Any:
    """A logger that keeps errors in `errors` and prints nothing.

    Args:
        listen: also called with every other message.
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif listen is not None:
                listen(message)

    return Log()


def _dims(shape: Sequence[int | str], fixed: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else fixed.get(dim, -1) for dim in shape)


def _imported(name: str) -> Any:
    try:
        with signals_held():
            return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise DeviceError(f"{name} is installed but does not load: {reason(error)}") from error
