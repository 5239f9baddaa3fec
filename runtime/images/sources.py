"""Pictures as people have them: what a caller may give, and how it is read once."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from internvl_edge.bundle.errors import ImageError
from internvl_edge.bundle.files import at_home, read_bytes
from internvl_edge.bundle.quoting import named, quoted, reason
from internvl_edge.runtime.arguments import flag, whole_or

ImageLike: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image"
    " | NDArray[np.generic] | DeviceImage | EncodedBytes | Picture"
)

#: One picture, several, or none.
Images: TypeAlias = "ImageLike | Sequence[ImageLike] | None"

#: Pixels above which an image is refused before it is decoded: where Pillow stops as well (two
#: times the 89 Mpx at which it warns). A 40-tile grid shows 8 Mpx, so nothing is gained beyond.
MAX_PIXELS = 178_956_970
#: Largest file: as many pixels of four times 16 bits, not compressed.
MAX_BYTES = 8 * MAX_PIXELS
#: Text below this length is a path that is not there rather than a picture in base64.
_LEAST_BASE64 = 64

#: First bytes of encoded images, and their media types.
_STARTS = {
    b"\x89PNG": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
    b"II*\0": "image/tiff",
    b"MM\0*": "image/tiff",
    b"%PDF": "application/pdf",
    b"P6": "image/x-portable-pixmap",
    b"P5": "image/x-portable-graymap",
}

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):(?=//|[a-z]+/)|(data):")
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]+={0,2}\s*")


class DeviceImage(Protocol):
    """An image in CUDA memory: uint8 `(H, W, 3)` of torch, CuPy, PyCUDA, Numba, `DeviceArray`."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class EncodedBytes:
    """An encoded image in memory.

    Attributes:
        data: the bytes.
        label: how messages call it.
        path: the file it was read from; None: there was none.
    """

    data: bytes
    label: str
    path: Path | None = None


@dataclass(frozen=True)
class Picture:
    """A picture, and how it is to be looked at.

    Attributes:
        source: path, URI, encoded bytes, `PIL.Image` or array; see `InternVL.stream`.
        frame: which frame of an animation, page of a TIFF or of a PDF; None takes the first, with
            a `FrameWarning` where there are more.
        upright: turn it as its EXIF orientation says. The reference does not, and its models were
            trained so.
        max_tiles: most tiles of this picture, thumbnail not counted; None leaves it to the call.
    """

    source: ImageLike
    frame: int | None = None
    upright: bool = False
    max_tiles: int | None = None

    def __post_init__(self) -> None:
        frame = whole_or("frame", self.frame, None)
        if frame is not None and frame < 0:
            raise ImageError(f"frame is {quoted(frame)}, it must be a whole number from 0 on")
        object.__setattr__(self, "frame", frame)
        object.__setattr__(self, "upright", flag("upright", self.upright))
        if isinstance(self.source, Picture):
            raise ImageError("the source of a Picture is another Picture; give that one's source")


@dataclass(frozen=True)
class EncodedPicture(Picture):
    """A picture that is held encoded."""

    source: EncodedBytes

    def file(self) -> Picture | None:
        """Return the picture by the file it came from; None: there was none."""
        if self.source.path is None:
            return None
        return Picture(self.source.path, self.frame, self.upright, self.max_tiles)


