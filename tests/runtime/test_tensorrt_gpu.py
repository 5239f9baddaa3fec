"""Engines on a GPU, with whichever TensorRT is installed: the reference implementation's answers.

pytest -m gpu tests/runtime
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import GOLDEN
from numpy.typing import NDArray
from PIL import Image

from internvl_edge.export.bundle import export_bundle
from internvl_edge.runtime import DeviceError, InternVL
from internvl_edge.runtime.cuda import Cuda
from internvl_edge.runtime.trt import Library

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("gpu")]


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
    model = InternVL.load(path, device="tensorrt", auto_build=True, reuse_bytes=0)
    wanted = chat_arrays["single_generated"][0].tolist()
    question = golden_chats["single"]["question"]
    for _ in range(2):  # the second time over captured steps
        got = model.generate(
            question, [golden_images["img0"]], max_tiles=6, max_new_tokens=len(wanted)
        )
        assert got.token_ids == wanted
