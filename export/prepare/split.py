"""Cutting the head's matrix into parts, so that no weight of a graph is far larger than the others.

Loading packs one matrix at a time in memory of its own: with InternLM2-20B's head in one piece
(569 MB of 8 bits) that is 0.83 GB and a second more than the layers need.
"""

from __future__ import annotations

import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

#: Columns of a part are a multiple of this, whatever the kernels' widths.
COLUMNS = 64
#: Inputs of MatMulNBits that have a row per column of the product: weight, scales, zero points,
#: bias.
BY_COLUMN = (1, 2, 3, 5)


def split_outputs(model: onnx.ModelProto, widest: int) -> None:
    """Replace MatMulNBits nodes that make a graph's output by several and a Concat, in place.

    Each column is the same product as before, so results are the same bit for bit.

    Args:
        model: with external data, of which only places are changed.
        widest: bytes of a weight from which on it is cut.
    """
    outputs = {output.name for output in model.graph.output}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "MatMulNBits" or node.output[0] not in outputs:
            nodes.append(node)
            continue
        weight = tensors[node.input[1]]
        columns, parts = weight.dims[0], -(-weight_bytes(weight) // widest)
        width = -(-columns // parts // COLUMNS) * COLUMNS
        cut = [
            _part(node, tensors, start, min(start + width, columns))
            for start in range(0, columns, width)
        ]
        if len(cut) == 1:
            nodes.append(node)
            continue
        joined = [part.output[0] for part, _ in cut]
        nodes += [part for part, _ in cut]
        nodes.append(helper.make_node("Concat", joined, node.output, f"{node.name}/join", axis=-1))
        for i in _by_column(node):
            model.graph.initializer.remove(tensors[node.input[i]])
        model.graph.initializer.extend(tensor for _, added in cut for tensor in added)
    replaced = onnx.GraphProto(node=nodes)
    model.graph.ClearField("node")
    model.graph.node.extend(replaced.node)


def _part(
    node: NodeProto, tensors: dict[str, TensorProto], start: int, stop: int
) -> tuple[NodeProto, list[TensorProto]]:
    """The node for columns `start..stop`, and its weights."""
    columns = tensors[node.input[1]].dims[0]
    part, weights = NodeProto(), []
    part.CopyFrom(node)
    part.name = f"{node.name}/{start}"
    part.output[0] = f"{node.output[0]}/{start}"
    for attribute in part.attribute:
        if attribute.name == "N":
            attribute.i = stop - start
    for i in _by_column(node):
        weights.append(_rows(tensors[node.input[i]], start, stop, columns))
        part.input[i] = weights[-1].name
    return part, weights


def _by_column(node: NodeProto) -> list[int]:
    """Return the inputs that can be cut."""
    return [i for i in BY_COLUMN if i < len(node.input) and node.input[i]]


def _rows(tensor: TensorProto, start: int, stop: int, columns: int) -> TensorProto:
    """Return the values of columns `start..stop` of a tensor with as many for each of `columns`."""
    name = f"{tensor.name}/{start}"
    if tensor.data_location != TensorProto.EXTERNAL:
        array = numpy_helper.to_array(tensor)
        each = array.shape[0] // columns
        return numpy_helper.from_array(array[start * each : stop * each], name)
    part = TensorProto()
    part.CopyFrom(tensor)
    part.name = name
    part.dims[0] = tensor.dims[0] // columns * (stop - start)
    each = weight_bytes(tensor) // columns
    for entry in part.external_data:
        if entry.key == "offset":
            entry.value = str(int(entry.value) + start * each)
        elif entry.key == "length":
            entry.value = str((stop - start) * each)
    return part


def weight_bytes(tensor: TensorProto) -> int:
    """Return the bytes of an initializer, wherever it is stored."""
    lengths = [int(entry.value) for entry in tensor.external_data if entry.key == "length"]
    return lengths[0] if lengths else numpy_helper.to_array(tensor).nbytes
