"""Checking that a graph ONNX Runtime opened takes and gives what the contract says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from internvl_edge.bundle import contract
from internvl_edge.bundle.errors import BundleError
from internvl_edge.bundle.manifest import Bundle
from internvl_edge.bundle.quoting import quoted, reason
from internvl_edge.runtime.backends import attention_nodes

if TYPE_CHECKING:
    import onnxruntime as ort

_ORT_TYPE = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
    "int8": "tensor(int8)",
    "uint8": "tensor(uint8)",
    "bool": "tensor(bool)",
}


def check_graph(
    bundle: Bundle, graph: str, opened: ort.InferenceSession, *, attends: bool = False
) -> None:
    """Raise BundleError unless an opened graph is the contract's.

    Args:
        attends: whether attention was given to our own kernel; see `attention_nodes`.
    """
    spec, manifest = bundle.spec, bundle.manifest
    if graph == contract.VISION_GRAPH:
        inputs = contract.vision_inputs(spec.vision)
        outputs = contract.vision_outputs(
            spec.vision, spec.language, manifest.vision, manifest.dialect
        )
    elif attends:
        inputs = attention_nodes.inputs(spec.language, manifest)
        outputs = attention_nodes.outputs(spec.language, manifest)
    else:
        given = manifest.kv, manifest.dialect, takes_batch(opened)
        inputs = contract.language_inputs(spec.language, manifest.language, *given)
        outputs = contract.language_outputs(spec.language, *given)
    check_contract(opened, inputs, outputs)


def takes_batch(opened: ort.InferenceSession) -> bool:
    """Whether a language graph takes several sequences in a pass; older ones, and those of the
    onnxruntime dialect as they are stored, take one."""
    shapes = {node.name: node.shape for node in opened.get_inputs()}
    if contract.LAST_POSITION in shapes:
        return list(shapes[contract.LAST_POSITION]) != [1]
    return len(shapes.get(contract.POSITIONS, ())) > 1


def check_contract(
    graph: ort.InferenceSession,
    inputs: list[contract.Tensor],
    outputs: list[contract.Tensor],
) -> None:
    """Raise BundleError unless names, types and fixed dimensions are the contract's."""
    for nodes, tensors in ((graph.get_inputs(), inputs), (graph.get_outputs(), outputs)):
        try:
            got = {(node.name, node.type, _fixed(node.shape)) for node in nodes}
        except UnicodeDecodeError as error:
            raise BundleError(
                f"a graph has a damaged name: {reason(error)}; export it anew"
            ) from error
        wanted = {(t.name, _ORT_TYPE[t.dtype], _fixed(t.shape)) for t in tensors}
        if got != wanted:
            raise BundleError(
                "graph and manifest do not match: graph"
                f" {quoted(sorted(got - wanted, key=str)[:2])}, manifest"
                f" {quoted(sorted(wanted - got, key=str)[:2])}; export the checkpoint with this"
                " version of internvl-edge"
            )


def _fixed(shape: Sequence[int | str]) -> tuple[int | None, ...]:
    """A shape with None for the symbolic dimensions."""
    return tuple(dim if isinstance(dim, int) else None for dim in shape)
