"""Planned memory beside measured memory, for one prompt in a process of its own.

internvl-edge bench memory BUNDLE --tiles 41 [--new-tokens N] [--low-memory] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from internvl_edge.bench.common.ceilings import read_bandwidth
from internvl_edge.bench.common.limits import Weights
from internvl_edge.bench.common.machine import describe_machine
from internvl_edge.bench.common.stored import check_writable, write_result
from internvl_edge.bundle.errors import MeasurementError, UsageError
from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.bundle.specs import MAX_TILES
from internvl_edge.kernels.ops import available_cores
from internvl_edge.runtime.backends.own_kernels import bundle_attention, mapped_graphs
from internvl_edge.runtime.backends.prepared import is_prepared
from internvl_edge.runtime.memory import plan_memory
from internvl_edge.runtime.options import add_threads

#: Answers once and reports; anonymous memory is sampled, file pages are the kernel's to drop.
CHILD = """
import json, sys, threading, time
import numpy as np
request = json.loads(sys.argv[1])

def size(name):
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields[name].split()[0]) * 1024

peaks, phase, done = {"load": 0, "answer": 0}, "load", threading.Event()

def watch():
    while not done.wait(0.01):
        peaks[phase] = max(peaks[phase], size("RssAnon"))

watcher = threading.Thread(target=watch, daemon=True)  # an error ends the process
watcher.start()
begun = time.perf_counter()
from internvl_edge.runtime import InternVL, Sampling
model = InternVL.load(
    request["bundle"],
    device="cpu",
    threads=request["threads"],
    verify="size",
    low_memory=request["low_memory"],
    reuse_bytes=0,
)
loaded = time.perf_counter() - begun
phase, anonymous = "answer", size("RssAnon")
side = model.spec.vision.tile_size
# As wide as there are tiles: cut into one row, without a thumbnail where it is one tile.
image = np.random.default_rng(0).integers(0, 256, (side, side * request["columns"], 3), np.uint8)
prompt = "<image>\\nWhat is written here?"
chat = model.chat(max_tiles=request["columns"])
greedy = Sampling(speculate=0)
first = chat.send(prompt, [image], max_new_tokens=request["new_tokens"], sampling=greedy)
timings = first.timings
done.set()
watcher.join()
print(json.dumps({
    "tiles": timings.tiles,
    "prompt_tokens": timings.prompt_tokens,
    "new_tokens": len(first.token_ids),
    "token_ids": first.token_ids,
    "load_s": loaded,
    "vision_s": timings.vision_s,
    "prefill_s": timings.prefill_s,
    "ttft_s": timings.ttft_s,
    "decode_tokens_per_s": timings.decode_tokens_per_s,
    "peak_anonymous_bytes": peaks,
    "loaded_anonymous_bytes": anonymous,
    "peak_rss_bytes": size("VmHWM"),
}))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument(
        "--tiles", type=int, default=13, metavar="N", help="thumbnail included: 1, or 3 and more"
    )
    parser.add_argument("--new-tokens", type=int, default=16, metavar="N")
    parser.add_argument("--low-memory", action="store_true", help="one graph at a time")
    add_threads(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the figures there")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, store; returns the exit status.

    Raises:
        UsageError: a number of tiles that no picture has.
        MeasurementError: the measured process failed.
        BundleError: not a bundle.
    """
    tiles, low_memory = arguments.tiles, arguments.low_memory
    check_writable(arguments.json)
    bundle = open_bundle(arguments.bundle, verify="size")
    columns = tiles - bundle.spec.tiling.thumbnail if tiles > 1 else 1
    if tiles < 1 or (tiles > 1 and columns < 2):
        raise UsageError(f"--tiles is {tiles}; one picture has 1, or 3 and more with its thumbnail")
    if columns > MAX_TILES:
        raise UsageError(f"--tiles is {tiles}; one picture has at most {MAX_TILES} and a thumbnail")
    request = {
        "bundle": str(bundle.path),
        "columns": columns,
        "new_tokens": arguments.new_tokens,
        "threads": arguments.threads,
        "low_memory": low_memory,
    }
    found = _child(request)
    plan = plan_memory(
        bundle.manifest,
        tokens=found["prompt_tokens"] + found["new_tokens"],
        tiles=found["tiles"],
        prepared=is_prepared(bundle),
        low_memory=low_memory,
        mapped=mapped_graphs(bundle),
        scores=bundle_attention(bundle).library is None,
    )
    measured = max(found["peak_anonymous_bytes"].values())
    count = arguments.threads or available_cores()
    # Not before: the machine's memory is the measured process's.
    read = read_bandwidth(count)
    middle = found["prompt_tokens"] + found["new_tokens"] // 2
    token_bytes = Weights.of(bundle.manifest).language_pass(1, middle).read_bytes
    share = 100 * token_bytes * found["decode_tokens_per_s"] / read
    result = {
        "format": "internvl-edge memory",
        "version": 2,
        "bundle_precision": bundle.manifest.precision,
        "parameters": dict(bundle.manifest.parameters),
        "prepared": is_prepared(bundle),
        **found,
        "read_bytes_per_s": read,
        "decode_percent_of_read": share,
        "planned_bytes": plan.total,
        "plan": asdict(plan),
        "machine": describe_machine(count),
    }
    print(
        f"{found['tiles']} tiles, {found['prompt_tokens']} + {found['new_tokens']} tokens:"
        f" load {found['load_s']:.2f} s, vision {found['vision_s']:.2f} s, prefill"
        f" {found['prefill_s']:.2f} s ({found['prompt_tokens'] / found['prefill_s']:.1f} tok/s),"
        f" decode {found['decode_tokens_per_s']:.2f} tok/s ({share:.0f}% of {read / 1e9:.1f} GB/s"
        " read)"
    )
    print(
        f"anonymous memory {measured / 2**30:.3f} GiB, planned {plan.total / 2**30:.3f} GiB"
        f" ({100 * (plan.total / measured - 1):+.1f}%); with file pages"
        f" {found['peak_rss_bytes'] / 2**30:.2f} GiB"
    )
    if arguments.json is not None:
        write_result(result, arguments.json)
    return 0


def _child(request: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(request)], capture_output=True, text=True
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MeasurementError(f"the measured process failed (status {done.returncode}): {reason}")
    return dict(json.loads(done.stdout.splitlines()[-1]))
