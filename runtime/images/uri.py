"""Pictures named by a URI, as messages have them: a path, `file://`, or the data itself."""

from __future__ import annotations

import base64
import binascii
import os
from urllib.parse import urlsplit
from urllib.request import url2pathname

from internvl_edge.bundle.errors import ImageError
from internvl_edge.bundle.quoting import quoted
from internvl_edge.runtime.images.preprocess import EncodedBytes

#: Schemes that would need a network.
_REMOTE = ("http", "https", "ftp", "s3", "gs")


def picture_at(uri: str) -> str | EncodedBytes:
    """Return what a URI names: a path, or the bytes of a `data:` URI.

    Raises:
        ImageError: the data is no base64, the file is another machine's, or it is on a network.
    """
    scheme, _, rest = uri.partition(":")
    scheme = scheme.lower()
    if scheme == "data":
        return _data(rest)
    if scheme == "file" and rest.startswith("//"):
        host, path = urlsplit(uri)[1:3]
        if host not in ("", "localhost"):
            raise ImageError(
                f"{quoted(uri)} is a file of {quoted(host)}; only local files are read"
            )
        return url2pathname(path)
    if scheme in _REMOTE and rest.startswith("//"):
        raise ImageError(
            f"{quoted(uri)} is not fetched from the network; download it and pass the file"
        )
    return os.path.expanduser(uri)


def _data(rest: str) -> EncodedBytes:
    """Bytes of `[type];base64,data`."""
    kind, comma, text = rest.partition(",")
    if not comma or not kind.lower().endswith(";base64"):
        raise ImageError(
            f"the data URI begins with {quoted('data:' + kind[:40])}; expected"
            " data:image/png;base64,..."
        )
    try:
        return EncodedBytes(base64.b64decode(text, validate=True), "the picture in the data URI")
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the data URI is not base64: {error}") from error
