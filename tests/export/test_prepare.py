"""Packed weights: the same results bit for bit, mapped, and never used where they do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from calibrating import few_items
from checkpoints import small_config, write_checkpoint
from loaded_memory import anonymous_bytes
from numpy.typing import NDArray
from packaging.version import Version

from internvl_edge.bundle.contract import LANGUAGE_GRAPH, VISION_GRAPH
from internvl_edge.bundle.manifest import file_entry, open_bundle
from internvl_edge.bundle.seal import sealed
from internvl_edge.cli.main import main
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration.decisions import QuantOptions
from internvl_edge.export.prepare import prepack
from internvl_edge.export.prepare.prepack import packed_bytes, prepack_graph
from internvl_edge.export.prepare.prepare import prepare_bundle
from internvl_edge.runtime import BundleError, ExportError, InternVL, PreparedWarning
from internvl_edge.runtime.backends import machine, own_kernels, products, tower
from internvl_edge.runtime.backends.blocks import NO_KERNEL
from internvl_edge.runtime.backends.own_kernel import own_kernel
from internvl_edge.runtime.backends.prepared import find_prepared, packed_graphs
from internvl_edge.runtime.backends.products import UNPACKED, UNSIGNED
from internvl_edge.runtime.backends.tower import FLOAT_TOWER

pytestmark = pytest.mark.slow(seconds=1)

#: The external data entry that names a packed form: "key|offset;length;flags".
PACKED_FORM = "prepacked_0"
#: ONNX Runtime begins each weight of a file on a page.
PADDING = 64 * 4096
#: Whether ONNX Runtime compares a stored form with what packing its weight gives.
COMPARES = Version(onnxruntime.__version__) >= Version("1.32")
IDS = [1, 5, 9, 200, 17, 3]
PRECISIONS = [
    {"vision": "fp32", "language": "fp32"},
    {"vision": "int8", "language": "int4"},
    {"vision": "int8", "language": "int8"},
]


def write_bundle(folder: Path, **precision: str) -> Path:
    config = small_config(hidden=256, vision_hidden=128, heads=8, kv_heads=2)
    checkpoint = write_checkpoint(folder / "checkpoint", config)
    with few_items():
        return export_bundle(
            checkpoint,
            folder / "bundle",
            options=QuantOptions(naive=True, block=32),
            sensitivity=False,
            **precision,  # type: ignore[arg-type]
        )


@pytest.fixture(autouse=True)
def small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack those of small models, whose sizes are multiples of a page, too."""
    monkeypatch.setattr(prepack, "LEAST_BYTES", 1 << 12)


@pytest.fixture(autouse=True)
def packed_towers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave integer products to ONNX Runtime, as on CPUs where ours are slower: ours map their
    weights as they are."""
    theirs = own_kernel(FLOAT_TOWER)
    monkeypatch.setattr(tower, "tower_kernel", lambda: theirs)


@pytest.fixture(scope="module")
def int4_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("prepare"), vision="int8", language="int4")


@pytest.fixture
def prepared_bundle(int4_bundle: Path, tmp_path: Path) -> Path:
    bundle = Path(shutil.copytree(int4_bundle, tmp_path / "bundle"))
    prepare_bundle(bundle)
    return bundle


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: "-".join(p.values()))
def test_the_same_results_bit_for_bit(tmp_path: Path, precision: dict[str, str]) -> None:
    bundle = write_bundle(tmp_path, **precision)
    picture = np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)
    plain = InternVL.load(bundle, device="cpu", threads=1)
    folder = prepare_bundle(bundle)
    packed = InternVL.load(bundle, device="cpu", threads=1)
    assert find_prepared(open_bundle(bundle)) == folder
    np.testing.assert_array_equal(packed.encode_images([picture]), plain.encode_images([picture]))
    np.testing.assert_array_equal(packed.logits(IDS), plain.logits(IDS))


def test_packed_forms_stand_beside_the_originals(
    int4_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compared when it is loaded is there, as later versions of ONNX Runtime want it."""
    monkeypatch.setattr(own_kernels, "bundle_kernel", lambda bundle: NO_KERNEL)
    bundle = Path(shutil.copytree(int4_bundle, tmp_path / "bundle"))
    folder = prepare_bundle(bundle)
    for graph in (VISION_GRAPH, LANGUAGE_GRAPH):
        name = Path(graph).with_suffix(".data").name
        original = (bundle / name).stat().st_size
        written = (folder / name).stat().st_size
        assert 1.5 * original < written <= packed_bytes(original) + PADDING
        forms = packed_initializers(folder / graph)
        assert len(forms) > 4
        # Each is itself: not other bytes of the file that lead to the same packed form.
        assert len({(entry["offset"], entry["length"]) for entry in forms}) == len(forms)


