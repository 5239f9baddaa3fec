"""The runtime on CPUs that are not at hand, emulated by qemu-user.

    python tests/matrix/cpus.py [--install] [--folder build/cpu-matrix]

The native machine writes bundles of tiny_ocr; every kind runs the demo, tries the integer products
against NumPy's integers and encodes the demo's picture and generated ones, the former once more
with the native machine's roundings. `--install` lets root install the emulator and a compiler from
Debian. What cannot be run is said in a line; the exit status is 1 if a kind that ran is wrong.
docs/cpus.md says what was seen.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from internvl_edge.export.bundle import export_bundle
from internvl_edge.runtime import InternVL
from matrix.arm64 import Root, Skipped, call, make_root
from matrix.on_cpu import PICTURES
from matrix.pictures import write_pictures
from matrix.pinned import write_pinned
from matrix.tree import CROSS, make_tree

HERE = Path(__file__).parent
ROOMS = Path(__file__).parents[2]
EXAMPLE = ROOMS / "examples" / "tiny_ocr"
#: All kinds together, in seconds: what is not done by then is skipped.
BOUND_S = 600
#: Largest difference as a share of the largest value: of embeddings where float operations are the
#: same, and on every kind where the roundings are given.
EMBEDDING_SHARE = 1e-5
#: Where float operations are ONNX Runtime's, they differ in their last bit between kinds, and some
#: activations round to the other integer. Then the quantised embeddings are held against the float
#: ones instead: as close as the native ones, within this.
SQNR_DB = 0.5
#: One value of each, since the manifest's precision decides which products a bundle has.
PRECISIONS: Mapping[str, Mapping[str, str]] = {
    "float": {},
    "int8-int8": {"vision": "int8", "language": "int8"},
    "int8-int4": {"vision": "int8", "language": "int4"},
}
QUANTISED = ("int8-int8", "int8-int4")


@dataclass(frozen=True)
class Kind:
    """A CPU to run on.

    Attributes:
        name: for people.
        model: qemu's name of it; empty for the machine itself.
        emulator: the program that emulates it.
        exact: whether its embeddings equal the native ones, rather than being as good, even where
            the vision tower is not computed by kernels of ours.
    """

    name: str
    model: str = ""
    emulator: str = ""
    exact: bool = True


KINDS = (
    Kind("native"),
    Kind("x86-64, AVX2 without VNNI", "Haswell", "qemu-x86_64-static"),
    Kind("x86-64, SSE4.2 only", "Nehalem", "qemu-x86_64-static", exact=False),
    Kind("aarch64, dot products", "neoverse-n1", "qemu-aarch64-static", exact=False),
    Kind("aarch64, matrix products", "max", "qemu-aarch64-static", exact=False),
    Kind("aarch64, neither", "cortex-a53", "qemu-aarch64-static", exact=False),
)


@dataclass
class Outcome:
    """What a kind gave, and what is wrong with it.

    Attributes:
        report: of `on_cpu`; empty if that failed.
        arrays: embeddings by bundle, and `pinned.N`: what came of the given roundings.
        seconds: taken.
        wrong: for people.
    """

    report: dict[str, Any]
    arrays: Mapping[str, NDArray[np.float32]]
    seconds: float
    wrong: list[str] = field(default_factory=list)


class Bound:
    """The time that is left of a number of seconds from now on."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Return seconds.

        Raises:
            Skipped: none are left.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise Skipped(f"the bound of {BOUND_S} s is used up")
        return left


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all kinds; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOMS / "build" / "cpu-matrix")
    parser.add_argument("--install", action="store_true", help="install qemu-user-static as root")
    options = parser.parse_args(arguments)
    folder: Path = options.folder.resolve()
    bound = Bound(BOUND_S)
    if options.install:
        _install(bound)
    _write_inputs(folder)
    native = _run(KINDS[0], folder, bound)
    _judge(KINDS[0], native, native)
    failed = _print(KINDS[0], native)
    for kind in KINDS[1:] if native.report else ():
        try:
            outcome = _run(kind, folder, bound)
        except Skipped as error:
            print(f"{kind.name:28} SKIPPED: {error}", flush=True)
            continue
        _judge(kind, outcome, native)
        failed |= _print(kind, outcome)
    return int(failed)


