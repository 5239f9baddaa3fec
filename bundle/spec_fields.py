"""Fields of the frozen descriptions in `specs`, written to bundle.json and read back, checked."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, TypeVar, cast, get_args, get_type_hints

from internvl_edge.bundle.errors import BundleError
from internvl_edge.bundle.quoting import quoted

#: Largest size or position: they are int32 in the graphs' contract.
MAX_INTEGER = 2**31 - 1

_Part = TypeVar("_Part")

_EXPECTED: dict[Any, str] = {
    int: "a positive integer",
    float: "a positive number",
    bool: "true or false",
    str: "text",
    int | None: "a positive integer",
    tuple[float, ...]: "a list of positive numbers",
    tuple[int, ...]: "a list of positive integers",
}


#: Fields whose integers need not be positive.
_SIGNED = ("select_layer", "stop_ids")


def written(part: Any) -> dict[str, Any]:
    """Return the fields of one part; bundles of before a field had its default."""
    return {
        field.name: value
        for field in dataclasses.fields(part)
        if (value := getattr(part, field.name)) != field.default
    }


def read_part(kind: type[_Part], data: Mapping[str, Any], part: str) -> _Part:
    """Return one part of a spec, of its fields by name.

    Raises:
        BundleError: the part is missing, or a field is missing, unknown or of another type.
    """
    values = data.get(part)
    if not isinstance(values, Mapping):
        raise BundleError(f"bundle.json: spec has no object '{part}'")
    hints = get_type_hints(kind)
    fields = dataclasses.fields(cast(Any, kind))
    optional = {field.name for field in fields if field.default is not dataclasses.MISSING}
    if odd := sorted((values.keys() ^ hints.keys()) - (optional - values.keys())):
        raise BundleError(f"bundle.json: spec.{part} has missing or unknown fields: {quoted(odd)}")
    for name, hint in ((name, hint) for name, hint in hints.items() if name in values):
        if not _fits(values[name], hint, signed=name in _SIGNED):
            expected = _EXPECTED.get(hint, hint)
            raise BundleError(
                f"bundle.json: spec.{part}.{name} is {quoted(values[name])}, expected {expected}"
            )
    return kind(**{name: _frozen(value) for name, value in values.items()})


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _fits(value: object, hint: Any, *, signed: bool) -> bool:
    if hint in (tuple[float, ...], tuple[int, ...]):
        items = value if isinstance(value, (list, tuple)) else [None]
        return all(_fits(item, get_args(hint)[0], signed=signed) for item in items)
    if hint == (int | None):
        hint = int  # None is the default, which is not written
    if hint in (int, float):
        kinds = (int, float) if hint is float else int
        if not isinstance(value, kinds) or isinstance(value, bool):
            return False
        return signed or 0 < value <= (MAX_INTEGER if hint is int else sys.float_info.max)
    if hint in (bool, str):
        return isinstance(value, hint)
    options = get_args(hint)  # Literal[...] or str | None
    return value in options or (str in options and (value is None or isinstance(value, str)))
