"""Giving the attention of a language graph to an operator of ours, when it is loaded.

ONNX Runtime's operator takes one sequence a pass from a graph that binds its cache. Ours takes the
rows of many, and the places of their caches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from internvl_edge.bundle import contract
from internvl_edge.bundle.contract import Tensor
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.kernels.attention.library import PLACE_FIELDS
from internvl_edge.runtime.backends.graph_bytes import (
    INT64,
    Declared,
    Graph,
    Model,
    Node,
    changed_model,
)
from internvl_edge.runtime.backends.own_nodes import MICROSOFT_DOMAIN, OWN_DOMAIN

#: The input that says where each sequence of a pass stands: int64 `(sequences, fields)`, its first
#: row, its rows, positions cached before them, the cache's capacity; then by layer the addresses
#: of its keys and values.
SEQUENCES = "sequences"

#: Our operator by ONNX's number of the type of attention's floats.
_OPERATORS = {1: "CachedAttention", 10: "CachedAttentionOfHalves"}
#: ONNX's numbers of the types of caches.
_ELEMENTS = {"float32": 1, "int8": 3, "float16": 10}
#: GroupQueryAttention's attributes that ours has too; those that its inputs say again.
_KEPT = ("num_heads", "kv_num_heads")
_SAID = {*_KEPT, "do_rotary", "k_quant_type", "v_quant_type", "qk_norm_epsilon"}
#: Others, and what ours does: a graph that ONNX Runtime saved has them all.
_TAKEN = {
    "kv_cache_bit_width": {0, 8},
    "causal": {1},
    "rotary_interleaved": {0},
    "local_window_size": {-1},
    "sliding_window_cache": {0},
    "smooth_softmax": {0, -1},
    "qk_output": {0},
}
#: Its inputs: queries, keys, values; past keys; rotary tables; scales of the cache.
_ROWS, _PAST_KEY, _TABLES, _SCALES = slice(0, 3), 3, slice(7, 9), slice(12, 14)
_MOST_INPUTS = 14
_PAST = re.compile(r"past\.(\d+)\.key")


def fields(layers: int) -> int:
    """Return the number of fields of a row of `SEQUENCES`."""
    return PLACE_FIELDS + 2 * layers


def inputs(spec: LanguageSpec, manifest: Manifest) -> list[Tensor]:
    """Return the inputs of a changed graph: rotary tables hold a row for each row of the pass.

    Where heads are rotated before attention, as their size makes it, the graph takes its rows from
    tables by their place: with the rows of the pass as total length that is what it finds.
    """
    given = contract.language_inputs(spec, manifest.language, manifest.kv, manifest.dialect)
    dropped = _left_out(spec)
    kept = [tensor for tensor in given if tensor.name not in dropped]
    layers = spec.num_hidden_layers
    return [*kept, Tensor(SEQUENCES, "int64", (SEQUENCES, fields(layers)))]


def takes_total(spec: LanguageSpec) -> bool:
    """Whether a changed graph takes the total length; see `inputs`."""
    return spec.head_dim % contract.ROTARY_MULTIPLE != 0


def outputs(spec: LanguageSpec, manifest: Manifest) -> list[Tensor]:
    """Return the outputs of a changed graph: logits alone."""
    given = contract.language_outputs(spec, manifest.kv, manifest.dialect)
    return [tensor for tensor in given if tensor.name == contract.LOGITS]


def _left_out(spec: LanguageSpec) -> set[str]:
    pasts = {past for past, _ in contract.cache_pairs(spec)}
    total = set() if takes_total(spec) else {contract.TOTAL_LENGTH}
    return {contract.LAST_POSITION, *pasts, *total}


def give_attention(model: bytes) -> bytes | None:
    """Give all attention of a language graph to our operator.

    Args:
        model: a serialised `ModelProto`.

    Returns:
        The changed model; None where a node is not as ours computes it, there is none, or the
        bytes are no model.
    """
    return changed_model(model, _gave)


def has_caches(model: bytes, wanted: Sequence[Tensor]) -> bool:
    """Whether a stored language graph takes and gives these caches, as ONNX Runtime would refuse
    others: a graph that was changed has none any more."""
    try:
        said = Model.parse(model).graph.tensors()
    except (IndexError, ValueError):
        return False
    return all(said.get(one.name) == _declared(one) for one in wanted)


def _declared(tensor: Tensor) -> Declared:
    sizes = tuple(size if isinstance(size, int) else None for size in tensor.shape)
    return Declared(_ELEMENTS[tensor.dtype], sizes)


def _gave(model: Model) -> bool:
    """Change a model where all of its attention is as ours computes it; whether it is."""
    graph = model.graph
    nodes, said = graph.nodes, graph.tensors()
    taken = {i: node for i, node in enumerate(nodes) if is_attention(node)}
    tables = said.get(contract.ROPE_COS)
    operator = None if tables is None else _OPERATORS.get(tables.element or 0)
    if tables is None or operator is None or not taken or not all(map(takes, taken.values())):
        return False
    layers = {i: _layer(node) for i, node in taken.items()}
    heads = {i: head_size(node, said, tables.element) for i, node in taken.items()}
    if sorted(layers.values()) != list(range(len(layers))) or None in heads.values():
        return False
    _drop_caches(graph, taken)
    for i, node in taken.items():
        _give(node, operator, layers[i], heads[i] or 0)
    _drop_unused(graph)
    graph.add_input(SEQUENCES, INT64, (SEQUENCES, fields(len(layers))))
    if OWN_DOMAIN not in model.domains:
        model.import_domain(OWN_DOMAIN)
    return True


def head_size(node: Node, said: Mapping[str, Declared], floats: int | None) -> int | None:
    """Return the head size of a node's caches; None where they are not as ours takes them."""
    element = _ELEMENTS["int8"] if any(node.inputs[_SCALES]) else floats
    heads = node.integers().get("kv_num_heads")
    shapes = []
    for name in (*node.inputs[3:5], *node.outputs[1:]):
        cache = said.get(name)
        if cache is None or cache.element != element or len(cache.shape) != 4:
            return None
        shapes.append((*cache.shape[:2], cache.shape[3]))
    size = shapes[0][-1]
    return size if set(shapes) == {(1, heads, size)} else None


