"""Stored results: written whole or not at all, read back with one typed error for anything odd.

`latency.schema.json` beside this file describes the format; the tests hold results to it.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_edge.bundle.disk import full_disk, is_full
from internvl_edge.bundle.errors import MissingExtraError, OutputError, ResultError
from internvl_edge.bundle.files import DATA_BYTES
from internvl_edge.bundle.json_reader import JsonError, read_json
from internvl_edge.bundle.quoting import named, quoted, reason

FORMAT = "internvl-edge latency"
VERSION = 2
SCHEMA = "latency.schema.json"


def write_result(result: Mapping[str, Any], path: Path) -> None:
    """Write a result as JSON.

    Raises:
        OutputError: the file cannot be written.
    """
    write_whole((json.dumps(result, indent=1) + "\n").encode(), path)


def write_whole(content: bytes, path: Path) -> None:
    """Write a file beside its place and rename it.

    Raises:
        OutputError: the file cannot be written.
    """
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    except OSError as error:
        text = full_disk(error, path) if is_full(error) else reason(error)
        raise OutputError(f"cannot write {named(path)}: {text}") from error
    finally:
        aside.unlink(missing_ok=True)


def read_result(path: Path) -> dict[str, Any]:
    """A stored latency result.

    Raises:
        ResultError: unreadable, not such a result, of another version, or against the schema.
        MissingExtraError: the package that checks it is not installed.
    """
    try:
        result = read_json(path, DATA_BYTES)
    except (OSError, JsonError) as error:
        raise ResultError(f"cannot read {named(path)}: {reason(error)}") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise ResultError(f"{named(path)} is no result of 'bench latency --json'")
    if result.get("version") != VERSION:
        raise ResultError(
            f"{named(path)} has version {quoted(result.get('version'))}, this tool reads {VERSION};"
            " measure again"
        )
    if (wrong := violation(result)) is not None:
        raise ResultError(f"{named(path)} is damaged: {wrong}; measure again")
    return result


def violation(result: Any) -> str | None:
    """Return where a result departs from the schema, and how; None where it does not.

    Raises:
        MissingExtraError: jsonschema is not installed.
    """
    try:
        import jsonschema
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "reading a result needs the package jsonschema", extra="bench"
        ) from error
    wrong = jsonschema.exceptions.best_match(
        jsonschema.Draft202012Validator(schema()).iter_errors(result)
    )
    return None if wrong is None else f"{wrong.json_path}: {wrong.message[:200]}"


def check_writable(*paths: Path | None) -> None:
    """Fail before anything is measured rather than after.

    Raises:
        OutputError: a path is a directory, or its directory is not there or not writable.
    """
    for path in filter(None, paths):
        if path.is_dir():
            raise OutputError(f"cannot write {named(path)}: it is a directory")
        if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
            raise OutputError(f"cannot write {named(path)}: no such directory, or not writable")


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a result."""
    text = Path(__file__).with_name(SCHEMA).read_text(encoding="utf-8")
    return dict(json.loads(text))
