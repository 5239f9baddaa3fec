"""An interrupt at any moment leaves nothing of the driver's behind that nobody gives back."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import numpy as np
import pytest
from campaign.interrupts import Moments
from host_driver import INVALID, HostDriver

from internvl_edge.bundle.errors import DeviceError
from internvl_edge.kernels.cuda import CudaKernels
from internvl_edge.kernels.device import DeviceArray, Driver, Scratch
from internvl_edge.runtime.backends.cuda import Cuda, Graph

PIXELS = np.zeros((20, 30, 3), np.uint8)
#: What makes something, and what gives it back.
PAIRS = (
    ("cuStreamCreate", "cuStreamDestroy"),
    ("cuEventCreate", "cuEventDestroy"),
    ("cuGraphInstantiate", "cuGraphExecDestroy"),
)


def captured(cuda: Cuda) -> Graph:
    with cuda.active(), cuda.capture() as graph:
        pass
    return graph


def scratch(cuda: Cuda) -> Scratch:
    held = Scratch(cuda.driver)
    held.get(cuda.context, cuda.stream, 9)
    return held


def tiled(cuda: Cuda) -> Any:
    """Weights and scratch memory of a kernel."""
    kernels, out = CudaKernels(cuda.driver), cuda.empty((1, 4, 4, 3), "uint8")
    kernels.tile(PIXELS, columns=1, rows=1, tile_size=4, patch_size=2, out=out, thumbnail=False)
    cuda.driver("cuCtxSynchronize")
    return kernels


def interrupt() -> None:
    """Except where something is given back: Python would let no interrupt out of there."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not weakref.finalize.__call__.__code__:
        frame = frame.f_back
    if frame is None:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "make",
    [
        lambda cuda: cuda.empty((4,), "uint8"),
        lambda cuda: DeviceArray.of(cuda.driver, PIXELS),
        lambda cuda: cuda.pinned((4,), "uint8"),
        lambda cuda: cuda.event(),
        lambda cuda: cuda.wait_for(5),
        lambda cuda: Cuda(cuda.driver),
        captured,
        scratch,
        pytest.param(tiled, marks=pytest.mark.slow(seconds=5)),
    ],
    ids=["memory", "copy", "pinned", "event", "order", "stream", "graph", "scratch", "kernel"],
)
def test_what_is_made_is_given_back(bindings: HostDriver, make: Callable[[Cuda], Any]) -> None:
    made = [make(cuda := Cuda(Driver(bindings, DeviceError)))]
    for at in range(1, 2000):
        made.clear()
        counted = Moments(at, interrupt)
        with suppress(KeyboardInterrupt), counted:
            made.append(make(cuda))
        del made[:], bindings.current[1:]  # a context that is left is the thread's affair
        assert bindings.memory == bindings.pinned == {}
        cuda.synchronize()
        for creating, giving in PAIRS:
            own = creating == "cuStreamCreate"
            assert len(bindings.named(creating)) == len(bindings.named(giving)) + own
        if counted.seen < at:
            break
    assert 10 < at < 1999


def test_a_copy_that_fails_is_given_back(
    bindings: HostDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = Cuda(Driver(bindings, DeviceError))
    monkeypatch.setattr(HostDriver, "do_cuMemcpyHtoD", lambda *_: (INVALID,))
    with pytest.raises(DeviceError, match="cuMemcpyHtoD"):
        DeviceArray.of(cuda.driver, PIXELS)
    assert bindings.memory == {}
