"""The runtime on a GPU: memory, graphs, answers, and the arrays and streams of other libraries.

    pytest -m gpu tests/runtime

Each test skips with its reason where something is missing: a GPU, nvcc, onnxruntime-gpu, PyCUDA.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from candidates import check_candidates
from cuda_callers import TOKENS, answer_in_pycuda
from many import ASKED, alone, same
from numpy.typing import NDArray
from PIL import Image

from internvl_edge.kernels.build import BuildError, cuda_binary
from internvl_edge.kernels.cuda import TILING_SOURCE
from internvl_edge.kernels.device import DeviceArray
from internvl_edge.runtime import DeviceError, ImageError, InternVL
from internvl_edge.runtime.backends.cuda import Cuda
from internvl_edge.runtime.decoding.device_sampling import LargestLogits, selection_kernels
from internvl_edge.runtime.decoding.sampling import Candidates
from internvl_edge.runtime.images.device_tiling import DeviceTiler
from internvl_edge.runtime.images.preprocess import Tiling, tile_on_host

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("the_gpu")]

QUESTION = "How many lanterns are there?"
PIXELS = np.random.default_rng(3).integers(0, 256, (300, 410, 3), dtype=np.uint8)
TILING = Tiling(tile_size=448, min_tiles=1, max_tiles=12, thumbnail=True)


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


@pytest.fixture(scope="module")
def cuda() -> Cuda:
    try:
        return Cuda.open()
    except DeviceError as error:
        pytest.skip(f"no GPU to test on: {first_line(error)}")


@pytest.fixture(scope="module")
def torch(cuda: Cuda) -> ModuleType:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return torch  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def nvcc(cuda: Cuda) -> None:
    try:
        cuda_binary(TILING_SOURCE)
    except BuildError as error:
        pytest.skip(first_line(error))


def load(bundle: Path, **options: Any) -> InternVL:
    try:
        return InternVL.load(bundle, device="cuda", **options)
    except DeviceError as error:
        pytest.skip(f"no CUDA provider: {first_line(error)}")


def tiles_and_name(cuda: Cuda, image: Any) -> tuple[NDArray[Any], bytes]:
    tiles, name = DeviceTiler.of(cuda)(image, TILING)
    assert isinstance(tiles, DeviceArray)
    return tiles.to_host(), name


def test_copies_and_a_graph(cuda: Cuda) -> None:
    values = np.arange(1 << 20, dtype=np.float32)
    with cuda.active():
        source, back = cuda.pinned(values.shape, "float32"), np.zeros_like(values)
        array = cuda.zeros(values.shape, "float32")
        with cuda.capture() as graph:
            cuda.upload(source, array)
        for factor in (1, 2):
            source[:] = factor * values
            start = cuda.event()
            graph.launch()
            stop = cuda.event()
            cuda.download(array[4:], back[4:])
            cuda.synchronize()
            np.testing.assert_array_equal(back[4:], factor * values[4:])
            assert start.seconds_until(stop) > 0
        assert not back[:4].any()
    cuda.check_primary()


def read(largest: LargestLogits, cuda: Cuda, count: int) -> Candidates | None:
    assert largest.fetch(count)
    cuda.synchronize()
    return largest.fetched(count)


def test_captured_candidates(cuda: Cuda, nvcc: None) -> None:
    """Of InternLM2's 92,553 logits, by a graph over what comes next; too many equals are told."""
    rng, kernels = np.random.default_rng(7), selection_kernels(cuda)
    assert kernels is not None
    with cuda.active():
        host, logits = cuda.pinned((92_553,), "float32"), cuda.zeros((92_553,), "float32")
        largest = LargestLogits(cuda, kernels, 92_553)
        largest.queue(logits)
        assert read(largest, cuda, 50) is None  # all alike
        with cuda.capture() as graph:
            largest.queue(logits)
        for _ in range(3):
            host[:] = rng.standard_normal(92_553)
            cuda.upload(host, logits)
            graph.launch()
            first, found = read(largest, cuda, 1), read(largest, cuda, 50)
            assert first is not None
            assert first.ids is not None
            assert first.ids.tolist() == [host.argmax()]
            assert found is not None
            assert found.ids is not None
            assert found.ids.tolist() == sorted(np.argsort(-host)[:64])
            np.testing.assert_array_equal(found.logits, host[found.ids])


def test_tiles_and_names_are_the_hosts(cuda: Cuda, nvcc: None) -> None:
    wanted, name = tile_on_host(PIXELS, TILING)
    with cuda.active():
        own = DeviceArray.of(cuda.driver, PIXELS)
    for image in (PIXELS, own):
        tiles, got = tiles_and_name(cuda, image)
        np.testing.assert_array_equal(tiles, wanted)
        assert got == name


