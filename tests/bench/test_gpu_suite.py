"""The GPU suite without a GPU: its parts on stand-ins at small width, its driver with any parts."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builder import needs_newest
from checkpoints import small_config
from fake_tensorrt import FakeTensorRt, fake_build
from host_driver import HostDriver

from internvl_edge.bench.gpu import parts as gpu_parts
from internvl_edge.bench.gpu import suite as gpu_suite
from internvl_edge.bench.gpu.model import Workshop, cut
from internvl_edge.bench.gpu.parts import PARTS, cosine, decoder, true_width, vision
from internvl_edge.bench.gpu.suite import SUITES, Part, add_shares, main, run_part, run_suite
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.export.checkpoint.config import parse_config
from internvl_edge.kernels import cuda as cuda_kernels
from internvl_edge.kernels import ops
from internvl_edge.kernels.device import Driver
from internvl_edge.runtime import DeviceError, LimitError
from internvl_edge.runtime.backends.cuda import Cuda
from internvl_edge.runtime.decoding import device_sampling

pytestmark = pytest.mark.slow(seconds=1)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    if ops.cpu_kernels() is None:
        pytest.skip("no C++ compiler here")
    binaries = tmp_path / "kernels"
    binaries.mkdir()

    def binary(source: str) -> Path:
        path = binaries / source
        path.write_text(source)
        return path

    for user in (cuda_kernels, device_sampling):
        monkeypatch.setattr(user, "cuda_binary", binary)
    bindings = HostDriver(capacity=64 << 30)
    trt = FakeTensorRt(bindings)
    return Workshop(Cuda(Driver(bindings)), trt.library, tmp_path, fake_build)


@pytest.fixture
def spec() -> ModelSpec:
    """Wide enough for blocks of 128."""
    return parse_config(small_config(hidden=128, vision_hidden=128))


def portable(shop: Workshop) -> Workshop:
    return replace(shop, library=replace(shop.library, api=replace(shop.library.api, modern=False)))


@needs_newest
def test_engines_beside_the_oracle(
    shop: Workshop, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_parts, "CUT_LAYERS", 2)
    found = true_width(shop, spec)
    assert found["passed"]
    assert [item["precision"] for item in found["precisions"]] == ["fp16+fp16", "int8+int4"]
    for item in found["precisions"]:
        assert item["cosine_decode"] > 0.9999
        assert item["tokens_equal"] == 1


@needs_newest
def test_engines_that_differ_from_the_oracle_do_not_pass(
    shop: Workshop, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = gpu_parts.Sequence.run

    def wrong(self: Any, tokens: int) -> Any:
        logits = original(self, tokens)
        return -logits if "Reference" in type(self._backend).__name__ else logits

    monkeypatch.setattr(gpu_parts, "CUT_LAYERS", 1)
    monkeypatch.setattr(gpu_parts.Sequence, "run", wrong)
    assert not true_width(shop, spec)["passed"]


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_vision_is_timed(shop: Workshop, spec: ModelSpec, precision: Any) -> None:
    found = vision(portable(shop), precision, spec)
    names = [item["name"] for item in found["rows"]]
    assert names == [f"vision {precision}, 1 tiles", f"vision {precision}, 7 tiles"]
    one, seven = (item["linear_operations"] for item in found["rows"])
    assert seven == pytest.approx(7 * one)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_decoding_is_timed(
    shop: Workshop, spec: ModelSpec, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_parts, "PREFILL", 300)
    monkeypatch.setattr(gpu_parts, "DECODE_KEYS", (40, 200))
    monkeypatch.setattr(gpu_parts, "CONTEXT", 512)
    found = decoder(portable(shop), precision, spec)
    assert [item["name"] for item in found["rows"]] == [
        f"prefill 256, {precision}",
        f"decode at 40 keys, {precision}",
        f"decode at 200 keys, {precision}",
    ]
    assert all(item["seconds"] > 0 for item in found["rows"])


def test_every_part_is_documented() -> None:
    text = (Path(gpu_parts.__file__).parent / "README.md").read_text(encoding="utf-8")
    for parts in SUITES.values():
        for part in parts:
            assert part.name in text
            assert f"{part.limit_s}" in text


def test_a_cut_keeps_the_width(spec: ModelSpec) -> None:
    short = cut(spec, 1, 5)
    assert (short.vision.num_hidden_layers, short.language.num_hidden_layers) == (1, 5)
    assert short.language.hidden_size == spec.language.hidden_size


def test_every_part_exists() -> None:
    named = {part.name for parts in SUITES.values() for part in parts if not part.words}
    assert named == PARTS.keys()


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [([1, 0], [2, 0], 1.0), ([1, 0], [0, 3], 0.0), ([1, np.nan], [1, 1], 0.0)],
)
def test_cosine(a: Any, b: Any, wanted: float) -> None:
    assert cosine(np.array(a, float), np.array(b, float)) == wanted


@pytest.mark.slow
def test_torch_beside(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, and without compiling, which takes minutes."""
    torch = pytest.importorskip("torch")
    from internvl_edge.bench.gpu.torch_peer import product_rates, time_decoder, time_vision

    monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)
    rows = time_vision(spec, "cpu", 1)
    rows += time_decoder(spec, "cpu", 1, prompt=20, context=64)
    assert len(rows) == 4 + 3
    assert all(item["seconds"] > 0 for item in rows)
    if not torch.cuda.is_available():
        assert product_rates(64) == {}


