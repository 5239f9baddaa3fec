"""ONNX graphs read, changed and written as protocol buffers: the runtime has no `onnx`.

Fields that are not named here stay as they are, and where they are.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from internvl_edge.runtime.backends.protocol_buffers import (
    BYTES,
    FIXED32,
    VARINT,
    Field,
    Message,
    text_fields,
)

#: ONNX's number of a type (`onnx.TensorProto.DataType`).
INT64 = 7

#: Numbers of fields in ONNX's messages.
_MODEL_GRAPH, _MODEL_OPSET = 7, 8
_GRAPH_NODE, _GRAPH_WEIGHT, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_VALUE = 1, 5, 11, 12, 13
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OPERATOR = 1, 2, 3, 4
_NODE_ATTRIBUTE, _NODE_DOMAIN = 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_FLOAT, _ATTRIBUTE_INTEGER, _ATTRIBUTE_TEXT = 1, 2, 3, 4
_ATTRIBUTE_TYPE, _TYPE_FLOAT, _TYPE_INTEGER = 20, 1, 2
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR, _TENSOR_ELEMENT = 1, 2, 1, 1
_TENSOR_SHAPE, _SHAPE_SIZE, _SIZE_NUMBER, _SIZE_NAME = 2, 1, 1, 2
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
_WEIGHT_SIZE, _WEIGHT_ELEMENT, _WEIGHT_NAME, _WEIGHT_BYTES = 1, 2, 8, 9
_WEIGHT_PLACE, _PLACE_KEY, _PLACE_VALUE, _FILE_KEY = 13, 1, 2, "location"


class Node(Message):
    """An operator of a graph, its inputs and outputs by name; "" is one that is absent."""

    @classmethod
    def made(cls, operator: str, inputs: Sequence[str], output: str) -> Node:
        """Return a node of ONNX's own domain without attributes, named as what it gives."""
        fields = [
            *text_fields(_NODE_INPUT, inputs),
            *text_fields(_NODE_OUTPUT, [output]),
            *text_fields(_NODE_NAME, [output]),
            *text_fields(_NODE_OPERATOR, [operator]),
        ]
        return cls(fields)

    @property
    def name(self) -> str:
        return self.text(_NODE_NAME)

    @property
    def operator(self) -> str:
        return self.text(_NODE_OPERATOR)

    @operator.setter
    def operator(self, name: str) -> None:
        self.replace(_NODE_OPERATOR, text_fields(_NODE_OPERATOR, [name]))

    @property
    def domain(self) -> str:
        return self.text(_NODE_DOMAIN)

    @domain.setter
    def domain(self, name: str) -> None:
        self.replace(_NODE_DOMAIN, text_fields(_NODE_DOMAIN, [name]))

    @property
    def inputs(self) -> list[str]:
        return self.texts(_NODE_INPUT)

    @inputs.setter
    def inputs(self, names: Sequence[str]) -> None:
        self.replace(_NODE_INPUT, text_fields(_NODE_INPUT, names))

    @property
    def outputs(self) -> list[str]:
        return self.texts(_NODE_OUTPUT)

    @outputs.setter
    def outputs(self, names: Sequence[str]) -> None:
        self.replace(_NODE_OUTPUT, text_fields(_NODE_OUTPUT, names))

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
            if found.number == _ATTRIBUTE_FLOAT and found.kind == FIXED32
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
        self.replace(_NODE_ATTRIBUTE, [Field(_NODE_ATTRIBUTE, BYTES, one) for one in kept])

    def set_integer(self, name: str, value: int) -> None:
        """Give an attribute an integer, which is not negative."""
        self._set(name, Field(_ATTRIBUTE_INTEGER, VARINT, value), _TYPE_INTEGER)

    def set_float(self, name: str, value: float) -> None:
        """Give an attribute a float."""
        self._set(name, Field(_ATTRIBUTE_FLOAT, FIXED32, struct.pack("<f", value)), _TYPE_FLOAT)

    def _set(self, name: str, value: Field, kind: int) -> None:
        others = [one for one in self._attributes() if one.text(_ATTRIBUTE_NAME) != name]
        made = Message(
            [*text_fields(_ATTRIBUTE_NAME, [name]), value, Field(_ATTRIBUTE_TYPE, VARINT, kind)]
        )
        fields = [Field(_NODE_ATTRIBUTE, BYTES, one) for one in [*others, made]]
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
        self.replace(_GRAPH_NODE, [Field(_GRAPH_NODE, BYTES, node) for node in nodes])

    @property
    def inputs(self) -> list[str]:
        return self._names(_GRAPH_INPUT)

    @property
    def outputs(self) -> list[str]:
        return self._names(_GRAPH_OUTPUT)

    @property
    def describes_values(self) -> bool:
        """Whether types or shapes of values between nodes are stored, too."""
        return any(one.number == _GRAPH_VALUE for one in self.fields)

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

    def move_weights(self, file: str, to: str) -> None:
        """Look for the weights that lie in one file, named relative to the graph, in another."""
        for weight in self.messages(_GRAPH_WEIGHT, Message):
            for place in weight.messages(_WEIGHT_PLACE, Message):
                key, value = place.text(_PLACE_KEY), place.text(_PLACE_VALUE)
                if (key, value) == (_FILE_KEY, file):
                    place.replace(_PLACE_VALUE, text_fields(_PLACE_VALUE, [to]))

    def drop(self, names: Iterable[str]) -> None:
        """Drop inputs and outputs of the graph."""
        dropped = set(names)
        for number in (_GRAPH_INPUT, _GRAPH_OUTPUT):
            values = self.messages(number, Message)
            kept = [one for one in values if one.text(_VALUE_NAME) not in dropped]
            self.replace(number, [Field(number, BYTES, one) for one in kept])

    def add_input(self, name: str, element: int, shape: Sequence[int | str]) -> None:
        """Add an input.

        Args:
            element: ONNX's number of the type (`onnx.TensorProto.DataType`).
            shape: sizes, or names of those that may be any.
        """
        sizes = [
            Message([Field(_SIZE_NUMBER, VARINT, size)] if isinstance(size, int) else _named(size))
            for size in shape
        ]
        dimensions = Message([Field(1, BYTES, size) for size in sizes])
        tensor = Message([Field(1, VARINT, element), Field(2, BYTES, dimensions)])
        kind = Message([Field(1, BYTES, tensor)])
        value = Message([*text_fields(_VALUE_NAME, [name]), Field(_VALUE_TYPE, BYTES, kind)])
        self.fields.append(Field(_GRAPH_INPUT, BYTES, value))

    def name_size(self, names: Iterable[str], axis: int, size: str) -> None:
        """Let one size of some inputs and outputs be any, by a name.

        Raises:
            IndexError: they have fewer dimensions.
        """
        sought = set(names)
        for number in (_GRAPH_INPUT, _GRAPH_OUTPUT):
            for value in self.messages(number, Message):
                if value.text(_VALUE_NAME) in sought:
                    _sizes(value)[axis].fields = _named(size)

    def add_weight(self, name: str, values: Sequence[int]) -> None:
        """Add a vector of int64."""
        weight = [
            Field(_WEIGHT_SIZE, VARINT, len(values)),
            Field(_WEIGHT_ELEMENT, VARINT, INT64),
            *text_fields(_WEIGHT_NAME, [name]),
            Field(_WEIGHT_BYTES, BYTES, struct.pack(f"<{len(values)}q", *values)),
        ]
        self.fields.append(Field(_GRAPH_WEIGHT, BYTES, Message(weight)))

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
        opset = Message([*text_fields(_OPSET_DOMAIN, [name]), Field(_OPSET_VERSION, VARINT, 1)])
        self.fields.append(Field(_MODEL_OPSET, BYTES, opset))


