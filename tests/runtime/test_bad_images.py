"""Images of unusual kinds become the right tiles; what is no image is an ImageError.

"Right" is what Pillow's own `convert("RGB")` gives, except for 16-bit grey, which Pillow clips.
"""

from __future__ import annotations

import errno
import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from internvl_edge.runtime import ImageError, InternVL
from internvl_edge.runtime.images.decode import MAX_SIDE, load_image
from internvl_edge.runtime.images.preprocess import tile_image
from internvl_edge.runtime.images.sources import MAX_PIXELS

TILE = 56

Convert = Callable[[Image.Image], Image.Image]


def picture(width: int = 150, height: int = 100) -> Image.Image:
    """A smooth colour gradient with some noise: every channel differs."""
    y, x = np.mgrid[:height, :width]
    channels = [x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)]
    noise = np.random.default_rng(0).integers(-9, 9, (height, width, 3))
    return Image.fromarray((np.stack(channels, -1) + noise).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def tiles(image: Image.Image) -> NDArray[np.uint8]:
    return tile_image(image, tile_size=TILE, max_tiles=6)


def transparent(image: Image.Image) -> Image.Image:
    """RGBA with an alpha ramp; the colours below it stay."""
    alpha = Image.linear_gradient("L").resize(image.size)
    image = image.copy()
    image.putalpha(alpha)
    return image


def see_through_palette(image: Image.Image) -> Image.Image:
    """A palette with an alpha value per colour, at which Pillow warns."""
    image = image.quantize(64)
    image.info["transparency"] = bytes(range(64))
    return image


def as_is(image: Image.Image) -> Image.Image:
    return image


# Kinds that are accepted.


@pytest.mark.parametrize(
    ("kind", "change", "options"),
    [
        ("JPEG", lambda image: image.convert("CMYK"), {}),
        ("TIFF", lambda image: image.convert("CMYK"), {}),
        ("PNG", lambda image: image.quantize(37), {}),
        ("PNG", see_through_palette, {}),
        ("GIF", lambda image: image.quantize(200), {"transparency": 3}),
        ("PNG", lambda image: image.convert("L"), {}),
        ("PNG", lambda image: image.convert("1"), {}),
        ("PNG", lambda image: image.convert("LA"), {}),
        ("PNG", transparent, {}),
        ("WEBP", transparent, {"lossless": True}),
        ("TIFF", lambda image: image.convert("YCbCr"), {}),
        ("TIFF", lambda image: image.convert("LAB"), {}),
        ("JPEG", as_is, {"progressive": True}),
        ("BMP", as_is, {}),
        ("PPM", as_is, {}),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_modes(kind: str, change: Convert, options: dict[str, Any]) -> None:
    data = encoded(change(picture()), kind, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(tiles(load_image(data)), tiles(expected))


def test_cmyk_is_cmyk() -> None:
    """The first case above does exercise what it says."""
    data = encoded(picture().convert("CMYK"), "JPEG")
    assert Image.open(io.BytesIO(data)).mode == "CMYK"


def test_no_warning_is_shown() -> None:
    data = encoded(see_through_palette(picture()), "PNG")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_image(data)
    assert caught == []


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("low_byte", [0, 0x5A, 0xFF])
def test_16_bit_grey_is_its_high_byte(kind: str, low_byte: int) -> None:
    grey = np.asarray(picture().convert("L"))
    wide = Image.fromarray(grey.astype(np.uint16) << 8 | low_byte)
    assert wide.mode == "I;16"
    expected = Image.fromarray(grey).convert("RGB")
    np.testing.assert_array_equal(
        tiles(load_image(encoded(wide, kind))), tiles(expected), strict=True
    )


def test_32_bit_grey_is_scaled_by_what_it_holds() -> None:
    """Clipped to 16 bits, a picture of 24 was white."""
    image = Image.fromarray(np.array([[-5, 0, 0x7FFF, 0xFFFF, 0x10000]], np.int32))
    assert np.asarray(load_image(image))[0, :, 0].tolist() == [0, 0, 0x3F, 0x7F, 0x80]


def test_16_bit_colour() -> None:
    """Pillow has no 16-bit RGB: it reads the high bytes."""
    colours = np.asarray(picture())
    data = png(*picture().size, colour_type=2, depth=16, rows=colours.repeat(2, axis=2))
    np.testing.assert_array_equal(load_image(data), colours)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animation_shows_its_first_frame(kind: str) -> None:
    frames = [picture().quantize(99).convert("RGB"), Image.new("RGB", (150, 100), "red")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    opened: Any = Image.open(io.BytesIO(data))
    assert opened.n_frames == 2
    np.testing.assert_array_equal(tiles(load_image(data)), tiles(opened.convert("RGB")))
    assert np.abs(np.asarray(load_image(data), int) - np.asarray(frames[0])).max() < 16


def test_exif_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(), "PNG", exif=exif)
    np.testing.assert_array_equal(load_image(data), picture())


@pytest.mark.parametrize(
    ("size", "grid"), [((1, 10_000), 7), ((10_000, 1), 7), ((1, 1), 1), ((1, MAX_SIDE), 7)]
)
def test_extreme_shapes(size: tuple[int, int], grid: int) -> None:
    image = load_image(encoded(Image.new("RGB", size, (1, 2, 3)), "PNG"))
    cut = tiles(image)
    assert cut.shape == (grid, TILE, TILE, 3)
    assert (cut == (1, 2, 3)).all()


def test_thin_image_ends_in_an_answer(golden_model: InternVL) -> None:
    reply = golden_model.generate("What?", [picture(1, 10_000)], max_new_tokens=1)
    assert reply.timings.tiles == 13


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview], ids=lambda kind: kind.__name__)
def test_any_buffer_of_bytes(wrap: Callable[[bytes], Any]) -> None:
    np.testing.assert_array_equal(load_image(wrap(encoded(picture(), "PNG"))), picture())


@pytest.mark.parametrize("wrap", [str, Path], ids=lambda kind: kind.__name__)
def test_any_path(tmp_path: Path, wrap: Callable[[Path], Any]) -> None:
    (tmp_path / "写真 1.jpg").write_bytes(encoded(picture(), "PNG"))  # the suffix does not count
    np.testing.assert_array_equal(load_image(wrap(tmp_path / "写真 1.jpg")), picture())


def test_any_strides_of_an_array() -> None:
    array = np.asarray(picture())
    np.testing.assert_array_equal(load_image(array[::-2, ::3, ::-1]), array[::-2, ::3, ::-1])


# What is refused.


def refusal(source: Any, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def png(
    width: int, height: int, *, colour_type: int = 0, depth: int = 1, rows: NDArray[Any] | None
) -> bytes:
    """A PNG file by hand; without rows only its header is true."""
    lines = [] if rows is None else [b"\0" + row.tobytes() for row in rows]
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"".join(lines))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.95])
def test_truncated(kind: str, share: float) -> None:
    data = encoded(picture(), kind)
    refusal(data[: int(len(data) * share)])


