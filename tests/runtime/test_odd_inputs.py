"""What callers hand over that is no file, no array of tiles, or has no end; what is said of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import small_config, write_checkpoint
from PIL import Image

from internvl_edge.bench.answers.datasets import DataError, load_dataset
from internvl_edge.bench.answers.journal import Journal
from internvl_edge.bench.common.stored import read_result
from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.bundle.quoting import LONGEST
from internvl_edge.cli.main import main
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.prepare.prepare import prepare_bundle
from internvl_edge.runtime import (
    BundleError,
    CapacityError,
    ImageError,
    InternVL,
    InternVLEdgeError,
    LimitError,
    PreparedWarning,
    PromptError,
    Sampling,
)
from internvl_edge.runtime.backends.plans import FOLDER as ENGINES
from internvl_edge.runtime.backends.plans import built_engines
from internvl_edge.runtime.backends.prepared import MANIFEST as PREPARED
from internvl_edge.runtime.backends.prepared import find_prepared, prepared_folder
from internvl_edge.runtime.images.decode import load_image
from internvl_edge.runtime.images.sources import MAX_BYTES


def replaced(path: Path, by: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if by == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    return path


@pytest.fixture(params=["pipe", "device"])
def by(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# Files.


def test_image(golden_model: InternVL, tmp_path: Path, by: str) -> None:
    path = replaced(tmp_path / "a.png", by)
    with pytest.raises(ImageError, match=r"cannot read image .*a.png': it is a .*, not a regular"):
        golden_model.generate("What?", [path])


def test_image_larger_than_any_picture(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as stream:
        stream.truncate(40 << 30)  # sparse
    with pytest.raises(ImageError, match=f"it has {40 << 30} bytes, at most {MAX_BYTES} are read"):
        load_image(tmp_path / "a.png")


def test_image_whose_name_is_not_utf8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(bytes(tmp_path) + b"/\xff.png"))
    Image.new("RGB", (3, 2)).save(path, "png")
    assert load_image(path).size == (3, 2)
    path.write_bytes(b"no picture")
    with pytest.raises(ImageError) as caught:
        load_image(path)
    str(caught.value).encode()  # can be printed anywhere


def test_image_folder(golden_bundle: Path, tmp_path: Path, by: str) -> None:
    """What was kept there before is as good as not there."""
    picture = np.zeros((9, 9, 3), np.uint8)
    options: dict[str, Any] = {"device": "cpu", "threads": 1, "reuse_bytes": 0}
    model = InternVL.load(golden_bundle, image_folder=tmp_path, **options)
    first = model.generate("What?", [picture], max_new_tokens=2)
    (kept,) = tmp_path.iterdir()
    replaced(kept, by)
    model = InternVL.load(golden_bundle, image_folder=tmp_path, **options)
    assert model.generate("What?", [picture], max_new_tokens=2).token_ids == first.token_ids


def test_prepared(bundle: Path, by: str) -> None:
    folder = prepare_bundle(bundle)
    replaced(folder / PREPARED, by)
    with pytest.warns(PreparedWarning, match=r"prepared.json: it is a .*prepare --overwrite"):
        InternVL.load(bundle, device="cpu", threads=1)


@pytest.mark.parametrize("content", ["[]", '{"a": NaN}', "[" * 5000, '{"a": 1, "a": 1}'])
def test_prepared_that_is_no_json(bundle: Path, content: str) -> None:
    opened = open_bundle(bundle)
    prepared_folder(opened).mkdir(parents=True)
    (prepared_folder(opened) / PREPARED).write_text(content)
    with pytest.raises(BundleError, match=r"cannot read .*prepared.json: .*prepare --overwrite"):
        find_prepared(opened)


def test_prepared_with_a_flipped_bit(bundle: Path) -> None:
    """Nothing but the files' own hashes told before, and with verify='size' not even those."""
    folder = prepare_bundle(bundle)
    text = (folder / PREPARED).read_bytes()
    opened = open_bundle(bundle, verify="size")
    whole = find_prepared(opened)
    for at in range(0, len(text), 7):
        flipped = bytearray(text)
        flipped[at] ^= 1
        (folder / PREPARED).write_bytes(flipped)
        with pytest.raises(BundleError, match=r"prepared.json"):
            find_prepared(opened)
    (folder / PREPARED).write_bytes(text)
    assert find_prepared(opened) == whole


def test_engines(bundle: Path, by: str) -> None:
    replaced(bundle / ENGINES / "sm87-tensorrt-10.16.2-0123456789ab" / "engines.json", by)
    with pytest.raises(BundleError, match=r"engines.json: it is a .*build the engines again"):
        built_engines(open_bundle(bundle))


def test_report(bundle: Path, by: str, capsys: pytest.CaptureFixture[str]) -> None:
    calibrated = export_bundle(
        write_checkpoint(bundle.parent / "checkpoint", small_config()),
        bundle.parent / "calibrated",
        vision="int8",
        language="int8",
    )
    replaced(calibrated / "quantisation.json", by)
    assert main(["inspect", str(calibrated)]) == 2
    assert "quantisation.json: it is a " in capsys.readouterr().err


def test_data_of_an_evaluation(tmp_path: Path, by: str) -> None:
    with pytest.raises(DataError, match=r"data.jsonl: it is a "):
        load_dataset(replaced(tmp_path / "data.jsonl", by), "anls")
    with pytest.raises(DataError, match=r"answers.jsonl: it is a "):
        Journal(replaced(tmp_path / "answers.jsonl", by), {}, [])
    with pytest.raises(LimitError, match=r"result.json: it is a "):
        read_result(replaced(tmp_path / "result.json", by))


