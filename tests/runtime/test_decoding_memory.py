"""Decoding takes what the header said it would, and no more than there is."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from internvl_edge.runtime import ImageError
from internvl_edge.runtime.images import rgb
from internvl_edge.runtime.images.decode import load_pixels
from internvl_edge.runtime.images.rgb import decoding_bytes

#: Decodes a picture in a process of its own and says by how much its peak rose.
DECODE = """
import sys
from internvl_edge.runtime.images.decode import load_pixels

def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

data = open(sys.argv[1], "rb").read()
load_pixels(data[:0] + open(sys.argv[2], "rb").read())  # the decoder's own tables
before = peak()
load_pixels(data)
print(peak() - before)
"""

SIDE = 6000
#: Of a process, beside what is computed from the header: strips, tables, the C library's own.
SLACK = 24 << 20


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "PNG": ("RGB", "PNG", {}),
    "PNG palette": ("P", "PNG", {}),
    "PNG grey": ("L", "PNG", {}),
    "PNG 16 bits": ("I;16", "PNG", {}),
    "PNG alpha": ("RGBA", "PNG", {}),
    "GIF": ("P", "GIF", {}),
    "JPEG": ("RGB", "JPEG", {}),
    "JPEG progressive": ("RGB", "JPEG", {"progressive": True, "subsampling": 0}),
    "JPEG CMYK": ("CMYK", "JPEG", {}),
    "TIFF": ("RGB", "TIFF", {"compression": "tiff_deflate"}),
    "WEBP": ("RGB", "WEBP", {"lossless": True, "method": 0}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_takes_what_was_told(tmp_path: Path, kind: str) -> None:
    mode, name, options = KINDS[kind]
    for side, file in ((SIDE, "large"), (8, "small")):
        (tmp_path / file).write_bytes(encoded(Image.new(mode, (side, side)), name, **options))
    with Image.open(tmp_path / "large") as image:
        told = decoding_bytes(image)
    done = subprocess.run(
        [sys.executable, "-c", DECODE, str(tmp_path / "large"), str(tmp_path / "small")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0.8 * told < int(done.stdout) < told + SLACK


def test_a_small_file_of_many_pixels_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its header tells: 1.2 GiB, of the one that decoding may take."""
    plain = encoded(Image.new("RGB", (1, 1)), "PNG")
    header = b"IHDR" + struct.pack(">II", 13_300, 13_300) + plain[24:29]
    data = plain[:12] + header + struct.pack(">I", zlib.crc32(header)) + plain[33:]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    with pytest.raises(ImageError, match=r"13300 x 13300 pixels, RGB\) takes 1180 MiB of memory"):
        load_pixels(data)


def never(*_: object) -> None:
    raise AssertionError("it was decoded")


@pytest.mark.parametrize(("free", "fits"), [(20 << 20, False), (40 << 20, True)])
def test_what_is_not_free_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, free: int, fits: bool
) -> None:
    data = encoded(Image.new("RGB", (2000, 2000)), "PNG")
    monkeypatch.setattr(rgb, "available_memory", lambda: rgb.RESERVE_BYTES + free)
    if fits:
        assert load_pixels(data).shape == (2000, 2000, 3)
        return
    with pytest.raises(ImageError, match=r"takes 26 MiB of memory, 20 are free; scale it down"):
        load_pixels(data)


def smooth(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    channels = np.stack([x * 255 / width, y * 255 / height, (x + y) % 256], -1)
    return Image.fromarray(channels.astype(np.uint8))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(("limit", "scale"), [(7.0, 1), (6.9, 2), (1.7, 4), (0.4, 8)])
def test_a_jpeg_beyond_the_limit_is_decoded_smaller(
    monkeypatch: pytest.MonkeyPatch, limit: float, scale: int, progressive: bool
) -> None:
    """`limit`: bytes for each pixel of the whole picture."""
    width, height = 403, 301
    data = encoded(smooth(width, height), "JPEG", quality=95, progressive=progressive)
    each = limit * (10 / 7 if progressive else 1)  # a progressive one takes 10 bytes, not 7
    coefficients = 6 * width * height if progressive else 0
    monkeypatch.setattr(rgb, "DECODING_BYTES", int(each * width * height + 1))
    if coefficients > rgb.DECODING_BYTES:
        with pytest.raises(ImageError, match="scale it down first"):
            load_pixels(data)
        return
    pixels = load_pixels(data)
    assert pixels.shape == (-(-height // scale), -(-width // scale), 3)
    np.testing.assert_array_equal(pixels, load_pixels(data))  # the same each time
    assert pixels.mean() == pytest.approx(np.asarray(smooth(width, height)).mean(), abs=4)


def test_a_picture_of_the_callers_is_not_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is decoded already: what is left is three bytes a pixel."""
    image = Image.open(io.BytesIO(encoded(smooth(400, 300), "JPEG")))
    image.load()
    monkeypatch.setattr(rgb, "DECODING_BYTES", 3 * 400 * 300)
    assert load_pixels(image).shape == (300, 400, 3)
    monkeypatch.setattr(rgb, "DECODING_BYTES", 3 * 400 * 300 - 1)
    with pytest.raises(ImageError, match="scale it down first"):
        load_pixels(image)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "LA", "RGBA", "CMYK", "YCbCr", "I;16", "F"])
def test_strips_join_to_the_whole_picture(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    grey = mode in ("I;16", "F")
    image = smooth(37, 29).convert("L" if grey else mode)
    if grey:
        kind = np.uint16 if mode == "I;16" else np.float32
        image = Image.fromarray(np.asarray(image).astype(kind))
    whole = load_pixels(image)
    monkeypatch.setattr(rgb, "STRIP_BYTES", 3 * 37 * 4)
    np.testing.assert_array_equal(load_pixels(image), whole)
    if not grey:
        np.testing.assert_array_equal(whole, np.asarray(image.convert("RGB")))
