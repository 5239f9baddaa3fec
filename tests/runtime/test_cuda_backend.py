"""`device="cuda"` whole, with a stand-in for the driver and ONNX Runtime's CPU on its memory.

Kernels, copies and sessions are queued and done when somebody waits, so answers are right only if
the path waits where it must. What it costs (waits, allocations, bytes) is read from the calls.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from calibrating import few_items
from candidates import check_candidates
from checkpoints import GOLDEN
from host_driver import FOREIGN_CONTEXT, HostDriver, on_device
from numpy.typing import NDArray
from PIL import Image

from internvl_edge.cli.main import main
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration.decisions import QuantOptions
from internvl_edge.kernels.device import Driver
from internvl_edge.runtime import (
    DeviceError,
    InternVL,
    LimitError,
    devices,
)
from internvl_edge.runtime.backends import Slice, onnxruntime_cuda, sessions
from internvl_edge.runtime.backends.cuda_passes import Binding, CudaCache
from internvl_edge.runtime.backends.own_kernels import NO_KERNELS
from internvl_edge.runtime.decoding.sampling import Sampling

QUESTION = "How many lanterns are there?"
PIXELS = np.random.default_rng(3).integers(0, 256, (100, 150, 3), dtype=np.uint8)
#: New device memory, and memory that waits: calls that cost the host time.
ALLOCATIONS = ("cuMemAlloc", "cuMemHostAlloc", "cuMemFree", "cuMemFreeHost")
WAITS = ("cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize")


@pytest.fixture
def model(bindings: HostDriver, golden_bundle: Path) -> InternVL:
    """Keeps nothing between prompts, so that each computes everything."""
    return InternVL.load(golden_bundle, device="cuda", threads=2, reuse_bytes=0)


@pytest.fixture
def remembering(bindings: HostDriver, golden_bundle: Path) -> InternVL:
    return InternVL.load(golden_bundle, device="cuda", threads=2)


def test_answers_are_the_cpus(
    model: InternVL, golden_model: InternVL, golden_images: dict[str, Image.Image]
) -> None:
    for image in golden_images.values():
        wanted = golden_model.generate(QUESTION, [image], max_new_tokens=8)
        assert model.generate(QUESTION, [image], max_new_tokens=8).token_ids == wanted.token_ids


@pytest.mark.parametrize(
    ("name", "shown"), [("single", ["img0"]), ("multi_image", ["img0", "img1"]), ("text_only", [])]
)
def test_golden_answers(
    model: InternVL,
    golden_images: dict[str, Image.Image],
    golden_chats: dict[str, dict[str, Any]],
    chat_arrays: dict[str, NDArray[Any]],
    name: str,
    shown: list[str],
) -> None:
    """What the reference implementation answered."""
    wanted = chat_arrays[f"{name}_generated"][0].tolist()
    images = [golden_images[stem] for stem in shown]
    got = model.generate(
        golden_chats[name]["question"],
        images,
        max_tiles=6,
        max_new_tokens=len(wanted),
        extra_stops=False,
    )
    assert got.token_ids == wanted


def test_every_logit_and_embedding_is_the_cpus(
    model: InternVL, golden_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same sessions on the same numbers: equal to the bit."""
    monkeypatch.setattr(sessions, "bundle_kernels", lambda bundle: NO_KERNELS)
    golden_model = InternVL.load(golden_bundle, device="cpu", threads=2)
    rows = golden_model.encode_images([PIXELS])
    np.testing.assert_array_equal(model.encode_images([PIXELS]), rows)
    ids = [5, *[model.context_id] * len(rows), 9, 11]
    wanted = golden_model.logits(ids, [PIXELS])
    np.testing.assert_array_equal(model.logits(ids, [PIXELS]), wanted)
    # Tiles cut elsewhere are on the host.
    tiles = golden_model.tile(PIXELS)
    np.testing.assert_array_equal(model.logits_of_tiles(ids, tiles), wanted)


