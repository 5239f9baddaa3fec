"""Pictures as people have them: what names one, what it may be, and how it is looked at.

"Right" is what Pillow decodes of the same bytes, and of wide grey what its values say.
"""

from __future__ import annotations

import base64
import io
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from internvl_edge.runtime import (
    FrameWarning,
    ImageError,
    InternVL,
    InternVLEdgeError,
    LimitError,
    Picture,
)
from internvl_edge.runtime.images.decode import load_pixels

WHITE = 255


def colours(width: int = 40, height: int = 30) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def encoded(image: Image.Image | NDArray[np.uint8], kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    opened = image if isinstance(image, Image.Image) else Image.fromarray(image)
    opened.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a picture 模型.png"
    path.write_bytes(encoded(colours()))
    return path


# What names a picture.


def test_a_path_of_every_kind(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(file.parent))
    monkeypatch.chdir(file.parent)
    home = f"~/{file.name}"
    names = (str(file), file.name, home, file.as_uri(), f"./{file.name}")
    for source in (file, Path(home), *names):
        np.testing.assert_array_equal(load_pixels(source), colours(), err_msg=str(source))


def test_file_uris_name_this_machine(file: Path) -> None:
    path = quote(str(file))
    np.testing.assert_array_equal(load_pixels(f"FILE://localhost{path}"), colours())
    with pytest.raises(ImageError, match="names another machine; copy the file to this one"):
        load_pixels(f"file://elsewhere{path}")


def test_a_file_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~x.png").write_bytes(encoded(colours()))
    np.testing.assert_array_equal(load_pixels("~x.png"), colours())


@pytest.mark.parametrize(
    "altered", [lambda t: t, lambda t: t.replace(b"=", b""), lambda t: t + b"\n"]
)
@pytest.mark.parametrize("alphabet", [base64.b64encode, base64.urlsafe_b64encode])
def test_base64(alphabet: Any, altered: Any) -> None:
    text = altered(alphabet(encoded(colours()))).decode()
    np.testing.assert_array_equal(load_pixels(text), colours())
    np.testing.assert_array_equal(load_pixels(f"data:image/png;base64,{text}"), colours())
    np.testing.assert_array_equal(load_pixels(f"data:;base64,{text}"), colours())


@pytest.mark.parametrize(
    "head", [b"\0\0\0\x20ftypisom", b"\x1aE\xdf\xa3" * 3, b"RIFF\0\0\0\0AVI LIST"], ids=repr
)
def test_a_video_is_called_one(head: bytes) -> None:
    with pytest.raises(ImageError, match="is a video; take frames of it with video_frames"):
        load_pixels(head + bytes(100))


def test_base64_that_is_bytes() -> None:
    np.testing.assert_array_equal(load_pixels(base64.b64encode(encoded(colours()))), colours())


def test_open_files(file: Path, golden_model: InternVL) -> None:
    """Of them one is a picture too, and not as many as it has lines."""
    memory = io.BytesIO(encoded(colours()))
    memory.seek(7)
    with file.open("rb") as stream:
        for source in (memory, memory, stream, Picture(stream)):
            np.testing.assert_array_equal(load_pixels(source), colours())
        one, listed = (
            golden_model.generate("What?", images, max_new_tokens=1).timings.prompt_tokens
            for images in (memory, [memory])
        )
    assert one == listed
    for bad, said in (
        (stream, "closed file"),
        (io.StringIO("text"), "gives str; open it with mode 'rb'"),
        (io.BytesIO(), "is empty"),
    ):
        with pytest.raises(ImageError, match=said):
            load_pixels(bad)  # type: ignore[arg-type]
    with (
        file.open(encoding="utf-8") as words,
        pytest.raises(ImageError, match="gives text; open it with mode 'rb'"),
    ):
        load_pixels(words)  # type: ignore[arg-type]


def test_a_pipe_that_is_not_buffered(tmp_path: Path) -> None:
    """It gives no more at once than it holds, and cannot be gone back in."""
    path = tmp_path / "large.bmp"
    path.write_bytes(encoded(colours(400, 300), "BMP"))
    with subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE, bufsize=0) as cat:
        np.testing.assert_array_equal(load_pixels(cat.stdout), colours(400, 300))