# Tiles.


@pytest.mark.parametrize(
    ("tiles", "said"),
    [
        (np.zeros((1, 56, 56, 3), np.float32), r"not float32 \(1, 56, 56, 3\)"),
        (np.zeros((1, 56, 56, 3), np.int64), r"not int64 \(1, 56, 56, 3\)"),
        (np.zeros((56, 56, 3), np.uint8), r"not uint8 \(56, 56, 3\)"),
        (np.zeros((1, 3, 56, 56), np.uint8), r"not uint8 \(1, 3, 56, 56\)"),
        (np.zeros((1, 28, 28, 3), np.uint8), r"not uint8 \(1, 28, 28, 3\)"),
        ([[1, 2]], "not list"),
        (None, "not NoneType"),
    ],
    ids=str,
)
def test_tiles_that_are_none(golden_model: InternVL, tiles: Any, said: str) -> None:
    ids = [1] + [golden_model.context_id] * 4
    with pytest.raises(ImageError, match=rf"tiles are uint8 of shape \(tiles, 56, 56, 3\).*{said}"):
        golden_model.logits_of_tiles(ids, tiles)


def test_tiles(golden_model: InternVL) -> None:
    ids = [1] + [golden_model.context_id] * 4
    picture = np.full((56, 56, 3), 80, np.uint8)
    logits = golden_model.logits_of_tiles(ids, golden_model.tile(picture))
    assert np.array_equal(logits, golden_model.logits(ids, [picture]))
    none = np.empty((0, 56, 56, 3), np.uint8)
    assert golden_model.logits_of_tiles([1], none).shape == (1, 512)


# Messages.

LONG = "x" * 91_610


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (ImageError, lambda model: model.generate("What?", [LONG])),
        (ImageError, lambda model: model.generate("What?", [f"data:image/png;base64,{LONG}"])),
        (ImageError, lambda model: model.generate("What?", [Path(LONG)])),
        (LimitError, lambda model: model.generate("What?", max_new_tokens=-(10**4000))),
        (LimitError, lambda model: model.generate("What?", [LONG], max_tiles=10**9000)),
        (LimitError, lambda model: model.generate("What?", sampling=Sampling(top_k=-(10**5000)))),
        (PromptError, lambda model: model.generate([10**5000])),
        (BundleError, lambda model: InternVL.load(LONG)),
        (BundleError, lambda model: InternVL.load(f"a/{LONG}/b", verify="size")),
        (BundleError, lambda model: InternVL.load(".", verify=LONG)),
        (BundleError, lambda model: model.tokenizer.token_id(LONG)),
    ],
    ids=range(11),
)
def test_messages_stay_short(
    golden_model: InternVL, error: type[InternVLEdgeError], call: Any
) -> None:
    with pytest.raises(error) as caught:
        call(golden_model)
    assert len(str(caught.value)) < 3 * LONGEST


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_context", 10**5000), ("threads", -(10**5000)), ("device", LONG)],
    ids=["context", "threads", "device"],
)
def test_messages_of_loading_stay_short(golden_bundle: Path, option: str, value: Any) -> None:
    with pytest.raises(InternVLEdgeError) as caught:
        InternVL.load(golden_bundle, **({"device": "cpu"} | {option: value}))
    assert len(str(caught.value)) < 3 * LONGEST


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", LONG],
        ["chat", LONG, "-p", "hi"],
        ["chat", "BUNDLE", LONG, "-p", "hi", "--device", "cpu"],
        ["chat", "BUNDLE", "--max-tiles", LONG],
        ["export", LONG, "-o", "out"],
        ["export", "CHECKPOINT", "-o", LONG],
        ["export", "CHECKPOINT", "-o", "out", "--vision", LONG],
        [LONG],
    ],
    ids=range(8),
)
def test_messages_of_the_command_line_stay_short(
    words: list[str],
    golden_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", small_config())
    places = {"BUNDLE": str(golden_bundle), "CHECKPOINT": str(checkpoint)}
    try:
        status = main([places.get(word, word) for word in words])
    except SystemExit as end:  # argparse's own
        status = end.code
    assert status == 2
    assert len(capfd.readouterr().err.split("error: ")[1]) < 4 * LONGEST


# ONNX Runtime's own words.


@pytest.mark.parametrize("name", ["vision.onnx", "language.onnx"])
def test_nothing_on_stdout_of_a_graph_that_does_not_load(
    bundle: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """It would print, fall back to the same provider, and fail again."""
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    (bundle / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} does not load"):
        InternVL.load(bundle, device="cpu", threads=1, verify="size")
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("kind", [MemoryError, RuntimeError])
def test_memory_is_not_the_bundles_fault(
    bundle: Path, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object, **options: object) -> None:
        raise kind("[ONNXRuntimeError] : 6 : Exception during initialization: std::bad_alloc")

    monkeypatch.setattr("onnxruntime.InferenceSession", refuse)
    with pytest.raises(CapacityError, match=r"^no memory to load .*\.onnx"):
        InternVL.load(bundle, device="cpu", threads=1)


def test_nothing_on_stdout_of_data_cut_short(
    bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    graph = (bundle / "vision.onnx").read_bytes()
    shutil.copyfile(bundle / "language.onnx", bundle / "vision.onnx")
    with (bundle / "vision.onnx").open("r+b") as stream:
        stream.truncate(len(graph))
    assert manifest["files"]["vision.onnx"]["bytes"] == len(graph)
    with pytest.raises(BundleError):
        InternVL.load(bundle, device="cpu", threads=1, verify="size")
    assert capfd.readouterr().out == ""