@pytest.mark.parametrize("where", ["host", "device"])
def test_nothing_waits_between_the_kernel_and_the_rows(
    bindings: HostDriver, model: InternVL, where: str
) -> None:
    image = PIXELS if where == "host" else on_device(bindings, PIXELS, stream=9)
    model.encode_images([image])  # the weights of the picture's axes are on the device now
    bindings.calls.clear()
    model.encode_images([image])
    names = [name for name, *_ in bindings.calls]
    first, last = names.index("cuLaunchKernel"), names.index("run")
    assert first < last
    assert not set(names[first:last]) & set(WAITS)
    assert [name for name in names[last:] if name in WAITS] == ["cuStreamSynchronize"]
    copied = [name for name in names if name.startswith("cuMemcpy")]
    # The picture, one way or the other, and the rows; no tiles.
    picture = "cuMemcpyHtoDAsync" if where == "host" else "cuMemcpyDtoHAsync"
    assert copied == [picture, "cuMemcpyDtoHAsync"]
    assert {call[8] for call in bindings.named("cuLaunchKernel")} == {21}


@pytest.mark.parametrize(("count", "copied"), [(0, None), (1, 8), (5, 512)])
def test_a_step_of_decoding(
    bindings: HostDriver, model: InternVL, count: int, copied: int | None
) -> None:
    """One wait, no memory; a row to the device, a row of logits or the largest back."""
    engine, language = model.engine, model.spec.language
    cache = engine.backend.new_cache(40)
    rows = rows_of(model, [3, 4, 5])
    engine.backend.forward([Slice(cache, rows, language.rope_theta, np.array([2]))])
    cache.state.extend(np.array([3, 4, 5]), language.rope_theta)
    engine.decode_candidates(
        cache, 6, count
    )  # the logits' memory and the tables are as large as they get
    bindings.calls.clear()
    for token in (7, 8, 9):
        engine.decode_candidates(cache, token, count)
    assert bindings.named(*ALLOCATIONS) == []
    assert bindings.named(*WAITS) == [(21,)] * 3
    assert len(bindings.named("run")) == 3
    sent = sum(call[2] for call in bindings.named("cuMemcpyHtoDAsync"))
    assert sent == 3 * (language.hidden_size * 4 + 4 + 8)  # the embedding, its position, the row
    fetched = [call[2] for call in bindings.named("cuMemcpyDtoHAsync")]
    assert fetched == 3 * [copied or language.vocab_size * 4]


def test_candidates_are_the_largest_logits(bindings: HostDriver, model: InternVL) -> None:
    engine = model.engine
    caches = [engine.backend.new_cache(40) for _ in range(2)]
    check_candidates(engine, *caches, zip(range(5, 25), range(1, 21), strict=True))
    assert all(cache.state.length == 20 for cache in caches)
    assert len(bindings.named("cuLaunchKernel")) == 20


@pytest.mark.parametrize(
    ("sampling", "copied"),
    [
        (Sampling(temperature=0.7, top_k=5, top_p=0.9, seed=3), 512),
        (Sampling(temperature=0.7, top_k=1, seed=3), 512),
        (Sampling(temperature=0.7, top_k=65, seed=3), None),
        (Sampling(temperature=0.7, seed=3), None),
        (Sampling(repetition_penalty=1.3), None),
    ],
    ids=["top-k", "top-1", "more than 64", "sampled", "penalised"],
)
def test_who_samples_gets_what_decides(
    bindings: HostDriver,
    model: InternVL,
    golden_model: InternVL,
    sampling: Sampling,
    copied: int | None,
) -> None:
    """The same seed draws the same tokens as from all the logits."""
    asked: dict[str, Any] = {"max_new_tokens": 8, "sampling": sampling}
    wanted = golden_model.generate("Hello", **asked)
    assert model.generate("Hello", **asked).token_ids == wanted.token_ids
    _, *fetched = (call[2] for call in bindings.named("cuMemcpyDtoHAsync"))
    assert fetched == [copied or model.spec.language.vocab_size * 4] * (len(wanted.token_ids) - 1)


def test_an_answer_copies_the_logits_of_its_prompt_only(
    bindings: HostDriver, model: InternVL
) -> None:
    tokens = len(model.generate("Hello", max_new_tokens=8).token_ids)
    fetched = [call[2] for call in bindings.named("cuMemcpyDtoHAsync")]
    assert tokens > 1
    assert fetched == [model.spec.language.vocab_size * 4, *[8] * (tokens - 1)]


def rows_of(model: InternVL, ids: list[int]) -> NDArray[Any]:
    return model.engine._embedding.rows(np.array(ids))


