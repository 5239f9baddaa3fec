"""Images in device memory, and tiles that stay there, with the stand-in for the driver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_driver import HostDriver, on_device
from PIL import Image

from internvl_edge.kernels.build import BuildError
from internvl_edge.runtime import ImageError, InternVL
from internvl_edge.runtime.decoding import device_sampling
from internvl_edge.runtime.images import device_tiling

QUESTION = "How many lanterns are there?"
PIXELS = np.random.default_rng(3).integers(0, 256, (100, 150, 3), dtype=np.uint8)


@pytest.fixture
def model(bindings: HostDriver, golden_bundle: Path) -> InternVL:
    return InternVL.load(golden_bundle, device="cuda", threads=2)


def test_tiles_are_bit_equal_wherever_the_picture_is(
    bindings: HostDriver, model: InternVL, golden_model: InternVL
) -> None:
    for max_tiles in (1, 2, 6):
        wanted = golden_model.tile(PIXELS, max_tiles)
        for image in (PIXELS, Image.fromarray(PIXELS), on_device(bindings, PIXELS)):
            np.testing.assert_array_equal(model.tile(image, max_tiles), wanted)


def test_rows_with_gaps_between_them_and_read_only_memory(
    bindings: HostDriver, model: InternVL, golden_model: InternVL
) -> None:
    """A camera's pitch, or a part of a larger picture."""
    whole = on_device(bindings, PIXELS)
    address = whole.held.address + 10 * 450 + 7 * 3
    part = on_device(bindings, PIXELS, shape=(60, 90, 3), strides=(450, 3, 1), data=(address, True))
    part.held = whole
    wanted = golden_model.tile(np.ascontiguousarray(PIXELS[10:70, 7:97]))
    np.testing.assert_array_equal(model.tile(part), wanted)


def test_a_picture_is_recognised_on_the_host_and_on_the_device(
    bindings: HostDriver, model: InternVL, golden_model: InternVL
) -> None:
    chat, other, image = model.chat(), golden_model.chat(), on_device(bindings, PIXELS)
    for question, here, there, encoded in (
        (QUESTION, [image], [PIXELS], True),
        ("And the lamps?", [], [], False),
        ("The same?", [image], [PIXELS], False),
        ("And this?", [PIXELS], [PIXELS], False),
        ("Another?", [on_device(bindings, 255 - PIXELS)], [255 - PIXELS], True),
    ):
        got = chat.send(question, here, max_new_tokens=5)
        wanted = other.send(question, there, max_new_tokens=5)
        assert got.token_ids == wanted.token_ids
        assert (got.timings.tiles > 0) == encoded
        assert got.timings.cached_tokens == wanted.timings.cached_tokens


@pytest.mark.parametrize("stream", [None, 9, 21], ids=["no stream", "its own", "the runtime's"])
def test_the_picture_may_be_overwritten_afterwards(
    bindings: HostDriver, model: InternVL, golden_model: InternVL, stream: int | None
) -> None:
    """By the host where the interface names no stream, else by what comes next on it."""
    image = on_device(bindings, PIXELS, stream=stream)
    tiles = model.tile_with_identity(image, None).pixels()
    if stream is None:
        bindings.memory[image.held.address][:] = 0
    else:
        bindings.do_cuMemsetD8Async(image.held.address, 0, PIXELS.nbytes, stream)
        bindings.drain(stream)
    np.testing.assert_array_equal(tiles.to_host(), golden_model.tile(PIXELS))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"typestr": "<f4", "shape": (100, 37, 3)}, r"uint8 of shape \(H, W, 3\), not float32"),
        ({"shape": (100, 450)}, r"not uint8 \(100, 450\)"),
        ({"shape": (3, 100, 150)}, r"not uint8 \(3, 100, 150\)"),
        ({"shape": (0, 150, 3), "data": (0, False)}, r"no pixels \(150 x 0\)"),
        ({"shape": (100, 75, 3), "strides": (450, 6, 1)}, "rows have gaps.*copy the image first"),
        ({"strides": (-450, 3, 1)}, "go up"),
        ({"mask": object()}, "has a mask"),
        ({"shape": None}, "damaged __cuda_array_interface__"),
        ({"shape": (65536, 1, 3), "strides": (3, 3, 1)}, "longest side allowed is 65535"),
    ],
    ids=["dtype", "axes", "channels first", "empty", "gaps", "upside down", "mask", "odd", "high"],
)
def test_device_images_that_are_none(
    bindings: HostDriver, model: InternVL, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(ImageError, match=text):
        model.generate(QUESTION, [on_device(bindings, PIXELS, **changes)])


def test_an_image_on_another_device(bindings: HostDriver, model: InternVL) -> None:
    image = on_device(bindings, PIXELS)
    bindings.devices[image.held.address] = 1
    with pytest.raises(ImageError, match="on CUDA device 1, the model on 0; copy it"):
        model.generate(QUESTION, [image])


def test_an_image_that_is_not_in_device_memory(bindings: HostDriver, model: InternVL) -> None:
    address = (PIXELS.ctypes.data, False)
    with pytest.raises(ImageError, match="not in memory the device knows"):
        model.generate(QUESTION, [on_device(bindings, PIXELS, data=address)])


def test_a_device_image_needs_the_device(bindings: HostDriver, golden_model: InternVL) -> None:
    for ask in (golden_model.generate, golden_model.chat().send):
        with pytest.raises(ImageError, match=r"in device memory.*needs device='cuda'"):
            ask(QUESTION, [on_device(bindings, PIXELS)])


def test_without_nvcc_tiles_are_cut_on_the_host(
    bindings: HostDriver,
    golden_bundle: Path,
    golden_model: InternVL,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def none(source: str) -> Path:
        raise BuildError("no nvcc found\nsearched everywhere")

    for user in (device_tiling, device_sampling):
        monkeypatch.setattr(user, "cuda_binary", none)
    model = InternVL.load(golden_bundle, device="cuda", threads=2)
    assert [record.getMessage() for record in caplog.records] == [
        "CUDA kernels not built: no nvcc found; tokens are chosen on the CPU",
        "CUDA kernels not built: no nvcc found; images are tiled on the CPU",
    ]
    wanted = golden_model.generate(QUESTION, [PIXELS], max_new_tokens=4).token_ids
    assert model.generate(QUESTION, [PIXELS], max_new_tokens=4).token_ids == wanted
    late = on_device(bindings, np.zeros_like(PIXELS), stream=9)
    bindings.do_cuMemcpyHtoDAsync(late.held.address, PIXELS.ctypes.data, PIXELS.nbytes, 9)
    assert model.generate(QUESTION, [late], max_new_tokens=4).token_ids == wanted
    assert bindings.named("cuLaunchKernel") == []
    whole = on_device(bindings, PIXELS)
    part = on_device(
        bindings, PIXELS, shape=(60, 90, 3), strides=(450, 3, 1), data=(whole.held.address, True)
    )
    np.testing.assert_array_equal(
        model.tile(part), golden_model.tile(np.ascontiguousarray(PIXELS[:60, :90]))
    )
