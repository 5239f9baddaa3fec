"""The layers of an engine as its builder lists them in its log.

At verbose level it names every layer with the types of its inputs and constants, which an engine
inspector would only give on a GPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: Beginning of the message that lists them.
LAYERS = "Layers:"
_LAYER = re.compile(
    r"Name: (?P<name>.*), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*)\],"
    r" Constants: \[(?P<constants>.*)\], Outputs: \[(?P<outputs>.*)\], TacticName: .*,"
    r" Metadata: (?P<nodes>.*)"
)
_OPERAND = re.compile(r"{ Name: (.*?), Dimensions: \[([-\d,]*)\],.*?Datatype: (\w+),")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\]")


@dataclass(frozen=True)
class Operand:
    """A value an engine layer reads or makes."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine as its builder listed it.

    Attributes:
        kind: the builder's name for it: gemm, kgen, runtime_fusion, ...
        nodes: names of the ONNX nodes it computes.
    """

    name: str
    kind: str
    inputs: tuple[Operand, ...]
    constants: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    nodes: tuple[str, ...]


def parse_layers(listing: str) -> tuple[EngineLayer, ...]:
    """Read the layers of an engine from the text the builder logs about them."""
    return tuple(
        EngineLayer(
            name=match["name"],
            kind=match["kind"],
            inputs=_operands(match["inputs"]),
            constants=_operands(match["constants"]),
            outputs=_operands(match["outputs"]),
            nodes=tuple(_NODE.findall(match["nodes"])),
        )
        for match in map(_LAYER.match, listing.splitlines())
        if match is not None
    )


def _operands(text: str) -> tuple[Operand, ...]:
    return tuple(
        Operand(name, dtype.lower(), tuple(int(size) for size in shape.split(",") if size))
        for name, shape, dtype in _OPERAND.findall(text)
    )