def test_the_cache_is_one_block_bound_as_past_and_present(
    bindings: HostDriver, model: InternVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: dict[str, int] = {}
    bind = Binding._bind

    def noted(self: Binding, told: Any, name: str, array: Any) -> None:
        bound[name] = array.address
        bind(self, told, name, array)

    monkeypatch.setattr(Binding, "_bind", noted)
    cache, language = model.engine.backend.new_cache(32), model.spec.language
    new = Slice(cache, rows_of(model, [3]), language.rope_theta, np.array([0]))
    model.engine.backend.forward([new])
    past = {name[5:]: at for name, at in bound.items() if name.startswith("past.")}
    present = {name[8:]: at for name, at in bound.items() if name.startswith("present.")}
    assert past == present
    step = 32 * language.num_key_value_heads * language.head_dim * 4
    first = min(past.values())
    assert sorted(past.values()) == [
        first + i * step for i in range(2 * language.num_hidden_layers)
    ]
    assert isinstance(cache, CudaCache)
    assert first == cache.slot.storage.memory.address


def test_a_step_writes_its_own_rows_of_the_cache_and_nothing_else(model: InternVL) -> None:
    cache = model.engine.backend.new_cache(32)
    assert isinstance(cache, CudaCache)
    memory, theta = cache.slot.storage.memory, model.spec.language.rope_theta
    assert not memory.to_host().any()  # cleared, whatever the memory held before
    for start, ids in ((0, [3, 4, 5]), (3, [6]), (4, [7])):
        before = memory.to_host()
        model.engine.backend.forward([Slice(cache, rows_of(model, ids), theta, np.array([0]))])
        cache.state.extend(np.array(ids), theta)
        changed = np.flatnonzero((memory.to_host() != before).any(axis=(0, 1, 2, 4)))
        assert changed.tolist() == list(range(start, start + len(ids)))


def test_logits_are_the_callers_to_keep(model: InternVL) -> None:
    cache = model.engine.backend.new_cache(8)
    kept = model.engine.decode(cache, 3)
    before = kept.copy()
    model.engine.decode(cache, 4)
    np.testing.assert_array_equal(kept, before)


@pytest.mark.parametrize(
    "options",
    [
        {"language": "fp16", "vision": "fp16"},
        {"language": "int4", "options": QuantOptions(naive=True)},
    ],
    ids=["fp16", "int4"],
)
def test_other_precisions(
    bindings: HostDriver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    # CUDA has ONNX Runtime's operators: rounded alike, added in another order.
    monkeypatch.setattr(sessions, "bundle_kernels", lambda bundle: NO_KERNELS)
    with few_items():
        path = export_bundle(GOLDEN / "model", tmp_path / "bundle", sensitivity=False, **options)
    wanted = InternVL.load(path, device="cpu", threads=2).generate(
        QUESTION, [PIXELS], max_new_tokens=6
    )
    got = InternVL.load(path, device="cuda", threads=2).generate(
        QUESTION, [PIXELS], max_new_tokens=6
    )
    assert got.token_ids == wanted.token_ids


def test_beyond_the_trained_length(model: InternVL, golden_model: InternVL) -> None:
    """Dynamic NTK gives every step there tables of its own."""
    trained = model.spec.language.max_position_embeddings
    ids = np.random.default_rng(0).integers(5, 400, trained - 3).tolist()
    wanted = golden_model.generate(ids, max_new_tokens=8)
    assert model.generate(ids, max_new_tokens=8).token_ids == wanted.token_ids


def test_a_prompt_begun_earlier_is_copied_on_the_device(
    bindings: HostDriver, remembering: InternVL, golden_model: InternVL
) -> None:
    image, question = on_device(bindings, PIXELS), f"{QUESTION} And lamps?"
    remembering.generate(QUESTION, [image], max_new_tokens=3)
    bindings.calls.clear()
    got = remembering.generate(question, [image], max_new_tokens=5)
    assert got.timings.cached_tokens > got.timings.prompt_tokens // 2
    assert len(bindings.named("cuMemcpy3DAsync")) == 1
    wanted = golden_model.generate(question, [PIXELS], max_new_tokens=5)
    assert got.token_ids == wanted.token_ids


def test_threads_share_the_stream(model: InternVL, golden_model: InternVL) -> None:
    """What a pass queues stays together."""
    pictures = [np.roll(PIXELS, shift, axis=1) for shift in range(6)]

    def ask(model: InternVL, picture: NDArray[Any]) -> list[int]:
        return model.generate(QUESTION, [picture], max_new_tokens=6).token_ids

    with ThreadPoolExecutor(3) as pool:
        got = list(pool.map(partial(ask, model), pictures))
    assert got == [ask(golden_model, picture) for picture in pictures]


def test_a_foreign_stream_carries_everything(
    bindings: HostDriver, golden_bundle: Path, golden_model: InternVL
) -> None:
    stream = SimpleNamespace(cuda_stream=5)
    model = InternVL.load(golden_bundle, device="cuda", threads=2, stream=stream)
    # Filled on the same stream, not there yet, and no wait of the caller's.
    image = on_device(bindings, np.zeros_like(PIXELS), stream=5)
    bindings.do_cuMemcpyHtoDAsync(image.held.address, PIXELS.ctypes.data, PIXELS.nbytes, 5)
    got = model.generate(QUESTION, [image], max_new_tokens=4)
    assert got.token_ids == golden_model.generate(QUESTION, [PIXELS], max_new_tokens=4).token_ids
    assert bindings.named("cuStreamCreate", "cuStreamDestroy", "cuEventRecord") == []
    assert {call[-1] for call in bindings.named("cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync")} == {5}
    assert {call[8] for call in bindings.named("cuLaunchKernel")} == {5}


def test_a_context_that_onnxruntime_cannot_share(bindings: HostDriver, golden_bundle: Path) -> None:
    bindings.stream_contexts[40] = FOREIGN_CONTEXT
    with pytest.raises(DeviceError, match="autoprimaryctx"):
        InternVL.load(golden_bundle, device="cuda", stream=40)


def test_a_cache_that_does_not_fit(bindings: HostDriver, model: InternVL) -> None:
    bindings.capacity = 1 << 16
    with pytest.raises(LimitError, match="no device memory for a KV cache of 1000 tokens"):
        model.engine.backend.new_cache(1000)


def test_everything_is_given_back(bindings: HostDriver, model: InternVL) -> None:
    def held() -> list[list[int]]:
        kinds = bindings.memory, bindings.pinned
        return [sorted(block.nbytes for block in blocks.values()) for blocks in kinds]

    logits = model.logits(list(range(5, 25)))  # of more rows than a step's
    model.generate(QUESTION, [PIXELS], max_new_tokens=3)
    before = held()
    assert logits.nbytes not in before[0]
    for _ in range(3):
        model.generate(QUESTION, [PIXELS], max_new_tokens=3)
        np.testing.assert_array_equal(model.logits(list(range(5, 25))), logits)
    assert held() == before


def test_the_description_names_the_device(model: InternVL) -> None:
    assert model.engine.backend.description.endswith(", stand-in")


# Devices that are not there.


def test_auto_says_once_why_it_is_the_cpu(
    golden_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    devices._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        models = [InternVL.load(golden_bundle, device="auto", threads=1) for _ in range(2)]
    assert [r.getMessage()[:22] for r in caplog.records] == ["running on the CPU (au"]
    for model in models:
        assert "CUDAExecutionProvider" in model.engine.backend.description
        assert model.max_context == model.spec.language.max_context


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_the_command_line_without_a_gpu(
    golden_bundle: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
) -> None:
    def none(failure: type[Exception]) -> None:
        raise failure("cuInit failed: CUDA_ERROR_NO_DEVICE (100); there is no NVIDIA GPU here")

    monkeypatch.setattr(Driver, "open", none)
    monkeypatch.setattr(sessions, "check_provider", lambda device: None)
    assert main(["chat", str(golden_bundle), "-p", "Hi", "--device", device]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no NVIDIA GPU here" in line


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_falls_back_is_refused(
    bindings: HostDriver, golden_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime warns and goes on with the CPU where the CUDA libraries are missing."""
    monkeypatch.setattr(onnxruntime_cuda, "cuda_provider", lambda cuda: sessions.Provider("cuda"))
    with pytest.raises(DeviceError, match="installed but did not start"):
        InternVL.load(golden_bundle, device="cuda")
    model = InternVL.load(golden_bundle, device="auto", threads=1)
    assert "did not start" in model.engine.backend.description


def test_a_stream_for_the_cpu(golden_bundle: Path) -> None:
    with pytest.raises(DeviceError, match="a CUDA stream was given for device 'cpu'"):
        InternVL.load(golden_bundle, device="cpu", stream=3)