def _install(bound: Bound) -> None:
    """Install emulator and compiler where that can be done, else say why not."""
    emulators = {kind.emulator for kind in KINDS if kind.emulator}
    needed = {"qemu-user-static": emulators, "g++-aarch64-linux-gnu": {CROSS}}
    lacking = [name for name, programs in needed.items() if not all(map(shutil.which, programs))]
    if not lacking:
        return
    try:
        if shutil.which("apt-get") is None:
            raise Skipped("there is no apt-get")
        if os.geteuid() != 0:
            raise Skipped("only root can")
        for command in (["update"], ["install", "-y", *lacking]):
            call(["apt-get", "-q", *command], bound.left() / 2)
    except Skipped as error:
        print(f"not installed: {', '.join(lacking)}: {error}", flush=True)


def _write_inputs(folder: Path) -> None:
    """Export the bundles natively, the demo's included: emulated machines have no exporter."""
    shutil.rmtree(folder / "bundles", ignore_errors=True)
    for name, precision in PRECISIONS.items():
        export_bundle(EXAMPLE / "checkpoint", folder / "bundles" / name, **precision)  # type: ignore[arg-type]
    script = json.loads((EXAMPLE / "receipt.json").read_text(encoding="utf-8"))
    asked = {
        "bundles": list(PRECISIONS),
        "answering": QUANTISED,  # the demo asks the float one
        "image": str(EXAMPLE / script["image"]),
        "questions": [turn["question"] for turn in script["turns"]],
    }
    (folder / "bundles" / "questions.json").write_text(json.dumps(asked), encoding="utf-8")
    bundle = folder / "bundles" / QUANTISED[0]
    tiles = InternVL.load(bundle, device="cpu").tile(EXAMPLE / script["image"])
    write_pinned(bundle, folder / "bundles" / "pinned", tiles)
    write_pictures(folder / "bundles" / PICTURES)
    make_tree(folder / "tree")


