"""What is tried with one set of versions: run by `matrix.versions` in an environment that has them.

    python tests/matrix/smoke.py FOLDER STEP

Bundles go to FOLDER, which the steps of an environment share; they are run in the order of `STEPS`.
Prints one line of JSON with what there is to say; what is wrong ends in a traceback and exit
status 1.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

# Nothing else is imported before a step runs: its packages may be the ones that fail.
if TYPE_CHECKING:
    from internvl_edge.runtime import InternVL

GOLDEN = Path(__file__).parents[1] / "golden"
EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_ocr"
THREADS = 2
#: Side of the golden model's tiles.
TILE = 56
#: Of the golden logits, absolute: see tests/test_golden.py.
LOGIT_TOLERANCE = 2e-4
#: Largest difference of a JPEG at quality 95 from its pixels.
JPEG_TOLERANCE = 96


@dataclass(frozen=True)
class Precision:
    """What `export` is asked for.

    Attributes:
        options: of the command line.
        prepares: whether `prepare` takes the bundle.
        naive: whether to round to nearest, which is enough where the weights were tried already.
        runs_from: first onnxruntime that runs the graphs, where not all do.
    """

    options: Mapping[str, str]
    prepares: bool = False
    naive: bool = False
    runs_from: str = "0"


_INT4 = {"vision": "int8", "language": "int4"}
PRECISIONS: Mapping[str, Precision] = {
    "fp32": Precision({}, prepares=True),
    "fp16": Precision({"vision": "fp16", "language": "fp16"}),
    "int8-int8": Precision({"vision": "int8", "language": "int8"}, prepares=True),
    "int8-int4": Precision(_INT4, prepares=True),
    "int8-int4-kv8": Precision(_INT4 | {"kv": "int8"}, prepares=True),
    "tensorrt": Precision(_INT4 | {"for": "tensorrt"}, naive=True, runs_from="1.25"),
    "portable": Precision(_INT4 | {"for": "tensorrt-portable"}, naive=True),
    "portable-kv8": Precision(_INT4 | {"kv": "int8", "for": "tensorrt-portable"}, naive=True),
}


def tokenizer(folder: Path) -> str:
    """Compare token ids and text with the reference's."""
    from internvl_edge.bundle.tokenizer import load_tokenizer

    vectors = json.loads((GOLDEN / "tokenizer_vectors.json").read_text(encoding="utf-8"))
    loaded = load_tokenizer(GOLDEN / "model")
    for case in vectors["encode"]:
        _same(loaded.encode(case["text"]), case["ids"], case["text"])
    for case in (*vectors["encode"], *vectors["decode_random"]):
        _same(loaded.decode(case["ids"]), case["decode_skip"], case["ids"])
    return ""


def images(folder: Path) -> str:
    """Write a picture in several formats and modes, and read the same pixels."""
    import numpy as np
    from PIL import Image

    from internvl_edge.runtime.images.decode import load_pixels

    picture = Image.open(EXAMPLE / "receipt.png").convert("RGB")
    wanted = np.asarray(picture)
    for form, options in (
        *((form, {}) for form in ("PNG", "BMP", "TIFF", "PPM", "TGA")),
        ("WEBP", {"lossless": True}),
        ("JPEG", {"quality": 95}),
    ):
        file = folder / f"receipt.{form.lower()}"
        picture.save(file, form, **options)
        for source in (file, str(file), file.read_bytes(), Image.open(file)):
            away = np.abs(load_pixels(source).astype(int) - wanted).max()
            _check(away <= (JPEG_TOLERANCE if form == "JPEG" else 0), f"{form}: {away} away")
    for mode in (
        "1",
        "L",
        "LA",
        "P",
        "PA",
        "RGBA",
        "RGBX",
        "CMYK",
        "YCbCr",
        "HSV",
        "LAB",
        "I",
        "F",
    ):
        given = picture if mode not in ("LA", "PA", "I", "F", "LAB") else picture.convert("L")
        if mode == "LAB":
            given = Image.merge("LAB", [given] * 3)
        pixels = load_pixels(given if mode == "LAB" else given.convert(mode))
        _same((pixels.shape, pixels.dtype.name), (wanted.shape, "uint8"), mode)
    deep = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    _check((load_pixels(deep)[..., 0] == np.asarray(picture.convert("L"))).all(), deep.mode)
    return ""