def test_torch_arrays_and_streams(cuda: Cuda, nvcc: None, torch: ModuleType) -> None:
    """A picture made on torch's stream, read on it and on another, and overwritten at once."""
    wanted, name = tile_on_host(PIXELS, TILING)
    side = torch.cuda.Stream()
    for adopted in (None, torch.cuda.current_stream(), side):
        with torch.cuda.stream(adopted if adopted is not None else torch.cuda.current_stream()):
            image = torch.zeros(PIXELS.shape, dtype=torch.uint8, device="cuda")
            torch.cuda._sleep(50_000_000)  # the picture is late
            image.copy_(torch.from_numpy(PIXELS), non_blocking=True)
            tiles, got = DeviceTiler.of(Cuda.open(adopted))(image, TILING)
            image.zero_()
        np.testing.assert_array_equal(tiles.to_host(), wanted)
        assert got == name


def test_a_view_of_a_torch_array(cuda: Cuda, nvcc: None, torch: ModuleType) -> None:
    whole = torch.from_numpy(PIXELS).cuda()
    tiles, _ = tiles_and_name(cuda, whole[10:200, 7:300])
    wanted, _ = tile_on_host(np.ascontiguousarray(PIXELS[10:200, 7:300]), TILING)
    np.testing.assert_array_equal(tiles, wanted)
    with pytest.raises(ImageError, match="copy the image first"):
        tiles_and_name(cuda, whole[:, ::2])
    with pytest.raises(ImageError, match="not float32"):
        tiles_and_name(cuda, whole.float())


def test_pycuda_arrays_and_streams(cuda: Cuda, nvcc: None) -> None:
    pytest.importorskip("pycuda.autoprimaryctx", reason="no PyCUDA here")
    from pycuda import driver, gpuarray

    wanted, name = tile_on_host(PIXELS, TILING)
    stream = driver.Stream()
    for adopted in (None, stream):
        image = gpuarray.to_gpu_async(PIXELS, stream=stream)
        if adopted is None:
            stream.synchronize()  # PyCUDA's arrays do not name their stream
        tiles, got = DeviceTiler.of(Cuda.open(adopted))(image, TILING)
        np.testing.assert_array_equal(tiles.to_host(), wanted)
        assert got == name


def test_answers_are_the_cpus(
    cuda: Cuda,
    golden_bundle: Path,
    golden_model: InternVL,
    golden_images: dict[str, Image.Image],
) -> None:
    model = load(golden_bundle)
    for image in golden_images.values():
        wanted = golden_model.generate(QUESTION, [image], max_new_tokens=16)
        assert model.generate(QUESTION, [image], max_new_tokens=16).token_ids == wanted.token_ids
    rows = golden_model.encode_images([PIXELS])
    # float32 sums in another order; TF32 would be off by 1e-3.
    np.testing.assert_allclose(model.encode_images([PIXELS]), rows, rtol=0, atol=1e-4)


def test_a_batch_is_answered_as_each_alone(
    cuda: Cuda, golden_bundle: Path, golden_model: InternVL
) -> None:
    """Several sequences in a pass, also beyond the trained length."""
    model = load(golden_bundle, max_sequences=3, max_context=700, reuse_bytes=0)
    trained = model.spec.language.max_position_embeddings
    ids = np.random.default_rng(0).integers(5, 400, trained + 9).tolist()
    greedy = [one for one in ASKED if "sampling" not in one]
    for asked in (greedy, [ids[: trained - 15], ids, ids[:20]]):
        wanted = [alone(golden_model, one, max_new_tokens=25) for one in asked]
        same(model.generate_batch(asked, max_new_tokens=25), wanted)
    model.close()


def test_answers_in_torchs_context_and_stream(
    cuda: Cuda, torch: ModuleType, golden_bundle: Path, golden_model: InternVL
) -> None:
    wanted = golden_model.generate(QUESTION, [PIXELS], max_new_tokens=8)
    stream = torch.cuda.Stream()
    model = load(golden_bundle, stream=stream)
    with torch.cuda.stream(stream):
        image = torch.from_numpy(PIXELS).cuda(non_blocking=True)
        got = model.generate(QUESTION, [image], max_new_tokens=8)
    assert got.token_ids == wanted.token_ids
    assert torch.ones(3, device="cuda").sum().item() == 3  # torch's context is as it was


def test_answers_in_pycudas_context_and_stream(
    cuda: Cuda, golden_bundle: Path, golden_model: InternVL
) -> None:
    """ONNX Runtime works in the primary context; another is refused."""
    wanted = golden_model.generate(QUESTION, [PIXELS], max_new_tokens=TOKENS)
    on_stream = partial(load, golden_bundle)
    got = answer_in_pycuda(lambda stream: on_stream(stream=stream), PIXELS, primary=True)
    assert got == wanted.token_ids


def test_candidates_are_the_largest_logits(cuda: Cuda, nvcc: None, golden_bundle: Path) -> None:
    engine = load(golden_bundle).engine
    caches = [engine.backend.new_cache(64) for _ in range(2)]
    check_candidates(engine, *caches, zip(range(5, 60), range(1, 56), strict=True))
