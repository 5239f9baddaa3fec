"""The TensorRT dialects' files, run by ONNX Runtime: golden answers, steps, the other dialect.

What TensorRT makes of the same files is the gate's business.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checkpoints import GOLDEN, KV8
from dialects import RUNNABLE, TENSORRT, runs
from numpy.typing import NDArray
from PIL import Image

from internvl_edge.bundle.contract import DialectName
from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.bundle.rope import rope_base
from internvl_edge.cli.main import main
from internvl_edge.examples.tiny_ocr.data import HELD_OUT, sample
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration.decisions import QuantOptions
from internvl_edge.export.formats.plan import QuantPlan
from internvl_edge.export.graphs.dialects import registry
from internvl_edge.export.graphs.dialects.engine_form import engine_form
from internvl_edge.export.graphs.dialects.tensorrt_modern import ModernDialect, Step
from internvl_edge.export.graphs.dialects.tensorrt_operators import refusals
from internvl_edge.export.graphs.graph import GraphBuilder
from internvl_edge.runtime import DeviceError, ExportError, InternVL
from internvl_edge.runtime.backends import Slice
from internvl_edge.runtime.backends.reference import KEY_BUCKET, ReferenceBackend

pytestmark = pytest.mark.slow(seconds=1)

TINY_OCR = Path(__file__).parents[2] / "examples" / "tiny_ocr" / "checkpoint"
#: Pictures the dialects are compared on.
PICTURES = 4


@dataclass(frozen=True)
class Precision:
    """Arguments of an export.

    Attributes:
        tolerance: how far the dialects may be apart, as a share of the values' RMS. None, where
            the weights are quantised: not further than quantising takes either from float32.
    """

    vision: Any
    language: Any
    kv: Any = None
    tolerance: float | None = None

    @property
    def name(self) -> str:
        return f"{self.vision}+{self.language}" + (f"+kv {self.kv}" if self.kv else "")


FP32 = Precision("fp32", "fp32", tolerance=1e-5)
#: Half precision rounds to 2^-11 = 5e-4 at a time; errors of some layers add up, partly.
FP16 = Precision("fp16", "fp16", tolerance=2e-3)
INT8 = Precision("int8", "int8")
INT4 = Precision("int8", "int4")
INT4_KV8 = Precision("int8", "int4", "int8")

PRECISIONS = (FP32, FP16, INT8, INT4)
CASES = [
    *(pytest.param(d, p, id=f"{d}-{p.name}") for d in TENSORRT for p in PRECISIONS),
    pytest.param("tensorrt-portable", INT4_KV8, id=f"tensorrt-portable-{INT4_KV8.name}"),
]
RUNNABLE_CASES = [
    pytest.param(*case.values, marks=runs(case.values[0]).marks, id=case.id) for case in CASES
]

Export = Callable[[str, Precision], Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """tiny_ocr in a dialect and precision, written when first asked for."""
    folder = tmp_path_factory.mktemp("tensorrt")
    calibration = _calibration(folder / "pictures")

    def bundle(dialect: Any, precision: Precision) -> Path:
        path = folder / f"{dialect} {precision.name}"
        if not path.exists():
            export_bundle(
                TINY_OCR,
                path,
                vision=precision.vision,
                language=precision.language,
                kv=precision.kv,
                dialect=dialect,
                options=QuantOptions(block=64),
                calibration=calibration,
                sensitivity=False,
            )
        return path

    return bundle


def _calibration(folder: Path) -> Path:
    folder.mkdir()
    lines = []
    for seed in range(4):
        image, turns = sample(seed)
        image.save(folder / f"{seed}.png")
        prompt, answer = turns[0]
        lines.append(json.dumps({"image": f"{seed}.png", "prompt": prompt, "answer": answer}))
    (folder / "pictures.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Results:
    """What a bundle computes for some pictures, and its greedy answers."""

    embeddings: NDArray[np.float32]
    logits: NDArray[np.float32]
    answers: list[str]


@pytest.fixture(scope="module")
def results(exported: Export) -> Callable[[str, Precision], Results]:
    known: dict[Path, Results] = {}

    def of(dialect: str, precision: Precision) -> Results:
        path = exported(dialect, precision)
        if path not in known:
            known[path] = _results(InternVL.load(path, device="cpu", threads=2, verify="size"))
        return known[path]

    return of


def _results(model: InternVL) -> Results:
    embeddings, logits, answers = [], [], []
    for offset in range(PICTURES):
        image, turns = sample(HELD_OUT + offset)
        question, answer = turns[0]
        tiled = [model.tile_with_identity(image, None)]
        ids = model.encode_conversation([(f"<image>\n{question}", answer)], tiled, None)
        embeddings.append(model.encode_images([image]))
        logits.append(model.logits(ids, [image]))
        answers.append(model.generate(question, [image], max_new_tokens=64).text)
    return Results(np.concatenate(embeddings), np.concatenate(logits), answers)


@pytest.mark.parametrize(("dialect", "precision"), CASES)
def test_graphs_are_well_formed(
    exported: Export, dialect: DialectName, precision: Precision
) -> None:
    folder = exported(dialect, precision)
    for graph in ("vision", "language"):
        onnx.checker.check_model(str(folder / f"{graph}.onnx"), full_check=True)
        model = onnx.load(str(folder / f"{graph}.onnx"), load_external_data=False)
        assert {opset.domain for opset in model.opset_import} == {""}
        if dialect == "tensorrt-portable":
            assert list(refusals(model)) == []
        else:
            assert {"RMSNormalization", "Attention"} <= {node.op_type for node in model.graph.node}
            assert any("RMSNormalization" in line for line in refusals(model))


@pytest.mark.parametrize(("dialect", "precision"), RUNNABLE_CASES)
def test_results_are_the_other_dialects(
    results: Callable[[str, Precision], Results], dialect: DialectName, precision: Precision
) -> None:
    if precision.kv == "int8" and not KV8:
        pytest.skip("this onnxruntime has no int8 keys and values to compare with")
    got = results(dialect, precision)
    expected, exact = results("onnxruntime", precision), results("onnxruntime", FP32)
    for part in ("embeddings", "logits"):
        mine, other, true = (getattr(r, part).astype(np.float64) for r in (got, expected, exact))
        limit = precision.tolerance
        if limit is None:
            limit = _apart(other, true)
            assert _apart(mine, true) < 1.15 * limit, part
        assert _apart(mine, other) < limit, part
    assert got.answers == expected.answers


def _apart(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(np.sqrt(((a - b) ** 2).mean() / (b**2).mean()))


@pytest.mark.parametrize("precision", [FP32, FP16], ids=lambda precision: precision.name)
@pytest.mark.parametrize("dialect", RUNNABLE)
def test_golden(
    tmp_path: Path,
    dialect: DialectName,
    precision: Precision,
    golden_images: dict[str, Image.Image],
    golden_chats: dict[str, dict[str, Any]],
    chat_arrays: dict[str, NDArray[Any]],
    logits_arrays: dict[str, NDArray[Any]],
) -> None:
    """Greedy tokens of the reference implementation, and in float32 its logits."""
    path = export_bundle(
        GOLDEN / "model",
        tmp_path / "bundle",
        vision=precision.vision,
        language=precision.language,
        dialect=dialect,
    )
    model = InternVL.load(path, device="cpu", threads=2)
    expected = chat_arrays["single_generated"][0].tolist()
    question = golden_chats["single"]["question"]
    reply = model.generate(
        question,
        [golden_images["img0"]],
        max_tiles=6,
        max_new_tokens=len(expected),
        extra_stops=False,
    )
    assert reply.token_ids == expected
    crossing = logits_arrays["ntk_cross_input_ids"][0].tolist()
    reply = model.generate(crossing, max_new_tokens=16, extra_stops=False)
    assert reply.token_ids == logits_arrays["ntk_cross_generated"][0].tolist()
    if precision is FP32:
        got = model.logits(logits_arrays["single_input_ids"][0], [golden_images["img0"]], 6)
        # The golden tests' tolerance, for the same reason.
        np.testing.assert_allclose(got, logits_arrays["single_logits"][0], rtol=0, atol=2e-4)


@pytest.mark.parametrize(("dialect", "precision"), RUNNABLE_CASES)
def test_steps_are_one_prefill(
    exported: Export, dialect: DialectName, precision: Precision
) -> None:
    """Rows that see earlier ones through the cache, or beside them: the same logits."""
    path = exported(dialect, precision)
    whole, stepped = _logits(path, [300]), _logits(path, [270, 1, 1, 20, 1, 7])
    # Half precision sums in another order over the cache; int8 rounding can tip over by that.
    limit = {"fp32": 1e-5, "fp16": 2e-3}.get(precision.language, 2e-2)
    assert _apart(stepped, whole) < limit


@pytest.mark.parametrize("dialect", RUNNABLE[:1])
def test_a_causal_flag_is_no_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: Export, dialect: DialectName
) -> None:
    """The trap: `is_causal` without a mask is wrong for a step, whatever its alignment."""

    class Trapped(ModernDialect):
        def masked_attention(self, qkv: Sequence[str], step: Step, name: str) -> str:
            return self.graph.node("Attention", list(qkv), name, {"is_causal": 1})

    def trapped(name: DialectName, graph: str, plan: QuantPlan, dtype: str) -> ModernDialect:
        assert name == dialect
        return Trapped(GraphBuilder(graph), plan, dtype)

    monkeypatch.setattr("internvl_edge.export.writer.new_dialect", trapped)
    path = export_bundle(TINY_OCR, tmp_path / "bundle", dialect=dialect)
    monkeypatch.undo()
    sizes = [270, 1, 1]
    right = _logits(exported(dialect, FP32), sizes)
    assert _apart(_logits(exported("tensorrt-portable", FP32), sizes), right) < 1e-5
    assert _apart(_logits(path, sizes)[-2:], right[-2:]) > 0.1


def _logits(bundle: Path, sizes: Sequence[int]) -> NDArray[np.float64]:
    """Logits of random tokens given in passes of these sizes."""
    opened = open_bundle(bundle, verify="size")
    backend, spec = ReferenceBackend(opened, 2), opened.spec.language
    total = sum(sizes)
    assert total % KEY_BUCKET  # some of the keys read are of no position yet
    cache, base = backend.new_cache(2 * KEY_BUCKET), rope_base(spec, total)
    random = np.random.default_rng(0)
    rows = np.load(opened.file("embedding.npy"))[random.integers(0, spec.vocab_size, total)]
    if (opened.path / "embedding.scales.npy").exists():
        rows = random.standard_normal(rows.shape)
    rows = rows.astype("float32" if opened.manifest.language == "fp32" else "float16")
    parts = []
    for part in np.split(rows, np.cumsum(sizes)[:-1]):
        parts.append(backend.forward([Slice(cache, part, base, np.arange(len(part)))]))
        cache.state.extend(np.zeros(len(part), np.int64), base)
    return np.concatenate(parts).astype(np.float64)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"dialect": "tensorrt", "kv": "int8"}, "TensorScatter"),
        ({"dialect": "tensorrt-portable", "kv": "fp16"}, "for tensorrt-portable; use fp32 or int8"),
        ({"language": "int4", "options": QuantOptions(block=32)}, "blocks of 64 or 128"),
        ({"language": "int4", "options": QuantOptions(symmetric=False)}, "symmetric"),
    ],
)
def test_what_tensorrt_does_not_take_is_refused(
    tmp_path: Path, exported: Export, arguments: dict[str, Any], expected: str
) -> None:
    calibration = exported("onnxruntime", FP32).parent / "pictures"
    target = tmp_path / "bundle"
    arguments = {"dialect": "tensorrt", "calibration": calibration, **arguments}
    with pytest.raises(ExportError, match=expected):
        export_bundle(TINY_OCR, target, sensitivity=False, **arguments)
    assert not target.exists()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "bundle")
    words = ["export", str(GOLDEN / "model"), "-o", target]
    assert main([*words, "--for", "tensorrt", "--kv", "int8"]) == 2
    assert "tensorrt-portable" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main([*words, "--for", "tensorrt-portable"]) == 0
    assert main(["inspect", target, "--json"]) == 0
    assert '"dialect": "tensorrt-portable"' in capsys.readouterr().out
    with pytest.raises(DeviceError, match="is of the tensorrt-portable dialect"):
        InternVL.load(target, device="cuda")
    assert "as reference for" in InternVL.load(target).engine.backend.description


def test_engine_form_fixes_what_is_free(exported: Export) -> None:
    path = exported("tensorrt", FP16) / "language.onnx"
    before = path.read_bytes()
    model = onnx.load_from_string(engine_form(path, 1024))
    caches = [v for v in model.graph.input if v.name.startswith("past.")]
    assert caches
    assert {v.type.tensor_type.shape.dim[2].dim_value for v in caches} == {1024}
    attention = [node for node in model.graph.node if node.op_type == "Attention"]
    assert all(node.attribute[-1].name == "TRT_decomposable" for node in attention)
    assert path.read_bytes() == before


def test_dialects_have_their_names() -> None:
    for name in ("onnxruntime", *TENSORRT):
        dialect = registry.new_dialect(name, "language", QuantPlan(), "float32")
        assert dialect.name == name