def test_data_uri_with_percents() -> None:
    text = quote(encoded(colours()))
    np.testing.assert_array_equal(load_pixels(f"data:image/png,{text}"), colours())


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("https://example.org/x.png", "is on the network, .* download it"),
        ("http://example.org/x.png", "is on the network"),
        ("s3://bucket/x.png", "has the scheme 's3'; give a path"),
        ("data:image/png;base64", "has no comma"),
        ("data:image/png;base64,!!!!", "is no base64"),
        ("data:image/png;base64,", "is empty"),
        ("data:text/plain;base64,aGVsbG8=", "not an image Pillow can identify"),
        ("", "path is empty"),
        ("QUJD" * 60, "cannot read image"),
        ("~nobody-of-this-name/x.png", "cannot read image"),
        ("~\0", "cannot read image"),
    ],
)
def test_what_names_none(source: str, said: str) -> None:
    with pytest.raises(ImageError, match=said) as caught:
        load_pixels(source)
    assert len(str(caught.value)) < 400


@given(st.text(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_picture_or_one_error(text: str) -> None:
    with pytest.raises(ImageError):
        load_pixels(text)


@given(
    st.binary(max_size=200), st.sampled_from(["data:image/png;base64,", "data:,", "file://", ""])
)
@settings(max_examples=300, deadline=None)
def test_any_uri_is_a_picture_or_one_error(data: bytes, head: str) -> None:
    with pytest.raises(ImageError):
        load_pixels(head + data.decode("latin-1"))


# Arrays.


def test_arrays_of_grey_and_with_alpha() -> None:
    grey = colours()[..., 0]
    expected = np.asarray(Image.fromarray(grey).convert("RGB"))
    np.testing.assert_array_equal(load_pixels(grey), expected)
    np.testing.assert_array_equal(load_pixels(grey[..., np.newaxis]), expected)
    rgba = np.dstack([colours(), grey])
    np.testing.assert_array_equal(
        load_pixels(rgba), np.asarray(Image.fromarray(rgba).convert("RGB"))
    )


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_first_are_told_apart(channels: int) -> None:
    with pytest.raises(ImageError, match=r"channels come last: transpose\(1, 2, 0\)"):
        load_pixels(np.zeros((channels, 30, 40), np.uint8))


@pytest.mark.parametrize("dtype", [np.float32, np.uint16, bool])
def test_other_types_are_named(dtype: Any) -> None:
    with pytest.raises(ImageError, match=f"not {np.dtype(dtype)} .*scale its values to 0..255"):
        load_pixels(np.zeros((30, 40, 3), dtype))


# Frames and pages.


def frames() -> list[Image.Image]:
    return [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_frames_are_chosen_or_said(kind: str) -> None:
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames()[0], kind, save_all=True, append_images=frames()[1:], **options)
    with pytest.warns(FrameWarning, match="has 3 frames, the first is taken; 'frame' chooses"):
        first = load_pixels(data)
    assert first[0, 0].tolist() == [WHITE, 0, 0]
    for number, frame in enumerate(frames()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_array_equal(load_pixels(Picture(data, frame=number)), frame)
    with pytest.raises(ImageError, match="has 3 frames, numbered from 0, so frame 3 is none"):
        load_pixels(Picture(data, frame=3))


def test_a_still_picture_has_one_frame() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pixels(encoded(colours()))
        load_pixels(Picture(encoded(colours()), frame=0))
    with pytest.raises(ImageError, match="has 1 frames"):
        load_pixels(Picture(encoded(colours()), frame=1))


def test_an_opened_picture_is_taken_where_it_stands() -> None:
    data = encoded(frames()[0], "GIF", save_all=True, append_images=frames()[1:])
    opened = Image.open(io.BytesIO(data))
    opened.seek(1)
    assert load_pixels(opened)[0, 0].tolist() == [0, WHITE, 0]
    assert load_pixels(Picture(opened, frame=2))[0, 0].tolist() == [0, 0, WHITE]


@pytest.mark.parametrize("frame", [-1, 1.5, True, "0"])
def test_a_frame_is_a_whole_number(frame: Any) -> None:
    with pytest.raises(InternVLEdgeError, match=r"^frame is .*, it must be a whole number"):
        Picture("x.gif", frame=frame)


@pytest.mark.parametrize("frame", [2.0, np.int64(2), np.array(2)], ids=repr)
def test_fields_of_a_picture_are_what_is_meant(frame: Any) -> None:
    assert Picture("x.gif", frame, np.bool_(True)) == Picture("x.gif", 2, True)
    for upright in ("no", 2, [1]):
        with pytest.raises(LimitError, match=r"^upright is .*, it must be True or False"):
            Picture("x.gif", upright=upright)  # type: ignore[arg-type]


def test_pages_of_a_pdf() -> None:
    pytest.importorskip("pypdfium2")
    data = encoded(frames()[0], "PDF", save_all=True, append_images=frames()[1:], resolution=72)
    with pytest.warns(FrameWarning, match="has 3 frames"):
        first = load_pixels(data)
    assert first.shape == (20, 40, 3)  # two pixels a point
    for number, colour in enumerate([[254, 0, 0], [0, 255, 1], [0, 0, 254]]):
        page = load_pixels(Picture(data, frame=number))
        assert np.abs(page[10, 20].astype(int) - colour).max() < 4, number  # JPEG within
    with pytest.raises(ImageError, match="has 3 frames"):
        load_pixels(Picture(data, frame=3))
    with pytest.raises(ImageError, match="cannot be decoded"):
        load_pixels(b"%PDF-1.4")


def test_heic() -> None:
    heif = pytest.importorskip("pillow_heif")
    stream = io.BytesIO()
    heif.from_pillow(frames()[1]).save(stream, quality=-1)
    np.testing.assert_allclose(load_pixels(stream.getvalue()), frames()[1], atol=4)


@pytest.mark.parametrize(
    ("package", "data", "said"),
    [
        ("pypdfium2", b"%PDF-1.4", r"is a PDF, which needs pypdfium2: .*internvl-edge\[pdf\]"),
        (
            "pillow_heif",
            b"\0\0\0\x18ftypheic\0\0\0\0",
            r"is a HEIC picture, .*internvl-edge\[heif\]",
        ),
    ],
)
def test_the_extra_that_reads_it_is_named(
    package: str, data: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImageError, match=said):
        load_pixels(data)


# Wide grey.


@pytest.mark.parametrize("bits", range(8, 17))
def test_wide_grey_by_what_it_holds(bits: int) -> None:
    """Twelve bits in a file of sixteen came out nearly black."""
    values = np.linspace(0, 2**bits - 1, 64).astype(np.uint16).reshape(8, 8)
    found = load_pixels(encoded(Image.fromarray(values)))[..., 0]
    np.testing.assert_array_equal(found, values >> (bits - 8))
    assert found.max() == WHITE


@pytest.mark.parametrize("bits", [12, 16, 17, 24, 31])
def test_wide_grey_in_32_bits(bits: int) -> None:
    """As in 16; of more, nearly all came out white."""
    values = np.linspace(0, 2**bits - 1, 64).astype(np.int32).reshape(8, 8)
    found = load_pixels(Image.fromarray(values))[..., 0]
    np.testing.assert_array_equal(found, values >> (bits - 8))


@pytest.mark.parametrize("largest", [1.0, 255.0, 4095.0, 2.0**24 - 1])
def test_floats(largest: float) -> None:
    values = np.linspace(0, largest, 64, dtype=np.float32).reshape(8, 8)
    found = load_pixels(encoded(Image.fromarray(values), "TIFF"))[..., 0]
    np.testing.assert_array_equal(found, np.round(values * np.float32(255 / largest)))


@pytest.mark.parametrize("largest", [1e9, float(np.finfo(np.float32).max)])
def test_floats_of_any_size(largest: float) -> None:
    """Half of the values that the bits of the largest hold is half of white."""
    found = load_pixels(Image.fromarray(np.array([[0, largest / 4, largest]], np.float32)))[0, :, 0]
    whole = 255 * largest / 2.0 ** (int(largest).bit_length())
    np.testing.assert_array_equal(found, np.round([0, whole / 4, whole]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_floats_that_are_no_numbers(value: float) -> None:
    values = np.full((8, 8), value, np.float32)
    with pytest.raises(ImageError, match="no finite numbers"):
        load_pixels(Image.fromarray(values))


# Orientation.


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_only_when_asked_for(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(colours(), "PNG", exif=exif)
    np.testing.assert_array_equal(load_pixels(data), colours())  # as the reference
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(load_pixels(Picture(data, upright=True)), upright)


def test_another_orientation_is_another_image_to_the_caches(golden_model: InternVL) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(colours(120, 60), "PNG", exif=exif)
    plain, turned = (golden_model.tile(source) for source in (data, Picture(data, upright=True)))
    assert plain.shape != turned.shape or (plain != turned).any()
    first = golden_model.tile_with_identity(data, None).identity
    assert golden_model.tile_with_identity(Picture(data, upright=True), None).identity != first


def test_pictures_of_pictures_are_refused() -> None:
    with pytest.raises(ImageError, match="is another Picture"):
        Picture(Picture("x.png"))
