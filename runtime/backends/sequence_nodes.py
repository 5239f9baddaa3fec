"""Giving a language graph an axis of sequences, when it is loaded for ONNX Runtime's own attention.

A bundle's graph has one sequence. GroupQueryAttention takes several, as many rows of each, one
after the other: so rows are brought to it as `(sequences, each, width)`.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, TypeGuard

from internvl_edge.bundle import contract
from internvl_edge.bundle.files import read_bytes
from internvl_edge.runtime.backends.attention_nodes import head_size, is_attention, takes
from internvl_edge.runtime.backends.graph_bytes import (
    INT64,
    Graph,
    Model,
    Node,
    Stored,
    changed_model,
)
from internvl_edge.runtime.backends.own_kernel import GRAPH_BYTES
from internvl_edge.runtime.backends.weight_files import give_weights

#: What the names of added values begin with.
_ADDED = f"{contract.BATCH}."
#: What axes of one dimension, the first, are stored as.
_FIRST_AXIS = Stored(INT64, (1,), struct.pack("<q", 0))
#: GroupQueryAttention's inputs that say where its rows stand.
_PLACE = slice(5, 9)
_PLACED = [
    contract.LAST_POSITION,
    contract.TOTAL_LENGTH,
    contract.ROPE_COS,
    contract.ROPE_SIN,
]


class SequenceAxis:
    """Gives language graphs an axis of sequences."""

    def give(self, graph: Path, options: Any) -> str | bytes:
        """Return what to open: the graph, changed, or its path where it stays as it is.

        Args:
            options: `onnxruntime.SessionOptions`, which get the folder of the weights.

        Raises:
            OSError: it cannot be read.
        """
        if graph.name != contract.LANGUAGE_GRAPH:
            return str(graph)
        changed = give_sequences(read_bytes(graph, GRAPH_BYTES))
        if changed is None:
            return str(graph)
        return give_weights(changed, graph, options)


def give_sequences(model: bytes) -> bytes | None:
    """Give a language graph an axis of sequences; see `contract.language_inputs`.

    Args:
        model: a serialised `ModelProto`.

    Returns:
        The changed model; None where its attention is not as it is exported, or heads are rotated
        before it, by rows of one sequence.
    """
    return changed_model(model, _gave)


def _gave(model: Model) -> bool:
    """Change a model where all of its attention is as it is exported; whether it is."""
    graph = model.graph
    taken = [node for node in graph.nodes if is_attention(node)]
    placed = {name for node in graph.nodes if node not in taken for name in node.inputs}
    if not taken or not placed.isdisjoint(_PLACED) or model.mentions(_ADDED):
        return False
    if graph.describes_values or not all(map(takes, taken)):
        return False
    said = graph.tensors()
    floats = said[contract.ROPE_COS].element if contract.ROPE_COS in said else None
    heads = [head_size(node, said, floats) for node in taken]
    axes = _Axes(graph)
    for node, size in zip(taken, heads, strict=True):
        if size is None or not axes.reshape_around(node, size):
            return False
    caches = [name for node in taken for name in (*node.inputs[3:5], *node.outputs[1:])]
    graph.name_size([contract.LAST_POSITION, *caches], 0, contract.BATCH)
    axes.write()
    return True


class _Axes:
    """Reshapes in the place of a graph's Unsqueeze and Squeeze around attention."""

    def __init__(self, graph: Graph) -> None:
        self._graph, self._weights = graph, graph.weights()
        self._makers = {name: node for node in graph.nodes for name in node.outputs}
        self._takers: dict[str, list[Node]] = {}
        for node in graph.nodes:
            for name in node.inputs:
                self._takers.setdefault(name, []).append(node)
        self._widths: set[int] = set()

    def reshape_around(self, node: Node, head: int) -> bool:
        """Bring rows to a node's attention, and what it gives back to rows; whether it is as it is
        exported.

        Args:
            head: its head size.
        """
        query, keys = (node.integers()[name] * head for name in ("num_heads", "kv_num_heads"))
        packed = not any(node.inputs[1:3])
        widths = [query + 2 * keys] if packed else [query, keys, keys]
        before = [self._makers.get(name) for name in node.inputs[: len(widths)]]
        after = self._takers.get(node.outputs[0], [])
        if node.inputs[_PLACE] != _PLACED or len(after) != 1:
            return False
        if not all(map(self._adds_axis, before)) or not self._is(after[0], "Squeeze"):
            return False
        for one, width in zip(before, widths, strict=True):
            assert one is not None
            self._reshape(one, width, self._shape(width))
        self._reshape(after[0], query, self._rows(query))
        return True

    def write(self) -> None:
        """Add what the reshapes take: `(sequences, each, width)` and `(rows, width)`."""
        graph, count = self._graph, f"{_ADDED}count"
        added = [Node.made("Shape", [contract.LAST_POSITION], count)]
        for width in sorted(self._widths):
            graph.add_weight(self._rows(width), [-1, width])
            joined = Node.made("Concat", [count, self._rows(width)], self._shape(width))
            joined.set_integer("axis", 0)
            added.append(joined)
        graph.nodes = [*added, *graph.nodes]

    def _adds_axis(self, node: Node | None) -> bool:
        """Whether a node is an Unsqueeze whose result attention alone takes."""
        return self._is(node, "Unsqueeze") and len(self._takers[node.outputs[0]]) == 1

    def _is(self, node: Node | None, operator: str) -> TypeGuard[Node]:
        """Whether a node is an operator over the first axis."""
        if node is None or node.domain or node.operator != operator:
            return False
        return self._weights.get(node.inputs[1]) == _FIRST_AXIS

    def _reshape(self, node: Node, width: int, shape: str) -> None:
        node.operator, node.inputs = "Reshape", [node.inputs[0], shape]
        self._widths.add(width)

    def _rows(self, width: int) -> str:
        return f"{_ADDED}rows.{width}"

    def _shape(self, width: int) -> str:
        return f"{_ADDED}shape.{width}"
