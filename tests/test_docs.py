"""The documents: links lead somewhere, commands parse, Python runs, tables agree with the code."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documents import ROOT, Document, documents, read
from PIL import Image

from internvl_edge.bundle import errors
from internvl_edge.bundle.extras import example_room
from internvl_edge.cli.commands import COMMANDS, PROGRAM, Command
from internvl_edge.cli.main import main
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.checkpoint.family import known_families
from internvl_edge.runtime import InternVL

README = read(ROOT / "README.md")
PYTHON_API = read(ROOT / "docs" / "python-api.md")
RESULTS = ROOT / "bench" / "results"
ROOMS = ("bench", "bundle", "calib_data", "cli", "docs", "examples", "export", "kernels", "runtime")

each_document = pytest.mark.parametrize("document", documents(), ids=lambda found: found.name)


@each_document
def test_links_lead_somewhere(document: Document) -> None:
    for link in document.links():
        target, _, anchor = link.partition("#")
        if re.match(r"https?://", target):
            continue
        found = (document.path.parent / target).resolve() if target else document.path
        assert found.is_relative_to(ROOT), link
        assert found.exists(), link
        assert not anchor or anchor in read(found).anchors(), link


@each_document
def test_files_that_are_named_are_there(document: Document) -> None:
    names = "|".join((*ROOMS, "tests"))
    for span in document.spans():
        if re.fullmatch(rf"({names})/[\w./-]*", span) and "/NAME" not in span:
            assert (ROOT / span).exists(), span


@each_document
def test_commands_parse(document: Document, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in document.commands():
        if words[0] != PROGRAM or "…" in words:
            continue
        command, path = found(words[1:])
        if len(path) == len(words) - 1:
            continue  # only named
        assert command.module is not None, words
        module = import_module(f"internvl_edge.{command.module}")
        monkeypatch.setattr(module, "run", lambda arguments: 0)
        assert status(words[1:]) == 0, words


@each_document
def test_commands_that_are_named_exist(document: Document) -> None:
    """Also those without the program's name: `bench memory --tiles 1`, `prepare B`."""
    for span in document.spans():
        words = [word for word in span.split() if word != "…"]
        if words[0] == PROGRAM:
            words = words[1:]
        if not words or words[0] not in COMMANDS.parts:
            continue
        command, path = found(words)
        rest = words[len(path) :]
        assert command.module is not None or not rest, span


@each_document
def test_options_that_are_named_exist(document: Document, options: set[str]) -> None:
    """Those without a command: `--kv int8`, or of one that is only named: `bench latency --png`."""
    modules = [words[2] for words in document.commands() if words[:2] == ["python", "-m"]]
    known = options.union(*(re.findall('"(--[a-z-]+)"', source(name)) for name in modules))
    for span in document.spans():
        words = span.split()
        if words[0].startswith("--") or words[0] in COMMANDS.parts:
            assert {word for word in words if re.fullmatch("--[a-z-]+", word)} <= known, span


def test_options_of_the_picks_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internvl_edge.export.command.run", lambda arguments: 0)
    for row in table_rows(README):
        if row[1].startswith("`--"):
            assert status(["export", "C", "-o", "B", *row[1].strip("`").split()]) == 0


@pytest.fixture(scope="module")
def options() -> set[str]:
    """Options of every command."""
    return set(re.findall(r"--[a-z][a-z-]*", "".join(helps(COMMANDS))))


def helps(command: Command) -> Iterator[str]:
    if command.module is not None:
        parser = argparse.ArgumentParser()
        import_module(f"internvl_edge.{command.module}").add_arguments(parser)
        yield parser.format_help()
    for part in command.parts.values():
        yield from helps(part)


@each_document
def test_modules_targets_and_extras_exist(document: Document) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[0].split())
    for words in document.commands():
        if words[0] == "make":
            assert {word for word in words[1:] if re.fullmatch(r"[a-z-]+", word)} <= targets, words
        elif words[0] == "pytest":
            assert all((ROOT / word).exists() for word in words[1:]), words
        elif words[0] == "pip":
            named = re.findall(r"\[([a-z,]+)\]", " ".join(words))
            assert {extra for group in named for extra in group.split(",")} <= {*extras()}, words
        elif re.fullmatch(r"python3?", words[0]) and words[1] == "-m":
            text = source(words[2])
            if words[2].startswith(("internvl_edge.", "campaign.")):
                named = [word for word in words[3:] if word.startswith("--")]
                assert all(f'"{word}"' in text for word in named), words


