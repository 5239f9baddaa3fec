"""The command line: exit statuses and one line of error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import GOLDEN
from command_line import BLOCK, CHAT, CHECKPOINT, IMAGE, command, error_line, run
from safetensors.numpy import load_file, save_file

from internvl_edge.bundle.contract import MANIFEST
from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.cli.main import main
from internvl_edge.runtime import InternVL
from internvl_edge.runtime.images.decode import load_image

# Every class of error.


def test_checkpoint_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("export", "inspect"):
        more = ["-o", tmp_path / "bundle"] if name == "export" else []
        line = error_line(capsys, name, tmp_path / "none", *more)
        assert "is not a checkpoint directory" in line
    assert os.listdir(tmp_path) == []


def test_checkpoint_error_in_the_middle(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_file(checkpoint / "model.safetensors")
    state["language_model.output.weight"][-1, -1] = np.nan
    save_file(state, checkpoint / "model.safetensors")
    line = error_line(capsys, "export", checkpoint, "-o", checkpoint.parent / "bundle")
    assert "NaN" in line
    assert os.listdir(checkpoint.parent) == ["checkpoint"]


def test_export_error(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(capsys, "export", CHECKPOINT, "-o", bundle)
    assert "exists; choose another output or pass --overwrite" in line


def test_a_digit_that_is_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Python calls it one: `int` does not."""
    words = ("-o", tmp_path / "bundle", "--language", "int4", "--keep-fp16", "\u00b2")
    assert "--keep-fp16 has '\u00b2', which no" in error_line(capsys, "export", CHECKPOINT, *words)


def test_a_file_of_a_checkpoint_is_no_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = CHECKPOINT / "config.json"
    line = error_line(capsys, "export", file, "-o", tmp_path / "bundle")
    assert f"{file} is no folder; give the folder of a Hugging Face checkpoint" in line


def test_bundle_error(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle / "vision.data").unlink()
    assert "vision.data is missing" in error_line(capsys, "chat", bundle, "-p", "Hi", *CHAT)


def test_bundle_error_of_inspect(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle / MANIFEST).write_text("{")
    assert "cannot read" in error_line(capsys, "inspect", bundle)


def test_size_mode(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = (bundle / "special_tokens_map.json").read_bytes()
    (bundle / "special_tokens_map.json").write_bytes(data.replace(b" ", b"\t", 1))
    assert "was altered" in error_line(capsys, "chat", bundle, "-p", "Hi", *CHAT)
    assert main(["chat", str(bundle), "-p", "Hi", "--verify", "size", *CHAT]) == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["none.png", "-p", "Hi"], "cannot read image"),
        ([str(GOLDEN / "meta.json"), "-p", "Hi"], "is not an image"),
        (["-p", ""], "the prompt is empty"),
        (["-p", " \n"], "the prompt is empty"),
        (["-p", "<image>"], "1 <image> for 0 images"),
        (["-p", "caf\udce9"], "not valid Unicode"),
        (["-p", "word " * 9999], "the context holds 1536"),
        (["-p", "Hi", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        ([IMAGE, "-p", "Hi", "--max-tiles", "0"], "--max-tiles is 0"),
        (["-p", "Hi", "--max-context", "0"], "--max-context 0 is outside 1..1536"),
        (["-p", "Hi", "--temperature", "-1"], "--temperature is -1.0"),
        (["-p", "Hi", "--temperature", "nan"], "--temperature is nan"),
        (["-p", "Hi", "--top-p", "0"], "--top-p is 0.0"),
        (["-p", "Hi", "--seed", "-1"], "--seed is -1"),
        (["-p", "Hi", "--threads", "0"], "--threads is 0"),
    ],
    ids=lambda item: ascii(item)[:40],
)
def test_bad_question(
    golden_bundle: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: str,
) -> None:
    images = [item for item in arguments[:1] if not item.startswith("-")]
    options = arguments[len(images) :]
    line = error_line(capsys, "chat", golden_bundle, *images, *CHAT, *options)
    assert expected in line


def test_device_error(
    golden_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    line = error_line(capsys, "chat", golden_bundle, "-p", "Hi", "--device", "cuda")
    assert "pass --device cpu" in line


def test_memory_that_the_system_refuses(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InternVL, "load", lambda path, **options: np.empty(1 << 60, np.uint8))
    line = error_line(capsys, "chat", bundle, "-p", "Hi")
    assert "this machine's memory does not suffice: Unable to allocate 1.00 EiB" in line


def test_limit_error_of_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--repeat is 0, it must be at least 1" in error_line(capsys, "demo", "--repeat", "0")
    assert "--threads is 1025, it must be at" in error_line(capsys, "demo", "--threads", "1025")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["export", "checkpoint"],
        ["export", "checkpoint", "-o", "bundle", "--vision", "fp8"],
        ["chat", "bundle", "--device", "tpu"],
        ["chat", "bundle", "--max-tiles", "many"],
        ["chat", "bundle", "--verify", "md5"],
        ["inspect"],
    ],
    ids=" ".join,
)
def test_usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: internvl-edge" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["chat", "--help"]], ids=" ".join)
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert "usage: internvl-edge" in capsys.readouterr().out


# The commands themselves.


