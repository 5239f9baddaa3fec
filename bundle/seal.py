"""Seals of JSON files that this program writes: a hash of their own content.

A seal tells damage, not intent: who changes a file on purpose can seal it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from internvl_edge.bundle.json_reader import JsonError, read_object
from internvl_edge.bundle.quoting import quoted

#: The key that holds it.
SEAL = "seal"


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content with its seal as the last key; an older one is replaced."""
    plain = {key: value for key, value in content.items() if key != SEAL}
    # Without spaces and in order: another layout of the same content has the same seal.
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return {**plain, SEAL: hashlib.sha256(canonical.encode()).hexdigest()}


def read_sealed(path: Path, older: Collection[str]) -> dict[str, Any]:
    """Read a sealed object; see `check_seal`.

    Raises:
        OSError: the file cannot be read, or is no regular file.
        JsonError: it is no JSON object, or its seal is broken.
    """
    content = read_object(path)
    check_seal(content, older)
    return content


def check_seal(content: Mapping[str, Any], older: Collection[str]) -> None:
    """Raise JsonError unless an object is what it was when it was sealed.

    Args:
        older: the keys of files written before there were seals: one with others has lost its own.
    """
    if SEAL in content:
        if content[SEAL] != sealed(content)[SEAL]:
            raise JsonError("it was altered: its seal does not fit its content")
    elif unknown := sorted(content.keys() - set(older)):
        raise JsonError(f"it has no seal, but the key {quoted(unknown[0])} that needs one")