def test_weights_are_mapped_not_copied(tmp_path: Path) -> None:
    config = small_config(hidden=1024, vision_hidden=1024, heads=8, kv_heads=8)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", config)
    bundle = export_bundle(checkpoint, tmp_path / "bundle")
    names = sum(packed_graphs(open_bundle(bundle)).values(), ())
    weights = sum((bundle / name).stat().st_size for name in names)
    plain = anonymous_bytes(bundle)
    prepare_bundle(bundle)
    # What remains is the sessions themselves, a few MB whatever the model.
    assert anonymous_bytes(bundle) < plain - 0.7 * weights


def packed_initializers(path: Path) -> list[dict[str, str]]:
    """External data entries of the initializers that are stored packed, too."""
    graph = onnx.load(str(path), load_external_data=False).graph
    entries = [{e.key: e.value for e in t.external_data} for t in graph.initializer]
    return [entry for entry in entries if PACKED_FORM in entry]


def test_another_machine_does_not_take_it(
    prepared_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(prepared_bundle)
    assert find_prepared(bundle) is not None
    monkeypatch.setattr(machine, "cpu_features", lambda: ["avx2", "fma"])
    assert find_prepared(bundle) is None


def test_another_version_of_onnxruntime_does_not_take_it_and_replaces_it(
    prepared_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = find_prepared(open_bundle(prepared_bundle))
    assert old is not None
    monkeypatch.setattr("onnxruntime.__version__", "9.9.9")
    assert find_prepared(open_bundle(prepared_bundle)) is None
    new = prepare_bundle(prepared_bundle)
    assert new.name.startswith("onnxruntime-9.9.9-")
    assert not old.exists()


def test_a_new_export_does_not_take_it(prepared_bundle: Path, tmp_path: Path) -> None:
    newer = write_bundle(tmp_path / "newer", vision="fp32", language="int8")
    shutil.copytree(prepared_bundle / "prepared", newer / "prepared")
    assert find_prepared(open_bundle(newer)) is None


@pytest.mark.parametrize("damage", ["cut", "altered", "lost", "manifest", "entries"])
def test_damage_is_one_error(prepared_bundle: Path, damage: str) -> None:
    bundle = open_bundle(prepared_bundle)
    folder = find_prepared(bundle)
    assert folder is not None
    file = folder / "vision.data"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "altered":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "lost":
        file.unlink()
    elif damage == "manifest":
        (folder / "prepared.json").write_text("{")
    else:
        data = json.loads((folder / "prepared.json").read_text())
        data["files"] = {VISION_GRAPH: {"bytes": 1}}
        (folder / "prepared.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match="prepare --overwrite"):
        find_prepared(bundle)


def damaged(prepared_bundle: Path) -> Path:
    folder = find_prepared(open_bundle(prepared_bundle))
    assert folder is not None
    file = folder / "vision.data"
    file.write_bytes(file.read_bytes()[:-1])
    return prepared_bundle


def of_another_machine(prepared_bundle: Path) -> Path:
    folder = find_prepared(open_bundle(prepared_bundle))
    assert folder is not None
    folder.rename(folder.with_name("onnxruntime-9.9.9-riscv64-0123456789ab"))
    return prepared_bundle


def of_an_older_version(prepared_bundle: Path) -> Path:
    """In parts, and with other bytes for originals: what was written before `layout` was told."""
    folder = find_prepared(open_bundle(prepared_bundle))
    assert folder is not None
    manifest = json.loads((folder / "prepared.json").read_text())
    del manifest["layout"]
    manifest |= {"widest_bytes": 128 << 20, "part_bytes": 4 << 30}
    for name in ("vision.onnx", "vision.data"):
        part = name.replace(".", ".1.")
        shutil.copyfile(folder / name, folder / part)
        manifest["files"][part] = manifest["files"][name]
    (folder / "prepared.json").write_text(json.dumps(sealed(manifest)))
    return prepared_bundle


def that_do_not_load(prepared_bundle: Path) -> Path:
    """As after a change of ONNX Runtime that its version does not show: whole, and refused."""
    folder = find_prepared(open_bundle(prepared_bundle))
    assert folder is not None
    (folder / VISION_GRAPH).write_bytes(b"not a graph")
    manifest = json.loads((folder / "prepared.json").read_text())
    manifest["files"][VISION_GRAPH] = vars(file_entry(folder / VISION_GRAPH))
    (folder / "prepared.json").write_text(json.dumps(manifest))
    return prepared_bundle


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize(
    "spoil", [damaged, of_another_machine, of_an_older_version, that_do_not_load]
)
def test_what_does_not_fit_is_left_out_with_a_warning(
    int4_bundle: Path, prepared_bundle: Path, spoil: Callable[[Path], Path], low_memory: bool
) -> None:
    plain = InternVL.load(int4_bundle, device="cpu", threads=1)
    bundle = spoil(prepared_bundle)

    def answer() -> NDArray[np.float32]:
        model = InternVL.load(bundle, device="cpu", threads=1, low_memory=low_memory)
        return model.logits(IDS)

    with pytest.warns(PreparedWarning, match="run 'internvl-edge prepare"):
        logits = answer()
    np.testing.assert_array_equal(logits, plain.logits(IDS))


def test_the_command_line_warns_in_one_line(
    prepared_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = of_another_machine(prepared_bundle)
    arguments = ["-p", "?", "--device", "cpu", "--max-new-tokens", "1"]
    assert main(["chat", str(bundle), *arguments]) == 0
    (line,) = capsys.readouterr().err.splitlines()[:1]
    assert line.startswith("warning: prepared weights in ")


def test_unsigned_weights_give_the_same_bits(
    int4_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What CPUs without VNNI get; the integers are the same, so any CPU shows it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle = Path(shutil.copytree(int4_bundle, tmp_path / "bundle"))
    picture = np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)
    plain = InternVL.load(bundle, device="cpu", threads=1).encode_images([picture])
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(products, "exact_form", lambda wanted: UNSIGNED)
    folder = prepare_bundle(bundle)
    model = InternVL.load(bundle, device="cpu", threads=1)
    assert find_prepared(open_bundle(bundle)) == folder
    np.testing.assert_array_equal(model.encode_images([picture]), plain)


def test_weights_prepared_in_a_form_that_is_wrong_here_are_left_out(
    prepared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_prepared(open_bundle(prepared_bundle)) is not None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(products, "exact_form", lambda wanted: UNSIGNED)
    assert find_prepared(open_bundle(prepared_bundle)) is None
    with pytest.warns(PreparedWarning, match="not exact on this CPU"):
        InternVL.load(prepared_bundle, device="cpu", threads=1)


def test_where_nothing_is_packed_there_is_nothing_to_prepare(
    int4_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(products, "exact_form", lambda wanted: UNPACKED)
    bundle = Path(shutil.copytree(int4_bundle, tmp_path / "bundle"))
    with pytest.raises(ExportError, match="nothing to prepare"):
        prepare_bundle(bundle)
    assert not (bundle / "prepared").exists()


def test_an_older_version_is_replaced(prepared_bundle: Path) -> None:
    bundle = of_an_older_version(prepared_bundle)
    with pytest.warns(PreparedWarning, match=r"another version .*prepare --overwrite"):
        InternVL.load(bundle, device="cpu", threads=1)
    folder = prepare_bundle(bundle, overwrite=True)
    assert find_prepared(open_bundle(bundle)) == folder
    packed = packed_graphs(open_bundle(bundle)).values()
    assert {path.name for path in folder.iterdir()} == {"prepared.json", *sum(packed, ())}
    assert InternVL.load(bundle, device="cpu", threads=1).engine.backend.prepared  # type: ignore[attr-defined]


@pytest.mark.parametrize("fault", ["does not load", "computes .* differently"])
def test_what_was_written_is_tried_before_it_is_done(
    int4_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    bundle = Path(shutil.copytree(int4_bundle, tmp_path / "bundle"))

    def spoiled(source: Path, target: Path, *rest: Any) -> Any:
        session = prepack_graph(source, target, *rest)
        if fault == "does not load":
            target.with_suffix(".data").write_bytes(b"")
        else:
            spoil_packed(target)
        return session

    monkeypatch.setattr("internvl_edge.export.prepare.prepare.prepack_graph", spoiled)
    with pytest.raises(ExportError, match="does not load" if COMPARES else fault):
        prepare_bundle(bundle)
    assert not list((bundle / "prepared").iterdir())


def spoil_packed(path: Path) -> None:
    """Change the packed bytes of every matrix, and none of the originals."""
    data = bytearray(path.with_suffix(".data").read_bytes())
    for entry in packed_initializers(path):
        offset, length, _ = entry[PACKED_FORM].split("|")[1].split(";")
        for place in range(int(offset), int(offset) + int(length), 7):
            data[place] ^= 0x55
    path.with_suffix(".data").write_bytes(data)


def test_command_line(
    int4_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(shutil.copytree(int4_bundle, tmp_path / "bundle"))
    assert main(["prepare", bundle]) == 0
    assert "prepared" in capsys.readouterr().out
    assert main(["prepare", bundle]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["prepare", bundle, "--overwrite"]) == 0


@pytest.mark.parametrize("part", ["vision", "language"])
def test_float16_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str) -> None:
    """The CPU computes it in float32, in memory of its own: nothing would be mapped."""
    bundle = write_bundle(tmp_path, **({"vision": "int8", "language": "int8"} | {part: "fp16"}))
    assert main(["prepare", str(bundle)]) == 2
    error = capsys.readouterr().err
    assert f"--{part} int8" in error
    assert not (bundle / "prepared").exists()


def test_nothing_is_left_of_an_interrupted_run(
    int4_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(int4_bundle, tmp_path / "bundle"))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("internvl_edge.export.prepare.prepare.file_entry", fail)
    with pytest.raises(ExportError, match="no space"):
        prepare_bundle(bundle)
    assert not list((bundle / "prepared").iterdir())
