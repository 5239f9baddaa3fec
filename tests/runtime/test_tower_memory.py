"""Weights of an INT8 tower are mapped as they are stored: loading and running it copies none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from internvl_edge.runtime.backends.own_nodes import MICROSOFT_DOMAIN
from internvl_edge.runtime.backends.tower import TOWER, tower_kernel

#: Of each product, and how many there are one after the other.
WIDTH, LAYERS = 8192, 4
WEIGHTS = LAYERS * WIDTH * WIDTH

#: Anonymous bytes that opening and running the graph takes, with our kernels and without.
TAKEN = """
import sys
from pathlib import Path
import numpy as np
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.tower import NO_TOWER, tower_kernel
def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
kernel = tower_kernel() if sys.argv[2] == "with" else NO_TOWER
options = load_onnxruntime().SessionOptions()
options.intra_op_num_threads = 1
given = kernel.give(Path(sys.argv[1]), options)
before = anonymous()
session = load_onnxruntime().InferenceSession(given, options)
loaded = anonymous()
(y,) = session.run(None, {"x": np.full((2, int(sys.argv[3])), 128, np.uint8)})
assert (y == 0).all()
print(loaded - before, anonymous() - before)
"""


def write_tower(folder: Path) -> Path:
    """Write products one after the other, whose weights are a hole of a file."""
    shared = {"scale": np.array(1, np.float32), "zero": np.array(128, np.uint8)}
    shared |= {"ws": np.ones(WIDTH, np.float32), "wz": np.zeros(WIDTH, np.int8)}
    stored = [numpy_helper.from_array(array, name) for name, array in shared.items()]
    nodes, x = [], "x"
    for i in range(LAYERS):
        weight = TensorProto(
            name=f"w{i}",
            data_type=TensorProto.INT8,
            dims=(WIDTH, WIDTH),
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (("location", "tower.data"), ("offset", str(i * WIDTH * WIDTH))):
            weight.external_data.add(key=key, value=value)
        weight.external_data.add(key="length", value=str(WIDTH * WIDTH))
        stored.append(weight)
        inputs = [x, "scale", "zero", f"w{i}", "ws", "wz"]
        nodes.append(
            helper.make_node("QGemm", inputs, [f"y{i}"], domain=MICROSOFT_DOMAIN, transB=1)
        )
        nodes.append(helper.make_node("QuantizeLinear", [f"y{i}", "scale", "zero"], [f"x{i}"]))
        x = f"x{i}"
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes[:-1],
        "tower",
        [info("x", TensorProto.UINT8, ["rows", WIDTH])],
        [info(f"y{LAYERS - 1}", TensorProto.FLOAT, ["rows", WIDTH])],
        stored,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT_DOMAIN, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "tower.onnx")
    (folder / "tower.data").touch()
    os.truncate(folder / "tower.data", WEIGHTS)
    return folder / "tower.onnx"


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc to read memory from")
def test_weights_are_mapped_and_not_copied(tmp_path: Path) -> None:
    if tower_kernel().kind != TOWER or tower_kernel().library is None:
        pytest.skip(str(tower_kernel()))
    graph, taken = write_tower(tmp_path), {}
    for mode in ("with", "without"):
        done = subprocess.run(
            [sys.executable, "-c", TAKEN, str(graph), mode, str(WIDTH)],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        taken[mode] = [int(one) for one in done.stdout.split()]
    assert max(taken["with"]) < WEIGHTS / 10
    assert min(taken["without"]) > WEIGHTS / 3  # else this would not be seen
