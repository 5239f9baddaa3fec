"""From a process that is not there to the first token: run in a fresh interpreter, timed in parts.

    python -m internvl_edge.bench.latency.cold_start REQUEST.json  # what `cold_start` below runs

Files are in the system's cache after the first run; a machine that has just booted is slower.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def cold_start(
    bundle: Path, image: bytes | None, prompt: str, *, threads: int | None, max_tiles: int | None
) -> dict[str, float]:
    """Start a process, import the runtime, load, answer with one token.

    Returns:
        Seconds `interpreter`, `import`, `load`, `first_token`, `total`, and bytes `loaded_rss`,
        `peak_rss` of that process.

    Raises:
        DeviceError: the process failed; the message is its last words.
    """
    # Not above: importing these is what the fresh process times.
    from internvl_edge.bundle.errors import DeviceError
    from internvl_edge.export.output.marker import scratch_folder

    with scratch_folder() as folder:
        request = folder / "request.json"
        picture = folder / "picture.jpg"
        if image is not None:
            picture.write_bytes(image)
        values = {
            "bundle": str(bundle.resolve()),
            "image": None if image is None else str(picture),
            "prompt": prompt,
            "threads": threads,
            "max_tiles": max_tiles,
            "started": time.monotonic(),
        }
        request.write_text(json.dumps(values), encoding="utf-8")
        process = subprocess.run(
            [sys.executable, "-m", "internvl_edge.bench.latency.cold_start", str(request)],
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
    if process.returncode:
        raise DeviceError(f"cold start failed: {process.stderr.strip()[-500:]}")
    result: dict[str, float] = json.loads(process.stdout)
    return result


def answer(request: Mapping[str, Any]) -> dict[str, float]:
    """In the fresh process: every part by the system's monotonic clock, the parent's as well."""
    began = time.monotonic()
    from internvl_edge.runtime import InternVL, Sampling

    imported = time.monotonic()
    model = InternVL.load(request["bundle"], device="cpu", threads=request["threads"])
    loaded = time.monotonic()
    loaded_rss = _rss("VmRSS")
    images = [] if request["image"] is None else [request["image"]]
    model.generate(
        request["prompt"],
        images,
        max_new_tokens=1,
        max_tiles=request["max_tiles"],
        sampling=Sampling(),
    )
    ended = time.monotonic()
    return {
        "interpreter": began - request["started"],
        "import": imported - began,
        "load": loaded - imported,
        "first_token": ended - loaded,
        "total": ended - request["started"],
        "loaded_rss": loaded_rss,
        # VmHWM belongs to the address space; `ru_maxrss` would be inherited from the parent.
        "peak_rss": _rss("VmHWM"),
    }


def _rss(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
