"""Integer products are tried, not trusted: the probes, the choice of a form, what is remembered."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from internvl_edge.bundle.contract import VISION_GRAPH
from internvl_edge.bundle.errors import DeviceError
from internvl_edge.bundle.manifest import FileEntry, Manifest, read_manifest
from internvl_edge.export.graphs.dialects.probes import probe
from internvl_edge.runtime.backends import products, trials
from internvl_edge.runtime.backends.products import (
    AS_STORED,
    COLUMNS,
    FORMS,
    LIMITS,
    UNSIGNED,
    WIDTH,
    Form,
    Product,
    bundle_form,
    exact_form,
    full_range,
    probe_input,
    products_of,
    use_exact_products,
    wrong_products,
)

PRODUCTS: tuple[Product, ...] = get_args(Product)
PROBES = Path(products.__file__).with_name("probes")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def manifest(golden_bundle: Path) -> Manifest:
    return replace(read_manifest(golden_bundle), vision="int8", language="int4")


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Product]]:
    """Forms and products tried from here on, all of them right."""
    calls: list[tuple[str, Product]] = []

    def is_exact(form: Form, product: Product) -> bool:
        calls.append((form.name, product))
        return True

    monkeypatch.setattr(products, "_is_exact", is_exact)
    monkeypatch.setattr(products, "exact_form", exact_form.__wrapped__)
    return calls


@pytest.mark.parametrize("product", PRODUCTS)
def test_probes_are_what_export_writes(product: Product) -> None:
    assert onnx.load(PROBES / f"{product}.onnx") == probe(product)


@pytest.mark.parametrize("product", PRODUCTS)
def test_some_form_is_exact_here(product: Product) -> None:
    assert wrong_products(exact_form((product,)), [product]) == []


def saturating(x: NDArray[np.int64], weight: NDArray[np.int64]) -> NDArray[np.int64]:
    """VPMADDUBSW: unsigned times signed bytes, pairs of products added in int16, saturating."""
    pairs = (x[:, np.newaxis] * weight).reshape(len(x), len(weight), -1, 2).sum(axis=-1)
    limits = np.iinfo(np.int16)
    return np.asarray(np.clip(pairs, limits.min, limits.max).sum(axis=-1))


@pytest.mark.parametrize("rows", products.ROWS)
def test_a_saturating_kernel_does_not_pass(rows: int) -> None:
    weight, x = full_range(COLUMNS, WIDTH, *LIMITS["w8a8"]), probe_input(rows)
    wrong = saturating(x + 128, weight) - 128 * weight.sum(axis=1)
    assert not np.array_equal(wrong, x @ weight.T)


@pytest.mark.parametrize("product", PRODUCTS)
def test_values_span_the_range_and_sums_are_exact_in_float32(product: Product) -> None:
    low, high = LIMITS[product]
    weight, x = full_range(COLUMNS, WIDTH, low, high), probe_input(17)
    assert weight.min() == low
    assert weight.max() == high
    assert x.min() == -products.LARGEST_INPUT
    assert np.all(x.reshape(17, -1, min(products.BLOCKS)).max(axis=-1) == products.LARGEST_INPUT)
    assert np.abs(x).max() * np.abs(weight).max() * WIDTH < 2**24


def test_a_wrong_form_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        products, "_is_exact", lambda form, product: form != AS_STORED or product != "w8a8"
    )
    assert exact_form.__wrapped__(("w8a8", "int4")) == UNSIGNED
    assert exact_form.__wrapped__(("int4",)) == AS_STORED


class FailingSession:
    """1.22 multiplies 8-bit weights where they are packed, and raises elsewhere when it runs."""

    def __init__(self, path: str, options: ort.SessionOptions, providers: list[str]) -> None:
        self.path = path

    def run(self, names: None, feeds: object) -> list[NDArray[np.float32]]:
        raise RuntimeError("Only 4b quantization is supported for unpacked compute")


def test_a_form_that_fails_when_it_runs_is_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.InferenceSession", FailingSession)
    assert wrong_products(AS_STORED, PRODUCTS) == list(PRODUCTS)


def test_no_right_form_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_is_exact", lambda form, product: product == "int8")
    with pytest.raises(DeviceError, match=f"{ort.__version__} multiplies.*w8a8, int4.*fp32"):
        exact_form.__wrapped__(("w8a8", "int8", "int4"))


@pytest.mark.parametrize(
    ("vision", "language", "dialect", "wanted"),
    [
        ("fp32", "fp16", "onnxruntime", ()),
        ("int8", "fp32", "onnxruntime", ("w8a8",)),
        ("fp16", "int8", "onnxruntime", ("int8",)),
        ("int8", "int4", "onnxruntime", ("w8a8", "int8", "int4")),
        ("int8", "int4", "tensorrt", ()),
    ],
)
def test_only_products_of_the_bundle_are_tried(
    manifest: Manifest, vision: str, language: str, dialect: str, wanted: tuple[Product, ...]
) -> None:
    given = {"vision": vision, "language": language, "dialect": dialect}
    assert products_of(replace(manifest, **given)) == wanted  # type: ignore[arg-type]


def test_it_is_tried_once(manifest: Manifest, tried: list[tuple[str, Product]]) -> None:
    assert bundle_form(manifest) == AS_STORED
    assert len(tried) == 3
    assert bundle_form(manifest) == AS_STORED
    assert len(tried) == 3


def other_graph(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    files = {**manifest.files, VISION_GRAPH: FileEntry(1, "0" * 64)}
    return replace(manifest, files=files)


def other_machine(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    monkeypatch.setattr(trials, "machine_key", lambda: "onnxruntime-9-x86_64-other")
    return manifest


def other_products(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    return replace(manifest, language="int8")


@pytest.mark.parametrize("changed", [other_graph, other_machine, other_products])
def test_it_is_tried_again_when_one_input_changes(
    manifest: Manifest,
    tried: list[tuple[str, Product]],
    monkeypatch: pytest.MonkeyPatch,
    changed: object,
) -> None:
    bundle_form(manifest)
    tried.clear()
    assert callable(changed)
    bundle_form(changed(manifest, monkeypatch))
    assert tried


def test_a_damaged_memory_is_no_answer(
    manifest: Manifest, tried: list[tuple[str, Product]], tmp_path: Path
) -> None:
    bundle_form(manifest)
    tried.clear()
    (remembered,) = (tmp_path / "cache/internvl-edge/trials").iterdir()
    for content in (b"another form", b"", b"\xff\xfe"):
        remembered.write_bytes(content)
        assert bundle_form(manifest) == AS_STORED
    assert len(tried) == 9


def test_a_cache_that_cannot_be_written_costs_no_load(
    manifest: Manifest, tried: list[tuple[str, Product]], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where the folder belongs")
    assert bundle_form(manifest) == AS_STORED
    assert tried


def test_sessions_get_the_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "exact_form", lambda wanted: UNSIGNED)
    options = ort.SessionOptions()
    use_exact_products(options)
    assert options.get_session_config_entry("session.x64quantprecision") == "1"
    assert [form.packs for form in FORMS] == [True, True, False]


#: The forms in which W8A8 is wrong, on the CPU that runs this.
TRY = """
import json
from internvl_edge.runtime.backends.products import FORMS, exact_form, wrong_products
wrong = {form.name: wrong_products(form, ("w8a8", "int8", "int4")) for form in FORMS}
print(json.dumps([wrong, exact_form(("w8a8", "int8", "int4")).name]))
"""


@pytest.mark.slow(seconds=3)
@pytest.mark.skipif(
    shutil.which("qemu-x86_64-static") is None or platform.machine() != "x86_64",
    reason="qemu-x86_64-static is not installed, or this is no x86-64",
)
def test_a_cpu_without_vnni_takes_unsigned_weights(tmp_path: Path) -> None:
    """The fault itself, on any machine: VPMADDUBSW saturates there."""
    tree = tmp_path / "internvl_edge"  # the emulated Python knows no environment
    tree.mkdir()
    for room in ("bundle", "kernels", "runtime"):
        (tree / room).symlink_to(Path(products.__file__).parents[2] / room)
    paths = [str(tmp_path), *(path for path in sys.path if path)]
    done = subprocess.run(
        ["qemu-x86_64-static", "-cpu", "Haswell", os.path.realpath(sys.executable), "-c", TRY],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    wrong, chosen = json.loads(done.stdout)
    assert wrong == {"as stored": ["w8a8"], "unsigned weights": [], "unpacked": []}
    assert chosen == UNSIGNED.name
