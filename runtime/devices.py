"""From a device's name to what runs on it: a backend, and the tiler that feeds it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from internvl_edge.bundle.contract import VISION_FILES
from internvl_edge.bundle.errors import DeviceError, UsageError
from internvl_edge.bundle.manifest import Bundle
from internvl_edge.bundle.quoting import named, quoted
from internvl_edge.bundle.remedies import Remedy
from internvl_edge.kernels.ops import cpu_kernels
from internvl_edge.runtime.arguments import function_or_none
from internvl_edge.runtime.backends import Backend
from internvl_edge.runtime.backends.own_kernels import mapped_graphs
from internvl_edge.runtime.backends.prepared import is_prepared
from internvl_edge.runtime.images.preprocess import Tiler, tile_on_host
from internvl_edge.runtime.memory import MemoryGuard

if TYPE_CHECKING:
    from internvl_edge.runtime.backends.cuda import Cuda
    from internvl_edge.runtime.backends.plans import Engines, Wanted
    from internvl_edge.runtime.backends.tensorrt_library import Library

Device = Literal["auto", "cpu", "cuda", "tensorrt"]

#: On a CUDA device the cache is committed when it is allocated, so a chat gets this many
#: positions unless told otherwise: room for 41 tiles and some turns. On the CPU pages are
#: committed as they fill, and a chat gets the model's whole context.
CUDA_CONTEXT = 16384

#: Threads that no CPU has use for: of more, ONNX Runtime makes them for minutes, and then fails.
MOST_THREADS = 1024

#: Builds engines for a GPU: bundle, CUDA, TensorRT, what they are to be for -> engines.
EngineBuilder: TypeAlias = "Callable[[Bundle, Cuda, Library, Wanted], Engines]"

_log = logging.getLogger("internvl_edge")


@dataclass(frozen=True)
class Opened:
    """A device in use.

    Attributes:
        backend: runs the graphs.
        tile: cuts images into tiles the backend takes.
        context: tokens a chat has room for unless told otherwise; None: as many as the model.
        memory: what fits beside the model; None where the device says so itself.
    """

    backend: Backend
    tile: Tiler
    context: int | None = None
    memory: MemoryGuard | None = None


def open_device(
    bundle: Bundle,
    device: str,
    threads: int | None,
    stream: Any = None,
    *,
    low_memory: bool = False,
    context: int | None = None,
    build_engines: EngineBuilder | None = None,
    max_sequences: int | None = None,
) -> Opened:
    """Load a bundle's graphs on a device.

    Args:
        bundle: a verified bundle.
        device: see `Device`; "auto" takes the GPU where it works, else the CPU, and says why:
            built engines where the bundle is of a TensorRT dialect, ONNX Runtime's CUDA otherwise.
        threads: CPU threads; None is one per core.
        stream: CUDA stream to work on; see `Cuda.open`.
        low_memory: on the CPU, hold one graph at a time.
        context: positions a KV cache must have room for; None leaves it to the device.
        build_engines: builds engines where there are none that fit this machine and what is asked.
        max_sequences: that a GPU decodes in one pass; None: one, or as many as engines are for. The
            CPU takes any number.

    Raises:
        DeviceError: the device is unknown or not available.
        BundleError: a graph or engine does not load.
        CapacityError: there is no memory for caches of so many sequences.
        UsageError: `threads` or `max_sequences` is outside its limits, engines are, or can be, for
            fewer sequences only, or `build_engines` is no function.
    """
    if not isinstance(device, str) or device not in get_args(Device):
        raise DeviceError(f"unknown device {quoted(device)}; use {', '.join(get_args(Device))}")
    function_or_none("build_engines", build_engines)
    for option, value in (("threads", threads), ("max_sequences", max_sequences)):
        if value is not None and value < 1:
            raise UsageError(f"is {quoted(value)}, it must be at least 1", option=option)
    if threads is not None and threads > MOST_THREADS:
        raise UsageError(
            f"is {quoted(threads)}, it must be at most {MOST_THREADS}", option="threads"
        )
    if stream is not None and device == "cpu":
        raise DeviceError(f"a CUDA stream was given for device {quoted(device)}; use device='cuda'")
    if device == "cpu":
        return _open_cpu(bundle, threads, low_memory)
    dialect = bundle.manifest.dialect
    engines = bundle.manifest.traits.engines
    if device == "cuda" and engines:
        raise DeviceError(
            f"{named(bundle.path)} is of the {dialect} dialect: device 'cuda' runs the onnxruntime"
            " dialect, 'cpu' gives reference results",
            [Remedy.ON_TENSORRT, Remedy.ON_CPU],
        )
    try:
        if device == "cuda" or (device == "auto" and not engines):
            return _open_cuda(bundle, threads, stream, context, max_sequences or 1)
        return _open_tensorrt(bundle, stream, context, build_engines, max_sequences)
    except DeviceError as error:
        if device != "auto":
            raise
        reason = f"auto: {error.message}"
    _say_once(f"running on the CPU ({reason})")
    return _open_cpu(bundle, threads, low_memory, reason)


def _open_cpu(bundle: Bundle, threads: int | None, low_memory: bool, note: str = "") -> Opened:
    from internvl_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend
    from internvl_edge.runtime.backends.reference import ReferenceBackend

    cpu_kernels()  # compiled once per machine: here rather than in the first answer
    if bundle.manifest.traits.engines:
        return Opened(ReferenceBackend(bundle, threads, note), tile_on_host)
    MemoryGuard(
        bundle.manifest, is_prepared(bundle), low_memory, mapped_graphs(bundle)
    ).check_load()
    backend = OnnxRuntimeBackend(bundle, threads, note, low_memory=low_memory)
    guard = MemoryGuard(
        bundle.manifest, backend.prepared, low_memory, backend.mapped, backend.holds_scores
    )
    return Opened(backend, tile_on_host, memory=guard)


def _open_cuda(
    bundle: Bundle, threads: int | None, stream: Any, context: int | None, sequences: int
) -> Opened:
    from internvl_edge.runtime.backends.cuda import Cuda
    from internvl_edge.runtime.backends.onnxruntime_cuda import (
        OnnxRuntimeCudaBackend,
        cuda_provider,
    )
    from internvl_edge.runtime.backends.sessions import check_provider
    from internvl_edge.runtime.images.device_tiling import DeviceTiler

    check_provider("cuda")
    cuda = Cuda.open(stream)
    backend = OnnxRuntimeCudaBackend(
        bundle,
        cuda,
        cuda_provider(cuda),
        threads,
        sequences=sequences,
        context=context or min(bundle.spec.language.max_context, CUDA_CONTEXT),
    )
    return Opened(backend, DeviceTiler.of(cuda), CUDA_CONTEXT)


def _open_tensorrt(
    bundle: Bundle,
    stream: Any,
    context: int | None,
    build_engines: EngineBuilder | None,
    sequences: int | None,
) -> Opened:
    from internvl_edge.runtime.backends.cuda import Cuda
    from internvl_edge.runtime.backends.plans import Wanted, find_engines, why_none
    from internvl_edge.runtime.backends.tensorrt import TensorRtBackend
    from internvl_edge.runtime.backends.tensorrt_library import Library
    from internvl_edge.runtime.images.device_tiling import DeviceTiler

    cuda = Cuda.open(stream)
    library = Library.open()
    library.check_dialect(bundle.manifest.dialect)
    with cuda.active():
        machine = library.machine(cuda)
    wanted = Wanted(context, sequences)
    engines = find_engines(bundle, machine, wanted)
    if engines is None and build_engines is not None:
        engines = build_engines(bundle, cuda, library, wanted)
    elif engines is None:  # those of fewer sequences are refused below, also where auto was asked
        engines = find_engines(bundle, machine, Wanted(context))
    if engines is None:
        raise DeviceError(why_none(bundle, machine, wanted), [Remedy.BUILD_ENGINES])
    built = engines.manifest.limits.sequences
    if sequences is not None and sequences > built:
        raise UsageError(
            f"is {sequences}, the engines are for {built}; rebuild them with"
            f" '{wanted.command(bundle)}'",
            option="max_sequences",
        )
    backend = TensorRtBackend(bundle, cuda, library, engines, sequences)
    return Opened(backend, DeviceTiler.of(cuda), backend.limits.context)


def encoder_name(bundle: Bundle, backend: Backend) -> str:
    """Name what encodes images: the vision graph, its weights, and what runs them."""
    hashes = [bundle.manifest.files[name].sha256 for name in VISION_FILES]
    return " ".join([*hashes, backend.numerics])


@lru_cache(maxsize=8)
def _say_once(message: str) -> None:
    _log.warning(message)
