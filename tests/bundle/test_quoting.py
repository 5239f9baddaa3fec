"""Values in messages: at most 200 characters, on one line, whatever they are."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_edge.bundle.quoting import LONGEST, named, quoted, reason

ROOT = Path(__file__).parents[2]

DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]


class _Unwilling:
    def __repr__(self) -> str:
        raise ValueError("no")


@pytest.mark.parametrize(
    "value",
    [
        "x" * 10**7,
        b"x" * 10**7,
        "\n" * 300,
        10**5000,
        -(10**100_000),
        DEEP,
        list(range(10**6)),
        {str(i): i for i in range(10**5)},
        np.zeros((1000, 1000)),
        {"a": ["x" * 10**6] * 10},
        _Unwilling(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_long_values(value: object) -> None:
    text = quoted(value)
    assert 0 < len(text) <= LONGEST
    assert "\n" not in text


@given(value=st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats())
def test_short_values_are_whole(value: object) -> None:
    assert quoted(value) == repr(value)


@given(value=st.text(st.characters(codec="ascii"), max_size=30))
def test_short_texts_are_whole(value: str) -> None:
    assert quoted(value) == " ".join(repr(value).split())


@given(value=st.text(max_size=400))
def test_any_text_fits(value: str) -> None:
    assert len(quoted(value)) <= LONGEST
    assert len(named(value)) <= LONGEST
    assert len(reason(ValueError(value))) <= LONGEST
    assert "\n" not in quoted(value) + named(value) + reason(ValueError(value))


def test_a_long_path_keeps_its_ends() -> None:
    text = named(Path("/begin") / ("x" * 5000) / "end.json")
    assert text.startswith("/begin/xxx")
    assert text.endswith("xxx/end.json")


def test_a_path_that_is_not_utf8_can_be_printed() -> None:
    assert named("a\udcffb\nc").encode() == rb"a\udcffb\nc"
    assert named("模型/ü") == "模型/ü"


def test_reason_of_an_operating_system_s_error() -> None:
    assert reason(FileNotFoundError(2, "No such file", "x" * 5000)) == "No such file"
    assert reason(ValueError()) == "ValueError"


#: What f-strings in errors may show as it is: numbers, and texts of this program's own.
ROOMS = ("bundle", "runtime", "export", "calib_data", "bench", "cli")


def test_no_error_shows_a_value_whole() -> None:
    """`!r` and an error in an error are how values of any length get into messages."""
    found = []
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Raise) and node.exc is not None:
                    found += [f"{path.relative_to(ROOT)}:{v.lineno}" for v in _whole(node.exc)]
    assert found == []


def _whole(error: ast.expr) -> list[ast.FormattedValue]:
    shown = [value for value in ast.walk(error) if isinstance(value, ast.FormattedValue)]
    return [
        value
        for value in shown
        if (value.conversion == ord("r") and ast.unparse(value.value) not in _SHORT)
        or ast.unparse(value.value) in ("path", "source", "target", "bundle", "checkpoint")
    ]


#: One of a few words.
_SHORT = {"manifest.dialect"}
