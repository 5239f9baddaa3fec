"""The vision graph with its roundings given: what is left must agree to 1e-5 on every CPU.

Float operations differ between kinds of CPU in their last bit. In a quantised graph such a bit
decides now and then to which integer an activation rounds, and every layer after multiplies the
difference. Here each product gets the native machine's integers, so that nothing is multiplied.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from internvl_edge.bundle.contract import TILES, VISION_FILES, VISION_GRAPH
from matrix.on_cpu import PINNED, PINNED_INPUTS, open_exact


def write_pinned(bundle: Path, folder: Path, tiles: NDArray[np.uint8]) -> None:
    """Write a graph that takes its roundings as inputs, and those of this machine.

    Its outputs are the embeddings and whatever was rounded.

    Args:
        bundle: with W8A8 vision.
        folder: made anew.
        tiles: uint8 `(tiles, S, S, 3)`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in VISION_FILES:
        shutil.copy(bundle / name, folder)
    model = onnx.load(folder / VISION_GRAPH, load_external_data=False)
    graph = model.graph
    rounding = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    names = [node.output[0] for node in rounding]
    values = _record(model, folder / "recorded.onnx", names, tiles)
    for node, value in zip(rounding, values, strict=True):
        graph.node.remove(node)
        kind = onnx.TensorProto.UINT8
        graph.input.append(
            onnx.helper.make_tensor_value_info(node.output[0], kind, list(value.shape))
        )
    graph.output.extend(_outputs(list(dict.fromkeys(node.input[0] for node in rounding))))
    onnx.save(model, folder / PINNED)
    np.savez(folder / PINNED_INPUTS, names=np.array([TILES, *names]), **_numbered([tiles, *values]))


def _record(
    model: onnx.ModelProto, path: Path, names: list[str], tiles: NDArray[np.uint8]
) -> list[NDArray[np.uint8]]:
    """Return tensors from inside a graph."""
    recorded = onnx.ModelProto()
    recorded.CopyFrom(model)
    recorded.graph.output.extend(_outputs(names))
    onnx.save(recorded, path)
    values: list[NDArray[np.uint8]] = open_exact(path).run(names, {TILES: tiles})
    return values


def _outputs(names: list[str]) -> list[onnx.ValueInfoProto]:
    return [onnx.ValueInfoProto(name=name) for name in names]


def _numbered(arrays: list[NDArray[np.uint8]]) -> dict[str, NDArray[np.uint8]]:
    """Arrays by number: names of tensors hold slashes."""
    return {str(i): array for i, array in enumerate(arrays)}
