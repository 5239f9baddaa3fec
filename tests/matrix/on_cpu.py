"""What one kind of CPU gives: run there by `matrix.cpus`, with the runtime's packages only.

    python on_cpu.py FOLDER RESULT

FOLDER holds bundles, questions.json and what `matrix.pinned` wrote; RESULT is an .npz of arrays
beside a .json of the rest.
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from internvl_edge.cli.main import main as command_line
from internvl_edge.kernels.cpu import cpu_features
from internvl_edge.runtime import InternVL
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.products import (
    FORMS,
    Product,
    exact_form,
    use_exact_products,
    wrong_products,
)
from internvl_edge.runtime.backends.tower import tower_kernel

THREADS = 2
#: The vision graph with its roundings given, in a folder of its own, and what it is given.
PINNED = "pinned.onnx"
PINNED_INPUTS = "pinned.npz"
#: Tiles of generated pictures, and how many are encoded at a time.
PICTURES, AT_A_TIME = "pictures.npy", 8


def measure(folder: Path, result: Path) -> None:
    """Write what this CPU computes."""
    asked = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    products = get_args(Product)
    report: dict[str, Any] = {
        "features": cpu_features(),
        "onnxruntime": load_onnxruntime().__version__,
        "wrong": {form.name: wrong_products(form, products) for form in FORMS},
        "form": exact_form(products).name,
        "vision": str(tower_kernel()),
        "own_vision": tower_kernel().library is not None,
        "demo": _demo(),
        "answers": {},
    }
    embeddings = {}
    for name in asked["bundles"]:
        model = InternVL.load(folder / name, device="cpu", threads=THREADS)
        embeddings[name] = np.concatenate(model.encode_images([asked["image"]]))
        if name == asked["answering"][0]:
            tiles = np.load(folder / PICTURES)
            parts = np.split(tiles, range(AT_A_TIME, len(tiles), AT_A_TIME))
            encoded = [model.engine.backend.encode_tiles(part) for part in parts]
            embeddings["pictures"] = np.concatenate(encoded)
        if name in asked["answering"]:
            report["answers"][name] = [
                model.generate(question, [asked["image"]], max_new_tokens=32).text
                for question in asked["questions"]
            ]
    pinned = {f"pinned.{i}": array for i, array in enumerate(run_pinned(folder / "pinned"))}
    np.savez(result.with_suffix(".npz"), **embeddings, **pinned)
    result.write_text(json.dumps(report), encoding="utf-8")


def run_pinned(folder: Path) -> list[NDArray[np.float32]]:
    """Return the embeddings, and what would be rounded, from the roundings that are given."""
    with np.load(folder / PINNED_INPUTS) as given:
        feeds = {name: given[str(i)] for i, name in enumerate(given["names"].tolist())}
    results: list[NDArray[np.float32]] = open_exact(folder / PINNED).run(None, feeds)
    return results


def open_exact(path: Path) -> Any:
    """Open a graph as the runtime does: with its products in the form that is exact here."""
    options = load_onnxruntime().SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = THREADS
    use_exact_products(options)
    return load_onnxruntime().InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"]
    )


def _demo() -> bool:
    """Whether the demo's answers are right."""
    with redirect_stdout(io.StringIO()):
        return command_line(["demo", "--device", "cpu", "--threads", str(THREADS)]) == 0


if __name__ == "__main__":
    measure(Path(sys.argv[1]), Path(sys.argv[2]))
