"""Bundles: what was altered, is missing or is from another version is refused by name."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutated import JSON, mutated

from internvl_edge.bundle import manifest as bundle_module
from internvl_edge.bundle.contract import MANIFEST
from internvl_edge.bundle.manifest import FORMAT_VERSION, open_bundle
from internvl_edge.bundle.seal import sealed
from internvl_edge.runtime import BundleError, InternVL, InternVLEdgeError
from internvl_edge.runtime.inspection import inspect_bundle

FILES = [
    "added_tokens.json",
    "embedding.npy",
    "language.data",
    "language.onnx",
    "special_tokens_map.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vision.data",
    "vision.onnx",
]


@pytest.fixture
def bundle(golden_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(golden_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def fuzzed(golden_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose manifest is overwritten again and again."""
    return Path(shutil.copytree(golden_bundle, tmp_path_factory.mktemp("fuzzed") / "bundle"))


def refusal(bundle: Path, **options: Any) -> str:
    """Opening and loading must both fail, in one line; return the message."""
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle, **options)
    with pytest.raises(BundleError):
        InternVL.load(bundle, device="cpu", **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


def edit(bundle: Path, path: str, value: Any) -> None:
    """Set a value of bundle.json, by its path with slashes, and seal it again."""
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    *steps, last = path.split("/")
    place = manifest
    for step in steps:
        place = place[step]
    place[last] = value
    write_manifest(bundle, manifest)


def write_manifest(bundle: Path, manifest: dict[str, Any]) -> None:
    (bundle / MANIFEST).write_text(json.dumps(sealed(manifest)))


# Files.


def test_every_file_is_listed(bundle: Path) -> None:
    assert sorted(os.listdir(bundle)) == sorted([*FILES, MANIFEST])
    assert sorted(open_bundle(bundle).manifest.files) == FILES


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("name", FILES)
def test_flipped_byte(bundle: Path, name: str, place: str) -> None:
    size = (bundle / name).stat().st_size
    flip(bundle / name, {"first": 0, "middle": size // 2, "last": size - 1}[place])
    message = refusal(bundle)
    assert f"{name} was altered: sha256" in message
    assert "export it anew" in message


@pytest.mark.parametrize("name", FILES)
def test_size_mode_looks_at_sizes_only(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    flip(bundle / name, 0)
    monkeypatch.setattr(bundle_module, "sha256_file", None)  # calling it would fail
    open_bundle(bundle, verify="size")


@pytest.mark.parametrize("verify", ["hash", "size"])
@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("name", FILES)
def test_resized_file(bundle: Path, name: str, change: int, verify: str) -> None:
    size = (bundle / name).stat().st_size
    os.truncate(bundle / name, size + change)
    message = refusal(bundle, verify=verify)
    assert f"{name} has {size + change} bytes, expected {size}" in message


@pytest.mark.parametrize("verify", ["hash", "size"])
@pytest.mark.parametrize("name", FILES)
def test_missing_file(bundle: Path, name: str, verify: str) -> None:
    (bundle / name).unlink()
    assert f"{name} is missing" in refusal(bundle, verify=verify)


@pytest.mark.parametrize("verify", ["hash", "size"])
def test_directory_instead_of_a_file(bundle: Path, verify: str) -> None:
    (bundle / "vision.data").unlink()
    (bundle / "vision.data").mkdir()
    edit(bundle, "files/vision.data/bytes", (bundle / "vision.data").stat().st_size)
    assert "vision.data" in refusal(bundle, verify=verify)


def test_unknown_verification(bundle: Path) -> None:
    assert "expected one of once, hash, size" in refusal(bundle, verify="sha256")


def test_more_files_do_no_harm(bundle: Path) -> None:
    (bundle / "notes.txt").write_text("mine")
    InternVL.load(bundle, device="cpu")


@pytest.mark.parametrize("name", ["vision.onnx", "language.onnx", "embedding.npy"])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_damage_that_size_mode_lets_through(fuzzed: Path, name: str, data: st.DataObject) -> None:
    """Loading may still succeed, but fails with a BundleError only."""
    original = (fuzzed / name).read_bytes()
    # The .npy header is 128 bytes; a graph may be damaged anywhere.
    end = 128 if name.endswith(".npy") else len(original)
    at, value = data.draw(st.integers(0, end - 1)), data.draw(st.integers(0, 255))
    (fuzzed / name).write_bytes(original[:at] + bytes([value]) + original[at + 1 :])
    try:
        InternVL.load(fuzzed, device="cpu", threads=1, verify="size")
    except BundleError:
        pass
    finally:
        (fuzzed / name).write_bytes(original)


# The manifest.


def test_no_directory(tmp_path: Path) -> None:
    assert "is not a bundle: it has no bundle.json; write one with" in refusal(tmp_path / "none")


def test_a_file_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "receipt.png").touch()
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "receipt.png", tmp_path / "pipe", Path("/dev/null")):
        assert refusal(path) == f"{path} is no folder; a bundle is one with a bundle.json"


def test_checkpoint_is_no_bundle() -> None:
    assert "internvl-edge export CHECKPOINT -o BUNDLE" in refusal(
        Path(__file__).parents[1] / "golden" / "model"
    )


def test_file_instead_of_a_bundle(bundle: Path) -> None:
    refusal(bundle / MANIFEST)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_truncated_manifest(bundle: Path, share: float) -> None:
    text = (bundle / MANIFEST).read_bytes().rstrip()
    (bundle / MANIFEST).write_bytes(text[: int(share * len(text))])
    assert f"cannot read {bundle / MANIFEST}" in refusal(bundle)


@pytest.mark.parametrize(
    "content",
    [b"\xff{}", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"[]", b"null", b"{}"],
    ids=["not UTF-8", "deep", "huge number", "list", "null", "empty"],
)
def test_other_manifest(bundle: Path, content: bytes) -> None:
    (bundle / MANIFEST).write_bytes(content)
    assert str(bundle / MANIFEST) in refusal(bundle)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, "1", None, [1]], ids=repr)
