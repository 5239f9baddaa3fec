"""Giving nodes of an ONNX graph to an operator of ours: in its serialised bytes, since the runtime
has no `onnx`.

A node is given by changing its domain. Ours has as many letters as ONNX Runtime's, so that every
other byte of the graph stays where it is; one import of our domain is added at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

MICROSOFT_DOMAIN, OWN_DOMAIN = b"com.microsoft", b"internvl_edge"

#: Numbers of fields in ONNX's messages.
_MODEL_GRAPH, _MODEL_OPSET, _GRAPH_NODE = 7, 8, 1
_NODE_INPUT, _NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_INTEGER = 1, 3

#: What the operator takes, of MatMulNBits' attributes; accuracy level 4 rounds inputs to int8.
_TAKEN = {b"bits": {4}, b"block_size": {32, 64, 128, 256}, b"accuracy_level": {4}}
#: Inputs that must be absent: zero points, and the order of groups.
_ABSENT = slice(3, 5)


def give_products(model: bytes) -> bytes | None:
    """Give every 4-bit product of a graph to our operator that it can take.

    Args:
        model: a serialised `ModelProto`.

    Returns:
        The changed model; None where no node is ours, or the bytes are no model.
    """
    changed = bytearray(model)
    given = False
    try:
        for graph in _fields(model, 0, len(model)):
            if graph.number != _MODEL_GRAPH:
                continue
            for node in _fields(model, graph.start, graph.stop):
                if node.number == _GRAPH_NODE and (domain := _domain_if_taken(model, node)):
                    changed[domain.start : domain.stop] = OWN_DOMAIN
                    given = True
    except (IndexError, ValueError):  # ONNX Runtime says what is wrong with it
        return None
    return bytes(changed) + _opset_import() if given else None


@dataclass(frozen=True)
class _Field:
    """A field of a message: its number, and its value or where that lies."""

    number: int
    value: int
    start: int
    stop: int

    def content(self, data: bytes) -> bytes:
        return data[self.start : self.stop]


def _fields(data: bytes, at: int, stop: int) -> Iterator[_Field]:
    """Iterate over the fields of the message in `data[at:stop]`.

    Raises:
        IndexError, ValueError: it is none.
    """
    while at < stop:
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        value, start = 0, at
        if kind == 0:
            value, at = _varint(data, at)
        elif kind == 2:
            size, start = _varint(data, at)
            at = start + size
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at > stop:
            raise ValueError("a field ends beyond its message")
        yield _Field(number, value, start, at)


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


def _domain_if_taken(data: bytes, node: _Field) -> _Field | None:
    """Return the domain of a node that our operator takes."""
    operator, domain = b"", None
    inputs: list[bytes] = []
    attributes: dict[bytes, int] = {}
    for field in _fields(data, node.start, node.stop):
        if field.number == _NODE_INPUT:
            inputs.append(field.content(data))
        elif field.number == _NODE_OPERATOR:
            operator = field.content(data)
        elif field.number == _NODE_DOMAIN:
            domain = field
        elif field.number == _NODE_ATTRIBUTE:
            parts = {part.number: part for part in _fields(data, field.start, field.stop)}
            if _ATTRIBUTE_NAME in parts and _ATTRIBUTE_INTEGER in parts:
                name = parts[_ATTRIBUTE_NAME].content(data)
                attributes[name] = parts[_ATTRIBUTE_INTEGER].value
    taken = all(attributes.get(name) in values for name, values in _TAKEN.items())
    if operator != b"MatMulNBits" or not taken or any(inputs[_ABSENT]):
        return None
    return domain if domain is not None and domain.content(data) == MICROSOFT_DOMAIN else None


def _opset_import() -> bytes:
    """Return the field of a model that imports version 1 of our domain."""
    name = bytes([1 << 3 | 2, len(OWN_DOMAIN)]) + OWN_DOMAIN
    message = name + bytes([2 << 3 | 0, 1])
    return bytes([_MODEL_OPSET << 3 | 2, len(message)]) + message
