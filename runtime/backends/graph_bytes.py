"""ONNX graphs read, changed and written as protocol buffers: the runtime has no `onnx`.

Fields that are not named here stay as they are, and where they are.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

#: Numbers of fields in ONNX's messages.
_MODEL_GRAPH, _MODEL_OPSET = 7, 8
_GRAPH_NODE, _GRAPH_WEIGHT, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 5, 11, 12
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OPERATOR = 1, 2, 3, 4
_NODE_ATTRIBUTE, _NODE_DOMAIN = 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_FLOAT, _ATTRIBUTE_INTEGER, _ATTRIBUTE_TEXT = 1, 2, 3, 4
_ATTRIBUTE_TYPE, _TYPE_FLOAT, _TYPE_INTEGER = 20, 1, 2
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR, _TENSOR_ELEMENT = 1, 2, 1, 1
_TENSOR_SHAPE, _SHAPE_SIZE, _SIZE_NUMBER = 2, 1, 1
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
_WEIGHT_SIZE, _WEIGHT_ELEMENT, _WEIGHT_NAME, _WEIGHT_BYTES = 1, 2, 8, 9

#: Kinds of fields: a number, 8 bytes, a run of bytes, 4 bytes.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

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
            if one.number == number and one.kind == _BYTES:
                if not isinstance(one.value, kind):
                    one.value = kind.parse(one.content())
                found.append(one.value)
        return found


class Node(Message):
    """An operator of a graph, its inputs and outputs by name; "" is one that is absent."""

    @property
    def name(self) -> str:
        return self.text(_NODE_NAME)

    @property
    def operator(self) -> str:
        return self.text(_NODE_OPERATOR)

    @operator.setter
    def operator(self, name: str) -> None:
        self.replace(_NODE_OPERATOR, _texts(_NODE_OPERATOR, [name]))

    @property
    def domain(self) -> str:
        return self.text(_NODE_DOMAIN)

    @domain.setter
    def domain(self, name: str) -> None:
        self.replace(_NODE_DOMAIN, _texts(_NODE_DOMAIN, [name]))

    @property
    def inputs(self) -> list[str]:
        return self.texts(_NODE_INPUT)

    @inputs.setter
    def inputs(self, names: Sequence[str]) -> None:
        self.replace(_NODE_INPUT, _texts(_NODE_INPUT, names))

    @property
    def outputs(self) -> list[str]:
        return self.texts(_NODE_OUTPUT)

    @outputs.setter
    def outputs(self, names: Sequence[str]) -> None:
        self.replace(_NODE_OUTPUT, _texts(_NODE_OUTPUT, names))

    def integers(self) -> dict[str, int]:
        """Return the attributes that are integers."""
        named = {one.text(_ATTRIBUTE_NAME): one for one in self._attributes()}
        values = {name: one.number(_ATTRIBUTE_INTEGER) for name, one in named.items()}
        return {name: _signed(value) for name, value in values.items() if value is not None}

    def attribute_names(self) -> list[str]:
        """Return the names of all attributes."""
        return [one.text(_ATTRIBUTE_NAME) for one in self._attributes()]

    def floats(self) -> dict[str, float]:
        """Return the attributes that are floats."""
        return {
            one.text(_ATTRIBUTE_NAME): float(struct.unpack("<f", found.content())[0])
            for one in self._attributes()
            for found in one.fields
            if found.number == _ATTRIBUTE_FLOAT and found.kind == _FIXED32
        }

    def strings(self) -> dict[str, str]:
        """Return the attributes that are text."""
        return {
            one.text(_ATTRIBUTE_NAME): one.text(_ATTRIBUTE_TEXT)
            for one in self._attributes()
            if any(found.number == _ATTRIBUTE_TEXT for found in one.fields)
        }

    def keep_attributes(self, names: Iterable[str]) -> None:
        """Drop all other attributes."""
        kept = [one for one in self._attributes() if one.text(_ATTRIBUTE_NAME) in set(names)]
        self.replace(_NODE_ATTRIBUTE, [Field(_NODE_ATTRIBUTE, _BYTES, one) for one in kept])

    def set_integer(self, name: str, value: int) -> None:
        """Give an attribute an integer, which is not negative."""
        self._set(name, Field(_ATTRIBUTE_INTEGER, _VARINT, value), _TYPE_INTEGER)

    def set_float(self, name: str, value: float) -> None:
        """Give an attribute a float."""
        self._set(name, Field(_ATTRIBUTE_FLOAT, _FIXED32, struct.pack("<f", value)), _TYPE_FLOAT)

    def _set(self, name: str, value: Field, kind: int) -> None:
        others = [one for one in self._attributes() if one.text(_ATTRIBUTE_NAME) != name]
        made = Message(
            [*_texts(_ATTRIBUTE_NAME, [name]), value, Field(_ATTRIBUTE_TYPE, _VARINT, kind)]
        )
        fields = [Field(_NODE_ATTRIBUTE, _BYTES, one) for one in [*others, made]]
        self.replace(_NODE_ATTRIBUTE, fields)

    def _attributes(self) -> list[Message]:
        return self.messages(_NODE_ATTRIBUTE, Message)


@dataclass(frozen=True)
class Declared:
    """What a graph says of a tensor that it takes or gives.

    Attributes:
        element: ONNX's number of the type (`onnx.TensorProto.DataType`).
        shape: None for sizes that may be any.
    """

    element: int | None
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Stored:
    """A weight of a graph.

    Attributes:
        element: ONNX's number of the type (`onnx.TensorProto.DataType`).
        shape: of it.
        content: its bytes, where the graph itself has them.
    """

    element: int | None
    shape: tuple[int, ...]
    content: bytes


class Graph(Message):
    """Nodes, inputs and outputs; weights stay what they are."""

    @property
    def nodes(self) -> list[Node]:
        """The nodes, in order; see `Message.messages`."""
        return self.messages(_GRAPH_NODE, Node)

    @nodes.setter
    def nodes(self, nodes: Iterable[Node]) -> None:
        self.replace(_GRAPH_NODE, [Field(_GRAPH_NODE, _BYTES, node) for node in nodes])

    @property
    def inputs(self) -> list[str]:
        return self._names(_GRAPH_INPUT)

    @property
    def outputs(self) -> list[str]:
        return self._names(_GRAPH_OUTPUT)

    def tensors(self) -> dict[str, Declared]:
        """Return what is said of inputs and outputs that are tensors."""
        found: dict[str, Declared] = {}
        for number in (_GRAPH_INPUT, _GRAPH_OUTPUT):
            for value in self.messages(number, Message):
                for kind in value.messages(_VALUE_TYPE, Message):
                    for tensor in kind.messages(_TYPE_TENSOR, Message):
                        found[value.text(_VALUE_NAME)] = _declared(tensor)
        return found

    def weights(self) -> dict[str, Stored]:
        """Return the weights by name."""
        return {
            one.text(_WEIGHT_NAME): Stored(
                one.number(_WEIGHT_ELEMENT),
                tuple(one.numbers(_WEIGHT_SIZE)),
                b"".join(f.content() for f in one.fields if f.number == _WEIGHT_BYTES),
            )
            for one in self.messages(_GRAPH_WEIGHT, Message)
        }

    def drop(self, names: Iterable[str]) -> None:
        """Drop inputs and outputs of the graph."""
        dropped = set(names)
        for number in (_GRAPH_INPUT, _GRAPH_OUTPUT):
            values = self.messages(number, Message)
            kept = [one for one in values if one.text(_VALUE_NAME) not in dropped]
            self.replace(number, [Field(number, _BYTES, one) for one in kept])

    def add_input(self, name: str, element: int, shape: Sequence[int | str]) -> None:
        """Add an input.

        Args:
            element: ONNX's number of the type (`onnx.TensorProto.DataType`).
            shape: sizes, or names of those that may be any.
        """
        sizes = [
            Message([Field(1, _VARINT, size)] if isinstance(size, int) else _texts(2, [size]))
            for size in shape
        ]
        dimensions = Message([Field(1, _BYTES, size) for size in sizes])
        tensor = Message([Field(1, _VARINT, element), Field(2, _BYTES, dimensions)])
        kind = Message([Field(1, _BYTES, tensor)])
        value = Message([*_texts(_VALUE_NAME, [name]), Field(_VALUE_TYPE, _BYTES, kind)])
        self.fields.append(Field(_GRAPH_INPUT, _BYTES, value))

    def _names(self, number: int) -> list[str]:
        return [one.text(_VALUE_NAME) for one in self.messages(number, Message)]


class Model(Message):
    """A `ModelProto`."""

    @property
    def graph(self) -> Graph:
        """The graph.

        Raises:
            ValueError: there is none.
        """
        found = self.messages(_MODEL_GRAPH, Graph)
        if not found:
            raise ValueError("no graph")
        return found[-1]

    @property
    def domains(self) -> list[str]:
        """The domains of operators that it imports."""
        return [one.text(_OPSET_DOMAIN) for one in self.messages(_MODEL_OPSET, Message)]

    def mentions(self, text: str) -> bool:
        """Whether a text is anywhere but among the domains that are imported."""
        sought = text.encode()
        return any(sought in one.content() for one in self.fields if one.number != _MODEL_OPSET)

    def import_domain(self, name: str) -> None:
        """Import version 1 of a domain."""
        opset = Message([*_texts(_OPSET_DOMAIN, [name]), Field(_OPSET_VERSION, _VARINT, 1)])
        self.fields.append(Field(_MODEL_OPSET, _BYTES, opset))


def _declared(tensor: Message) -> Declared:
    shapes = tensor.messages(_TENSOR_SHAPE, Message)
    sizes = [size for shape in shapes for size in shape.messages(_SHAPE_SIZE, Message)]
    shape = tuple(size.number(_SIZE_NUMBER) for size in sizes)
    return Declared(tensor.number(_TENSOR_ELEMENT), shape)


def _texts(number: int, texts: Iterable[str]) -> list[Field]:
    return [Field(number, _BYTES, text.encode()) for text in texts]


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _fields(data: bytes) -> Iterator[Field]:
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield Field(number, kind, value)
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
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
    return tag + (_number(len(content)) if one.kind == _BYTES else b"") + content


def _number(value: int) -> bytes:
    """Write a number of at most 64 bits, seven at a time, the lowest first."""
    written = bytearray()
    while value >= 0x80:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)
