"""Building engines: shapes, memory, publication; the builder is a stand-in but for one bundle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from builder import needs_builder
from checkpoints import GOLDEN, small_config, write_checkpoint
from fake_tensorrt import FakeTensorRt, fake_build
from host_driver import HostDriver

from internvl_edge.bundle.manifest import Bundle, open_bundle
from internvl_edge.cli.main import main
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.checkpoint.config import parse_config
from internvl_edge.export.graphs.dialects.engine_form import engine_form
from internvl_edge.export.tensorrt import builder as engine_builder
from internvl_edge.export.tensorrt import engines as engines_module
from internvl_edge.export.tensorrt import profiles
from internvl_edge.export.tensorrt.builder import Built, Progress, Request
from internvl_edge.export.tensorrt.engines import (
    build_engines,
    render_layers,
    timing_cache_path,
)
from internvl_edge.export.tensorrt.profiles import (
    GIB,
    MemoryNeed,
    Place,
    limits_of,
    plan_build,
    target_place,
    this_place,
)
from internvl_edge.kernels.device import Driver
from internvl_edge.runtime import (
    DeviceError,
    ExportError,
    LeftoverWarning,
    LimitError,
    OutputError,
)
from internvl_edge.runtime.backends.cuda import Cuda
from internvl_edge.runtime.backends.plans import (
    FOLDER,
    PLANS,
    Limits,
    Machine,
    built_engines,
    find_engines,
)
from internvl_edge.runtime.backends.tensorrt_library import APIS, Library

pytestmark = pytest.mark.slow(seconds=1)

ORIN = Machine(87, "tensorrt", "10.16.2", "Orin (nvgpu)", 13020)
PLACE = Place("Orin", ORIN, 60 * GIB, shared=True)
LIMITS = Limits(context=256, tokens=64)
LIBRARY = FakeTensorRt(HostDriver()).library


def plenty() -> int:
    return 1 << 40


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    return export_bundle(GOLDEN / "model", folder / "bundle", dialect="tensorrt-portable")


@pytest.fixture
def opened(exported: Path, tmp_path: Path) -> Bundle:
    """The bundle under another name, without engines: files are links."""
    path = tmp_path / "bundle"
    path.mkdir()
    for file in exported.iterdir():
        if file.is_file():
            os.link(file, path / file.name)
    return open_bundle(path, verify="size")


Build = Callable[[Request, bytes, Progress], Built]


def build(bundle: Bundle, builder: Build = fake_build, **options: Any) -> Any:
    memory = plan_build(bundle, LIMITS, PLACE, available=plenty)
    return build_engines(bundle, PLACE, LIMITS, memory, LIBRARY, build=builder, **options)


# Shapes.


def test_shapes_follow_from_tiles_and_context() -> None:
    spec = parse_config(small_config())  # 56 px tiles of 4 tokens, 6 tiles and a thumbnail
    assert limits_of(spec, None, None) == Limits(1024, tokens=512, tiles=7)  # the model's longest
    assert limits_of(spec, 1, 100) == Limits(100, tokens=100, tiles=1)  # one tile: no thumbnail
    assert limits_of(spec, 3, 17).tiles == 4
    many = limits_of(spec, 1, 100, 12)
    assert (many.sequences, many.rows) == (12, 12)  # each gets logits


def test_the_context_of_the_true_model() -> None:
    """40 tiles and thumbnail are 10,496 rows; text is added, in whole multiples."""
    config = small_config(tile=448)
    config["llm_config"]["max_position_embeddings"] = 32768
    spec = parse_config(config)
    assert limits_of(spec, 40, None).context == 12544
    assert limits_of(spec, 12, None).context == 5376


@pytest.mark.parametrize(
    ("tiles", "context", "said"),
    [
        (0, None, "^max_tiles is 0"),
        (None, 0, "^max_context is 0"),
        (None, 1025, r"outside 1\.\.1024"),
        (40, 100, "41 tiles with thumbnail are 164 tokens, the context holds 100"),
    ],
)
def test_shapes_that_cannot_be(tiles: int | None, context: int | None, said: str) -> None:
    with pytest.raises(LimitError, match=said):
        limits_of(parse_config(small_config()), tiles, context)


# Memory.


def test_memory_is_the_sum_of_its_parts(opened: Bundle) -> None:
    memory = plan_build(opened, LIMITS, PLACE, available=plenty)
    for graph, size in memory.weights.items():
        data = opened.manifest.files[graph.replace(".onnx", ".data")].bytes
        assert 0.8 * data < size <= data  # tensors begin at multiples of a page there
    language = opened.spec.language
    rows = 2 * language.num_hidden_layers * language.num_key_value_heads * language.head_dim
    assert memory.kv_cache == 4 * rows * LIMITS.context
    assert memory.workspace + memory.running - memory.activations == PLACE.usable_bytes
    assert f"{memory.building / GIB:.2f} GiB of host memory" in memory.describe()
    card = plan_build(opened, LIMITS, replace(PLACE, shared=False), available=plenty)
    table = opened.file("embedding.npy").stat().st_size
    assert memory.running - card.running == table  # the table is the host's


def test_engines_that_would_not_fit_the_device(opened: Bundle) -> None:
    with pytest.raises(LimitError, match=r"Orin has 0.50 GiB for them; lower max_context, "):
        plan_build(opened, LIMITS, PLACE, device_memory=GIB // 2, available=plenty)
    with pytest.raises(LimitError, match="Orin has"):
        plan_build(opened, LIMITS, replace(PLACE, usable_bytes=GIB), available=plenty)


def test_a_build_that_would_not_fit_the_host(opened: Bundle) -> None:
    with pytest.raises(
        LimitError, match=r"of host memory, 0.06 GiB are free; close other programs, add swap"
    ):
        plan_build(opened, LIMITS, PLACE, available=lambda: GIB // 16)


def test_swap_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemFree: 9 kB\nSwapFree:     2048 kB\n")
    monkeypatch.setattr(profiles, "available_memory", lambda: 1000)
    assert profiles._free_memory(tmp_path) == 1000 + (2 << 20)
    assert profiles._free_memory(tmp_path / "nowhere") == 1000


def test_building_is_what_was_measured() -> None:
    """No build at true width took more than is reckoned with; see bench/results."""
    results = Path(__file__).parents[2] / "bench" / "results"
    (path,) = results.glob("engines-*.json")
    for graphs in json.loads(path.read_text())["builds"].values():
        for graph in graphs:
            need = MemoryNeed({"": graph["weight_bytes"]}, 0, 0, 0, 0)
            assert 1 <= need.building / graph["peak_bytes"] < 1.3


# Places.


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = HostDriver(capacity=64 * GIB)
    place = this_place(Cuda(Driver(bindings)), LIBRARY)
    assert place.machine == Machine(87, "tensorrt", "10.16.2", "stand-in", 13020)
    assert place.shared
    assert 60 * GIB < place.usable_bytes < 64 * GIB
    orin = target_place("orin-agx-64", LIBRARY, lambda: Cuda(Driver(bindings)))
    assert orin.machine == place.machine
    with pytest.raises(DeviceError, match="here sm_87; h100 is sm_90: run the build there"):
        target_place("h100", LIBRARY, lambda: Cuda(Driver(bindings)))
    with pytest.raises(LimitError, match="unknown target 'orin'"):
        target_place("orin", LIBRARY, lambda: Cuda(Driver(bindings)))


@needs_builder
def test_rtx_builds_for_a_gpu_that_is_elsewhere() -> None:
    rtx = Library.open("tensorrt_rtx")
    assert target_place("a100", rtx).machine == Machine(80, "tensorrt_rtx", rtx.version)
    with pytest.raises(DeviceError, match=r"does not build for orin-agx-64 \(sm_87\).*SM89"):
        target_place("orin-agx-64", rtx)


def test_timings_are_kept_by_version_and_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    path = timing_cache_path(LIBRARY, 87)
    assert str(path) == "/cache/internvl-edge/timing/tensorrt-10.16.2-sm87.cache"
    other = replace(LIBRARY, api=replace(LIBRARY.api, timing_cache=False))
    assert timing_cache_path(other, 87) is None


# Publication.


def test_engines_are_published_with_all_they_depend_on(opened: Bundle) -> None:
    asked: list[Request] = []

    def noting(request: Request, form: bytes, progress: Progress) -> Built:
        asked.append(request)
        return fake_build(request, form, progress)

    engines = build(opened, noting)
    assert find_engines(opened, ORIN) == engines
    assert [path.name for path in (opened.path / FOLDER).iterdir()] == [engines.path.name]
    for request, graph in zip(asked, PLANS, strict=True):
        assert request.graph == str(opened.file(graph))
        assert request.capability is None  # the GPU is here
        assert request.flags == ()
        assert request.workspace > 50 * GIB
        assert "sm87" in str(request.timing_cache)
    assert asked[1].profile["key_positions"].largest == (256,)
    assert asked[1].profile["positions"].smallest == (1, 1)
    assert asked[1].profile["positions"].largest == (1, 64)
    assert asked[0].profile["tiles"].typical == asked[0].profile["tiles"].largest
    assert "not listed" in render_layers(engines)


def test_the_key_tells_shapes_apart(opened: Bundle) -> None:
    build(opened)
    memory = plan_build(opened, LIMITS, PLACE, available=plenty)
    longer = replace(LIMITS, context=300)
    build_engines(opened, PLACE, longer, memory, LIBRARY, build=fake_build)
    assert len(built_engines(opened)) == 2


def test_what_exists_is_not_built_again_unless_told(opened: Bundle) -> None:
    before = build(opened)
    with pytest.raises(OutputError, match="pass overwrite=True"):
        build(opened)
    assert build(opened, overwrite=True) == before


def test_a_build_that_fails_leaves_what_was_there(opened: Bundle) -> None:
    before = build(opened)

    def failing(request: Request, form: bytes, progress: Progress) -> Built:
        if "language" in request.graph:
            raise ExportError("the builder does not take it")
        return fake_build(request, form, progress)

    with pytest.raises(ExportError, match="does not take it"):
        build(opened, failing, overwrite=True)
    assert find_engines(opened, ORIN) == before
    assert [path.name for path in (opened.path / FOLDER).iterdir()] == [before.path.name]


def test_a_bundle_for_onnxruntime_has_no_engines(golden_bundle: Path) -> None:
    with pytest.raises(DeviceError, match="has no engines; export with dialect='tensorrt' or"):
        build(open_bundle(golden_bundle))


KILLED = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import test_build_engines
    from internvl_edge.bundle.manifest import open_bundle

    def slow(request, form, progress):
        built = test_build_engines.fake_build(request, form, progress)
        if "language" in request.graph:
            Path({flag!r}).touch()
            time.sleep(60)
        return built

    test_build_engines.build(open_bundle({bundle!r}, verify="size"), slow)
"""