def _run(kind: Kind, folder: Path, bound: Bound) -> Outcome:
    """Run a kind in a process of its own, with a cache of its own and no compiler.

    Raises:
        Skipped: it cannot be run here, or not in time.
    """
    command, variables = _command(kind, folder, bound)
    result = folder / f"result-{kind.model or 'native'}.json"
    cache = folder / f"cache-{kind.model or 'native'}"
    shutil.rmtree(cache, ignore_errors=True)
    environment = {"HOME": str(folder), "XDG_CACHE_HOME": str(cache), **variables}
    environment["PATH"] = ""  # no compiler: one for aarch64 is not there
    _place_demo(cache)
    started = time.monotonic()
    try:
        done = subprocess.run(
            [*command, str(HERE / "on_cpu.py"), str(folder / "bundles"), str(result)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=bound.left(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Skipped(f"not done within the bound of {BOUND_S} s") from None
    taken = time.monotonic() - started
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return Outcome({}, {}, taken, [f"exit status {done.returncode}: {last}"])
    with np.load(result.with_suffix(".npz")) as arrays:
        return Outcome(json.loads(result.read_text(encoding="utf-8")), dict(arrays), taken)


def _place_demo(cache: Path) -> None:
    """Put the demo's exported bundle where the demo looks for it."""
    subprocess.run(
        [sys.executable, "-c", _DEMO],
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        check=True,
    )


_DEMO = """
from internvl_edge.export.bundle import export_bundle
from internvl_edge.cli import demo
from internvl_edge.bundle.extras import example_room
demo._bundle(example_room() / "checkpoint", export_bundle)
"""


def _command(kind: Kind, folder: Path, bound: Bound) -> tuple[list[str], dict[str, str]]:
    """Return the interpreter of a kind, and the variables it needs."""
    python = os.path.realpath(sys.executable)
    paths = [str(folder / "tree"), *(path for path in sys.path if path.endswith("site-packages"))]
    if not kind.emulator:
        return [python], {"PYTHONPATH": os.pathsep.join(paths)}
    emulator = shutil.which(kind.emulator)
    if emulator is None:
        raise Skipped(f"{kind.emulator} is not installed (Debian: qemu-user-static)")
    if kind.emulator == "qemu-aarch64-static":
        root: Root = make_root(folder / "arm64", bound.left)
        return [emulator, "-cpu", kind.model, str(root.python)], root.variables(folder / "tree")
    if os.uname().machine != "x86_64":
        raise Skipped("this machine is no x86-64: it has no packages for one")
    return [emulator, "-cpu", kind.model, python], {"PYTHONPATH": os.pathsep.join(paths)}


def _judge(kind: Kind, outcome: Outcome, native: Outcome) -> None:
    """Add what is wrong."""
    if not outcome.report:
        return
    report, wrong = outcome.report, outcome.wrong
    exact = kind.exact or (report["own_vision"] and native.report["own_vision"])
    if not report["demo"]:
        wrong.append("the demo's answers are wrong")
    if report["wrong"][report["form"]]:
        wrong.append(f"products {report['wrong'][report['form']]} differ from NumPy's integers")
    for name in QUANTISED:
        got, wanted = outcome.arrays[name], native.arrays[name]
        share = _share(got, wanted)
        unrounded = outcome.arrays["float"]
        loss = _sqnr(native.arrays["float"], wanted) - _sqnr(unrounded, got)
        report[f"{name} differs"] = share
        if (exact and share > EMBEDDING_SHARE) or loss > SQNR_DB:
            wrong.append(f"{name}: embeddings differ by {share:.1e}, {loss:.2f} dB worse")
        if report["answers"][name] != native.report["answers"][name]:
            wrong.append(f"{name}: answers {report['answers'][name]}")
    report["pictures"] = _share(outcome.arrays["pictures"], native.arrays["pictures"])
    if exact and report["pictures"] > EMBEDDING_SHARE:
        wrong.append(f"embeddings of pictures differ by {report['pictures']:.1e}")
    pinned = {name: array for name, array in native.arrays.items() if name.startswith("pinned.")}
    report["pinned"] = max(_share(outcome.arrays[name], pinned[name]) for name in pinned)
    if report["pinned"] > EMBEDDING_SHARE:
        wrong.append(f"with the native roundings values differ by {report['pinned']:.1e}")


def _share(got: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Return the largest difference as a share of the largest value."""
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def _sqnr(exact: NDArray[np.float32], quantised: NDArray[np.float32]) -> float:
    """Return signal over quantisation noise in dB."""
    wide = exact.astype(np.float64)
    return float(10 * np.log10(np.sum(wide**2) / np.sum((wide - quantised) ** 2)))


def _print(kind: Kind, outcome: Outcome) -> bool:
    """Print a kind's line; return whether something is wrong."""
    report = outcome.report
    verdict = "WRONG: " + "; ".join(outcome.wrong) if outcome.wrong else "right"
    print(f"{kind.name:28} {verdict} ({outcome.seconds:.0f} s)", flush=True)
    if report:
        stored = ", ".join(report["wrong"]["as stored"]) or "none"
        shares = ", ".join(f"{name} {report[f'{name} differs']:.1e}" for name in QUANTISED)
        print(f"    features  {' '.join(report['features'])}")
        print(f"    products  onnxruntime {report['onnxruntime']}, {report['form']};", end=" ")
        print(f"inexact as stored: {stored}")
        print(f"    vision    {report['vision']}")
        print(f"    embeddings differ from the native ones, of the largest: {shares};", end=" ")
        print(f"{report['pictures']:.1e} of generated pictures;", end=" ")
        print(f"with the native roundings {report['pinned']:.1e}", flush=True)
    return bool(outcome.wrong)


if __name__ == "__main__":
    sys.exit(main())