def tiles(folder: Path) -> str:
    """Compare tiles with the reference's, by the kernel and, as without a compiler, by Pillow."""
    import numpy as np
    from PIL import Image

    from internvl_edge.kernels import ops
    from internvl_edge.runtime.images.decode import load_pixels
    from internvl_edge.runtime.images.preprocess import tile_image

    golden = np.load(GOLDEN / "tiles.npz")
    kernel = ops.cpu_kernels() is not None
    cases = json.loads((GOLDEN / "tiles.json").read_text(encoding="utf-8"))["images"]
    for found in (ops.cpu_kernels, lambda: None):
        with mock.patch.object(ops, "cpu_kernels", found):
            for case in cases:
                file = GOLDEN / case["file"]
                pixels = load_pixels(Image.open(file))
                got = tile_image(pixels, tile_size=TILE, max_tiles=case["max_num"])
                _check(np.array_equal(got, golden[f"{file.stem}_tiles_u8"]), file.name)
    return "" if kernel else "no compiler: by Pillow only"


def golden(folder: Path) -> str:
    """Compare logits and a conversation with the reference's."""
    import numpy as np
    from PIL import Image

    from internvl_edge.export.bundle import export_bundle

    model = _load(export_bundle(GOLDEN / "model", folder / "golden"))
    picture = Image.open(GOLDEN / "images" / "img0.png")
    with np.load(GOLDEN / "logits.npz") as logits:
        got = model.logits(logits["single_input_ids"][0], [picture], 6)
        away = float(np.abs(got - logits["single_logits"][0]).max())
    _check(away < LOGIT_TOLERANCE, f"logits are {away:.1e} away")
    cases = json.loads((GOLDEN / "chat.json").read_text(encoding="utf-8"))["cases"]
    chats = {case["name"]: case for case in cases}
    chat = model.chat(max_tiles=6)
    with np.load(GOLDEN / "chat_ids.npz") as ids:
        for name, shown in (("turn1", [picture]), ("turn2", [])):
            wanted = ids[f"{name}_generated"][0].tolist()
            reply = chat.send(chats[name]["question"], shown, max_new_tokens=len(wanted))
            _same(reply.token_ids, wanted, name)
    return f"logits {away:.1e} away"


def demo(folder: Path) -> str:
    """Run the demo, whose answers must be right."""
    status, printed, told = _command_line("demo", "--device", "cpu")
    _same(status, 0, printed + told)
    return ""


def export(name: str, folder: Path) -> str:
    """Export the example at one precision and ask it."""
    from packaging.version import Version

    from internvl_edge.runtime import BundleError
    from internvl_edge.runtime.backends.ort import load_onnxruntime

    precision = PRECISIONS[name]
    options = [word for key, value in precision.options.items() for word in (f"--{key}", value)]
    options += ["--naive"] if precision.naive else []
    bundle = folder / name
    arguments = ["export", str(EXAMPLE / "checkpoint"), "-o", str(bundle), "--no-sensitivity"]
    status, _, told = _command_line(*arguments, *options)
    if not _has_cache(name):
        _same((status, bundle.exists()), (2, False), told)
        return f"refused as it should be: {told.strip()}"
    _same(status, 0, told)
    _check("100%" in told, "no progress is shown")
    if Version(load_onnxruntime().__version__) >= Version(precision.runs_from):
        return _ask(_load(bundle))
    try:
        _load(bundle)
    except BundleError as error:
        return f"not run, as it should be: {str(error).rsplit('; ', 1)[-1]}"
    raise AssertionError(f"runs before onnxruntime {precision.runs_from}")