def test_other_version(bundle: Path, version: object) -> None:
    edit(bundle, "version", version)
    message = refusal(bundle)
    assert f"format version {version!r}, this runtime reads {FORMAT_VERSION}" in message
    assert "update internvl-edge" in message


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/passwd",
        "sub/file",
        "..",
        ".",
        "",
        "..\\secret",
        "a\0b",
        "vision.onnx/",
    ],
    ids=repr,
)
def test_file_outside_the_bundle(bundle: Path, name: str) -> None:
    (bundle.parent / "secret").write_text("x")
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    write_manifest(bundle, manifest)
    assert f"names a file outside the bundle: {name!r}" in refusal(bundle)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {},
        {"bytes": 1},
        {"bytes": "1", "sha256": "0" * 64},
        {"bytes": 1.5, "sha256": "0" * 64},
        {"bytes": -1, "sha256": "0" * 64},
        {"bytes": 1, "sha256": None},
        {"bytes": 1, "sha256": "0" * 63},
        {"bytes": 1, "sha256": "A" * 64},
    ],
    ids=repr,
)
def test_bad_file_entry(bundle: Path, entry: object) -> None:
    edit(bundle, "files/vision.onnx", entry)
    assert "vision.onnx" in refusal(bundle)


@pytest.mark.parametrize("name", ["vision.onnx", "language.onnx", "embedding.npy"])
def test_unlisted_file(bundle: Path, name: str) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    del manifest["files"][name]
    write_manifest(bundle, manifest)
    assert f"does not list {name}" in refusal(bundle)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("precision/vision", "fp8", "precision.vision is 'fp8'"),
        ("precision/language", ["fp32"], "precision.language is ['fp32']"),
        ("precision", None, "no object 'precision'"),
        ("parameters/total", "many", "total is 'many'"),
        ("spec/vision", None, "no object 'vision'"),
        ("spec/vision/heads", 2, "unknown fields: ['heads']"),
        ("spec/vision/tile_size", 0, "tile_size is 0, expected a positive integer"),
        ("spec/vision/patch_size", -14, "a positive integer"),
        ("spec/language/rope_theta", float("nan"), "NaN is not a number"),
        ("spec/language/rope_theta", -1.0, "a positive number"),
        ("spec/language/rope_factor", 1e308, "the context is inf tokens"),
        ("spec/language/bias", 1, "bias is 1, expected true or false"),
        ("spec/prompt/template", "vicuna", "unknown prompt template 'vicuna'"),
        ("spec/tiling/max_tiles", 2.5, "a positive integer"),
    ],
)
def test_bad_value(bundle: Path, path: str, value: object, expected: str) -> None:
    edit(bundle, path, value)
    assert expected in refusal(bundle)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("dialect", "tensorrt"),
        ("precision/language", "fp16"),
        ("precision/vision", "fp16"),
        ("precision/kv", "int8"),
        ("precision/embedding", "int8"),
        ("spec/language/num_hidden_layers", 2),
        ("spec/language/num_key_value_heads", 1),
        ("spec/language/num_attention_heads", 12),
        ("spec/language/vocab_size", 511),
        ("spec/language/hidden_size", 192),
        ("spec/vision/tile_size", 112),
        ("spec/vision/patch_size", 28),
    ],
)
def test_manifest_of_another_bundle(bundle: Path, path: str, value: object) -> None:
    """Well-formed, but not what the graphs are: refused on loading, not in the first answer."""
    edit(bundle, path, value)
    with pytest.raises(BundleError) as caught:
        InternVL.load(bundle, device="cpu")
    assert "export" in str(caught.value)


