"""A thin builder over ONNX protos: named nodes, streamed weights, one file pair per graph."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from internvl_edge.bundle.contract import Tensor, stored_name
from internvl_edge.bundle.manifest import FileEntry, file_entry
from internvl_edge.export.checkpoint.weights import Weight

OPSET = 21
IR_VERSION = 10
MICROSOFT = "com.microsoft"

#: Weights begin at multiples of this, so that a loader can map them.
ALIGNMENT = 4096

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Placed:
    """A weight and where its bytes begin in the data file."""

    weight: Weight
    offset: int


class GraphBuilder:
    """Collects nodes and weights of one graph.

    Values are named after the node that makes them, and nodes after their place:
    `/language/layers.7/attention/qkv`.
    """

    def __init__(self, name: str, opset: int = OPSET) -> None:
        self.opset = opset
        self._name = name
        self._path = [name]
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[Tensor] = []
        self._outputs: dict[str, Tensor] = {}  # value -> the tensor it leaves the graph as
        self._constants: dict[str, TensorProto] = {}
        self._placed: list[Placed] = []
        self._dtypes: dict[str, str] = {}
        self._data_bytes = 0

    @property
    def data_bytes(self) -> int:
        """Size of the data file."""
        return self._data_bytes

    @property
    def weights(self) -> list[Weight]:
        return [placed.weight for placed in self._placed]

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of the nodes made inside."""
        self._path.append(name)
        yield
        self._path.pop()

    def input(self, tensor: Tensor) -> str:
        self._inputs.append(tensor)
        self._dtypes[tensor.name] = tensor.dtype
        return tensor.name

    def output(self, value: str, tensor: Tensor) -> None:
        """Let `value` leave the graph under the contract's name."""
        self._outputs[value] = tensor

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        name: str,
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
    ) -> str:
        """Add a node with one output; return the output's name."""
        return self.nodes(op, inputs, name, 1, attributes, domain)[0]

    def nodes(
        self,
        op: str,
        inputs: Sequence[str],
        name: str,
        outputs: int,
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
    ) -> list[str]:
        """Add a node with several outputs: the first is named after the node."""
        address = "/" + "/".join([*self._path, name])
        results = [address, *(f"{address}:{i}" for i in range(1, outputs))]
        node = helper.make_node(
            op, list(inputs), results, name=address, domain=domain, **(attributes or {})
        )
        self._nodes.append(node)
        given = [self._dtypes.get(value, "") for value in inputs]
        self._dtypes |= dict.fromkeys(results, _result_dtype(op, attributes or {}, given))
        return results

    def dtype(self, value: str) -> str:
        """NumPy dtype name of a value made so far."""
        return self._dtypes[value]

    def cast(self, value: str, dtype: str, name: str) -> str:
        """`value` itself where it has this dtype already."""
        if self._dtypes[value] == dtype:
            return value
        return self.node("Cast", [value], name, {"to": _onnx_type(dtype)})

    def sources(self, value: str) -> list[str]:
        """Inputs of the node that makes `value`; none for an input of the graph or a weight."""
        makers = (node for node in self._nodes if value in node.output)
        return [name for node in makers for name in node.input]

    def constant(self, values: NDArray[np.generic], name: str) -> str:
        """A small tensor stored in the graph itself; equal names must mean equal values."""
        name = stored_name(name)
        self._constants[name] = numpy_helper.from_array(values, name)
        self._dtypes[name] = str(values.dtype)
        return name

    def shape(self, *dims: int) -> str:
        """An int64 constant, for Reshape and its kin."""
        return self.constant(np.array(dims, np.int64), "dims." + "x".join(map(str, dims)))

    def weight(self, weight: Weight) -> str:
        """Place a tensor in the data file; return the name it has there."""
        name = stored_name(weight.name)
        self._placed.append(Placed(weight, self._data_bytes))
        self._dtypes[name] = weight.dtype
        self._data_bytes += -(-weight.nbytes // ALIGNMENT) * ALIGNMENT
        return name

    def save(self, directory: Path, progress: Progress) -> dict[str, FileEntry]:
        """Write `<name>.onnx` and `<name>.data`, streaming the weights.

        Args:
            progress: called with the number of bytes after each block.

        Returns:
            Size and hash of both files, by name.
        """
        data_name, graph_name = f"{self._name}.data", f"{self._name}.onnx"
        with (directory / data_name).open("wb") as stream:
            data = _write_weights(stream, self._placed, self._data_bytes, progress)
        onnx.save(self._model(data_name), directory / graph_name)
        return {data_name: data, graph_name: file_entry(directory / graph_name)}

    def _model(self, data_name: str) -> onnx.ModelProto:
        renamed = {value: tensor.name for value, tensor in self._outputs.items()}
        for node in self._nodes:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            node.output[:] = [renamed.get(name, name) for name in node.output]
        graph = helper.make_graph(
            self._nodes,
            self._name,
            [_value_info(tensor) for tensor in self._inputs],
            [_value_info(tensor) for tensor in self._outputs.values()],
            initializer=[
                *self._constants.values(),
                *(_external(placed, data_name) for placed in self._placed),
            ],
        )
        opsets = [helper.make_opsetid("", self.opset)]
        if any(node.domain == MICROSOFT for node in self._nodes):
            opsets.append(helper.make_opsetid(MICROSOFT, 1))
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="internvl-edge"
        )


def _result_dtype(op: str, attributes: Mapping[str, Any], given: Sequence[str]) -> str:
    """Casting operators set the dtype of their results, all others keep that of an input."""
    if op == "Cast":
        return str(helper.tensor_dtype_to_np_dtype(attributes["to"]))
    fixed = {"Shape": "int64", "Less": "bool", "LessOrEqual": "bool"}
    source = {"DequantizeLinear": 1, "QuantizeLinear": 2, "Where": 1}
    return fixed.get(op) or given[source.get(op, 0)]


def _onnx_type(dtype: str) -> int:
    if dtype == "int4":
        return int(TensorProto.INT4)
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def _value_info(tensor: Tensor) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, _onnx_type(tensor.dtype), list(tensor.shape))


def _external(placed: Placed, location: str) -> TensorProto:
    weight = placed.weight
    proto = TensorProto(
        name=stored_name(weight.name),
        data_type=_onnx_type(weight.dtype),
        dims=weight.shape,
        data_location=TensorProto.EXTERNAL,
    )
    for key, value in (
        ("location", location),
        ("offset", str(placed.offset)),
        ("length", str(weight.nbytes)),
    ):
        proto.external_data.add(key=key, value=value)
    return proto


def _write_weights(
    stream: BinaryIO, placed: Sequence[Placed], total: int, progress: Progress
) -> FileEntry:
    """Write every weight at its offset, hashing on the way so that no byte is read again."""
    digest = hashlib.sha256()
    position = 0

    def write(data: bytes | memoryview) -> None:
        nonlocal position
        stream.write(data)
        digest.update(data)
        position += len(data)

    for item in placed:
        write(bytes(item.offset - position))  # padding
        for block in item.weight.cast_blocks():
            write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
            progress(block.nbytes)
        if position != item.offset + item.weight.nbytes:
            raise AssertionError(f"{item.weight.name}: wrote {position - item.offset} bytes")
    write(bytes(total - position))
    return FileEntry(total, digest.hexdigest())
