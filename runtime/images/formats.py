"""Opening encoded pictures: what Pillow reads by itself, and what an extra brings."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image, UnidentifiedImageError

from internvl_edge.bundle.errors import ImageError
from internvl_edge.bundle.signals import signals_held
from internvl_edge.runtime.images.sources import MAX_PIXELS

#: Points are 1/72 inch; a page of A4 becomes 1,190 x 1,684 pixels, as a screen would show it.
PDF_SCALE = 2.0
#: Brands of ISO base media files (ISO 14496-12) by the name of the format.
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"hevc": "HEIC"}
_BRANDS |= {b"heim": "HEIC", b"heis": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC"}


@dataclass(frozen=True)
class Opened:
    """A picture that is opened and not yet decoded.

    Attributes:
        image: at the frame that was asked for.
        frames: how many it has: of an animation, or pages.
    """

    image: Image.Image
    frames: int


@contextmanager
def open_picture(stream: io.BytesIO, label: str, frame: int | None) -> Iterator[Opened]:
    """Open an encoded picture without decoding it.

    Args:
        stream: of all its bytes.
        label: how messages call it.
        frame: of an animation, or page; None is the first.

    Raises:
        ImageError: it needs an extra that is not installed, or has no such frame.
        UnidentifiedImageError: it is of no format that is known.
    """
    head = stream.getbuffer()[:12].tobytes()
    if head.startswith(b"%PDF"):
        with _document(stream, label) as document:
            check_frame(label, frame, len(document))
            yield Opened(_rendered(document[frame or 0]), len(document))
        return
    with _opened(stream, label, head) as image:
        yield Opened(image, choose_frame(image, label, frame))


def choose_frame(image: Image.Image, label: str, frame: int | None) -> int:
    """Go to a frame, or stay; return how many there are.

    Raises:
        ImageError: it has no such frame.
    """
    frames: int = getattr(image, "n_frames", 1)
    check_frame(label, frame, frames)
    if frame is not None and frames > 1:
        image.seek(frame)
    return frames


def check_frame(label: str, frame: int | None, frames: int) -> None:
    """Raise ImageError unless a picture of so many frames has this one."""
    if frame is not None and frame >= frames:
        raise ImageError(f"{label} has {frames} frames, numbered from 0, so frame {frame} is none")


def _opened(stream: io.BytesIO, label: str, head: bytes) -> Image.Image:
    try:
        return Image.open(stream)
    except UnidentifiedImageError:
        kind = _BRANDS.get(head[8:12]) if head[4:8] == b"ftyp" else None
        if kind is None and _is_video(head):
            raise ImageError(f"{label} is a video; take frames of it with video_frames") from None
        if kind is None:
            raise
    try:
        with signals_held():
            import pillow_heif
    except ImportError as error:
        raise ImageError(
            f"{label} is a {kind} picture, which needs pillow-heif: pip install"
            " 'internvl-edge[heif]'"
        ) from error
    stream.seek(0)
    image: Image.Image = pillow_heif.open_heif(stream).to_pillow()
    return image


def _is_video(head: bytes) -> bool:
    """Whether a file begins as MP4, Matroska or WebM, or AVI do."""
    riff = head.startswith(b"RIFF") and head[8:12] == b"AVI "
    return riff or head[4:8] == b"ftyp" or head.startswith(b"\x1aE\xdf\xa3")


@contextmanager
def _document(stream: io.BytesIO, label: str) -> Iterator[Any]:
    try:
        with signals_held():
            import pypdfium2
    except ImportError as error:
        raise ImageError(
            f"{label} is a PDF, which needs pypdfium2: pip install 'internvl-edge[pdf]'"
        ) from error
    with closing(pypdfium2.PdfDocument(stream)) as document:
        yield document


def _rendered(page: Any) -> Image.Image:
    """Render a page of a PDF; one of more pixels than are accepted is rendered smaller."""
    width, height = page.get_size()
    scale = min(PDF_SCALE, (MAX_PIXELS / 2 / max(width * height, 1)) ** 0.5)
    image: Image.Image = page.render(scale=scale).to_pil()
    return image
