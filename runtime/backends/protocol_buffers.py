"""Messages of protocol buffers read, changed and written: the runtime has no `protobuf`.

Fields that nobody asks for stay as they are, and where they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

#: Kinds of fields: a number, 8 bytes, a run of bytes, 4 bytes.
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

_M = TypeVar("_M", bound="Message")


@dataclass
class Field:
    """A field of a message: its number, its kind, and what it holds."""

    number: int
    kind: int
    value: int | bytes | Message

    def content(self) -> bytes:
        """Return what it holds, where that is bytes or a message."""
        if isinstance(self.value, Message):
            return self.value.serialised()
        return b"" if isinstance(self.value, int) else self.value


@dataclass
class Message:
    """A message, field after field."""

    fields: list[Field] = field(default_factory=list)

    @classmethod
    def parse(cls: type[_M], data: bytes) -> _M:
        """Read a message.

        Raises:
            IndexError, ValueError: it is none.
        """
        return cls(list(_fields(data)))

    def serialised(self) -> bytes:
        """Write the message."""
        return b"".join(map(_written, self.fields))

    def text(self, number: int) -> str:
        """Return the bytes of a field as text; "" where there is none."""
        return next(iter(self.texts(number)), "")

    def texts(self, number: int) -> list[str]:
        """Return the bytes of every field of a number as text."""
        return [f.content().decode(errors="replace") for f in self.fields if f.number == number]

    def number(self, number: int) -> int | None:
        """Return a field that is a number."""
        for one in self.fields:
            if one.number == number and isinstance(one.value, int):
                return one.value
        return None

    def numbers(self, number: int) -> Iterator[int]:
        """Return the numbers of a field that is repeated, each by itself or packed."""
        for one in self.fields:
            if one.number == number and isinstance(one.value, int):
                yield one.value
            elif one.number == number:
                data, at = one.content(), 0
                while at < len(data):
                    value, at = _varint(data, at)
                    yield value

    def replace(self, number: int, fields: Iterable[Field]) -> None:
        """Put fields in the place of all that have a number: at its first, or at the end."""
        at = [i for i, one in enumerate(self.fields) if one.number == number]
        start = at[0] if at else len(self.fields)
        kept = [one for one in self.fields if one.number != number]
        self.fields = [*kept[:start], *fields, *kept[start:]]

    def messages(self, number: int, kind: type[_M]) -> list[_M]:
        """Return the messages of a number: what is changed in them, is in this one too."""
        found = []
        for one in self.fields:
            if one.number == number and one.kind == BYTES:
                if not isinstance(one.value, kind):
                    one.value = kind.parse(one.content())
                found.append(one.value)
        return found


def text_fields(number: int, texts: Iterable[str]) -> list[Field]:
    return [Field(number, BYTES, text.encode()) for text in texts]


def _fields(data: bytes) -> Iterator[Field]:
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == VARINT:
            value, at = _varint(data, at)
            yield Field(number, kind, value)
            continue
        if kind == BYTES:
            size, at = _varint(data, at)
        elif kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(data):
            raise ValueError("a field ends beyond its message")
        yield Field(number, kind, data[at : at + size])
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number that begins at `at`, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _written(one: Field) -> bytes:
    tag = _number(one.number << 3 | one.kind)
    if isinstance(one.value, int):
        return tag + _number(one.value)
    content = one.content()
    return tag + (_number(len(content)) if one.kind == BYTES else b"") + content


def _number(value: int) -> bytes:
    """Write a number of at most 64 bits, seven at a time, the lowest first."""
    written = bytearray()
    while value >= 0x80:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)
