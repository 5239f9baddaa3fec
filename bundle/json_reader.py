"""The one reader of JSON: what Python lets through beyond the standard is refused.

Not JSON, and refused: `NaN` and `Infinity`, numbers beyond double precision, one key twice in an
object, halves of surrogate pairs. Nesting, length of numbers and size of files are bounded.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from typing import Any, NoReturn

from internvl_edge.bundle.files import read_bytes
from internvl_edge.bundle.quoting import quoted, reason

#: Of a file that describes something: the largest known, a tokenizer's, has 20 MB.
JSON_BYTES = 64 << 20
#: Most objects and lists within one another; the deepest file that is read has 5.
MAX_DEPTH = 64
#: Digits of a whole number: the largest double has 309.
MAX_DIGITS = 309

_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonError(ValueError):
    """Text is not JSON, or goes beyond what is read of it."""


def read_json(path: str | os.PathLike[str], limit: int = JSON_BYTES) -> Any:
    """Read a file of JSON in UTF-8, with or without a byte order mark.

    Raises:
        OSError: it cannot be read, is no regular file, or has more than `limit` bytes.
        JsonError: it is not JSON.
    """
    return parse_json(read_bytes(path, limit))


def read_object(path: str | os.PathLike[str], limit: int = JSON_BYTES) -> dict[str, Any]:
    """Read a file that holds one JSON object; raises as `read_json`."""
    return as_object(read_json(path, limit))


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; bytes are UTF-8, with or without a byte order mark.

    Raises:
        JsonError: it is none.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_float,
            parse_int=_int,
        )
    except JsonError:
        raise
    except RecursionError:
        raise JsonError(f"more than {MAX_DEPTH} objects and lists within one another") from None
    except ValueError as error:
        raise JsonError(reason(error)) from error
    _check_nesting(value)
    if _ESCAPED_SURROGATE.search(text):
        _check_unicode(value)
    return value


def as_object(value: Any) -> dict[str, Any]:
    """Return a parsed value that is an object; JsonError otherwise."""
    if not isinstance(value, dict):
        raise JsonError(f"expected a JSON object, got {quoted(value)}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise JsonError(f"the key {quoted(twice)} stands twice in one object")
    return found


def _refuse_constant(constant: str) -> NoReturn:
    raise JsonError(f"{constant} is not a number JSON has")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise JsonError(f"the number {quoted(text)} is beyond double precision")
    return value


def _int(text: str) -> int:
    if (digits := len(text.lstrip("-"))) > MAX_DIGITS:
        raise JsonError(f"a number has {digits} digits, at most {MAX_DIGITS} are read")
    return int(text)


def _check_nesting(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for item in level for inner in _inner(item)]
        if not level:
            return
    raise JsonError(f"more than {MAX_DEPTH} objects and lists within one another")


def _inner(item: Any) -> Any:
    if isinstance(item, dict):
        return item.values()
    return item if isinstance(item, list) else ()


def _check_unicode(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise JsonError(f"half of a surrogate pair ({half!a}) is no text") from error
