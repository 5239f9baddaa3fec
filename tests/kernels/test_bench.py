"""`internvl-edge bench kernels`: small inputs, the report's fields, and a wrong result refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from host_driver import ELAPSED_MS, open_driver

from internvl_edge.bench.kernels import attention as attention_bench
from internvl_edge.bench.kernels import blocks as blocks_bench
from internvl_edge.bench.kernels import cpu as bench
from internvl_edge.bench.kernels import cuda as cuda_bench
from internvl_edge.bench.kernels import experts as experts_bench
from internvl_edge.cli.main import main
from internvl_edge.kernels import cuda, ops
from internvl_edge.kernels.device import Driver
from internvl_edge.runtime.backends.attention import ATTENTION
from internvl_edge.runtime.backends.blocks import BLOCKS
from internvl_edge.runtime.backends.own_kernel import KernelKind, OwnKernel, own_kernel


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PICTURES", (((90, 60), (2, 1)),))
    monkeypatch.setattr(bench, "FEATURES", (1, 17, 64))
    monkeypatch.setattr(bench, "copy_bandwidth", lambda threads: 1e9 * threads)
    monkeypatch.setattr(blocks_bench, "SHAPE", (256, 96))
    monkeypatch.setattr(experts_bench, "SHAPE", (256, 128, 5, 2))
    monkeypatch.setattr(attention_bench, "SHAPE", (4, 2, 64))
    monkeypatch.setattr(attention_bench, "PASSES", ((1, 1, 30), (3, 2, 9)))


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--threads", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["copy_gigabytes_per_s"] == {"1": 1.0, "2": 2.0}
    assert [row["threads"] for row in report["rows"]] == [1, 2] * 3
    tiling = report["rows"][0]
    assert tiling["megabytes"] == round((90 * 60 * 3 + 3 * 3 * 448 * 448 * 4) / 1e6, 1)
    assert min(row["kernel_ms"] for row in report["rows"]) > 0
    if own_kernel(BLOCKS).library is not None:
        assert [row["rows"] for row in report["blocks"]["rows"]] == list(blocks_bench.ROWS) * 2
        assert all(row["gflops"] > 0 < row["percent_of_int8"] for row in report["blocks"]["rows"])
        experts = report["experts"]["rows"]
        assert [row["rows"] for row in experts] == list(experts_bench.ROWS)
        assert all(0 < row["difference"] < experts_bench.TOLERANCE for row in experts)
        assert all(row["speedup"] > 0 < row["gigabytes_per_s"] for row in experts)
    if own_kernel(ATTENTION).library is not None:
        attended = report["attention"]["rows"]
        assert {row["sequences"] for row in attended} == {1, 3}
        assert all(row["gflops"] > 0 < row["speedup"] for row in attended)
    assert main(["bench", "kernels", "--threads", "1"]) == 0
    assert "results checked" in capsys.readouterr().out


def test_a_wrong_result_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ops.tile

    def wrong(*args: object, **options: object) -> object:
        return np.negative(right(*args, **options))  # type: ignore[arg-type]

    monkeypatch.setattr(ops, "tile", wrong)
    assert main(["bench", "kernels"]) == 1
    assert "WRONG: tiling 90x60" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("measures", "kind", "said"),
    [
        (bench, BLOCKS, "INT4 product, 1 rows: differs from MatMulNBits by"),
        (experts_bench, BLOCKS, "experts, 1 rows: differ from QMoE by"),
        (attention_bench, ATTENTION, "attention, fp32, 1 rows: differs from Group"),
    ],
)
def test_what_is_wrong_is_not_reported(
    measures: ModuleType,
    kind: KernelKind,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if own_kernel(kind).library is None:
        pytest.skip("no such kernel here")
    monkeypatch.setattr(measures, "TOLERANCE", 0.0)
    assert main(["bench", "kernels", "--threads", "1"]) == 1
    assert f"WRONG: {said}" in capsys.readouterr().out


def test_without_the_kernel_the_reason_stands_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without(kind: KernelKind) -> OwnKernel:
        return OwnKernel(kind, None, "no library (why)")

    monkeypatch.setattr(bench, "own_kernel", without)
    assert main(["bench", "kernels", "--threads", "1"]) == 0
    assert "onnxruntime's MatMulNBits and QMoE: no library (why)" in capsys.readouterr().out


def test_a_bad_number_of_threads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--threads", "0"]) == 2
    assert "--threads is 0" in capsys.readouterr().err


def test_report_of_a_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With a stand-in for the driver: what is timed is not a GPU, what is checked is the flow."""
    if ops.cpu_kernels() is None:
        pytest.skip("no C++ compiler here")
    driver, bindings = open_driver()
    monkeypatch.setattr(Driver, "open", lambda failure: driver)
    monkeypatch.setattr(cuda, "cuda_binary", lambda source: binary(tmp_path, source))
    for name, value in (
        ("SIZE", (90, 60)),
        ("GRID", {"columns": 2, "rows": 1}),
        ("FEATURES", (1, 17, 64)),
        ("TILES", 2),
        ("COPY_BYTES", 1024),
        ("LAUNCHES", 2),
        ("GROUPS", 2),
    ):
        monkeypatch.setattr(cuda_bench, name, value)
    store = tmp_path / "results"
    command = ["bench", "kernels", "--device", "cuda", "--store", str(store)]
    assert main([*command, "--json"]) == 2
    assert "no such directory" in capsys.readouterr().err
    store.mkdir()
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (path,) = store.iterdir()
    assert path.name == f"kernels-stand-in-{report['date']}.json"
    assert json.loads(path.read_text()) == report
    assert len(report["rows"]) == 7
    assert report["sm"] == "87"
    assert report["rows"][0]["kernel_ms"] == ELAPSED_MS / 2
    assert bindings.memory == {}  # weights of the axes and scratch go with the kernels
    assert main(command) == 0
    assert "stand-in (sm_87), driver 13020" in capsys.readouterr().out


def binary(folder: Path, source: str) -> Path:
    path = folder / source
    path.write_text(source)
    return path


def test_without_a_device_the_error_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert main(["bench", "kernels", "--device", "cuda"]) == 2
    assert "pip install" in capsys.readouterr().err
