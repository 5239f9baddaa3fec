"""One object of config.json: typed reads that name the key when they fail."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from internvl_edge.bundle.errors import CheckpointError
from internvl_edge.bundle.quoting import quoted
from internvl_edge.bundle.spec_fields import MAX_INTEGER

#: The default of a key that has none.
REQUIRED = object()


class Section:
    """One object of config.json, or of another file: reads that name the key when they fail."""

    def __init__(self, data: Mapping[str, Any], path: str, file: str = "config.json") -> None:
        self._data = data
        self._path = path
        self._file = file
        self._asked: set[str] = set()

    def section(self, key: str) -> Section:
        value = self.raw(key, None)
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{self._file} has no object '{self.name(key)}'")
        return Section(value, f"{self._path}{key}.", self._file)

    def name(self, key: str) -> str:
        """Return a key with the sections it stands in."""
        return f"{self._path}{key}"

    def raw(self, key: str, default: object = REQUIRED) -> Any:
        self._asked.add(key)
        value = self._data.get(key, default)
        if value is REQUIRED:
            raise CheckpointError(f"{self._file} lacks '{self._path}{key}', which has no default")
        return value

    def positive(self, key: str, default: object = REQUIRED) -> int:
        value = self.raw(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_INTEGER:
            raise self.bad(key, value, "a positive integer below 2^31")
        return value

    def integer(self, key: str, default: object = REQUIRED) -> int:
        value = self.raw(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.bad(key, value, "an integer")
        return value

    def number(self, key: str, default: object = REQUIRED) -> float:
        value = self.raw(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.bad(key, value, "a number")
        if not 0 < value <= sys.float_info.max:  # false for NaN
            raise self.bad(key, value, "a positive number")
        return float(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        values = self.raw(key)
        plain = isinstance(values, list) and all(
            isinstance(value, (int, float)) and not isinstance(value, bool) for value in values
        )
        if not plain or not all(0 < value <= sys.float_info.max for value in values):
            raise self.bad(key, values, "a list of positive numbers")
        return tuple(map(float, values))

    def flag(self, key: str, default: object = REQUIRED) -> bool:
        value = self.raw(key, default)
        if not isinstance(value, bool):
            raise self.bad(key, value, "true or false")
        return value

    def one_of(self, key: str, allowed: tuple[str, ...], default: object = REQUIRED) -> Any:
        value = self.raw(key, default)
        if value not in allowed:
            raise self.bad(key, value, f"one of {', '.join(allowed)}")
        return value

    def only(self, key: str, value: object) -> None:
        """Refuse a key that would change what is computed, unless it is absent, null or `value`."""
        got = self.raw(key, None)
        if got is not None and (got != value or isinstance(got, bool) != isinstance(value, bool)):
            raise self.bad(key, got, quoted(value))

    def finish(self, harmless: Collection[str]) -> None:
        """Refuse what nobody asked for: it may change the mathematics.

        Args:
            harmless: keys that do not; those that begin with an underscore are notes.
        """
        for key in sorted(self._data.keys() - self._asked - set(harmless)):
            if self._data[key] is not None and not key.startswith("_"):
                raise CheckpointError(
                    f"{self._file}: {quoted(self.name(key))} is {quoted(self._data[key])}; it is"
                    " not known here and may change what the model computes: remove it if it does"
                    " not"
                )

    def others(self, known: Collection[str]) -> Iterator[tuple[str, Any]]:
        """Keys that are not known, in order, and their values; notes aside, as in `finish`."""
        for key in sorted(self._data.keys() - set(known)):
            if not key.startswith("_"):
                yield key, self._data[key]

    def bad(self, key: str, value: object, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self._file}: '{self.name(key)}' is {quoted(value)}; supported: {expected}"
        )

    def refuse_quantised(self) -> None:
        """Refuse weights that are integers already: they are not what the names say."""
        for key in ("quantization_config", "compression_config"):
            if not (found := self.raw(key, None)):
                continue
            method = found.get("quant_method") if isinstance(found, Mapping) else None
            raise CheckpointError(
                f"{self._file}: the weights are already quantised with {quoted(method or found)}"
                f" ('{self.name(key)}'); export the original checkpoint,"
                " the 16-bit one"
            )

    def refuse_other_wiring(self) -> None:
        """Refuse what a config may ask of any of transformers' models."""
        self.only("add_cross_attention", False)
        self.only("cross_attention_hidden_size", None)
        self.only("is_encoder_decoder", False)
        self.only("pruned_heads", {})
        self.only("tie_encoder_decoder", False)
        self.only("use_moe", False)