def test_a_killed_build_leaves_no_engine_that_loads(opened: Bundle, tmp_path: Path) -> None:
    """kill -9 when both plans are written; the next build clears what lies there."""
    flag, here = tmp_path / "both plans", Path(__file__).parent
    code = textwrap.dedent(KILLED).format(tests=str(here), flag=str(flag), bundle=str(opened.path))
    environment = os.environ | {"PYTHONPATH": str(here.parent)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not flag.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert flag.exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (left,) = (opened.path / FOLDER).iterdir()
    assert {path.name for path in left.glob("new-*/*")} == set(PLANS.values())
    assert built_engines(opened) == []
    assert find_engines(opened, ORIN) is None
    with pytest.warns(LeftoverWarning, match="removed an unfinished result .* left by process"):
        engines = build(opened)
    assert [path.name for path in (opened.path / FOLDER).iterdir()] == [engines.path.name]


# TensorRT for RTX itself.


@needs_builder
def test_a_strongly_typed_network_is_asked_for_where_it_must_be(
    opened: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of TensorRT 10, through RTX, which has the flag still."""
    rtx = Library.open("tensorrt_rtx")
    ten = replace(APIS[0], library=rtx.name)
    assert ten.strong_flag
    monkeypatch.setattr(Library, "open", lambda name: replace(rtx, api=ten))
    form = engine_form(opened.file("vision.onnx"), LIMITS.context)
    request = Request(
        rtx.name,
        str(opened.file("vision.onnx")),
        engines_module._profile(form, LIMITS),
        None,
        GIB,
        (),
        None,
        str(tmp_path / "plan"),
    )
    built = engine_builder._build_here(asdict(request), form)
    assert built["errors"] == []
    assert (tmp_path / "plan").stat().st_size > opened.file("vision.data").stat().st_size / 2


@needs_builder
def test_the_command_line_with_the_real_builder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(hidden=128, vision_hidden=128, layers=1, vision_layers=1)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", config)
    path = export_bundle(
        checkpoint, tmp_path / "bundle", vision="fp16", language="fp16", dialect="tensorrt"
    )
    words = ["build", str(path), "--library", "tensorrt_rtx", "--max-context", "256"]
    assert main([*words, "--target", "a100"]) == 0
    said = capsys.readouterr().out
    assert "building takes about" in said
    # wqkv, wo, w1, w3, w2 and the head.
    assert "6 fp16 x fp16, 1 attention fp16" in said.split("language.onnx")[1]
    (engines,) = built_engines(open_bundle(path))
    assert engines.manifest.machine.sm == 80
    for graph, name in PLANS.items():
        weights = path / graph.replace(".onnx", ".data")
        assert (engines.path / name).stat().st_size > weights.stat().st_size
        with engines.plan(graph) as plan:
            assert plan.exists()
    assert main([*words, "--target", "a100"]) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert main([*words, "--target", "orin-nx-16"]) == 2
    assert "build on the device" in capsys.readouterr().err
    assert main([*words, "--target", "a100", "--device-memory", "0.1"]) == 2
    assert "A100 80GB SXM has 0.10 GiB for them" in capsys.readouterr().err
    assert main([*words, "--device-memory", "-1"]) == 2


@needs_builder
def test_progress_of_the_real_builder(opened: Bundle) -> None:
    seen: list[tuple[str, int, int]] = []
    rtx = Library.open("tensorrt_rtx")
    place = Place("A100", Machine(80, rtx.name, rtx.version), 60 * GIB, shared=False)
    memory = plan_build(opened, LIMITS, place, available=plenty)
    build_engines(opened, place, LIMITS, memory, rtx, progress=lambda *step: seen.append(step))
    assert seen
    assert all(0 <= done <= steps for _, done, steps in seen)
    assert any(done == steps for _, done, steps in seen)
