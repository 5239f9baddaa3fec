"""Giving nodes of an ONNX graph to operators of ours, when it is loaded."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping

from internvl_edge.runtime.backends.graph_bytes import Model, Node, changed_model

MICROSOFT_DOMAIN, OWN_DOMAIN = "com.microsoft", "internvl_edge"

_BLOCKS = {32, 64, 128, 256}
#: What our operators take, by their names: integer attributes (accuracy level 4 rounds inputs to
#: int8); and inputs that must be absent: zero points and the order of groups, biases.
_PRODUCT = "MatMulNBits"
_EXPERTS = "QMoE"
_TAKEN: Mapping[str, Mapping[str, Container[int]]] = {
    _PRODUCT: {"bits": {4, 8}, "block_size": _BLOCKS, "accuracy_level": {4}},
    _EXPERTS: {
        "expert_weight_bits": {4, 8},
        "block_size": _BLOCKS,
        "swiglu_fusion": {1},
        "normalize_routing_weights": {1},
    },
}
_ABSENT = {_PRODUCT: (3, 4), _EXPERTS: (4, *range(7, 20))}
#: The gated activation of experts, as ours is.
_ACTIVATION = {"activation_type": "swiglu"}
_ACTIVATION_FLOATS = {"activation_alpha": 1.0, "activation_beta": 0.0}


def has_own_nodes(model: bytes) -> bool:
    """Whether a stored model may have nodes of our operators already.

    None is written with them. They go where their inputs say, so that only the runtime may make
    these: what comes with a file is not given the library.
    """
    try:
        return Model.parse(model).mentions(OWN_DOMAIN)
    except (IndexError, ValueError):
        return True


def give_products(model: bytes) -> bytes | None:
    """Give products of weights in blocks, and experts of such, to operators of ours.

    Args:
        model: a serialised `ModelProto`.

    Returns:
        The changed model; None where no node is ours, experts are not, or the bytes are no model.
    """
    return changed_model(model, _gave)


def _gave(model: Model) -> bool:
    nodes = model.graph.nodes
    taken = [node for node in nodes if _takes(node)]
    if not taken or any(node.operator == _EXPERTS and not _takes(node) for node in nodes):
        return False
    for node in taken:
        node.domain = OWN_DOMAIN
    model.import_domain(OWN_DOMAIN)
    return True


def _takes(node: Node) -> bool:
    """Whether an operator of ours computes a node."""
    if node.operator not in _TAKEN or node.domain != MICROSOFT_DOMAIN:
        return False
    integers, given = node.integers(), node.inputs
    if any(integers.get(name) not in values for name, values in _TAKEN[node.operator].items()):
        return False
    if any(given[place] for place in _ABSENT[node.operator] if place < len(given)):
        return False
    return node.operator != _EXPERTS or _is_gated(node)


def _is_gated(node: Node) -> bool:
    """Whether experts have the activation that ours have."""
    floats, strings = node.floats(), node.strings()
    named = all(strings.get(name) == text for name, text in _ACTIVATION.items())
    limits = floats.get("swiglu_limit", math.inf)
    return (
        named
        and math.isinf(limits)
        and all(floats.get(name) == value for name, value in _ACTIVATION_FLOATS.items())
    )