def prepare(name: str, folder: Path) -> str:
    """Prepare a bundle: the same logits bit for bit, from mapped weights."""
    import numpy as np

    bundle = folder / name
    if not _has_cache(name):
        return "not exported"
    ids = list(range(5, 60))
    plain = _load(bundle).logits(ids)
    status, printed, told = _command_line("prepare", str(bundle))
    _same(status, 0, told)
    if "there is nothing to prepare" in printed:  # all is mapped as it is
        return _ask(_load(bundle))
    model = _load(bundle)
    _check(model.engine.backend.prepared, "the prepared weights are not used")  # type: ignore[attr-defined]
    _check(np.array_equal(model.logits(ids), plain), "logits differ")
    return _ask(model)


def chat(folder: Path) -> str:
    """Ask about an image in the command line and in a stream."""
    picture, turns = _receipt()
    question, answer = turns[0]
    arguments = ["chat", str(folder / "int8-int4"), str(picture), "-p", question]
    status, printed, told = _command_line(*arguments, "--json", "--device", "cpu")
    _same(status, 0, told)
    _same(json.loads(printed)["text"], answer, question)
    chat = _load(folder / "int8-int4").chat()
    for (question, answer), shown in zip(turns, ([picture.read_bytes()], []), strict=True):
        _same("".join(chat.stream(question, shown)), answer, question)
    return ""


STEPS: Mapping[str, Callable[[Path], str]] = {
    "tokenizer": tokenizer,
    "images": images,
    "tiles": tiles,
    "golden": golden,
    "demo": demo,
    **{f"export {name}": partial(export, name) for name in PRECISIONS},
    **{f"prepare {name}": partial(prepare, name) for name, p in PRECISIONS.items() if p.prepares},
    "chat": chat,
}
#: Steps that read what another wrote.
NEEDS: Mapping[str, str] = {
    **{f"prepare {name}": f"export {name}" for name in PRECISIONS},
    "chat": "export int8-int4",
}


def _has_cache(name: str) -> bool:
    """Whether the installed ONNX Runtime has the KV cache of a precision."""
    from internvl_edge.runtime.backends.int8_cache import takes_int8_cache

    return takes_int8_cache() or PRECISIONS[name].options.get("kv") != "int8"


def _load(bundle: Path) -> InternVL:
    from internvl_edge.runtime import InternVL

    return InternVL.load(bundle, device="cpu", threads=THREADS)


def _ask(model: InternVL) -> str:
    """Hold the demo's conversation."""
    picture, turns = _receipt()
    chat = model.chat()
    for (question, answer), shown in zip(turns, ([picture], []), strict=True):
        _same(chat.send(question, shown, max_new_tokens=64).text, answer, question)
    return ""


def _receipt() -> tuple[Path, list[tuple[str, str]]]:
    """Return the demo's picture, and its questions with their answers."""
    script = json.loads((EXAMPLE / "receipt.json").read_text(encoding="utf-8"))
    return EXAMPLE / script["image"], [(t["question"], t["answer"]) for t in script["turns"]]


class _Terminal(io.StringIO):
    """A terminal, so that progress is drawn."""

    def isatty(self) -> bool:
        return True


def _command_line(*arguments: str) -> tuple[int, str, str]:
    """Return exit status, and what is written to stdout and stderr."""
    from internvl_edge.cli.main import main as command_line

    printed, told = io.StringIO(), _Terminal()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(told):
        status = command_line(arguments)
    return status, printed.getvalue(), told.getvalue()


def _same(got: object, wanted: object, what: object) -> None:
    _check(got == wanted, f"{what}: {got!r} instead of {wanted!r}")


def _check(right: bool, otherwise: str) -> None:
    if not right:
        raise AssertionError(otherwise)


def main(folder: Path, step: str) -> None:
    """Run one step."""
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        # What a dependency is about to drop is a fault.
        warnings.filterwarnings("error", category=DeprecationWarning, module=r"internvl_edge\.")
        said = STEPS[step](folder)
    words = [said, *sorted({f"{w.category.__name__}: {w.message}" for w in warned})]
    print(json.dumps({"said": "; ".join(word for word in words if word)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
