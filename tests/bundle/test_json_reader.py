"""The one reader of JSON: what is not JSON, or has no end, is one error; and it is the only one."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_edge.bundle.json_reader import (
    JSON_BYTES,
    MAX_DEPTH,
    JsonError,
    as_object,
    parse_json,
    read_json,
    read_object,
)
from internvl_edge.bundle.quoting import LONGEST

ROOT = Path(__file__).parents[2]

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # Halves of surrogate pairs are no text.
    | st.text(st.characters(exclude_categories=("Cs",))),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=20,
)


@given(value=VALUES, ascii_only=st.booleans())
def test_what_is_written_is_read(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert parse_json(text) == value
    assert parse_json(text.encode()) == value
    assert parse_json(b"\xef\xbb\xbf" + text.encode()) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Expecting value"),
        ("{} {}", "Extra data"),
        ("NaN", "NaN is not a number"),
        ('{"a": [Infinity]}', "Infinity is not a number"),
        ("-Infinity", "-Infinity is not a number"),
        ("1e400", "'1e400' is beyond double precision"),
        ("-1e400", "'-1e400' is beyond double precision"),
        ("9" * 310, "a number has 310 digits, at most 309"),
        ("9" * 100_000, "a number has 100000 digits"),
        ('{"a": 1, "b": 2, "a": 1}', "the key 'a' stands twice"),
        ('[{"x": {"a": 1, "a": 2}}]', "the key 'a' stands twice"),
        ('"\\ud800"', "half of a surrogate pair"),
        ('{"\\udfff": 1}', "half of a surrogate pair"),
        ('["\\ude00\\ud83d"]', "half of a surrogate pair"),
        ("[" * 100_000, "within one another"),
        ('{"a":' * 100_000, "within one another"),
        ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "within one another"),
        (b"\xff{}", "can't decode byte 0xff"),
        (b'"\xed\xa0\x80"', "can't decode byte"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_refused(text: str | bytes, said: str) -> None:
    with pytest.raises(JsonError) as caught:
        parse_json(text)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 2 * LONGEST


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('"\\ud83d\\ude00"', "\U0001f600"),  # a whole pair
        ("1e308", 1e308),
        ("9" * 309, int("9" * 309)),
        ("-" + "9" * 309, -int("9" * 309)),
        ("1e-400", 0.0),
    ],
    ids=["pair", "large", "digits", "negative", "small"],
)
def test_at_the_limit(text: str, value: Any) -> None:
    assert parse_json(text) == value


def test_nesting_at_the_limit() -> None:
    value = parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    for _ in range(MAX_DEPTH - 1):
        (value,) = value
    assert value == []


@pytest.mark.parametrize("value", [[], "x" * 10_000, None, math.pi])
def test_not_an_object(value: Any) -> None:
    with pytest.raises(JsonError, match="expected a JSON object") as caught:
        as_object(value)
    assert len(str(caught.value)) < 2 * LONGEST


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": [1]}')
    assert read_json(path) == read_object(path) == {"a": [1]}
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json")


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as stream:
        stream.truncate(1 << 40)  # sparse
    with pytest.raises(OSError, match=f"it has {1 << 40} bytes, at most {JSON_BYTES} are read"):
        read_json(tmp_path / "a.json")


#: JSON that this program's own processes wrote a moment before, or that is installed with it.
OWN = {
    "cli/demo.py",
    "bundle/json_reader.py",
    "export/tensorrt/rtx.py",
    "export/tensorrt/builder.py",
    "bench/latency/cold_start.py",
    "bench/gpu/suite.py",
    "bench/answers/journal.py",  # the header it has just made
    "bench/latency/memory.py",
    "bench/peers/worker.py",
    "bench/latency/operators.py",
    "bench/common/stored.py",  # the schema
}


def test_no_other_reads_a_user_s_json() -> None:
    found = set()
    for room in ("bundle", "runtime", "export", "calib_data", "bench", "cli"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                    "json.load",
                    "json.loads",
                ):
                    found.add(str(path.relative_to(ROOT)))
    assert found <= OWN