def is_attention(node: Node) -> bool:
    """Whether a node is ONNX Runtime's attention over a cache."""
    return node.operator == "GroupQueryAttention" and node.domain == MICROSOFT_DOMAIN


def takes(node: Node) -> bool:
    """Whether our operator computes a node of attention: nothing is asked that it does not know."""
    given, integers = node.inputs, node.integers()
    beside = given[9:12]  # positions, a bias, sinks
    if any(beside) or len(given) > _MOST_INPUTS:
        return False
    for name in set(node.attribute_names()) - _SAID:
        if integers.get(name) not in _TAKEN.get(name, ()):
            return False
    tables = any(given[_TABLES]) == bool(integers.get("do_rotary", 0))
    return tables and bool(_PAST.fullmatch(given[_PAST_KEY]))


def _layer(node: Node) -> int:
    found = _PAST.fullmatch(node.inputs[_PAST_KEY])
    if found is None:
        raise ValueError("a cache of no layer")
    return int(found[1])


def _give(node: Node, operator: str, layer: int, head_size: int) -> None:
    given = node.inputs
    rows, tables, scales = ([*given[part], "", "", ""] for part in (_ROWS, _TABLES, _SCALES))
    inputs_ = [*rows[:3], SEQUENCES, *tables[:2], *scales[:2]]
    while not inputs_[-1]:
        inputs_.pop()
    node.inputs, node.outputs = inputs_, node.outputs[:1]
    node.operator, node.domain = operator, OWN_DOMAIN
    node.keep_attributes(_KEPT)
    node.set_integer("layer", layer)
    node.set_integer("head_size", head_size)


def _drop_caches(graph: Graph, taken: Mapping[int, Node]) -> None:
    """Drop the caches from what the graph takes and gives."""
    graph.drop(name for node in taken.values() for name in (*node.inputs[3:5], *node.outputs[1:]))


def _drop_unused(graph: Graph) -> None:
    """Drop the inputs that told ONNX Runtime's attention where its rows stand."""
    used = {name for node in graph.nodes for name in node.inputs}
    graph.drop({contract.LAST_POSITION, contract.TOTAL_LENGTH} - used)
