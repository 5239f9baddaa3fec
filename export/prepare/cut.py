"""Cutting a graph between layers into parts that run one after the other.

Loading packs the weights of a session on one core: the parts of a large graph load at once.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import onnx
from onnx import NodeProto, TensorProto, helper

from internvl_edge.export.prepare.split import weight_bytes

_LAYER = re.compile(r"/layers\.(\d+)/")


def cut_graph(model: onnx.ModelProto, count: int) -> list[onnx.ModelProto]:
    """Parts of a graph with about equal bytes of weights, cut between layers.

    What a later part needs of an earlier one is an output there and an input here, of the same
    name: float32, as residuals are in graphs that can be prepared.

    Args:
        model: with external data, nodes in an order in which they can run.
        count: of parts, at most as many as there are layers.
    """
    nodes = list(model.graph.node)
    cuts = [0, *_cuts(model, count), len(nodes)]
    return [
        _part(model, nodes[:start], nodes[start:stop], nodes[stop:])
        for start, stop in itertools.pairwise(cuts)
    ]


def _cuts(model: onnx.ModelProto, count: int) -> list[int]:
    """Return the nodes that begin the second and later parts."""
    sizes = {tensor.name: weight_bytes(tensor) for tensor in model.graph.initializer}
    before, layers, starts = [0], {"0"}, []  # starts: the first node of each layer but the first
    for i, node in enumerate(model.graph.node):
        found = _LAYER.search(node.name)
        if found is not None and found[1] not in layers:
            layers.add(found[1])
            starts.append(i)
        before.append(before[-1] + sum(sizes.get(name, 0) for name in node.input))
    cuts: list[int] = []
    first = 0
    for number in range(1, count):
        last = len(starts) - (count - 1 - number)  # a layer is left for each later part
        even = number * before[-1] / count
        chosen = min(range(first, last), key=lambda i: abs(before[starts[i]] - even))
        cuts.append(starts[chosen])
        first = chosen + 1
    return cuts


def _part(
    model: onnx.ModelProto,
    earlier: Sequence[NodeProto],
    nodes: Sequence[NodeProto],
    later: Sequence[NodeProto],
) -> onnx.ModelProto:
    """The model of `nodes` alone."""
    graph = model.graph
    made = {name for node in nodes for name in node.output}
    read = {name for node in nodes for name in node.input}
    taken = _handed_on(earlier, read)
    given = _handed_on(nodes, {name for node in later for name in node.input})
    part = onnx.ModelProto()
    part.CopyFrom(model)
    part.graph.CopyFrom(
        helper.make_graph(
            nodes,
            graph.name,
            [value for value in graph.input if value.name in read] + _floats(taken),
            [value for value in graph.output if value.name in made] + _floats(given),
            [tensor for tensor in graph.initializer if tensor.name in read],
        )
    )
    return part


def _handed_on(nodes: Sequence[NodeProto], read: set[str]) -> list[str]:
    """What `nodes` make of what others read, in order; "" is an output that is left out."""
    return [name for node in nodes for name in node.output if name and name in read]


def _floats(names: Sequence[str]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
