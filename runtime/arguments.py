"""Arguments as people write them: taken as what they mean, or refused by name.

Integers may come as 4.0 or a NumPy scalar, one text or one picture without a list around it, and
None is the default. What is left, a typed error names.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from internvl_edge.bundle.errors import ImageError, PromptError, UsageError
from internvl_edge.bundle.files import at_home
from internvl_edge.bundle.quoting import quoted, reason

T = TypeVar("T")


def whole(name: str, value: Any) -> int:
    """Return an integer.

    Raises:
        UsageError: it is none.
    """
    found = _integer(value)
    if found is None:
        raise UsageError(f"is {quoted(value)}, it must be a whole number", option=name)
    return found


def whole_or(name: str, value: Any, default: T) -> int | T:
    """Return an integer, and `default` for None; see `whole`."""
    return default if value is None else whole(name, value)


def whole_numbers(name: str, values: Any) -> list[int]:
    """Return several integers.

    Raises:
        UsageError: they are none; the message names the one that is not.
    """
    plain = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(plain, Iterable) or isinstance(plain, str | bytes | Mapping):
        raise UsageError(f"is {quoted(values)}, it must be a row of whole numbers", option=name)
    return [whole(f"{name}[{index}]", one) for index, one in enumerate(plain)]


def number(name: str, value: Any) -> float:
    """Return a number.

    Raises:
        UsageError: it is none.
    """
    plain = _plain(value)
    if isinstance(plain, numbers.Real) and not isinstance(plain, bool):
        try:
            found = float(plain)
            return plain if isinstance(plain, int) else found
        except OverflowError:  # an integer of hundreds of digits
            return math.inf
    raise UsageError(f"is {quoted(value)}, it must be a number", option=name)


def number_or(name: str, value: Any, default: float) -> float:
    """Return a number, and `default` for None; see `number`."""
    return default if value is None else number(name, value)


def file_path(name: str, value: Any) -> Path:
    """Return a path; a leading `~` is the user's home.

    Raises:
        UsageError: it is none.
    """
    given = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(given, str) or not given:
        raise UsageError(f"is {quoted(value)}, it must be a path", option=name)
    if "\0" in given:
        raise UsageError(f"is {quoted(given)}, a path has no NUL in it", option=name)
    try:
        os.fsencode(given)
    except UnicodeEncodeError as error:
        raise UsageError(
            f"is {quoted(given)}, it is no path: {reason(error)}", option=name
        ) from error
    return Path(at_home(given))


def flag(name: str, value: Any, *, default: bool = False) -> bool:
    """Return True or False; None is `default`.

    Raises:
        UsageError: it is neither.
    """
    plain = default if value is None else _plain(value)
    if isinstance(plain, int) and plain in (0, 1):  # a bool is one
        return bool(plain)
    raise UsageError(f"is {quoted(value)}, it must be True or False", option=name)


def either(name: str, value: T, other: str, second: T) -> T:
    """Return what is given of two names of one argument.

    Raises:
        UsageError: both are.
    """
    if value is not None and second is not None:
        raise UsageError(f"is given beside {other}, which is the same; give one", option=name)
    return second if value is None else value


def function_or_none(name: str, value: T) -> T:
    """Return a function, or None.

    Raises:
        UsageError: it is neither.
    """
    if value is None or callable(value):
        return value
    raise UsageError(f"is {quoted(value)}, it must be a function", option=name)


def text(name: str, value: Any) -> str:
    """Return a text.

    Raises:
        PromptError: it is none.
    """
    if isinstance(value, str):
        return value
    raise PromptError(f"{name} is {quoted(value)}, it must be text")


def text_or_none(name: str, value: Any) -> str | None:
    """Return a text, or None; see `text`."""
    return None if value is None else text(name, value)


def texts(name: str, value: Any) -> tuple[str, ...]:
    """Return several texts: of one alone, of a list of them; None is none.

    Raises:
        PromptError: one is no text.
    """
    if value is None:
        return ()
    found = (value,) if isinstance(value, str) else _several(name, value, "texts", PromptError)
    return tuple(text(f"{name}[{index}]", one) for index, one in enumerate(found))


def prompts(name: str, value: Any) -> Iterable[Any]:
    """Return several prompts, not looked at yet: of one alone, of those that are iterated over.

    Raises:
        PromptError: it is neither.
    """
    if isinstance(value, str | Mapping):
        return (value,)
    value = _plain(value)
    if not isinstance(value, Iterable) or isinstance(value, bytes | bytearray | memoryview):
        raise PromptError(f"{name} is {quoted(value)}, it must be a prompt, or a list of them")
    return value


def pairs_of_texts(name: str, value: Any) -> list[tuple[str, str]]:
    """Return the turns of a conversation: questions and answers.

    Raises:
        PromptError: they are something else.
    """
    turns = []
    for index, turn in enumerate(_several(name, value, "turns", PromptError)):
        place = f"{name}[{index}]"
        if not isinstance(turn, Sequence) or isinstance(turn, str | bytes) or len(turn) != 2:
            raise PromptError(f"{place} is {quoted(turn)}, it must be a question and its answer")
        turns.append((text(f"{place}[0]", turn[0]), text(f"{place}[1]", turn[1])))
    return turns


def pictures(name: str, value: Any) -> tuple[Any, ...]:
    """Return several pictures: of one alone, of a list of them; None is none.

    Raises:
        ImageError: it is neither.
    """
    if value is None:
        return ()
    return (value,) if _is_picture(value) else _several(name, value, "pictures", ImageError)


def token_ids(name: str, value: Any) -> list[int]:
    """Return token ids.

    Raises:
        PromptError: they are no row of whole numbers.
    """
    expected = f"{name} must be text or a row of token ids"
    if isinstance(value, bytes | bytearray | memoryview):
        raise PromptError(f"{expected}, not bytes; decode them: {name}.decode()")
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(value, Iterable) or isinstance(value, str | Mapping):
        raise PromptError(f"{expected}, not {quoted(value)}")
    ids = list(value)
    for index, one in enumerate(ids):
        if type(one) is not int:
            found = _integer(one)
            if found is None:
                raise PromptError(f"{name}[{index}] is {quoted(one)}, it must be a token id")
            ids[index] = found
    return ids


def _integer(value: Any) -> int | None:
    """The integer that a number is, if it is one; True is none."""
    plain = _plain(value)
    if isinstance(plain, bool):
        return None
    try:
        return operator.index(plain)
    except TypeError:
        pass
    if not isinstance(plain, numbers.Real):
        return None
    try:
        return operator.index(math.trunc(plain)) if plain == math.trunc(plain) else None
    except (OverflowError, ValueError):  # infinite, or not a number
        return None


def _plain(value: Any) -> Any:
    """A NumPy scalar as Python's own."""
    scalar = isinstance(value, np.generic) or (isinstance(value, np.ndarray) and not value.ndim)
    return value.item() if scalar else value


def _is_picture(value: object) -> bool:
    """Whether this is one picture rather than several; arrays of four axes are several."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return len(shape) != 4
    if hasattr(value, "read"):  # a file gives its lines
        return True
    return isinstance(value, str | bytes | bytearray | memoryview | os.PathLike) or not isinstance(
        value, Iterable
    )


def _several(
    name: str, value: Any, what: str, error: type[PromptError | ImageError]
) -> tuple[Any, ...]:
    value = _plain(value)
    if not isinstance(value, Iterable) or isinstance(value, Mapping | bytes | bytearray):
        raise error(f"{name} is {quoted(value)}, it must be one of the {what}, or a list of them")
    return tuple(value)
