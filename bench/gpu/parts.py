"""Parts of the GPU suite, each a process of its own: a part that dies takes no other with it.

python -m internvl_edge.bench.gpu.parts NAME RESULT.json FOLDER
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bench.gpu.model import (
    Sequence,
    Workshop,
    cut,
    median_seconds,
    random_tiles,
    row,
    weights_of,
)
from internvl_edge.bench.kernels.cuda import DeviceBench
from internvl_edge.bench.scale.members import internvl_1_5
from internvl_edge.bundle.contract import LanguagePrecision, VisionPrecision
from internvl_edge.bundle.extras import example_room
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.tensorrt.engines import build_for_machine
from internvl_edge.runtime.backends.reference import ReferenceBackend
from internvl_edge.runtime.model import InternVL

Result = dict[str, Any]

#: Rows of an engine and of ONNX Runtime: 4 layers in float16 or integers, other orders of sums.
LEAST_COSINE = 0.999
CUT_LAYERS = 4
PREFILL, DECODE_KEYS, CONTEXT = 2048, (512, 3072), 4096
REPEAT = 20
GEMM_SIDE = 8192

PRECISIONS: tuple[tuple[VisionPrecision, LanguagePrecision], ...] = (
    ("fp16", "fp16"),
    ("int8", "int8"),
    ("int8", "int4"),
)


def tiny_ocr(shop: Workshop) -> Result:
    """The trained tiny model at every precision: rows, logits and answers beside the oracle's."""
    room = example_room()
    found: list[Result] = []
    picture = next(room.glob("receipt.*"))
    for vision, language in PRECISIONS:
        path = shop.folder / f"tiny_ocr-{vision}-{language}"
        export_bundle(
            room / "checkpoint", path, vision=vision, language=language, dialect=shop.dialect
        )
        models = [InternVL.load(path, device="tensorrt", build_engines=build_for_machine)]
        models.append(InternVL.load(path, device="cpu"))
        rows = [model.encode_images([picture]) for model in models]
        asked = ("What is the total?", "What is the date?")
        answers = [
            [model.generate(q, [picture], max_new_tokens=24).token_ids for q in asked]
            for model in models
        ]
        found.append(
            {
                "precision": f"{vision}+{language}",
                "cosine_rows": cosine(*rows),
                "tokens_equal": answers[0] == answers[1],
            }
        )
    holds = all(item["cosine_rows"] > LEAST_COSINE and item["tokens_equal"] for item in found)
    return {"passed": holds, "precisions": found}


def true_width(shop: Workshop, spec: ModelSpec | None = None) -> Result:
    """A few layers at full width beside ONNX Runtime on the CPU: rows, prefill and decoding."""
    spec = cut(spec or internvl_1_5(), CUT_LAYERS, CUT_LAYERS)
    found: list[Result] = []
    for vision, language in PRECISIONS[:1] + PRECISIONS[2:]:
        bundle = shop.bundle(spec, vision, language)
        backends = (shop.load(bundle, 512), ReferenceBackend(bundle, None))
        rows = [backend.encode_tiles(random_tiles(spec, 2)) for backend in backends]
        sequences = [Sequence(backend, bundle, 512) for backend in backends]
        prefill = [sequence.run(200) for sequence in sequences]
        steps = [np.stack([sequence.run(1) for _ in range(8)]) for sequence in sequences]
        found.append(
            {
                "precision": f"{vision}+{language}",
                "cosine_rows": cosine(*rows),
                "cosine_prefill": cosine(*prefill),
                "cosine_decode": cosine(*steps),
                "tokens_equal": float(np.mean(steps[0].argmax(1) == steps[1].argmax(1))),
            }
        )
    cosines = [value for item in found for key, value in item.items() if "cosine" in key]
    return {"passed": min(cosines) > LEAST_COSINE, "precisions": found}


def vision(shop: Workshop, precision: VisionPrecision, spec: ModelSpec | None = None) -> Result:
    """The whole tower; the decoder is cut to a layer."""
    spec = spec or internvl_1_5()
    bundle = shop.bundle(cut(spec, spec.vision.num_hidden_layers, 1), precision, "int8")
    backend, weights = shop.load(bundle, 512), weights_of(bundle)
    rows = []
    for count in (1, backend.limits.tiles):
        tiles = shop.cuda.empty((count, *random_tiles(spec, 1).shape[1:]), np.uint8)
        with shop.cuda.active():
            shop.cuda.upload(random_tiles(spec, count), tiles)
        seconds = median_seconds(lambda tiles=tiles: backend.encode_tiles(tiles), REPEAT)  # type: ignore[misc]
        rows.append(row(f"vision {precision}, {count} tiles", seconds, weights.vision_pass(count)))
    return {"passed": True, "arithmetic": precision, "rows": rows}