# The driver.


def test_a_part_that_fails_is_recorded_and_the_next_runs(tmp_path: Path) -> None:
    code = {
        "kernels": "print('fine')",
        "ceilings": "import os; print('last words', flush=True); os.abort()",
        "vision-int8": "import time; time.sleep(60)",
    }
    parts = [Part(name, 1 if "sleep" in text else 30, ("-c", text)) for name, text in code.items()]
    found = {part.name: run_part(part, part.limit_s, tmp_path) for part in parts}
    assert found["kernels"]["passed"]
    assert found["ceilings"]["error"] == "status -6"
    assert found["ceilings"]["output"] == ["last words"]
    assert found["vision-int8"]["error"] == "took longer than 1 s"


def test_the_result_is_written_after_every_part(tmp_path: Path) -> None:
    path, seen = tmp_path / "result.json", []

    def run(part: Part, limit: float, folder: Path) -> dict[str, Any]:
        seen.append((part.name, path.exists(), limit <= part.limit_s))
        return {"passed": part.name != "kernels", "wall_s": 1}

    assert run_suite("bench", "stand-in", path, run=run) == 1
    assert seen[0] == ("ceilings", False, True)
    assert all(written for _, written, _ in seen[1:])
    stored = json.loads(path.read_text())
    assert list(stored["parts"]) == [part.name for part in SUITES["bench"]]
    assert stored["device"] == "stand-in"


def test_time_runs_out(tmp_path: Path) -> None:
    def run(part: Part, limit: float, folder: Path) -> dict[str, Any]:
        return {"passed": True}

    path = tmp_path / "result.json"
    assert run_suite("test", "stand-in", path, budget_s=0, run=run) == 1
    parts = json.loads(path.read_text())["parts"]
    assert {item["error"] for item in parts.values()} == {"no time was left for it"}
    assert run_suite("test", "stand-in", path, budget_s=0, only=["tiny_ocr"], run=run) == 0
    with pytest.raises(LimitError, match="no part 'tiny' in suite test; it has: pytest kernels"):
        run_suite("test", "stand-in", path, only=["tiny"], run=run)


def test_shares_of_the_ceilings() -> None:
    """2e12 operations at 1e14 are 20 ms, 10 GB at 1e12 are 10 ms: at best 20 of the 40 ms."""
    part = {
        "arithmetic": "int8",
        "rows": [
            {
                "linear_operations": 2e12,
                "attention_operations": 0,
                "read_bytes": 1e10,
                "seconds": 0.04,
            }
        ],
    }
    ceilings = {"bandwidth": 1e12, "operations_per_s": {"int8": 1e14, "fp16": 5e13}}
    add_shares({"ceilings": ceilings, "vision-int8": part})
    assert part["rows"][0]["percent_of_ceiling"] == 50  # type: ignore[index]
    add_shares({"vision-int8": part})  # without ceilings: nothing to say


def test_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(failure: type[Exception]) -> None:
        raise DeviceError("cuInit failed: CUDA_ERROR_NO_DEVICE (100)")

    monkeypatch.setattr(Driver, "open", none)
    assert main(["bench", "--store", str(tmp_path)]) == 2
    assert "this suite needs a GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_parts_are_processes_of_this_interpreter(tmp_path: Path) -> None:
    part = Part("any", 30, ("-c", "import sys; print(sys.executable)"))
    assert run_part(part, 30, tmp_path)["output"] == [sys.executable]
    assert gpu_suite.SUITE_S == 480
