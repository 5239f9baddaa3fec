"""Attention by our own kernel in ONNX Runtime: what GroupQueryAttention gives, of many sequences in
one pass; without it, GroupQueryAttention itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from calibrating import few_items
from checkpoints import GOLDEN
from numpy.typing import NDArray

from internvl_edge.bundle import contract
from internvl_edge.bundle.contract import CachePrecision, LanguagePrecision, VisionPrecision
from internvl_edge.bundle.errors import BundleError, LimitError
from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.cli.main import main
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.formats.plan import CacheScales
from internvl_edge.export.graphs.dialects.probes import attention_graph
from internvl_edge.export.prepare.prepare import prepare_bundle
from internvl_edge.runtime import InternVL
from internvl_edge.runtime.backends import (
    MOST_SLICES,
    Slice,
    int8_cache,
    own_kernel,
    own_kernels,
    sessions,
)
from internvl_edge.runtime.backends.attention import ATTENTION, addresses
from internvl_edge.runtime.backends.attention_nodes import SEQUENCES, give_attention, takes_total
from internvl_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend
from internvl_edge.runtime.backends.own_kernel import OwnKernel
from internvl_edge.runtime.backends.own_kernels import NO_KERNELS, OwnKernels, bundle_attention
from internvl_edge.runtime.backends.sessions import Provider, open_session

IDS = [1, 5, 9, 200, 17, 3]
#: Cached positions, new rows, and positions that stay free.
PLACES = ((0, 19, 2), (33, 1, 0), (5, 4, 70), (130, 1, 1))
#: Error beside ONNX Runtime's: rounding, and of int8 a value that is rounded the other way.
ERRORS: dict[CachePrecision, float] = {"fp32": 2e-6, "fp16": 4e-3, "int8": 2e-6}


@pytest.fixture
def kernel() -> OwnKernel:
    if (found := own_kernel.own_kernel(ATTENTION)).library is None:
        pytest.skip(found.name)
    return found


def attention_spec(heads: int, kv_heads: int, head: int) -> LanguageSpec:
    return replace(
        int8_cache.SPEC,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_size=head,
        max_position_embeddings=256,
    )


def attention_model(spec: LanguageSpec, cache: CachePrecision) -> bytes:
    random = np.random.default_rng(1)
    shape = spec.num_key_value_heads, spec.head_dim
    key, value = (random.uniform(0.01, 0.03, shape).astype(np.float32) for _ in range(2))
    return bytes(attention_graph(spec, cache, CacheScales(key, value)).SerializeToString())


def opened(model: bytes, library: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("cache", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize(
    ("heads", "head"),
    [((6, 2), 64), ((4, 4), 80), ((7, 1), 96), ((16, 2), 128), ((2, 1), 40), ((3, 1), 256)],
)
def test_a_session_gives_what_groupqueryattention_gives(
    heads: tuple[int, int],
    head: int,
    cache: CachePrecision,
    kernel: OwnKernel,
) -> None:
    if cache == "int8" and not int8_cache.takes_int8_cache():
        pytest.skip("this onnxruntime has no int8 cache")
    spec = attention_spec(*heads, head)
    model = attention_model(spec, cache)
    changed = give_attention(model)
    assert changed is not None
    theirs, ours = opened(model), opened(changed, kernel.library)
    random = np.random.default_rng(2)
    angles = random.uniform(-4, 4, (256, head // 2))
    tables = [f(angles).astype(contract.rope_dtype("fp32", cache)) for f in (np.cos, np.sin)]
    width, dtype = spec.query_size + 2 * spec.key_value_size, contract.CACHE_DTYPE[cache]
    rows, wanted, given, places = [], [], [], []
    caches, grown, first = [], [], 0
    for cached, new, free in PLACES:
        total = cached + new
        shape = contract.cache_shape(spec, total + free)
        pair = [(random.standard_normal(shape) * 30).astype(dtype) for _ in range(2)]
        if dtype != "int8":
            pair = [one / np.array(30, dtype) for one in pair]
        qkv = random.standard_normal((new, width)).astype(np.float32)
        feeds = {
            int8_cache.QKV: qkv,
            contract.ROPE_COS: tables[0],
            contract.ROPE_SIN: tables[1],
            contract.LAST_POSITION: np.array([total - 1], np.int32),
            contract.TOTAL_LENGTH: np.array(total, np.int32),
            contract.past_key(0): pair[0],
            contract.past_value(0): pair[1],
        }
        attended, key, value = theirs.run(None, feeds)
        rows.append(qkv), wanted.append(attended), given.append(slice(cached, total))
        places.append([first, new, cached, total + free, *addresses(pair)])
        caches.append(pair), grown.append((key[:, :, :total], value[:, :, :total]))
        first += new
    feeds = {
        int8_cache.QKV: np.concatenate(rows),
        contract.ROPE_COS: np.concatenate([tables[0][one] for one in given]),
        contract.ROPE_SIN: np.concatenate([tables[1][one] for one in given]),
        SEQUENCES: np.array(places, np.int64),
    }
    if takes_total(spec):
        feeds[contract.TOTAL_LENGTH] = np.array(first, np.int32)
    (got,) = ours.run(None, feeds)
    check_near(got, np.concatenate(wanted), cache)
    for pair, after in zip(caches, grown, strict=True):
        for mine, their in zip(pair, after, strict=True):
            check_cached(mine[:, :, : their.shape[2]], their)


def check_near(got: NDArray[np.floating], wanted: NDArray[np.floating], cache: str) -> None:
    assert np.abs(got - wanted).max() <= ERRORS[cache] * np.abs(wanted).max()  # type: ignore[index]


def check_cached(got: NDArray[np.generic], wanted: NDArray[np.generic]) -> None:
    """Check keys or values: those of int8 are one apart where one rounds the other way."""
    difference = np.abs(got.astype(np.float64) - wanted.astype(np.float64))
    assert difference.max() <= {"int8": 1, "float16": 4e-3, "float32": 1e-6}[str(got.dtype)]
    if got.dtype == np.int8:
        assert np.count_nonzero(difference) <= max(1, 1e-3 * difference.size)


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ([[0, 2, 0, 9]], "not all rows of the pass"),
        ([[0, 2, 0, 9], [1, 1, 0, 9]], "not one after the other"),
        ([[0, 3, 7, 9]], "no room for its rows"),
        ([[0, 3, -1, 9]], "no room for its rows"),
    ],
)
def test_places_that_make_no_sense_are_refused(
    places: list[list[int]], said: str, kernel: OwnKernel
) -> None:
    """Before anything is written where they say."""
    model = give_attention(attention_model(attention_spec(2, 1, 64), "fp32"))
    assert model is not None
    cache = [np.zeros((1, 1, 9, 64), np.float32) for _ in range(2)]
    feeds = {
        int8_cache.QKV: np.ones((3, 4 * 64), np.float32),
        contract.ROPE_COS: np.ones((3, 32), np.float32),
        contract.ROPE_SIN: np.zeros((3, 32), np.float32),
    }

    def run(given: list[list[int]], addresses: list[int]) -> None:
        rows = [[*place, *addresses] for place in given]
        opened(model, kernel.library).run(None, feeds | {SEQUENCES: np.array(rows, np.int64)})

    with pytest.raises(Exception, match=said):
        run(places, addresses(cache))
    with pytest.raises(Exception, match="a cache has no address"):
        run([[0, 3, 0, 9]], [0, 0])
    assert not np.any(cache)
    run([[0, 3, 0, 9]], addresses(cache))
    assert np.all(cache[0][:, :, :3])
    assert not np.any(cache[0][:, :, 3:])


def test_nodes_of_ours_that_come_with_a_file_do_not_run(kernel: OwnKernel, tmp_path: Path) -> None:
    """They would write where the file says."""
    changed = give_attention(attention_model(attention_spec(2, 1, 64), "fp32"))
    assert changed is not None
    (tmp_path / "attention.onnx").write_bytes(changed)
    with pytest.raises(BundleError, match="internvl_edge"):
        open_session(tmp_path, "attention.onnx", Provider(own=OwnKernels(attention=kernel)), 1)


@pytest.fixture(scope="module")
def float_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float") / "bundle"
    return export_bundle(GOLDEN / "model", folder, vision="fp32", language="fp32")


@pytest.fixture
def backend(float_bundle: Path, kernel: OwnKernel) -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend(open_bundle(float_bundle), 2)


def passes(
    backend: OnnxRuntimeBackend, counts: Sequence[Sequence[int]], together: bool
) -> list[NDArray[np.float32]]:
    """Return the logits of each sequence's last row in each pass.

    Args:
        counts: rows of every sequence in each pass; none: it is not in it.
    """
    random = np.random.default_rng(3)
    spec = backend._spec.language
    caches = [backend.new_cache(64 + i) for i in range(len(counts[0]))]
    logits: list[NDArray[np.float32]] = []
    for counted in counts:
        batch = [
            Slice(
                cache,
                random.standard_normal((count, spec.hidden_size)).astype(backend._rows_dtype),
                spec.rope_theta * (1 + i),
                np.array([count - 1]),
            )
            for i, (cache, count) in enumerate(zip(caches, counted, strict=True))
            if count
        ]
        groups = [batch] if together else [[one] for one in batch]
        logits += [row for group in groups for row in backend.forward(group)]
        for one in batch:
            one.cache.state.extend(np.arange(len(one.rows)), one.rope_theta)
    return logits


def test_a_batch_is_each_alone(backend: OnnxRuntimeBackend) -> None:
    """Prompts beside answers and drafts, of sequences with rotary bases of their own."""
    counts = [(17, 3, 0), (1, 20, 0), (1, 1, 30), (4, 1, 1), (0, 1, 1)]
    assert backend.most_slices > 1
    for got, wanted in zip(*(passes(backend, counts, one) for one in (True, False)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
        assert got.argmax() == wanted.argmax()


@pytest.mark.parametrize(
    ("language", "kv", "error"),
    [("fp32", "int8", 1e-5), ("fp16", "fp16", 5e-3), ("int8", "fp16", 5e-3), ("int4", "fp32", 0.1)],
)
def test_a_batch_is_each_alone_but_for_rounding(
    language: LanguagePrecision,
    kv: CachePrecision,
    error: float,
    kernel: OwnKernel,
    tmp_path: Path,
) -> None:
    """Of integer weights inputs are rounded to int8, and some the other way: attention is the same
    bits, but products of few rows add in another order."""
    if kv == "int8" and not int8_cache.takes_int8_cache():
        pytest.skip("this onnxruntime has no int8 cache")
    vision: VisionPrecision = "fp16" if language == "fp16" else "fp32"
    with few_items():
        bundle = export_bundle(
            GOLDEN / "model", tmp_path / "bundle", vision=vision, language=language, kv=kv
        )
    backend = OnnxRuntimeBackend(open_bundle(bundle), 2)
    counts = [(17, 3, 0), (1, 20, 30), (1, 1, 1), (4, 1, 1)]
    got, wanted = (np.stack(passes(backend, counts, one)) for one in (True, False))
    assert np.linalg.norm(got - wanted) <= error * np.linalg.norm(wanted)


def test_greedy_answers_are_those_of_groupqueryattention(
    float_bundle: Path, kernel: OwnKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers() -> list[list[int]]:
        model = InternVL.load(float_bundle, device="cpu", threads=2, reuse_bytes=0)
        assert (model.engine.backend.most_slices > 1) == (not answered)
        return [
            model.generate(prompt, max_new_tokens=24, ignore_eos=True).token_ids
            for prompt in ("Hello", "What is in the picture?", IDS * 30)
        ]

    answered: list[list[int]] = []
    answered += answers()
    monkeypatch.setattr(sessions, "bundle_kernels", lambda bundle: NO_KERNELS)
    assert answers() == answered


def test_only_the_rows_asked_for_have_logits(backend: OnnxRuntimeBackend) -> None:
    spec = backend._spec.language
    rows = np.random.default_rng(4).standard_normal((6, spec.hidden_size)).astype(np.float32)

    def logits(*wanted: list[int]) -> NDArray[np.float32]:
        batch = [
            Slice(backend.new_cache(8), rows, spec.rope_theta, np.array(one, np.int64))
            for one in wanted
        ]
        return backend.forward(batch)

    every = logits([0, 1, 2, 3, 4, 5])
    np.testing.assert_allclose(logits([1, 4], [], [5]), every[[1, 4, 5]], atol=1e-5)
    assert logits([]).shape == (0, spec.vocab_size)


@pytest.mark.parametrize("slices", [0, MOST_SLICES + 1])
def test_there_is_a_most_of_slices(backend: OnnxRuntimeBackend, slices: int) -> None:
    rows = np.zeros((1, backend._spec.language.hidden_size), np.float32)
    batch = [Slice(backend.new_cache(4), rows, 1e4, np.zeros(1, np.int64))] * slices
    with pytest.raises(LimitError, match=f"1 to {MOST_SLICES} sequences in a pass, got {slices}"):
        backend.forward(batch)


def test_a_pass_beyond_a_cache_is_refused(backend: OnnxRuntimeBackend) -> None:
    spec = backend._spec.language
    new = Slice(
        backend.new_cache(3),
        np.zeros((4, spec.hidden_size), np.float32),
        spec.rope_theta,
        np.array([3]),
    )
    with pytest.raises(Exception, match="rotary tables are not of the rows"):
        backend.forward([new])


def test_without_a_library_there_is_one_sequence_a_pass(
    float_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = InternVL.load(float_bundle, device="cpu", threads=1, reuse_bytes=0).logits(IDS)
    monkeypatch.setattr(own_kernel, "built_library", lambda: "no C++ compiler found")
    monkeypatch.setattr(own_kernels, "own_kernel", own_kernel.own_kernel.__wrapped__)
    found = bundle_attention(open_bundle(float_bundle))
    assert str(found).endswith("GroupQueryAttention: no library (no C++ compiler found)")
    model = InternVL.load(float_bundle, device="cpu", threads=1, reuse_bytes=0)
    backend = model.engine.backend
    assert "own attention" not in backend.description
    assert backend.most_slices == 1
    np.testing.assert_allclose(model.logits(IDS), wanted, atol=2e-5)
    spec = model.spec.language
    new = Slice(
        backend.new_cache(4), np.zeros((1, spec.hidden_size), np.float32), 1e4, np.array([0])
    )
    with pytest.raises(LimitError, match="1 sequence in a pass, got 2"):
        backend.forward([new, new])


def test_prepared_bundles_attend_with_it_too(
    float_bundle: Path, tmp_path: Path, kernel: OwnKernel
) -> None:
    float_bundle = Path(shutil.copytree(float_bundle, tmp_path / "bundle"))
    wanted = InternVL.load(float_bundle, device="cpu", threads=1, reuse_bytes=0).logits(IDS)
    prepare_bundle(float_bundle, overwrite=True)
    backend = OnnxRuntimeBackend(open_bundle(float_bundle), 1)
    assert backend.prepared
    assert backend.most_slices > 1
    model = InternVL.load(float_bundle, device="cpu", threads=1, reuse_bytes=0)
    np.testing.assert_allclose(model.logits(IDS), wanted, atol=2e-5)


def test_low_memory_opens_it_again(float_bundle: Path, kernel: OwnKernel) -> None:
    backend = OnnxRuntimeBackend(open_bundle(float_bundle), 1, low_memory=True)
    counts = [(3, 2), (1, 1)]
    first = passes(backend, counts, together=True)
    backend.encode_tiles(np.zeros((1, *[backend._spec.vision.tile_size] * 2, 3), np.uint8))
    for got, wanted in zip(passes(backend, counts, together=True), first, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_inspect_and_doctor_say_it(
    float_bundle: Path, kernel: OwnKernel, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, part in ((["inspect", str(float_bundle)], "here"), (["doctor"], "kernels")):
        assert main([*command, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[part]["attention"] == kernel.name