def decoder(shop: Workshop, precision: LanguagePrecision, spec: ModelSpec | None = None) -> Result:
    """The whole decoder; the tower is cut to a layer."""
    spec = spec or internvl_1_5()
    bundle = shop.bundle(cut(spec, 1, spec.language.num_hidden_layers), "fp16", precision)
    context = min(CONTEXT, spec.language.max_context)
    backend, weights = shop.load(bundle, context), weights_of(bundle)
    chunk, prompt = backend.limits.tokens, min(PREFILL, context // 2)
    rows: list[Result] = []

    def prefill() -> None:
        sequence = Sequence(backend, bundle, context)
        for start in range(0, prompt, chunk):
            sequence.run(min(chunk, prompt - start))

    seconds = median_seconds(prefill, 3, warmup=1)
    rows.append(row(f"prefill {prompt}, {precision}", seconds, weights.language_pass(prompt, 0)))
    for keys in DECODE_KEYS:
        keys = min(keys, context - REPEAT - 8)
        sequence = Sequence(backend, bundle, context)
        for start in range(0, keys, chunk):
            sequence.run(min(chunk, keys - start))
        seconds = median_seconds(lambda s=sequence: s.run(1), REPEAT, warmup=4)  # type: ignore[misc]
        work = weights.language_pass(1, keys)
        rows.append(row(f"decode at {keys} keys, {precision}", seconds, work))
    return {"passed": True, "arithmetic": "fp16", "rows": rows}


def ceilings(shop: Workshop) -> Result:
    """Copy bandwidth, and what a large matrix product reaches; of the latter none without torch."""
    with shop.cuda.active():
        bandwidth = DeviceBench(shop.cuda).copy
    rates: dict[str, float] = {}
    try:
        from internvl_edge.bench.gpu.torch_peer import product_rates

        rates = product_rates(GEMM_SIDE)
    except ImportError:
        pass
    return {"passed": True, "bandwidth": bandwidth, "operations_per_s": rates}


def kernels(shop: Workshop) -> Result:
    """Tiling and pixel shuffle: equal to the CPU library, then their share of copy bandwidth."""
    with shop.cuda.active():
        return {"passed": True, "report": DeviceBench(shop.cuda).report()}


def torch_vision(shop: Workshop) -> Result:
    """transformers' tower in bfloat16, eager and compiled."""
    from internvl_edge.bench.gpu.torch_peer import time_vision

    return {"passed": True, "rows": time_vision(internvl_1_5(), "cuda", REPEAT)}


def torch_decoder(shop: Workshop) -> Result:
    """transformers' decoder in bfloat16, eager and compiled."""
    from internvl_edge.bench.gpu.torch_peer import time_decoder

    rows = time_decoder(internvl_1_5(), "cuda", REPEAT, prompt=PREFILL, context=CONTEXT)
    return {"passed": True, "rows": rows}


PARTS: Mapping[str, Callable[[Workshop], Result]] = {
    "tiny_ocr": tiny_ocr,
    "true-width": true_width,
    "ceilings": ceilings,
    "kernels": kernels,
    "vision-int8": lambda shop: vision(shop, "int8"),
    "vision-fp16": lambda shop: vision(shop, "fp16"),
    "decoder-int4": lambda shop: decoder(shop, "int4"),
    "decoder-int8": lambda shop: decoder(shop, "int8"),
    "torch-vision": torch_vision,
    "torch-decoder": torch_decoder,
}


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Return the cosine of two arrays of one shape, in float64; 0 with NaN in either."""
    x, y = (np.asarray(v, np.float64).ravel() for v in (a, b))
    value = float(x @ y / np.sqrt((x @ x) * (y @ y)))
    return value if np.isfinite(value) else 0.0


def main(name: str, result: str, folder: str) -> int:
    """Run one part and write what it found."""
    start = time.monotonic()
    shop = Workshop.open(Path(folder))
    found = PARTS[name](shop)
    about = {
        "device": shop.cuda.name,
        "library": f"{shop.library.name} {shop.library.version}",
        "wall_s": round(time.monotonic() - start, 1),
    }
    Path(result).write_text(json.dumps(about | found), encoding="utf-8")
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
