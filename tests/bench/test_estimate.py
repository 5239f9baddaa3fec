"""The estimate against public figures and data sheets; what fits, and what would."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import small_config, write_config
from command_line import error_line

from internvl_edge.bench.estimate.model import (
    Device,
    Efficiency,
    Request,
    memory_bytes,
    predict,
    remedies,
    weights_of,
)
from internvl_edge.bench.estimate.published import FIGURES, Figure, published_error
from internvl_edge.bench.scale.members import internvl_1_5
from internvl_edge.bundle.errors import LimitError
from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.cli.main import main
from internvl_edge.export.tensorrt.targets import GIB, TARGETS, get_target

pytestmark = pytest.mark.slow(seconds=1)

#: What docs/performance.md states: the worst of the published figures of each kind.
STATED = {"decode": 0.25, "prefill": 0.20}
INT4 = Request("int8", "int4", "int8", 13, 100, 4452)
FLOAT = Request("fp16", "fp16", "fp16", 13, 100, 4452)


@pytest.mark.parametrize("figure", FIGURES, ids=lambda f: f"{f.model}-{f.target}-{f.phase}")
def test_published_figures(figure: Figure) -> None:
    assert abs(figure.error) <= STATED[figure.phase]


def test_published_error_is_over_the_figures() -> None:
    found = published_error("decode", "orin-agx-64")
    assert found is not None
    assert found.count == 6
    assert 0 < found.median <= found.worst <= STATED["decode"]
    assert published_error("decode", "l4") is None


# Headline figures of the data sheets, dense, in tera-operations a second. Jetson's are sold as
# sparse INT8 with the deep learning accelerators: GPU alone 170, 108 (AGX), half of it dense.
@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("orin-agx-64", "int8", 85),
        ("orin-agx-32", "int8", 54),
        ("orin-nano-8", "int8", 33),
        ("rtx-4090", "float16", 165.2),
        ("rtx-4090", "int8", 660.6),
        ("rtx-4090", "float32", 82.6),
        ("l4", "float16", 121),
        ("l4", "int8", 242.5),
        ("a100", "float16", 312),
        ("a100", "int8", 624),
        ("h100", "float16", 989.4),
        ("h100", "int8", 1978.9),
        ("h200", "float16", 989.4),
    ],
)
def test_rates_are_the_data_sheets(name: str, dtype: str, tera: float) -> None:
    target = get_target(name)
    assert target.rate(dtype, target.mode(None)) == pytest.approx(tera * 1e12, rel=0.02)


def test_targets_are_told_apart_and_have_sources() -> None:
    assert len({target.name for target in TARGETS}) == len(TARGETS)
    for target in TARGETS:
        assert all(source.startswith("https://") for source in target.sources)
        speeds = [target.rate("float16", mode) for mode in target.modes]
        assert speeds[0] == max(speeds)
        assert 0 < target.usable_bytes < target.memory_bytes


def test_memory_of_internvl_1_5() -> None:
    spec = internvl_1_5()
    memory = memory_bytes(spec, FLOAT, shared=True)
    # 25.5 B parameters at two bytes, of which the unused rest of the tower's are none.
    weights = sum(size for name, size in memory.items() if "weights" in name or "table" in name)
    assert weights == pytest.approx(2 * 25.5e9, rel=0.01)
    # 48 layers, 8 heads of 128, keys and values, two bytes, a position.
    assert memory["KV cache"] == 4452 * 48 * 8 * 128 * 2 * 2
    assert "embedding table" not in memory_bytes(spec, FLOAT, shared=False)


def test_decode_reads_the_weights_once() -> None:
    """By hand: bytes over the bandwidth and its share."""
    spec, target = internvl_1_5(), get_target("orin-agx-64")
    weights = weights_of(spec, INT4)
    device = Device.of_target(target, target.modes[0], INT4, Efficiency(0.5, 0.5))
    speed = predict(weights, device, tiles=13, prompt_tokens=3428)
    read = weights.parts["decoder_linears"] + weights.parts["head"] + 3428 * 48 * 8 * 128 * 2
    assert speed.decode_tokens_per_s == pytest.approx(0.5 * 204.8e9 / read, rel=1e-6)
    assert speed.ttft_s == pytest.approx(speed.vision_s + speed.prefill_s)


def test_a_slower_power_mode_is_slower() -> None:
    spec, target = internvl_1_5(), get_target("orin-agx-64")
    weights = weights_of(spec, INT4)
    times = [
        predict(
            weights, Device.of_target(target, mode, INT4, None), tiles=13, prompt_tokens=3428
        ).ttft_s
        for mode in target.modes
    ]
    assert times == sorted(times)


def fits(request: Request, name: str) -> bool:
    target = get_target(name)
    memory = memory_bytes(internvl_1_5(), request, shared=target.shared)
    return sum(memory.values()) <= target.usable_bytes


def test_what_fits() -> None:
    assert fits(INT4, "orin-agx-32")
    assert not fits(FLOAT, "orin-agx-32")
    assert fits(FLOAT, "a100")
    assert not fits(INT4, "orin-nx-16")


def changed(request: Request, text: str) -> Request:
    """A request with the options a remedy names."""
    words = text.split()
    options: dict[str, Any] = dict(zip((word[2:] for word in words[::2]), words[1::2], strict=True))
    numbers = {name: int(options.pop(name)) for name in ("tiles", "context") if name in options}
    return replace(request, **options, **numbers)


@pytest.mark.parametrize("name", ["orin-agx-32", "rtx-4090", "l4"])
@pytest.mark.parametrize("context", [4452, 32768])
def test_remedies_fit_as_they_say(name: str, context: int) -> None:
    spec, target = internvl_1_5(), get_target(name)
    request = replace(FLOAT, context=context)
    found = remedies(spec, request, target.usable_bytes, shared=target.shared)
    assert found
    for remedy in found:
        smaller = changed(request, remedy.text)
        total = sum(memory_bytes(spec, smaller, shared=target.shared).values())
        assert total == remedy.total <= target.usable_bytes


def test_remedies_of_each_kind() -> None:
    """A little too much: a shorter context is enough, then fewer tiles, or a lower precision."""
    spec, request = internvl_1_5(), replace(INT4, context=32768)
    total = sum(memory_bytes(spec, request, shared=True).values())
    texts = [remedy.text for remedy in remedies(spec, request, total - GIB, shared=True)]
    assert len(texts) == 1  # nothing is below int4
    assert texts[0].startswith("--tiles 13 --context ")
    least = replace(INT4, context=INT4.prompt_tokens(spec) + 1024)
    small = sum(memory_bytes(spec, least, shared=True).values()) - 1
    (fewer,) = remedies(spec, request, small, shared=True)
    assert fewer.text.startswith("--tiles 12 ")
    assert remedies(spec, request, GIB, shared=True) == []


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (replace(INT4, context=3000), "raise --context or lower --tiles"),
        (replace(INT4, context=1 << 20), "this model ends at"),
        (replace(INT4, tiles=-1), "at least 0"),
    ],
)
def test_lengths_that_do_not_go_together(request_: Request, says: str) -> None:
    with pytest.raises(LimitError, match=says):
        memory_bytes(internvl_1_5(), request_, shared=True)


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["bench", "estimate", *map(str, arguments)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("target", [target.name for target in TARGETS])
def test_command_for_every_target(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "internvl-1.5", "--target", target, "--language", "int4")
    assert "fits: " in text
    assert "source: https://" in text
    assert "nothing was run" in text


def test_command_says_what_would_fit(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "internvl-chat-v1-5", "--target", "orin-agx-32")
    assert "fits: no" in text
    assert "would fit: --vision" in text
    assert "holds it as it is: orin-agx-64" in text
    nothing = printed(capsys, "internvl-chat-v1-5", "--target", "orin-nano-8")
    assert "no precision and no number of tiles makes it fit" in nothing


def test_command_on_a_bundle(integer_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--target", "h100", "--block", 32, "--prompt", 16, "--context", 128, "--json")
    report = json.loads(printed(capsys, integer_bundle, *options))
    manifest = open_bundle(integer_bundle, verify="size").manifest
    assert report["request"]["vision"] == manifest.vision == "int8"
    # Its parts were written with this very recipe.
    stored = manifest.parts["decoder_linears"].bytes + manifest.parts["head"].bytes
    assert report["memory_bytes"]["decoder weights"] == stored


def test_command_on_a_config_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(tmp_path / "model", small_config())
    options = ("--target", "l4", "--tiles", 1, "--prompt", 16, "--context", 100)
    assert "fits: yes" in printed(capsys, tmp_path / "model", *options)


def test_command_on_a_result(
    latency_files: Path, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads(printed(capsys, latency_files / "result.json", "--json"))
    rows = report["rows"]
    assert {row["phase"] for row in rows} == {"vision", "prefill", "itl"}
    points = result["models"][0]["points"]
    for row in rows:
        point = next(point for point in points if point["tiles"] == row["tiles"])
        assert row["measured_s"] == point["phases"][row["phase"]]["median"]
        assert row["error"] == pytest.approx(row["predicted_s"] / row["measured_s"] - 1)
        # Less than the whole ceiling is assumed: never faster than the bound.
        if row["phase"] != "itl":  # which is at the answer's middle there, at its start here
            assert row["predicted_s"] > point["limits"][row["phase"]]["bound_s"]
    assert "error of prefill" in printed(capsys, latency_files / "result.json")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["internvl-1.5"], "--target is missing; known: orin-agx-64"),
        (["internvl-1.5", "--target", "orin"], "unknown target 'orin'"),
        (["internvl-1.5", "--target", "l4", "--power", "15w"], "no power mode '15w'"),
        (["internvl-1.5", "--target", "l4", "--tiles", "-2"], "at least 0"),
        (["internvl-1.5", "--target", "l4", "--context", "99"], "raise --context"),
        (["internvl-1.5", "--target", "l4", "--arithmetic", "0.5"], "go together"),
        (
            ["internvl-1.5", "--target", "l4", "--arithmetic", "2", "--bandwidth", "1"],
            "--arithmetic is 2",
        ),
        (["no-such-model", "--target", "l4"], "known without files: internvl-1.5"),
    ],
)
def test_bad_options(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in error_line(capsys, "bench", "estimate", *options)


def test_a_damaged_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "result.json").write_text("{}")
    assert "no result of" in error_line(capsys, "bench", "estimate", tmp_path / "result.json")
