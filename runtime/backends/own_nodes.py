"""Giving nodes of an ONNX graph to operators of ours, when it is loaded."""

from __future__ import annotations

from internvl_edge.runtime.backends.graph_bytes import Model, Node

MICROSOFT_DOMAIN, OWN_DOMAIN = "com.microsoft", "internvl_edge"

#: What the operator takes, of MatMulNBits' attributes; accuracy level 4 rounds inputs to int8.
_TAKEN = {"bits": {4, 8}, "block_size": {32, 64, 128, 256}, "accuracy_level": {4}}
#: Inputs that must be absent: zero points, and the order of groups.
_ABSENT = slice(3, 5)


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
    """Give every product of weights in blocks to our operator that it can take.

    Args:
        model: a serialised `ModelProto`.

    Returns:
        The changed model; None where no node is ours, or the bytes are no model.
    """
    try:
        changed = Model.parse(model)
        taken = [node for node in changed.graph.nodes if _takes(node)]
    except (IndexError, ValueError):  # ONNX Runtime says what is wrong with it
        return None
    for node in taken:
        node.domain = OWN_DOMAIN
    if not taken:
        return None
    changed.import_domain(OWN_DOMAIN)
    return changed.serialised()


def _takes(node: Node) -> bool:
    """Whether our operator computes a node."""
    if node.operator != "MatMulNBits" or node.domain != MICROSOFT_DOMAIN:
        return False
    integers = node.integers()
    allowed = all(integers.get(name) in values for name, values in _TAKEN.items())
    return allowed and not any(node.inputs[_ABSENT])