def source(name: str) -> str:
    """Text of a module, which is not imported: some need torch."""
    specification = importlib.util.find_spec(name)
    assert specification is not None, name
    assert specification.origin is not None, name
    return Path(specification.origin).read_text(encoding="utf-8")


def test_the_readme_is_a_page() -> None:
    assert len(README.path.read_text(encoding="utf-8").splitlines()) <= 130


def test_the_page_of_errors_lists_warnings() -> None:
    """Classes of errors have a test of their own, in tests/bundle."""
    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind)]
    warnings = [kind for kind in kinds if issubclass(kind, errors.InternVLEdgeWarning)]
    seen = [[kind.__name__, first_line(kind)] for kind in warnings[1:]]
    rows = [row for row in table_rows(read(ROOT / "docs" / "errors.md")) if row[0] != "---"]
    assert [row for row in rows if len(row) == 2][1:] == seen


@pytest.mark.parametrize("name", ["README.md", "docs/adding-a-model.md"])
def test_every_decoder_has_a_line(name: str) -> None:
    cells = [row[0] for row in table_rows(read(ROOT / name))]
    listed = {found for cell in cells for found in re.findall(r"`(\w+ForCausalLM)`", cell)}
    assert listed == {name for family in known_families() for name in family.architectures}


def test_dependencies_have_a_reason() -> None:
    """A line names the packages, the extras they belong to, and why."""
    rows = table_rows(read(ROOT / "docs" / "dependencies.md"))
    for extra, packages in extras().items():
        listed = [row[0] for row in rows if f"`{extra}`" in row[1] and row[2]]
        for package in set(packages) - {"internvl-edge"}:
            assert package in ", ".join(listed).split(", "), (extra, package)


def test_answers_of_each_precision_are_the_stored_ones() -> None:
    stored = json.loads((RESULTS / "accuracy-tiny_ocr-2026-11-21.json").read_text("utf-8"))
    measured = [
        [
            f"{row['megabytes']:.1f} MB",
            f"{row['score']['mean']:.2%}",
            f"{row['score']['low'] * 100:.2f} to {row['score']['high'] * 100:.2f}",
            f"{row['naive']['mean']:.2%}" if row["naive"] else "",
        ]
        for row in stored["rows"]
        if "4-bit head" not in row["name"]  # in the text below the table
    ]
    rows = [row for row in table_rows(read(ROOT / "docs" / "quantisation.md")) if len(row) == 5]
    assert [row[1:] for row in rows[2:]] == measured
    picks = [row for row in table_rows(README) if row[3:4] and row[3].endswith("%")]
    assert len(picks) == 4
    assert all(row[2:4] in [figures[:2] for figures in measured] for row in picks)


def test_estimates_are_what_the_command_gives(capsys: pytest.CaptureFixture[str]) -> None:
    performance = read(ROOT / "docs" / "performance.md")
    commands = [words for words in performance.commands() if words[1:3] == ["bench", "estimate"]]
    rows = [row for row in table_rows(performance) if re.search(r" of .* GiB", row[1])]
    assert len(rows) == len(commands) == 3
    for words, (_, memory, *speeds) in zip(commands, rows, strict=True):
        report = estimated(words, capsys)
        total, usable = memory.removesuffix(" GiB").split(" of ")
        assert_rounded(total, report["total_bytes"] / 2**30)
        assert_rounded(usable, report["usable_bytes"] / 2**30)
        speed = report["speed"]
        values = (speed["vision_tile_s"] * 1e3, speed["ttft_s"], speed["decode_tokens_per_s"])
        for cell, value in zip(speeds, values, strict=True):
            assert_rounded(cell.split()[0], value)


def test_estimates_of_power_modes_are_what_the_command_gives(
    capsys: pytest.CaptureFixture[str],
) -> None:
    jetson = read(ROOT / "docs" / "jetson.md")
    (words,) = [words for words in jetson.commands() if "--power" in words]
    rows = [row for row in table_rows(jetson) if re.fullmatch(r"MAXN|\d+ W", row[0])]
    assert len(rows) == 4
    for mode, *cells in rows:
        speed = estimated([*words[:-1], mode.replace(" ", "").lower()], capsys)["speed"]
        for cell, value in zip(
            cells,
            (
                speed["vision_tile_s"] * 1e3,
                speed["prefill_tokens_per_s"],
                speed["ttft_s"],
                speed["decode_tokens_per_s"],
            ),
            strict=True,
        ):
            assert_rounded(cell, value)


