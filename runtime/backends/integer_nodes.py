"""Which integer products of a graph our operator computes: QGemm of bytes by signed bytes."""

from __future__ import annotations

from collections.abc import Mapping

from internvl_edge.runtime.backends.graph_bytes import Node, Stored
from internvl_edge.runtime.backends.own_nodes import MICROSOFT_DOMAIN

#: ONNX's numbers of types.
_FLOAT, _UINT8, _INT8, _INT32 = 1, 2, 3, 6
#: Attributes of QGemm that it may have.
_INTEGERS = {"transA": 0, "transB": 1}
#: Inputs of QGemm; what follows rounds its result.
_X, _SCALE, _ZERO, _WEIGHT, _SCALES, _WEIGHT_ZERO, _BIAS, _COUNT = range(8)


def is_product(node: Node) -> bool:
    """Whether a node is an integer product."""
    return (node.domain, node.operator) == (MICROSOFT_DOMAIN, "QGemm")


def shared_inputs(product: Node) -> list[str]:
    """Return rows, their scale and their zero point."""
    return product.inputs[_X : _ZERO + 1]


def weight_inputs(product: Node) -> list[str]:
    """Return a weight, its scales and its bias, "" where there is none."""
    inputs = product.inputs
    return [inputs[_WEIGHT], inputs[_SCALES], inputs[_BIAS] if len(inputs) > _BIAS else ""]


def takes_product(product: Node, weights: Mapping[str, Stored]) -> bool:
    """Whether our operator computes a product.

    Args:
        product: a QGemm.
        weights: of its graph; those of another type or shape than is written are not ours.
    """
    inputs = product.inputs
    integers = {"transA": 0, "transB": 0} | product.integers()
    plain = integers == _INTEGERS and all(value == 1 for value in product.floats().values())
    weight = weights.get(inputs[_WEIGHT]) if len(inputs) > _WEIGHT_ZERO else None
    if not plain or weight is None or any(inputs[_COUNT:]) or len(weight.shape) != 2:
        return False
    columns = weight.shape[:1]
    wanted: dict[int, tuple[int, set[tuple[int, ...]]]] = {
        _SCALE: (_FLOAT, {(), (1,)}),
        _ZERO: (_UINT8, {(), (1,)}),
        _WEIGHT: (_INT8, {weight.shape}),
        _SCALES: (_FLOAT, {columns}),
        _WEIGHT_ZERO: (_INT8, {columns, (), (1,)}),
    }
    if len(inputs) > _BIAS and inputs[_BIAS]:
        wanted[_BIAS] = (_INT32, {columns, (1, *columns)})
    found = {place: weights.get(inputs[place]) for place in wanted}
    alike = all(
        one is not None and one.element == element and one.shape in shapes
        for one, (element, shapes) in zip(found.values(), wanted.values(), strict=True)
    )
    return alike and _is_zero(found[_WEIGHT_ZERO])


def _is_zero(stored: Stored | None) -> bool:
    """Whether a weight is all zero; one outside of the graph is not looked at."""
    return stored is not None and stored.content != b"" and not any(stored.content)
