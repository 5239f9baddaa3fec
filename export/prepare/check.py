"""Opening what `prepare` wrote, and comparing products, before it is called done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from internvl_edge.bundle.contract import LANGUAGE_GRAPH, VISION_GRAPH
from internvl_edge.bundle.errors import BundleError, PrepareError
from internvl_edge.bundle.manifest import Bundle
from internvl_edge.export.graphs.node_model import PACKED_OPERATORS, node_model
from internvl_edge.export.prepare.prepack import PREPACKED, read_external
from internvl_edge.export.prepare.split import split_outputs
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.prepared import WIDEST_BYTES, part_count, part_names
from internvl_edge.runtime.backends.products import Form, bundle_form
from internvl_edge.runtime.backends.sessions import Provider, open_session

#: Rows of the products compared.
ROWS = 3
#: A part's product, beside its data file while it is compared.
CHECKED = "checked-product.onnx"

Tensors = Mapping[str, TensorProto]


def check_prepared(bundle: Bundle, folder: Path) -> None:
    """Open every part in `folder`, and compare one product of each kind with the plain graph's.

    Raises:
        PrepareError: a part does not load, or a product differs in a bit.
    """
    for graph in (VISION_GRAPH, LANGUAGE_GRAPH):
        plain = onnx.load(str(bundle.file(graph)), load_external_data=False)
        split_outputs(plain, WIDEST_BYTES)
        for part in part_names(graph, part_count(bundle.manifest, graph)):
            try:
                open_session(folder, part, Provider(optimise="none"), None)
            except BundleError as error:
                raise _unusable(f"does not load what it packed: {error}") from error
            stored = onnx.load(str(folder / part), load_external_data=False)
            for name in _one_of_each(stored):
                _compare(name, (plain, bundle.path), (stored, folder), bundle_form(bundle.manifest))


def _one_of_each(model: onnx.ModelProto) -> Iterator[str]:
    """Yield the name of the first node of each operator whose weight is stored packed."""
    tensors, seen = _tensors(model), set()
    for node in model.graph.node:
        if node.op_type in seen or node.op_type not in PACKED_OPERATORS:
            continue
        weight = tensors.get(node.input[PACKED_OPERATORS[node.op_type][0]])
        if weight is not None and any(e.key == PREPACKED for e in weight.external_data):
            seen.add(node.op_type)
            yield node.name


def _compare(
    name: str,
    plain: tuple[onnx.ModelProto, Path],
    stored: tuple[onnx.ModelProto, Path],
    form: Form,
) -> None:
    """Compare the node of this name in both models; each stands beside the folder of its data."""
    model, folder = stored
    node = _node(model, name)
    x = _some_input(node, _tensors(model))
    path = folder / CHECKED
    onnx.save(node_model(node, _tensors(model)), str(path))
    try:
        got = open_session(folder, CHECKED, Provider(optimise="none"), None).run(
            None, {node.input[0]: x}
        )
    except BundleError as error:
        raise _unusable(f"does not load {name} as it packed it: {error}") from error
    finally:
        path.unlink()
    if not np.array_equal(got[0], _plain_product(name, *plain, x, form)):
        raise _unusable(f"computes {name} differently from what it packed")


def _plain_product(
    name: str, model: onnx.ModelProto, folder: Path, x: NDArray[Any], form: Form
) -> NDArray[Any]:
    ort = load_onnxruntime()
    node, tensors = _node(model, name), _tensors(model)
    held = {key: _held(tensors[key], folder) for key in node.input if key in tensors}
    options = ort.SessionOptions()
    for key, value in form.entries.items():
        options.add_session_config_entry(key, value)
    serialised = node_model(node, held).SerializeToString()
    session = ort.InferenceSession(serialised, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {node.input[0]: x})[0])


def _held(tensor: TensorProto, folder: Path) -> TensorProto:
    """Return a tensor with its data inside."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return tensor
    return TensorProto(
        name=tensor.name,
        data_type=tensor.data_type,
        dims=tensor.dims,
        raw_data=read_external(tensor, folder).tobytes(),
    )


def _some_input(node: onnx.NodeProto, tensors: Tensors) -> NDArray[Any]:
    """Return an input `(ROWS, in)` of the node's dtype: the whole range of bytes, or around one."""
    weight_input, dtype_input = PACKED_OPERATORS[node.op_type]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    dims = tensors[node.input[weight_input]].dims
    width = attributes.get("K") or dims[1 if attributes.get("transB") else 0]
    dtype = helper.tensor_dtype_to_np_dtype(tensors[node.input[dtype_input]].data_type)
    random = np.random.default_rng(0)
    if dtype.kind in "ui":  # of activations: unsigned, whatever the weight is
        return random.integers(0, 256, (ROWS, width), np.uint8)
    return random.standard_normal((ROWS, width)).astype(dtype)


def _node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    nodes: dict[str, onnx.NodeProto] = {node.name: node for node in model.graph.node}
    return nodes[name]


def _tensors(model: onnx.ModelProto) -> Tensors:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def _unusable(what: str) -> PrepareError:
    return PrepareError(
        f"onnxruntime {load_onnxruntime().__version__} {what}; nothing was kept: the bundle runs"
        " as it is, only its load takes longer"
    )