@pytest.mark.parametrize("data", [b"", bytearray()], ids=["bytes", "bytearray"])
def test_no_bytes(data: bytes) -> None:
    assert refusal(data) == "0 bytes of image data is empty (0 bytes); expected an encoded image"


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    assert "empty.png is empty (0 bytes)" in refusal(tmp_path / "empty.png")


@pytest.mark.parametrize("size", [(0, 0), (0, 9), (9, 0)], ids=str)
def test_no_pixels(size: tuple[int, int]) -> None:
    width, height = size
    for source in (Image.new("RGB", size), np.zeros((height, width, 3), np.uint8)):
        assert f"has no pixels ({width} x {height})" in refusal(source)
    refusal(png(width, height, rows=None))


def test_missing_file(tmp_path: Path) -> None:
    message = refusal(tmp_path / "none.jpg")
    assert "none.jpg" in message
    assert os.strerror(errno.ENOENT) in message


def test_directory(tmp_path: Path) -> None:
    assert os.strerror(errno.EISDIR) in refusal(tmp_path)


@pytest.mark.parametrize("path", ["a\0b.png", "\ud800.png", "x" * 5000], ids=["NUL", "", "long"])
def test_impossible_path(path: str) -> None:
    assert "cannot read image" in refusal(path)


@pytest.mark.parametrize("data", [b"hello", b"<svg></svg>", b"\0" * 999], ids=repr)
def test_other_files(data: bytes) -> None:
    assert "is not an image Pillow can identify" in refusal(data)