def changed_model(model: bytes, change: Callable[[Model], bool]) -> bytes | None:
    """Change a serialised `ModelProto`.

    Args:
        change: changes it in place; returns whether it is to be so.

    Returns:
        The changed model; None where it is not to be, or the bytes are no model.
    """
    try:
        found = Model.parse(model)
        return found.serialised() if change(found) else None
    except (IndexError, ValueError):  # ONNX Runtime says what is wrong with it
        return None


def _named(size: str) -> list[Field]:
    return text_fields(_SIZE_NAME, [size])


def _sizes(value: Message) -> list[Message]:
    """Return the sizes of an input or output."""
    kinds = value.messages(_VALUE_TYPE, Message)
    tensors = [tensor for kind in kinds for tensor in kind.messages(_TYPE_TENSOR, Message)]
    shapes = [shape for tensor in tensors for shape in tensor.messages(_TENSOR_SHAPE, Message)]
    return [size for shape in shapes for size in shape.messages(_SHAPE_SIZE, Message)]


def _declared(tensor: Message) -> Declared:
    shapes = tensor.messages(_TENSOR_SHAPE, Message)
    sizes = [size for shape in shapes for size in shape.messages(_SHAPE_SIZE, Message)]
    shape = tuple(size.number(_SIZE_NUMBER) for size in sizes)
    return Declared(tensor.number(_TENSOR_ELEMENT), shape)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
