"""Every phase is measured, stored as the schema says, and refused in one line when asked badly."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import BLOCK, error_line, run

from internvl_edge.bench.common.machine import busy_note, cache_note, command_line, describe_machine
from internvl_edge.bench.common.stored import read_result, violation, write_result
from internvl_edge.bench.common.tables import PHASES, render_text
from internvl_edge.bench.latency.measure import (
    bundle_name,
    check_tiles,
    grid,
    grid_tiles,
    picture,
    question,
)
from internvl_edge.bundle.errors import LimitError, UsageError
from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.cli.main import main
from internvl_edge.runtime import InternVL

WITH_PICTURE = {"decode_image", "tile", "vision", "vision_per_tile"}


def test_result_follows_the_schema(latency_files: Path, result: dict[str, Any]) -> None:
    assert violation(result) is None
    assert read_result(latency_files / "result.json") == result
    written = {path.name for path in latency_files.iterdir()}
    assert written == {"result.json", "report.html", "plots.png"}


def runs_of(result: dict[str, Any]) -> int:
    """Two rounds were asked for; a machine that does not settle takes more."""
    settings = result["settings"]
    assert settings["rounds"] >= 2
    return int(settings["rounds"] * settings["runs"])


def test_every_phase(result: dict[str, Any]) -> None:
    text, pictures = result["models"][0]["points"]
    assert set(pictures["phases"]) == set(PHASES)
    assert set(text["phases"]) == set(PHASES) - WITH_PICTURE
    for point in (text, pictures):
        phases = point["phases"]
        assert len(phases["prefill"]["samples"]) == runs_of(result)
        assert len(phases["itl"]["samples"]) == runs_of(result) * (4 - 1)
        # A part is not longer than the whole, run by run.
        nested = [phases[name]["samples"] for name in ("prefill", "ttft", "end_to_end")]
        parts = zip(*nested, strict=True)
        assert all(prefill <= ttft <= end for prefill, ttft, end in parts)
        for name, limit in point["limits"].items():
            share = 100 * limit["bound_s"] / phases[name]["median"]
            assert limit["percent"] == pytest.approx(share)
    phases = pictures["phases"]
    assert phases["vision_per_tile"]["median"] == pytest.approx(phases["vision"]["median"] / 4)
    # 4 tokens a tile at 56 px; the template's own tokens come on top.
    assert pictures["prompt_tokens"] - text["prompt_tokens"] >= 4 * 4


def test_text_shows_every_median(result: dict[str, Any]) -> None:
    text = render_text(result)
    for point in result["models"][0]["points"]:
        for summary in point["phases"].values():
            assert f"{1e3 * summary['median']:9.3f}" in text
    assert "energy" in text
    assert "resident" in text


def broken(result: dict[str, Any], how: str) -> dict[str, Any]:
    point = result["models"][0]["points"][0]
    match how:
        case "phase missing":
            del point["phases"]["prefill"]
        case "unknown key":
            point["surprise"] = 1
        case "negative time":
            point["phases"]["ttft"]["samples"][0] = -1.0
        case "text for a number":
            result["ceilings"]["read_bytes_per_s"] = "fast"
        case "no model":
            result["models"] = []
        case "unknown precision":
            result["models"][0]["precision"]["kv"] = "int3"
        case "not a number":
            point["phases"]["ttft"]["median"] = float("nan")
    return result


@pytest.mark.parametrize(
    "how",
    [
        "phase missing",
        "unknown key",
        "negative time",
        "text for a number",
        "no model",
        "unknown precision",
        "not a number",
    ],
)
def test_broken_result_is_refused(result: dict[str, Any], how: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.json"
    write_result(broken(result, how), file)
    with pytest.raises(LimitError, match=r"damaged|NaN is not a number"):
        read_result(file)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cannot read"),
        ("[" * 100_000, "cannot read"),
        ("[]", "no result of"),
        ('{"format": "internvl-edge latency", "version": 1}', "version 1"),
    ],
)
def test_other_files_are_refused(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(LimitError, match=says):
        read_result(file)


def test_grid_is_every_combination() -> None:
    points = grid([0, 1, 4], [8, 16], [1])
    assert len(points) == len(set(points)) == 6


@pytest.mark.parametrize("tiles", [0, 1, 3, 4, 5, 7, 13])
def test_pictures_make_the_tiles(golden_model: InternVL, tiles: int) -> None:
    check_tiles(golden_model.spec, tiles)
    image = picture(golden_model.spec, tiles)
    if tiles == 0:
        assert image is None
        return
    assert image is not None
    assert len(golden_model.tile(image, grid_tiles(golden_model.spec, tiles))) == tiles


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_question_has_at_most_so_many_tokens(golden_model: InternVL, tokens: int) -> None:
    text = question(golden_model, tokens)
    assert text == " ".join(["total"] * (text.count(" ") + 1))
    assert len(text.split()) == 1 or len(golden_model.tokenizer.encode(text)) <= tokens + 1


def test_no_question_is_longer_than_the_context(golden_model: InternVL) -> None:
    """Nor is it made: of 100 million tokens it was a traceback for want of memory."""
    limit = golden_model.max_context
    with pytest.raises(UsageError, match=f"--prompt is {limit + 1}, this model ends at {limit}"):
        question(golden_model, limit + 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tiles", "-1"], "--tiles has -1"),
        (["--tiles", "2"], "this model cuts no picture into so many, but 1"),
        (["--tiles", "1026"], "--tiles 1026: at most 1024"),
        (["--prompt", "0"], "--prompt has 0"),
        (["--new-tokens", "0"], "--new-tokens has 0"),
        (["--repeat", "0"], "--repeat 0"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--threads", "0"], "--threads is 0"),
        (["--json", "/no/such/place.json"], "cannot write"),
        (["--html", "."], "it is a directory"),
    ],
)
def test_bad_options(
    options: list[str],
    says: str,
    integer_bundle: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert says in error_line(capsys, "bench", "latency", integer_bundle, *options)


def test_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error_line(capsys, "bench", "latency", tmp_path)


def test_names_of_equal_directories_are_numbered() -> None:
    paths = [Path("a/x"), Path("b/x"), Path("y")]
    names = [bundle_name(path, number, paths) for number, path in enumerate(paths)]
    assert names == ["x (1)", "x (2)", "y"]


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    machine = describe_machine(1, root=tmp_path)
    assert machine["load"] is None
    assert machine["cache_bytes"] is None
    assert busy_note(machine) is None
    assert cache_note(machine, "m", 1) is None


def test_a_machine_that_tells(tmp_path: Path) -> None:
    cpu = tmp_path / "sys/devices/system/cpu/cpu0"
    files = {
        cpu / "cpufreq/scaling_cur_freq": "1200000\n",
        cpu / "cpufreq/scaling_governor": "powersave\n",
        cpu / "cache/index0/size": "32K\n",
        cpu / "cache/index3/size": "4M\n",
        tmp_path / "proc/loadavg": "99.5 1 1 1/2 3\n",
        tmp_path / "proc/cpuinfo": "processor : 0\nmodel name\t: Some CPU\n",
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    machine = describe_machine(2, root=tmp_path)
    assert (machine["frequency_mhz"], machine["governor"]) == (1200.0, "powersave")
    assert (machine["cpu"], machine["cache_bytes"]) == ("Some CPU", 4 << 20)
    assert "load 99.5" in (busy_note(machine) or "")
    assert "fit the 4 MB" in (cache_note(machine, "m", 1000) or "")
    assert cache_note(machine, "m", 5 << 20) is None


def test_a_result_says_what_was_typed_without_folders(tmp_path: Path) -> None:
    typed = ["/usr/local/bin/internvl-edge", "bench", "memory", "/data/b 2", "--tiles", "13"]
    said = command_line([*typed, "--json=/data/x.json", "near/by", "--ratio=1/2", "/data/b2/"])
    assert said == (
        "internvl-edge bench memory 'b 2' --tiles 13 --json=x.json near/by --ratio=1/2 b2/"
    )
    assert describe_machine(1, root=tmp_path)["command"] == command_line(sys.argv)


def test_stop_token_does_not_end_an_answer(result: dict[str, Any], integer_bundle: Path) -> None:
    manifest = open_bundle(integer_bundle, verify="size").manifest
    model = result["models"][0]
    assert model["file_bytes"] == sum(entry.bytes for entry in manifest.files.values())
    assert model["spec"] == json.loads(json.dumps(manifest.spec.to_dict()))
    for point in model["points"]:
        gaps = runs_of(result) * (point["new_tokens"] - 1)
        assert len(point["phases"]["itl"]["samples"]) == gaps


def test_compare_of_missing_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(
        capsys, "bench", "latency", "compare", tmp_path / "a.json", tmp_path / "b.json"
    )
    assert "cannot read" in line


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("scipy", ("latency", "compare", "result.json", "result.json")),
        ("jsonschema", ("latency", "compare", "result.json", "result.json")),
        ("jsonschema", ("estimate", "result.json")),
    ],
)
def test_a_missing_package_is_named(
    package: str, arguments: tuple[str, ...], latency_files: Path
) -> None:
    given = [str(latency_files / text) if ".json" in text else text for text in arguments]
    process = run("bench", *given, hook="import sys\n" + BLOCK.format(names=[package]))
    assert process.returncode == 2
    assert package in process.stderr
    assert process.stderr.endswith("pip install 'internvl-edge[bench]'\n")
    assert process.stderr.count("\n") == 1


def test_commands_have_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("latency", "latency profile", "latency compare", "estimate"):
        with pytest.raises(SystemExit) as ended:
            main(["bench", *name.split(), "--help"])
        assert ended.value.code == 0
    assert "--target" in capsys.readouterr().out
