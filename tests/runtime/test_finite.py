"""What a part's precision does not hold is an error that names the part, never an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_driver import HostDriver
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from internvl_edge.bundle.manifest import Manifest, read_manifest
from internvl_edge.runtime import InternVL, PrecisionError, Sampling
from internvl_edge.runtime.backends.kv_cache import CacheState
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.reference import ReferenceCache
from internvl_edge.runtime.backends.rope_table import RopeTable
from internvl_edge.runtime.decoding.finite import FiniteCheck

QUESTION = "How many lanterns are there?"
WAYS = {
    "greedy": Sampling(),
    "sampled": Sampling(temperature=0.8, seed=1),
    "top-k": Sampling(temperature=0.8, top_k=5, seed=1),
    "penalised": Sampling(repetition_penalty=1.2),
}
BAD = [np.nan, np.inf]


def picture(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (60, 80, 3), np.uint8)


class Overflowing:
    """A backend one of whose results, counted from 0, holds a value that is no number."""

    def __init__(self, inner: Any, value: float) -> None:
        self._inner, self._value = inner, value
        self.images: int | None = None
        self.passes: int | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def encode_tiles(self, tiles: Any) -> Any:
        rows = self._inner.encode_tiles(tiles)
        if self.images is not None:
            self.images -= 1
            if self.images < 0:
                rows[0, -1, 3] = self._value
        return rows

    def forward(self, *given: Any) -> Any:
        logits = self._inner.forward(*given)
        if self.passes is not None:
            self.passes -= 1
            if self.passes < 0:
                logits[-1, 7] = self._value
        return logits


@pytest.fixture(params=BAD, ids=str)
def loud(golden_bundle: Path, request: pytest.FixtureRequest) -> tuple[InternVL, Overflowing]:
    model = InternVL.load(golden_bundle, device="cpu", threads=1)
    backend = Overflowing(model.engine.backend, request.param)
    model.engine.backend = backend
    return model, backend


@pytest.mark.parametrize("sampling", WAYS.values(), ids=WAYS)
def test_rows_of_an_image(loud: tuple[InternVL, Overflowing], sampling: Sampling) -> None:
    model, backend = loud
    backend.images = 0
    for ask in (model.generate, model.chat().send):
        with pytest.raises(PrecisionError, match="the vision part"):
            ask(QUESTION, [picture(0)], sampling=sampling, max_new_tokens=4)
    with pytest.raises(PrecisionError, match="the vision part"):
        model.encode_images([picture(0)])
    backend.images = None  # nothing of it was kept
    assert np.isfinite(model.encode_images([picture(0)])).all()


@pytest.mark.parametrize("passes", [0, 1, 3])
@pytest.mark.parametrize("sampling", WAYS.values(), ids=WAYS)
def test_logits(loud: tuple[InternVL, Overflowing], sampling: Sampling, passes: int) -> None:
    """Of the prompt, and of a later token; the conversation stays as it was."""
    model, backend = loud
    chat = model.chat()
    chat.send("Hello", max_new_tokens=3)
    history = list(chat.history)
    backend.passes = passes
    with pytest.raises(PrecisionError, match="the language part"):
        chat.send(QUESTION, sampling=sampling, max_new_tokens=9)
    with pytest.raises(PrecisionError, match="the language part"):
        model.generate(QUESTION, sampling=sampling, max_new_tokens=9)
    backend.passes = None
    assert chat.history == history
    ids = model.encode_conversation([*history, (QUESTION, None)], [], None)
    again = chat.send(QUESTION, max_new_tokens=5).token_ids
    assert again == model.generate(ids, max_new_tokens=5).token_ids


def test_a_token_that_is_impossible_is_no_overflow(golden_bundle: Path) -> None:
    model = InternVL.load(golden_bundle, device="cpu", threads=1)
    backend = Overflowing(model.engine.backend, -np.inf)
    model.engine.backend, backend.passes = backend, 0
    assert model.generate(QUESTION, max_new_tokens=3).token_ids


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("sampling", WAYS.values(), ids=WAYS)
def test_candidates_found_on_a_device(
    bindings: HostDriver, golden_bundle: Path, sampling: Sampling, value: float
) -> None:
    model = InternVL.load(golden_bundle, device="cuda", threads=1)
    backend: Any = model.engine.backend
    run, passes = backend.run, []

    def overflowing(session: Any, binding: Any) -> None:
        run(session, binding)
        passes.append(session)
        if len(passes) > 2:
            logits = backend._logits.device
            bindings.queue(backend._cuda.stream, lambda: put(bindings, logits, value))

    backend.run = overflowing
    with pytest.raises(PrecisionError, match="the language part"):
        model.generate(QUESTION, sampling=sampling, max_new_tokens=9)
    assert len(passes) == 3


def put(bindings: HostDriver, logits: Any, value: float) -> None:
    bindings.memory[logits.address].view(np.float32).reshape(-1)[7] = value


@pytest.mark.parametrize(
    ("changes", "part", "remedy"),
    [
        ({"vision": "fp16"}, "vision", "vision='fp32'"),
        ({"language": "fp16"}, "language", "language='fp32'"),
        ({"vision": "int8", "dialect": "tensorrt"}, "vision", "calibration data"),
        ({"kv": "fp16"}, "language", "kv=None"),
        ({}, "vision", "weights are damaged"),
        ({}, "language", "weights are damaged"),
    ],
)
def test_the_message_names_part_and_remedy(
    golden_bundle: Path, changes: dict[str, Any], part: str, remedy: str
) -> None:
    manifest: Manifest = replace(read_manifest(golden_bundle), **changes)
    check = FiniteCheck(manifest)
    failing: dict[str, Callable[[], None]] = {
        "vision": lambda: check.rows(np.array([[np.nan, 1]], np.float32)),
        "language": lambda: check.logit(float("nan")),
    }
    with pytest.raises(PrecisionError, match=f"the {part} part of this bundle") as said:
        failing[part]()
    assert remedy in str(said.value)


@given(
    arrays(
        st.sampled_from([np.float16, np.float32]),
        (3, 5),
        elements=st.floats(width=16) | st.sampled_from([65504.0, -65504.0]),
    ),
    st.booleans(),
)
def test_rows_are_refused_exactly_where_one_is_no_number(
    golden_manifest: Manifest, rows: NDArray[np.floating], large: bool
) -> None:
    """Also where their sum is beyond float32."""
    if large and rows.dtype == np.float32:
        with np.errstate(over="ignore"):
            rows = rows * np.float32(5e33)
    check = FiniteCheck(golden_manifest)
    if np.isfinite(rows).all():
        check.rows(rows)
    else:
        with pytest.raises(PrecisionError):
            check.rows(rows)


@pytest.fixture(scope="module")
def golden_manifest(golden_bundle: Path) -> Manifest:
    return read_manifest(golden_bundle)


def test_what_masked_keys_hold_is_cleared(golden_model: InternVL) -> None:
    """The reference reads beyond the length, and zero times NaN stays NaN."""
    ort = load_onnxruntime()
    past = ort.OrtValue.ortvalue_from_numpy(np.full((1, 2, 40, 4), np.nan, np.float32))
    past.numpy()[:, :, 30:] = 0
    state = CacheState(40)
    state.reserve(30)
    rope = RopeTable(golden_model.spec.language, 40, "float32")
    golden_model.engine.forget(ReferenceCache(state, rope, {"past": past}))
    assert state.length == 0
    assert (past.numpy() == 0).all()