def test_export_inspect_chat(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    exported = run("export", CHECKPOINT, "-o", bundle)
    assert (exported.returncode, exported.stdout, exported.stderr) == (0, f"wrote {bundle}\n", "")
    inspected = run("inspect", bundle)
    assert inspected.returncode == 0
    assert "MiB" in inspected.stdout
    asked = run("chat", bundle, IMAGE, "-p", "What is this?", *CHAT)
    assert asked.returncode == 0
    assert " tok/s; " in asked.stderr


def test_installed_script() -> None:
    script = Path(sys.executable).with_name("internvl-edge")
    if not script.exists():
        pytest.skip("internvl-edge is not installed into this environment")
    ended = subprocess.run([script, "--help"], capture_output=True, timeout=60, check=False)
    assert ended.returncode == 0


@pytest.mark.parametrize("options", [[], ["--vision", "fp16", "--language", "fp16"]], ids=len)
def test_export_with_options(tmp_path: Path, options: list[str]) -> None:
    assert main(["export", str(CHECKPOINT), "-o", str(tmp_path / "bundle"), *options]) == 0
    expected = "fp16" if options else "fp32"
    assert open_bundle(tmp_path / "bundle").manifest.language == expected


def test_overwrite(bundle: Path) -> None:
    assert main(["export", str(CHECKPOINT), "-o", str(bundle), "--overwrite"]) == 0
    open_bundle(bundle)


def test_inspect_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(CHECKPOINT), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    state = load_file(CHECKPOINT / "model.safetensors")
    counted = sum(array.size for array in state.values())
    stored = counted - state["vision_model.embeddings.class_embedding"].size  # in its position
    assert report["kind"] == "checkpoint"
    assert report["parameters"]["total"] == counted
    assert report["bundle_bytes"]["fp32"] == 4 * stored
    assert report["bundle_bytes"]["fp16"] == 2 * stored
    assert report["kv_cache"]["token_bytes"] == 2 * 3 * 2 * 16 * 4  # K, V; layers, heads, lanes


def test_inspect_bundle(golden_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(golden_bundle), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    on_disk = sum(path.stat().st_size for path in golden_bundle.iterdir())
    assert report["kind"] == "bundle"
    assert report["file_bytes"] == on_disk - (golden_bundle / MANIFEST).stat().st_size
    assert report["vision"]["tokens_per_tile"] == 4


@pytest.mark.parametrize("kind", ["checkpoint", "bundle"])
def test_inspect_prints_sizes(
    golden_bundle: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    assert main(["inspect", str(CHECKPOINT if kind == "checkpoint" else golden_bundle)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    sizes = {line[0] for line in lines if line[-1] in ("B", "KiB", "MiB", "GiB")}
    assert {"token_bytes", "largest_image_bytes"} <= sizes
    assert {"checkpoint": "fp16", "bundle": "file_bytes"}[kind] in sizes
    counted = sum(array.size for array in load_file(CHECKPOINT / "model.safetensors").values())
    assert ["total", f"{counted:,}"] in lines


def test_chat_json(golden_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(golden_bundle), IMAGE, "-p", "What?", "--json", *CHAT]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    reply = json.loads(line)
    assert len(reply["token_ids"]) <= 8
    assert reply["timings"]["tiles"] > 0


def test_conversation_over_a_pipe(golden_bundle: Path, golden_model: InternVL) -> None:
    ended = run("chat", golden_bundle, IMAGE, "--json", *CHAT, text="What?\n\nAnd else?\n")
    assert (ended.returncode, ended.stderr) == (0, "")
    got = [json.loads(line)["token_ids"] for line in ended.stdout.splitlines()]
    chat = golden_model.chat()
    assert got == [
        chat.send("What?", [load_image(IMAGE)], max_new_tokens=8).token_ids,
        chat.send("And else?", max_new_tokens=8).token_ids,
    ]


def test_pipe_that_is_not_utf8(golden_bundle: Path) -> None:
    ended = subprocess.run(
        command("chat", golden_bundle, *CHAT),
        input=b"caf\xe9?\n",
        capture_output=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONUTF8": "0", "PYTHONIOENCODING": "utf-8:strict"},
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.decode().splitlines()
    assert line.startswith("error: ")


# What is not installed.


@pytest.mark.parametrize("package", ["onnx", "safetensors", "ml_dtypes", "tqdm"])
def test_export_without_its_extra(tmp_path: Path, package: str) -> None:
    hook = BLOCK.format(names=[package])
    ended = run("export", CHECKPOINT, "-o", tmp_path / "bundle", hook=hook)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert f"needs the package {package}: pip install 'internvl-edge[export]'" in line
    assert os.listdir(tmp_path) == []


def test_inspect_of_a_checkpoint_without_the_extra() -> None:
    ended = run("inspect", CHECKPOINT, hook=BLOCK.format(names=["safetensors"]))
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert "pip install 'internvl-edge[export]'" in line


def test_inspect_of_nothing_asks_for_no_extra(tmp_path: Path) -> None:
    hook = BLOCK.format(names=["onnx", "safetensors"])
    for name in ("none", "file"):
        (tmp_path / "file").touch()
        ended = run("inspect", tmp_path / name, hook=hook)
        assert ended.returncode == 2
        assert f"{name} is not a checkpoint directory and no bundle" in ended.stderr


def test_bundles_need_no_extra(golden_bundle: Path) -> None:
    names = ["onnx", "safetensors", "ml_dtypes", "tqdm", "torch", "transformers"]
    hook = BLOCK.format(names=names)
    assert run("inspect", golden_bundle, hook=hook).returncode == 0
    assert run("chat", golden_bundle, IMAGE, "-p", "Hi", *CHAT, hook=hook).returncode == 0


def test_images_may_stand_behind_options(
    golden_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(GOLDEN / "images" / "img2.png")
    words = ["chat", str(golden_bundle), "--device", "cpu", image, "-p", "Hi", "--json"]
    assert main([*words, "--max-new-tokens", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["timings"]["tiles"] == 1


def test_unknown_words_are_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "receipt.png"])
    assert "unrecognized arguments: receipt.png" in capsys.readouterr().err