def test_inspection_refuses_a_bad_manifest(bundle: Path) -> None:
    edit(bundle, "spec/language/num_attention_heads", 0)
    with pytest.raises(BundleError):
        inspect_bundle(bundle)


# Whatever the manifest says.


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_mutated_manifest_opens_or_is_refused(
    golden_bundle: Path, fuzzed: Path, data: st.DataObject
) -> None:
    manifest = mutated(json.loads((golden_bundle / MANIFEST).read_text()), data)
    write_manifest(fuzzed, manifest)
    try:
        inspect_bundle(fuzzed)
        open_bundle(fuzzed, verify="size")
    except BundleError:
        pass
    finally:
        shutil.copyfile(golden_bundle / MANIFEST, fuzzed / MANIFEST)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_mutated_specification_answers_or_is_refused(
    golden_bundle: Path, fuzzed: Path, data: st.DataObject
) -> None:
    manifest = json.loads((golden_bundle / MANIFEST).read_text())
    part = data.draw(st.sampled_from(sorted(manifest["spec"])), label="part")
    field = data.draw(st.sampled_from(sorted(manifest["spec"][part])), label="field")
    manifest["spec"][part][field] = data.draw(JSON | st.integers(1, 600), label="value")
    write_manifest(fuzzed, manifest)
    try:
        model = InternVL.load(fuzzed, device="cpu", threads=1, verify="size")
    except BundleError:
        return
    finally:
        shutil.copyfile(golden_bundle / MANIFEST, fuzzed / MANIFEST)
    with np.errstate(all="ignore"), contextlib.suppress(InternVLEdgeError):
        model.generate("hi", [np.zeros((9, 9, 3), np.uint8)], max_new_tokens=2)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damaged_manifest_opens_or_is_refused(
    golden_bundle: Path, fuzzed: Path, data: st.DataObject
) -> None:
    text = bytearray((golden_bundle / MANIFEST).read_bytes())
    text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    (fuzzed / MANIFEST).write_bytes(text)
    try:
        open_bundle(fuzzed, verify="size")
    except BundleError:
        pass
    finally:
        shutil.copyfile(golden_bundle / MANIFEST, fuzzed / MANIFEST)
