"""What one kind of CPU gives: run there by `matrix.cpus`, with the runtime's packages only.

    python on_cpu.py FOLDER RESULT

FOLDER holds bundles and questions.json; RESULT is an .npz of embeddings beside a .json of the rest.
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, get_args

import numpy as np

from internvl_edge.kernels.cpu import cpu_features
from internvl_edge.runtime import InternVL
from internvl_edge.runtime.cli import main as command_line
from internvl_edge.runtime.ort import load_onnxruntime
from internvl_edge.runtime.products import FORMS, Product, exact_form, wrong_products

THREADS = 2


def measure(folder: Path, result: Path) -> None:
    """Write what this CPU computes."""
    asked = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    products = get_args(Product)
    report: dict[str, Any] = {
        "features": cpu_features(),
        "onnxruntime": load_onnxruntime().__version__,
        "wrong": {form.name: wrong_products(form, products) for form in FORMS},
        "form": exact_form(products).name,
        "demo": _demo(),
        "answers": {},
    }
    embeddings = {}
    for name in asked["bundles"]:
        model = InternVL.load(folder / name, device="cpu", threads=THREADS, reuse_bytes=0)
        embeddings[name] = np.concatenate(model.encode_images([asked["image"]]))
        report["answers"][name] = [
            model.generate(question, [asked["image"]], max_new_tokens=32).text
            for question in asked["questions"]
        ]
    np.savez(result.with_suffix(".npz"), **embeddings)
    result.write_text(json.dumps(report), encoding="utf-8")


def _demo() -> bool:
    """Whether the demo's answers are right."""
    with redirect_stdout(io.StringIO()):
        return command_line(["demo", "--device", "cpu", "--threads", str(THREADS)]) == 0


if __name__ == "__main__":
    measure(Path(sys.argv[1]), Path(sys.argv[2]))
