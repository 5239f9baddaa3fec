"""A machine with a GPU, for the tests of the runtime: the stand-in's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from host_driver import HostDriver

from internvl_edge.kernels import cuda as cuda_kernels
from internvl_edge.kernels import ops
from internvl_edge.kernels.device import Driver
from internvl_edge.runtime.backends import onnxruntime_cuda, sessions
from internvl_edge.runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend
from internvl_edge.runtime.decoding import device_sampling
from internvl_edge.runtime.images import device_tiling


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HostDriver]:
    """`device="cuda"` with the stand-in, and ONNX Runtime's CPU on its memory."""
    if ops.cpu_kernels() is None:
        pytest.skip("no C++ compiler here")
    driver = HostDriver()

    def binary(source: str) -> Path:
        path = tmp_path / source
        path.write_text(source)
        return path

    def run(self: OnnxRuntimeCudaBackend, session: Any, binding: Any) -> None:
        driver.calls.append(("run", session))
        driver.queue(self._cuda.stream, partial(session.run_with_iobinding, binding, self._options))

    def on_the_host(cuda: Any) -> sessions.Provider:
        with cuda.active():
            cuda.check_primary()
        return sessions.Provider("cpu")

    monkeypatch.setattr(Driver, "open", lambda failure: Driver(driver, failure))
    monkeypatch.setattr(cuda_kernels, "cuda_binary", binary)
    monkeypatch.setattr(device_tiling, "cuda_binary", binary)
    monkeypatch.setattr(device_sampling, "cuda_binary", binary)
    monkeypatch.setattr(sessions, "check_provider", lambda device: None)
    monkeypatch.setattr(onnxruntime_cuda, "cuda_provider", on_the_host)
    monkeypatch.setattr(OnnxRuntimeCudaBackend, "run", run)
    yield driver
    assert len(driver.current) == 1  # every context that was entered was left