def estimated(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> Any:
    assert main([*words[1:], "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def assert_rounded(cell: str, value: float) -> None:
    """A figure is what a value rounds to, with as many digits as it has."""
    digits = len(cell.partition(".")[2])
    assert float(cell) == round(value, digits), (cell, value)


def test_decisions_are_listed_in_order() -> None:
    """ARCHITECTURE.md links to each, by its title."""
    listed = re.findall(
        r"^- \[(.+)\]\(docs/decisions/(.+)\)$",
        (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    there = sorted(path.name for path in (ROOT / "docs" / "decisions").glob("*.md"))
    assert [name for _, name in listed] == there
    for number, (title, name) in enumerate(listed, start=1):
        text = (ROOT / "docs" / "decisions" / name).read_text(encoding="utf-8")
        assert text.startswith(f"# {number:03d}: {title}\n\nDecided 20")


def python_blocks() -> Iterator[Any]:
    for document in (README, PYTHON_API):
        blocks = [text for language, text in document.blocks if language == "python"]
        for number, text in enumerate(blocks):
            yield pytest.param(text, id=f"{document.name}-{number}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> InternVL:
    folder = tmp_path_factory.mktemp("docs") / "bundle"
    export_bundle(example_room() / "checkpoint", folder)
    return InternVL.load(folder, device="cpu", threads=1)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> InternVL:
    checkpoint = Path(__file__).with_name("families") / "orig_qwen3" / "model"
    exported = export_bundle(checkpoint, tmp_path_factory.mktemp("thinker") / "bundle")
    return InternVL.load(exported, device="cpu", threads=1)


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand where every file that the blocks name is."""
    av = pytest.importorskip("av")
    pillow_heif = pytest.importorskip("pillow_heif")
    pytest.importorskip("pypdfium2")
    monkeypatch.chdir(tmp_path)
    Path("scans").mkdir()
    with Image.open(example_room() / "receipt.png") as opened:
        receipt = opened.convert("RGB")
    for name in ("receipt.jpg", "scans/receipt.jpg", "photo.jpg", "a.png", "b.png", "page.png"):
        receipt.save(name)
    pillow_heif.from_pillow(receipt).save("phone.heic")
    receipt.save("report.pdf", save_all=True, append_images=[receipt, receipt])
    with av.open("clip.mp4", "w") as clip:
        stream = clip.add_stream("mpeg4", rate=2)
        stream.width, stream.height = 64, 48
        for _ in range(24):
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))
            clip.mux(stream.encode(frame))
        clip.mux(stream.encode())


@pytest.mark.parametrize("text", [*python_blocks()])
def test_python_runs(
    text: str,
    model: InternVL,
    thinker: InternVL,
    pictures: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each block by itself, on the demo's model, whatever bundle and device it names; on one that
    thinks where the name is of an InternVL 3.5."""
    signature = inspect.signature(InternVL.load)

    def load(*arguments: object, **settings: object) -> InternVL:
        named = signature.bind(*arguments, **settings).arguments["path"]
        return thinker if str(named).startswith("internvl3_5") else model

    monkeypatch.setattr(InternVL, "load", load)
    exec(compile(text, "block", "exec"), {})


def found(words: Sequence[str]) -> tuple[Command, list[str]]:
    """Follow words through the table of commands: the last one, and the words that led there."""
    command, path = COMMANDS, []
    for word in words:
        if word not in command.parts:
            break
        command = command.parts[word]
        path.append(word)
    return command, path


def status(words: Sequence[str]) -> object:
    """Exit status of a command whose `run` does nothing."""
    try:
        return main(words)
    except SystemExit as ended:
        return ended.code


def extras() -> dict[str, list[str]]:
    """Extras of this distribution, each with the packages it names."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    lists = re.findall(r"^(\w+) = (\[.*?\])$", section, re.MULTILINE | re.DOTALL)
    return {
        name: [re.split("[^\\w-]", requirement)[0] for requirement in ast.literal_eval(text)]
        for name, text in lists
    }


def first_line(kind: type) -> str:
    text = inspect.getdoc(kind)
    assert text is not None
    return text.splitlines()[0].removesuffix(".")


def table_rows(document: Document) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in document.prose.splitlines()
        if line.startswith("|")
    ]