@pytest.mark.parametrize(
    "source",
    [
        *(None, 3, ["a.png"], np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4), bool)),
        *(np.zeros((4, 4, 3)), np.zeros((3, 5, 5), np.uint8), np.zeros((1, 5, 5, 3), np.uint8)),
    ],
    ids=["None", "int", "list", "grey and alpha", "bool", "float", "channels first", "batch"],
)
def test_other_types(source: object) -> None:
    assert "uint8" in refusal(source)


def test_closed_image() -> None:
    image = Image.open(io.BytesIO(encoded(picture(), "PNG")))
    image.close()
    refusal(image)


@pytest.mark.parametrize("size", [(60_000, 60_000), (2**31 - 1, 2**31 - 1)], ids=str)
def test_decompression_bomb(size: tuple[int, int]) -> None:
    """Refused by its header: the pixels would take gigabytes."""
    message = refusal(png(*size, rows=None))
    assert str(MAX_PIXELS) in message
    assert "scale it down" in message


@pytest.mark.parametrize("size", [(1, MAX_SIDE + 1), (2_000_000, 2), (2, 89_000_000)], ids=str)
def test_endless_side(size: tuple[int, int]) -> None:
    """Few pixels, but resizing one axis at a time would take gigabytes."""
    message = refusal(png(*size, rows=None))
    assert str(MAX_SIDE) in message


def test_endless_array() -> None:
    array = np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (20_000, 20_000, 3))
    assert str(MAX_PIXELS) in refusal(array)


@pytest.mark.parametrize("wrap", [lambda image: image, lambda image: encoded(image, "PNG")])
def test_limit_of_the_caller(wrap: Callable[[Image.Image], Any]) -> None:
    source = wrap(picture())
    message = refusal(source, max_pixels=14_999)
    assert "150 x 100 = 15000 pixels, the limit is 14999" in message
    load_image(source, max_pixels=15_000)


def test_bomb_in_a_text_chunk() -> None:
    """A megabyte of zeros, compressed, where Pillow reads it while opening."""
    body = b"Comment\0\0" + zlib.compress(bytes(80 << 20))
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body
    chunk += struct.pack(">I", zlib.crc32(b"zTXt" + body))
    data = encoded(picture(), "PNG")
    refusal(data[:33] + chunk + data[33:])


# Whatever the bytes are.

SAMPLES = {
    kind: encoded(picture(40, 30), kind, **options)
    for kind, options in {
        "PNG": {},
        "JPEG": {},
        "WEBP": {},
        "GIF": {"save_all": True, "append_images": [Image.new("RGB", (40, 30))]},
        "TIFF": {"compression": "tiff_lzw"},
        "BMP": {},
    }.items()
}
MAGIC = [b"", *(data[:12] for data in SAMPLES.values()), b"\0\0\1\0", b"II*\0", b"P6", b"8BPS"]


def load_or_refuse(data: bytes) -> None:
    try:
        image = load_image(data, max_pixels=1_000_000)
    except ImageError:
        return
    assert image.mode == "RGB"


@settings(max_examples=150, deadline=None)
@given(start=st.sampled_from(MAGIC), rest=st.binary(max_size=200))
def test_random_bytes(start: bytes, rest: bytes) -> None:
    load_or_refuse(start + rest)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(SAMPLES)))
def test_random_truncation(data: st.DataObject, kind: str) -> None:
    sample = SAMPLES[kind]
    load_or_refuse(sample[: data.draw(st.integers(0, len(sample)))])


@settings(max_examples=300, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(SAMPLES)))
def test_random_damage(data: st.DataObject, kind: str) -> None:
    sample = bytearray(SAMPLES[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        # Mostly in the headers: damage to the pixels is rarely noticed.
        end = data.draw(st.sampled_from([40, 120, len(sample)]))
        at = data.draw(st.integers(0, min(end, len(sample)) - 1))
        sample[at] = data.draw(st.integers(0, 255))
    load_or_refuse(bytes(sample))
