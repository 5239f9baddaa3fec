"""One command on a GPU machine: `make gpu-test` or `make gpu-bench`; see README.md.

    python -m internvl_edge.bench.gpu.suite test|bench [--only NAME ...] [--store DIR]

Every part is a process with a time limit. One that fails, dies or takes too long is recorded, and
the next begins; the result is written again after each.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from internvl_edge.bench.common.machine import describe_machine
from internvl_edge.bench.common.roofline import Ceiling, Work
from internvl_edge.bench.common.stored import check_writable, write_result
from internvl_edge.bundle.errors import DeviceError, InternVLEdgeError, UsageError
from internvl_edge.bundle.quoting import quoted
from internvl_edge.export.output.marker import scratch_folder
from internvl_edge.runtime.backends.cuda import Cuda

FORMAT = "internvl-edge gpu"
#: Of a suite; what has not begun by then is left out.
SUITE_S = 480
#: Output of a part that goes into the result.
SHOWN_LINES = 8
RESULTS = Path("bench") / "results"


@dataclass(frozen=True)
class Part:
    """A process: `words` behind the interpreter, or a part of `gpu_parts` where there are none."""

    name: str
    limit_s: int
    words: tuple[str, ...] = ()


def _pytest(folder: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-m", "gpu", "-rs", "-p", "no:cacheprovider", folder)


#: What matters most comes first: time may run out.
SUITES: dict[str, tuple[Part, ...]] = {
    "test": (
        Part("pytest kernels", 120, _pytest("tests/kernels")),
        Part("pytest runtime", 120, _pytest("tests/runtime")),
        Part("tiny_ocr", 180),
        Part("true-width", 300),
    ),
    "bench": (
        Part("ceilings", 60),
        Part("kernels", 60),
        Part("vision-int8", 240),
        Part("decoder-int4", 300),
        Part("torch-vision", 120),
        Part("vision-fp16", 240),
        Part("torch-decoder", 180),
        Part("decoder-int8", 300),
    ),
}

Run = Callable[[Part, float, Path], dict[str, Any]]


def run_suite(
    name: str,
    device: str,
    path: Path,
    *,
    only: Sequence[str] = (),
    budget_s: float = SUITE_S,
    run: Run | None = None,
) -> int:
    """Run the parts of a suite and write the result; 0 if all of them passed.

    Args:
        device: its name, for the result.
        path: file to write.
        only: parts to run, whatever the time; none: all that fit.

    Raises:
        UsageError: an unknown part, or the file cannot be written.
    """
    parts = SUITES[name]
    if unknown := set(only) - {part.name for part in parts}:
        known = ", ".join(part.name for part in parts)
        raise UsageError(f"no part {quoted(sorted(unknown)[0])} in suite {name}; it has: {known}")
    check_writable(path)
    start = time.monotonic()
    found: dict[str, Any] = {}
    result: dict[str, Any] = {"format": FORMAT, "suite": name, "device": device}
    result |= {"date": str(date.today()), "machine": describe_machine(0), "parts": found}
    for part in parts:
        if only and part.name not in only:
            continue
        left = part.limit_s if only else min(part.limit_s, budget_s - (time.monotonic() - start))
        if left <= 0:
            found[part.name] = {"passed": False, "error": "no time was left for it"}
        else:
            print(f"{part.name} (at most {left:.0f} s)", flush=True)
            with scratch_folder() as folder:
                found[part.name] = (run or run_part)(part, left, folder)
        add_shares(found)
        print(render_part(part.name, found[part.name]), flush=True)
        write_result(result, path)
    print(f"wrote {path}")
    return 0 if all(item["passed"] for item in found.values()) else 1


def run_part(part: Part, limit_s: float, folder: Path) -> dict[str, Any]:
    """One process; what it found, or how it ended."""
    result = folder / "result.json"
    words = part.words or (
        *("-m", "internvl_edge.bench.gpu.parts"),
        *(part.name, str(result), str(folder)),
    )
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        error = None if process.returncode == 0 else f"status {process.returncode}"
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        error = f"took longer than {limit_s:.0f} s"
    found: dict[str, Any] = {"wall_s": round(time.monotonic() - start, 1), "passed": error is None}
    if result.exists():
        found |= json.loads(result.read_text(encoding="utf-8"))
    if part.words or error is not None:
        found["output"] = output.strip().splitlines()[-SHOWN_LINES:]
    if error is not None:
        found |= {"passed": False, "error": error}
    return found


def add_shares(parts: dict[str, Any]) -> None:
    """Add to every row what share of the measured ceilings it reaches, where they are known."""
    measured = parts.get("ceilings", {})
    rates, bandwidth = measured.get("operations_per_s", {}), measured.get("bandwidth")
    for part in parts.values():
        rate = rates.get(part.get("arithmetic"))
        if rate is None or bandwidth is None:
            continue
        ceiling = Ceiling(rate, rates["fp16"], bandwidth)
        for item in part["rows"]:
            work = Work(item["linear_operations"], item["attention_operations"], item["read_bytes"])
            item["percent_of_ceiling"] = round(100 * ceiling.seconds(work) / item["seconds"], 1)


def render_part(name: str, part: dict[str, Any]) -> str:
    """Return a part's findings as text."""
    head = f"  {'passed' if part['passed'] else 'FAILED'} {part.get('error', '')}".rstrip()
    lines = [head]
    for item in part.get("rows", ()):
        share = item.get("percent_of_ceiling")
        share = "" if share is None else f", {share} % of the ceiling"
        lines.append(f"  {item['name']}: {1e3 * item['seconds']:.2f} ms{share}")
    lines += [f"  {item}" for item in part.get("precisions", ())]
    if not part["passed"] or name.startswith("pytest"):
        lines += [f"  | {line}" for line in part.get("output", ())]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m internvl_edge.bench.gpu.suite")
    parser.add_argument("suite", choices=tuple(SUITES))
    parser.add_argument("--only", action="append", default=[], metavar="PART")
    parser.add_argument("--minutes", type=float, default=SUITE_S / 60)
    parser.add_argument("--store", type=Path, default=RESULTS, metavar="DIR")
    arguments = parser.parse_args(argv)
    try:
        device = Cuda.open().name
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        path = arguments.store / f"gpu-{arguments.suite}-{slug}-{date.today()}.json"
        budget = 60 * arguments.minutes
        return run_suite(arguments.suite, device, path, only=arguments.only, budget_s=budget)
    except DeviceError as error:
        print(f"error: this suite needs a GPU: {error.told(flags=True)}", file=sys.stderr)
        return 2
    except InternVLEdgeError as error:
        print(f"error: {error.told(flags=True)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
