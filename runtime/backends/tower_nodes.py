"""Giving the operations of an INT8 vision graph to operators of ours, when it is loaded.

They are as few as the graph allows: norms with the sum before and the rounding after, attention
with the norms of its queries and keys, integer products with the GELU and the rounding of every run
of columns after them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from internvl_edge.runtime.backends.graph_bytes import Model, Node, Stored, changed_model
from internvl_edge.runtime.backends.integer_nodes import (
    is_product,
    shared_inputs,
    takes_product,
    weight_inputs,
)
from internvl_edge.runtime.backends.own_nodes import MICROSOFT_DOMAIN, OWN_DOMAIN

#: Norms by whether they are of deviations from the mean, and add their first two inputs.
_NORMS: Mapping[tuple[str, str], tuple[bool, bool]] = {
    ("", "LayerNormalization"): (True, False),
    ("", "SimplifiedLayerNormalization"): (False, False),
    (MICROSOFT_DOMAIN, "SkipLayerNormalization"): (True, True),
    (MICROSOFT_DOMAIN, "SkipSimplifiedLayerNormalization"): (False, True),
}
#: The output of a norm that is the sum of its inputs.
_SUM = 3
#: Attributes of Gemm that it may have.
_GEMM_INTEGERS = {"transA": 0, "transB": 1}
#: Attributes of attention that are integers.
_HEADS = {"num_heads", "unidirectional"}
#: Runs of columns that GELU takes at most.
_MOST_RUNS = 8


def give_tower(model: bytes, *, products: bool = True) -> bytes | None:
    """Give the operations of an INT8 vision graph to our operators.

    Args:
        model: a serialised `ModelProto`.
        products: whether integer products are ours too.

    Returns:
        The changed model; None where it has no integer products, or the bytes are no model.
    """
    return changed_model(model, partial(_gave, products))


def _gave(products: bool, model: Model) -> bool:
    graph = model.graph
    tower = _Tower(graph.nodes, set(graph.outputs), graph.weights() if products else {})
    if not any(map(is_product, tower.nodes)):
        return False
    graph.nodes = tower.given()
    model.import_domain(OWN_DOMAIN)
    return True


def takes_all_products(model: bytes) -> bool:
    """Whether our operators compute every integer product of a serialised `ModelProto`."""
    try:
        graph = Model.parse(model).graph
        found, weights = list(filter(is_product, graph.nodes)), graph.weights()
    except (IndexError, ValueError):  # ONNX Runtime says what is wrong with it
        return False
    return bool(found) and all(takes_product(node, weights) for node in found)


@dataclass(frozen=True)
class _Rounded:
    """How a value becomes the bytes that a product takes.

    Attributes:
        nodes: that do it.
        output: their result.
        scale, zero, factors: names; factors may be "".
    """

    nodes: list[Node]
    output: str
    scale: str
    zero: str
    factors: str

    @property
    def inputs(self) -> list[str]:
        return [self.scale, self.zero, self.factors]


class _Tower:
    """The nodes of a graph, and who makes and who takes each value.

    Args:
        nodes: in order.
        kept: values that are outputs of the graph.
        weights: by name; with none, integer products are left.
    """

    def __init__(
        self, nodes: Sequence[Node], kept: set[str], weights: Mapping[str, Stored]
    ) -> None:
        self.nodes = list(nodes)
        self._kept = kept
        self._weights = weights
        self._makers = {name: node for node in nodes for name in node.outputs if name}
        self._takers: defaultdict[str, list[Node]] = defaultdict(list)
        for node in nodes:
            for name in filter(None, node.inputs):
                self._takers[name].append(node)
        #: Nodes by `id` that go, or in whose place others come.
        self._changed: dict[int, list[Node]] = {}

    def given(self) -> list[Node]:
        """Return the nodes, ours in the place of theirs."""
        for node in self.nodes:
            if node.operator == "MultiHeadAttention":
                self._give_attention(node)
        for node in self.nodes:
            if id(node) not in self._changed:
                self._give(node)
        return [one for node in self.nodes for one in self._changed.get(id(node), [node])]

    def _give(self, node: Node) -> None:
        if (node.domain, node.operator) in _NORMS:
            self._give_norm(node)
        elif (node.domain, node.operator) == ("", "Gelu") and _is_exact(node):
            self._give_gelu(node)
        elif (node.domain, node.operator) == ("", "Gemm") and _is_plain(node):
            self._put(node, [_made(node, "FloatProduct", node.inputs, node.outputs)])
        elif self._takes(node):
            inputs = [*shared_inputs(node), *weight_inputs(node)]
            self._put(node, [_made(node, "IntegerProduct", inputs, node.outputs)])

    def _put(self, place: Node, nodes: list[Node], gone: Sequence[Node] = ()) -> None:
        """Put nodes in the place of one; others go."""
        for node in gone:
            self._changed[id(node)] = []
        self._changed[id(place)] = nodes

    def _give_norm(self, node: Node) -> None:
        centred, adds = _NORMS[node.domain, node.operator]
        inputs, outputs = node.inputs, node.outputs
        most = 2 + adds + centred  # others hold what is added besides
        unused = [name for i, name in enumerate(outputs) if i not in (0, _SUM)]
        if any(inputs[most:]) or any(map(self._is_used, unused)) or not _is_last_axis(node):
            return
        place, gone = node, [node]
        total = outputs[_SUM] if adds and len(outputs) > _SUM else ""
        if not adds and (added := self._sum_of_two(inputs[0])) is not None:
            place, adds, total = added, True, inputs[0]
            inputs = [*added.inputs, *inputs[1:]]
        rounded = self._rounded(outputs[0])
        made = _made(
            node,
            ("AddNorm" if adds else "Norm") + ("Rounded" if rounded else ""),
            inputs,
            [rounded.output if rounded else outputs[0]],
        )
        if rounded:
            made.inputs = [*inputs, *[""] * (2 + adds + 1 - len(inputs)), *rounded.inputs]
            gone += rounded.nodes
        if adds:
            made.outputs = [*made.outputs, total or f"{outputs[0]}.sum"]
        made.set_integer("centred", int(centred))
        made.set_float("epsilon", node.floats()["epsilon"])
        self._put(place, [made], [one for one in gone if one is not place])

    def _sum_of_two(self, name: str) -> Node | None:
        """Return the Add of two computed values that makes a value."""
        node = self._makers.get(name)
        if node is None or (node.domain, node.operator) != ("", "Add"):
            return None
        return node if all(one in self._makers for one in node.inputs) else None

    def _give_gelu(self, node: Node) -> None:
        runs = self._runs(node)
        if runs is None:
            return self._put(node, [_made(node, "Gelu", node.inputs, node.outputs)])
        gelus, rounded, output, gone = runs
        first, last = rounded[0], gelus[-1]
        filler = [""] * (_MOST_RUNS - len(gelus))
        factors = [one.factors for one in rounded]
        gone = [*gelus, *(one for run in rounded for one in run.nodes), *gone]
        if (products := self._products_before(gelus)) is not None:
            operator, gone = "IntegerProductGeluRounded", [*products, *gone]
            inputs = [*shared_inputs(products[0]), first.scale, first.zero]
            inputs += [name for product in products for name in weight_inputs(product)]
            filler *= len(weight_inputs(products[0]))
        else:
            operator = "GeluRounded"
            inputs = [first.scale, first.zero, *(gelu.inputs[0] for gelu in gelus)]
        if any(factors):
            inputs += [*filler, *factors]
        self._put(
            last,
            [_made(node, operator, inputs, [output])],
            [one for one in gone if one is not last],
        )
        return None

    def _products_before(self, gelus: Sequence[Node]) -> list[Node] | None:
        """Return the products of the same rows that only these GELUs take."""
        makers = [self._makers.get(gelu.inputs[0]) for gelu in gelus]
        found = [one for one in makers if one is not None and self._takes(one)]
        alone = all(self._taker(gelu.inputs[0]) is gelu for gelu in gelus)
        alike = {tuple(shared_inputs(product)) for product in found}
        return found if alone and len(found) == len(gelus) and len(alike) == 1 else None

    def _takes(self, node: Node) -> bool:
        return is_product(node) and takes_product(node, self._weights)

    def _runs(self, node: Node) -> tuple[list[Node], list[_Rounded], str, list[Node]] | None:
        """Return the GELUs that are rounded into one value with this one, how each is rounded, the
        value, and the node that joins them."""
        if (own := self._rounded(node.outputs[0])) is None:
            return None
        joined = self._taker(own.output)
        if joined is None or joined.operator != "Concat":
            return [node], [own], own.output, []
        gelus, rounded = [], []
        for name in joined.inputs:
            gelu = self._rounded_from(name)
            run = self._rounded(gelu.outputs[0]) if gelu is not None else None
            if gelu is None or run is None or (run.scale, run.zero) != (own.scale, own.zero):
                return [node], [own], own.output, []
            gelus.append(gelu)
            rounded.append(run)
        if len(gelus) > _MOST_RUNS:
            return [node], [own], own.output, []
        return gelus, rounded, joined.outputs[0], [joined]

    def _rounded_from(self, name: str) -> Node | None:
        """Return the GELU whose result is rounded to a value."""
        node = self._makers.get(name)
        while node is not None and node.operator in ("QuantizeLinear", "Mul"):
            node = self._makers.get(node.inputs[0])
        return node if node is not None and node.operator == "Gelu" and _is_exact(node) else None

    def _give_attention(self, node: Node) -> None:
        if node.domain != MICROSOFT_DOMAIN or any(node.inputs[3:]) or not _is_full(node):
            return
        inputs, weights, epsilon, gone = self._normed_inputs(node)
        rounded, reshaped = self._rounded_attention(node)
        if rounded is None:
            made = _made(node, "IntegerAttention", [*inputs, *weights], node.outputs)
        else:
            inputs = [*inputs, *(weights or ["", ""]), *rounded.inputs]
            made = _made(node, "IntegerAttentionRounded", inputs, [rounded.output])
            gone += rounded.nodes
        made.set_integer("num_heads", node.integers()["num_heads"])
        made.set_float("epsilon", epsilon)
        self._put(node, [made, *reshaped], gone)

    def _rounded_attention(self, node: Node) -> tuple[_Rounded | None, list[Node]]:
        """Return how attention's result is rounded, and the Reshape that then follows, not comes
        before; a prepared graph has it there already."""
        name = node.outputs[0]
        if (rounded := self._rounded(name)) is not None:
            return rounded, []
        reshape = self._taker(name, "Reshape")
        rounded = self._rounded(reshape.outputs[0]) if reshape is not None else None
        if rounded is None or reshape is None:
            return None, []
        attended = f"{name}.rounded"
        reshaped = Node.parse(reshape.serialised())
        reshaped.inputs, reshaped.outputs = [attended, *reshape.inputs[1:]], [rounded.output]
        return replace(rounded, nodes=[reshape, *rounded.nodes], output=attended), [reshaped]

    def _normed_inputs(self, node: Node) -> tuple[list[str], list[str], float, list[Node]]:
        """Return queries, keys and values; the weights by which queries and keys are to be normed,
        if both are, with the epsilon; and the nodes that did so."""
        query, key, value = node.inputs[:3]
        reshapes = [self._makers.get(name) for name in (query, key)]
        norms = [self._root_mean_square(one) for one in reshapes]
        found = [one for one in norms if one is not None]
        if len(found) < 2 or found[0].floats() != found[1].floats():
            return [query, key, value], [], 0.0, []
        for reshape, norm in zip(reshapes, found, strict=True):
            assert reshape is not None
            reshape.inputs = [norm.inputs[0], *reshape.inputs[1:]]
        weights = [norm.inputs[1] for norm in found]
        return [query, key, value], weights, found[0].floats()["epsilon"], found

    def _root_mean_square(self, reshape: Node | None) -> Node | None:
        """Return the norm before a Reshape, if nobody else takes either's result."""
        if reshape is None or reshape.operator != "Reshape":
            return None
        norm = self._makers.get(reshape.inputs[0])
        if norm is None or _NORMS.get((norm.domain, norm.operator)) != (False, False):
            return None
        alone = self._taker(norm.outputs[0]) is reshape and self._taker(reshape.outputs[0])
        return norm if alone and _is_last_axis(norm) else None

    def _rounded(self, name: str) -> _Rounded | None:
        """Return how a value is rounded, if that is all that is done with it."""
        taker, factors, nodes = self._taker(name), "", []
        if taker is not None and (taker.domain, taker.operator) == ("", "Mul"):
            value, factors = taker.inputs
            if value != name or factors in self._makers:
                return None
            nodes.append(taker)
            taker = self._taker(taker.outputs[0])
        if taker is None or taker.operator != "QuantizeLinear" or len(taker.inputs) != 3:
            return None
        _, scale, zero = taker.inputs
        return _Rounded([*nodes, taker], taker.outputs[0], scale, zero, factors)

    def _taker(self, name: str, operator: str | None = None) -> Node | None:
        """Return the only node that takes a value, where there is one."""
        takers = self._takers.get(name, [])
        if len(takers) != 1 or name in self._kept:
            return None
        return takers[0] if operator in (None, takers[0].operator) else None

    def _is_used(self, name: str) -> bool:
        return name in self._takers or name in self._kept


def _made(node: Node, operator: str, inputs: Sequence[str], outputs: Sequence[str]) -> Node:
    """Return a node of ours in the place of another, without its attributes."""
    made = Node.parse(node.serialised())
    made.operator, made.domain = operator, OWN_DOMAIN
    made.inputs, made.outputs = inputs, outputs
    made.keep_attributes(())
    return made


def _is_last_axis(node: Node) -> bool:
    return node.integers().get("axis", -1) == -1


def _is_full(attention: Node) -> bool:
    """Whether every token attends to all of them, with scores of the usual scale."""
    integers = {"unidirectional": 0} | attention.integers()
    scale = attention.floats().get("scale", 0.0)  # as it is stored where there is none
    return scale == 0 and integers.keys() == _HEADS and integers["unidirectional"] == 0


def _is_exact(gelu: Node) -> bool:
    return gelu.strings().get("approximate", "none") == "none"


def _is_plain(gemm: Node) -> bool:
    """Whether a Gemm is rows times a weight of the checkpoint's layout, plus a bias."""
    integers = {"transA": 0, "transB": 0} | gemm.integers()
    return integers == _GEMM_INTEGERS and all(value == 1 for value in gemm.floats().values())
