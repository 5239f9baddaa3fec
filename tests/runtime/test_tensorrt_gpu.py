"""Engines on a GPU, with whichever TensorRT is installed: the reference implementation's answers,
and the CPU's to callers who bring context, stream and picture.

pytest -m gpu tests/runtime
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from candidates import check_candidates
from checkpoints import GOLDEN
from cuda_callers import QUESTION, TOKENS, answer_in_pycuda, answer_in_torch
from many import ASKED, alone, same
from numpy.typing import NDArray
from PIL import Image

from internvl_edge.bundle.contract import DialectName
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.tensorrt.engines import build_for_machine
from internvl_edge.runtime import DeviceError, InternVL
from internvl_edge.runtime.backends.cuda import Cuda
from internvl_edge.runtime.backends.tensorrt_library import Library

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("the_gpu")]

PIXELS = np.random.default_rng(3).integers(0, 256, (300, 410, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def library() -> Library:
    try:
        Cuda.open()
        return Library.open()
    except DeviceError as error:
        pytest.skip(f"no GPU or no TensorRT: {str(error).splitlines()[0]}")


@pytest.mark.parametrize("dialect", ["tensorrt", "tensorrt-portable"])
def test_golden_answers(
    library: Library,
    tmp_path: Path,
    golden_images: dict[str, Image.Image],
    golden_chats: dict[str, dict[str, Any]],
    chat_arrays: dict[str, NDArray[Any]],
    dialect: Any,
) -> None:
    if dialect == "tensorrt" and not library.api.modern:
        pytest.skip(f"{library.name} {library.version} does not parse this dialect")
    path = export_bundle(GOLDEN / "model", tmp_path / "bundle", dialect=dialect)
    model = InternVL.load(path, device="tensorrt", build_engines=build_for_machine, reuse_bytes=0)
    wanted = chat_arrays["single_generated"][0].tolist()
    question = golden_chats["single"]["question"]
    for _ in range(2):  # the second time over captured steps
        got = model.generate(
            question,
            [golden_images["img0"]],
            max_tiles=6,
            max_new_tokens=len(wanted),
            extra_stops=False,
        )
        assert got.token_ids == wanted


@pytest.mark.parametrize("dialect", ["tensorrt", "tensorrt-portable"])
def test_a_batch_is_answered_as_each_alone(
    library: Library, tmp_path: Path, golden_model: InternVL, dialect: Any
) -> None:
    """More requests than a pass takes, twice: the second time over captured steps."""
    if dialect == "tensorrt" and not library.api.modern:
        pytest.skip(f"{library.name} {library.version} does not parse this dialect")
    path = export_bundle(GOLDEN / "model", tmp_path / "bundle", dialect=dialect)
    given: Any = {"build_engines": build_for_machine, "max_sequences": 3}
    model = InternVL.load(path, device="tensorrt", reuse_bytes=0, **given)
    assert model.engine.backend.most_slices > 1
    wanted = [alone(golden_model, one, max_new_tokens=12) for one in ASKED]
    for _ in range(2):
        same(model.generate_batch(ASKED, max_new_tokens=12), wanted)
    model.close()


@pytest.fixture(scope="module")
def built(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with engines for this machine."""
    dialect: DialectName = "tensorrt" if library.api.modern else "tensorrt-portable"
    folder = tmp_path_factory.mktemp("engines")
    path = export_bundle(GOLDEN / "model", folder / "bundle", dialect=dialect)
    InternVL.load(path, device="tensorrt", build_engines=build_for_machine)
    return path


def on_stream(built: Path, stream: Any) -> InternVL:
    return InternVL.load(built, device="tensorrt", stream=stream)


@pytest.mark.parametrize("own_stream", [False, True])
def test_torchs_context_stream_and_picture(
    built: Path, golden_model: InternVL, own_stream: bool
) -> None:
    wanted = golden_model.generate(QUESTION, [PIXELS], max_new_tokens=TOKENS)
    got = answer_in_torch(partial(on_stream, built), PIXELS, own_stream=own_stream)
    assert got == wanted.token_ids


@pytest.mark.parametrize("primary", [True, False])
def test_pycudas_context_stream_and_picture(
    built: Path, golden_model: InternVL, primary: bool
) -> None:
    wanted = golden_model.generate(QUESTION, [PIXELS], max_new_tokens=TOKENS)
    got = answer_in_pycuda(partial(on_stream, built), PIXELS, primary=primary)
    assert got == wanted.token_ids


def test_candidates_are_the_largest_logits(built: Path) -> None:
    """The choice within the captured step, over three stretches of the cache."""
    engine = InternVL.load(built, device="tensorrt").engine
    caches = [engine.backend.new_cache(600) for _ in range(2)]
    steps = ((5 + step % 300, 1 + step % 64) for step in range(530))
    check_candidates(engine, *caches, steps)
