"""The table of TensorRT's versions, and what the library that is installed has of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from builder import needs_builder

from internvl_edge.runtime import BundleError, DeviceError
from internvl_edge.runtime.backends.tensorrt_library import (
    APIS,
    LIBRARIES,
    Api,
    Library,
    api_of,
    error_logger,
)


@pytest.mark.parametrize(
    ("library", "version", "row"),
    [
        ("tensorrt", "10.3.0", 0),
        ("tensorrt", "10.14.1.48", 0),
        ("tensorrt", "10.15.0", 1),
        ("tensorrt", "10.16.2.10", 1),
        ("tensorrt", "11.0.0", 2),
        ("tensorrt", "11.4.1", 2),
        ("tensorrt_rtx", "1.7.1.116", 3),
    ],
)
def test_rows_of_the_table(library: str, version: str, row: int) -> None:
    assert api_of(library, version) == APIS[row]


@pytest.mark.parametrize(("library", "version"), [("tensorrt", "8.6.2"), ("tensorrt", "10.2.0")])
def test_too_old(library: str, version: str) -> None:
    with pytest.raises(DeviceError, match=r"is too old; 10.3 or later"):
        api_of(library, version)


def test_graphs_an_old_parser_does_not_take() -> None:
    module = SimpleNamespace(__name__="tensorrt", __version__="10.3.0")
    library = Library.of(module)
    library.check_dialect("tensorrt-portable")
    with pytest.raises(DeviceError, match=r"need TensorRT 10.15, this is 10.3.0"):
        library.check_dialect("tensorrt")


def test_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"tensorrt or tensorrt_rtx.*--system-site-packages"):
        Library.open()


def test_an_installation_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tensorrt` with its bindings alone: libnvonnxparser.so.11 is not found."""

    def missing(name: str) -> None:
        raise ImportError("libnvonnxparser.so.11: cannot open shared object file")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(DeviceError, match="tensorrt is installed but does not load: libnvonnx"):
        Library.open()


Check = Callable[[Any], bool]
#: What each column says of the real module.
COLUMNS: dict[str, Check] = {
    "names_gpu": lambda trt: hasattr(trt.IBuilderConfig, "set_compute_capability"),
    "asks_capturable": lambda trt: hasattr(trt.IExecutionContext, "is_stream_capturable"),
    "modern": lambda trt: hasattr(trt, "IKVCacheUpdateLayer"),
}


@needs_builder
@pytest.mark.parametrize("column", COLUMNS)
def test_the_table_says_what_rtx_has(column: str) -> None:
    library = Library.open("tensorrt_rtx")
    assert library.name == LIBRARIES[1]
    assert getattr(library.api, column) == COLUMNS[column](library.module)


@needs_builder
def test_rtx_has_every_name_that_is_called() -> None:
    """What `tensorrt_library` and `export.tensorrt.builder` call without asking the table."""
    trt = Library.open("tensorrt_rtx").module
    names = {
        trt.Runtime: ["deserialize_cuda_engine"],
        trt.ICudaEngine: [
            *("create_execution_context", "device_memory_size_v2", "num_io_tensors"),
            *("get_tensor_name", "get_tensor_mode", "get_tensor_dtype", "get_tensor_shape"),
            "get_tensor_location",
        ],
        trt.IExecutionContext: [
            *("set_device_memory", "set_tensor_address", "set_input_shape", "execute_async_v3")
        ],
        trt.ExecutionContextAllocationStrategy: ["USER_MANAGED"],
        trt.TensorLocation: ["DEVICE"],
        trt.DataType: ["FLOAT", "HALF", "INT8", "INT32", "INT64", "UINT8"],
        trt.TensorIOMode: ["INPUT", "OUTPUT"],
        trt.IBuilderConfig: [
            *("set_memory_pool_limit", "progress_monitor", "add_optimization_profile"),
            *("profiling_verbosity", "set_flag", "create_timing_cache", "set_timing_cache"),
        ],
        trt.MemoryPoolType: ["WORKSPACE"],
        trt.IProgressMonitor: ["phase_start", "phase_finish", "step_complete"],
        trt.NetworkDefinitionCreationFlag: ["STRONGLY_TYPED"],
        trt.Builder: ["create_network", "create_builder_config", "build_serialized_network"],
    }
    missing = [(o.__name__, n) for o, listed in names.items() for n in listed if not hasattr(o, n)]
    assert missing == []


@needs_builder
def test_a_plan_is_read_by_the_real_runtime_as_far_as_it_goes(tmp_path: Path) -> None:
    """Without a GPU none loads: one error with the library's own words."""
    library = Library.open("tensorrt_rtx")
    (tmp_path / "a.plan").write_bytes(b"not a plan at all" * 100)
    with pytest.raises(BundleError, match="does not load it") as caught:
        library.read_plan(tmp_path / "a.plan")
    assert "no reason given" not in str(caught.value)


@needs_builder
def test_the_logger_is_one_of_the_librarys() -> None:
    trt = Library.open("tensorrt_rtx").module
    heard: list[str] = []
    log = error_logger(trt, heard.append)
    log.log(trt.ILogger.ERROR, "bad")
    log.log(trt.ILogger.VERBOSE, "chatter")
    assert (log.errors, heard) == (["bad"], ["chatter"])


def test_rows_are_in_order() -> None:
    by_library: dict[str, list[Api]] = {}
    for row in APIS:
        by_library.setdefault(row.library, []).append(row)
    assert tuple(by_library) == LIBRARIES
    for rows in by_library.values():
        assert [row.since for row in rows] == sorted({row.since for row in rows})