def encoded_image(source: ImageLike) -> ImageLike:
    """Read a file or a URI and copy bytes that may change, once; else return what was given.

    Raises:
        ImageError: the file cannot be read, the URI is none that is read, or there is nothing.
    """
    if isinstance(source, Picture):
        if hasattr(source.source, "__cuda_array_interface__"):
            return source.source  # pixels: neither frames nor an orientation
        return replace(source, source=encoded_image(source.source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _bytes(bytes(source))
    if isinstance(source, str):
        return _text(source)
    if isinstance(source, os.PathLike):
        return _file(at_home(os.fsdecode(source)), named(source))
    if callable(read := getattr(source, "read", None)):
        return _stream(source, read)
    return source


def _bytes(data: bytes) -> EncodedBytes:
    """Take encoded bytes; those of base64 are decoded, as the text they are would be."""
    if not looks_like_an_image(data) and data.isascii():
        decoded = _base64(data.decode("ascii"))
        if decoded is not None:
            return EncodedBytes(decoded, f"{len(decoded)} bytes of image data in base64")
    return EncodedBytes(data, f"{len(data)} bytes of image data")


def _stream(source: Any, read: Callable[[int], object]) -> EncodedBytes:
    """Read a file that is open, from its beginning where it can be gone back to."""
    try:
        if hasattr(source, "seek") and getattr(source, "seekable", lambda: True)():
            with suppress(io.UnsupportedOperation):
                source.seek(0)
        data = _read_all(read)
    except UnicodeDecodeError as error:
        raise ImageError("an open file gives text; open it with mode 'rb'") from error
    except (OSError, ValueError, TypeError) as error:  # a closed one gives a ValueError
        raise ImageError(f"cannot read image {quoted(source)}: {reason(error)}") from error
    if len(data) > MAX_BYTES:
        raise ImageError(f"cannot read image {quoted(source)}: it has more than {MAX_BYTES} bytes")
    return _bytes(data)


def _read_all(read: Callable[[int], object]) -> bytes:
    """Read up to one byte more than is taken; one that is not buffered gives what a pipe holds."""
    parts: list[bytes] = []
    left = MAX_BYTES + 1
    while left > 0 and (part := read(left)) != b"":
        if not isinstance(part, bytes):
            raise ImageError(f"an open file gives {type(part).__name__}; open it with mode 'rb'")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _text(text: str) -> EncodedBytes:
    """Read what a text names: a path, a URI, or a picture in base64."""
    if not text:
        raise ImageError("an image's path is empty")
    if (found := _SCHEME.match(text)) is not None:
        return _uri((found[1] or found[2]).lower(), text)
    if (data := _base64(text)) is not None:
        return EncodedBytes(data, f"{len(data)} bytes of image data in base64")
    return _file(at_home(text), named(text))


def _uri(scheme: str, text: str) -> EncodedBytes:
    if scheme == "data":
        return _data_uri(text)
    if scheme == "file":
        try:
            parts = urlsplit(text)
        except ValueError as error:  # such as one bracket of an IPv6 address
            raise ImageError(f"{named(text)} is no URI: {reason(error)}") from error
        if parts.netloc not in ("", "localhost"):
            raise ImageError(f"{named(text)} names another machine; copy the file to this one")
        return _file(url2pathname(parts.path), named(text))
    if scheme in ("http", "https"):
        raise ImageError(
            f"{named(text)} is on the network, where nothing is fetched from here; download it and"
            " give the file or its bytes"
        )
    raise ImageError(
        f"{named(text)} has the scheme {quoted(scheme)}; give a path, a file: or a data: URI"
    )


def _data_uri(text: str) -> EncodedBytes:
    """Decode `data:[<type>][;base64],<data>` (RFC 2397)."""
    head, comma, body = text.partition(",")
    if not comma:
        raise ImageError(f"the data URI {named(head)} has no comma before its data")
    if not head.lower().endswith(";base64"):
        data = unquote_to_bytes(body)
    else:
        try:
            data = _decoded(unquote_to_bytes(body))
        except binascii.Error as error:
            raise ImageError(f"the data URI {named(head)} is no base64: {reason(error)}") from error
    return EncodedBytes(data, f"{len(data)} bytes of a data URI")


def _base64(text: str) -> bytes | None:
    """Decode a text that is an image in base64 and no file; None where it is something else."""
    if len(text) < _LEAST_BASE64 or _BASE64.fullmatch(text) is None or _is_there(text):
        return None
    try:
        data = _decoded(text.encode())
    except binascii.Error:
        return None
    return data if looks_like_an_image(data) else None


def data_uri(data: bytes) -> str:
    """Return encoded bytes as a data URI, which `encoded_image` reads."""
    found = [media for start, media in _STARTS.items() if data.startswith(start)]
    media = found[0] if found else "application/octet-stream"
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


def _decoded(text: bytes) -> bytes:
    """Decode base64 of either alphabet, with line breaks or without, padded or not."""
    plain = b"".join(text.split()).rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
    return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)


def looks_like_an_image(data: bytes) -> bool:
    """Return whether bytes begin as a picture does, by what Pillow would open, or a PDF."""
    return data.startswith(tuple(_STARTS)) or data[8:12] == b"WEBP" or data[4:8] == b"ftyp"


def _is_there(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long for a name, or NUL within
        return False


def _file(path: str, label: str) -> EncodedBytes:
    try:
        data = read_bytes(path, MAX_BYTES)
        return EncodedBytes(data, label, Path(os.path.abspath(path)))
    except OSError as error:
        raise ImageError(f"cannot read image {quoted(path)}: {reason(error)}") from error
