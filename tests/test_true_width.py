"""InternVL-Chat-V1-5 at its true widths, cut to 2 + 2 layers: bounded export, right answers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import small_config, write_checkpoint
from oracle import load_reference, reference_logits, reference_rows

GIB = 1 << 30
RSS_LIMIT = 3 * GIB
DISK_NEEDED = 16 * GIB
#: Rows are sums of up to 16,384 float32 products of order one; torch adds them in another order.
TOLERANCE = 2e-3

#: VmHWM rather than ru_maxrss: the latter is inherited from the parent across exec.
EXPORT = """
import sys
def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
from internvl_edge.export.bundle import export_bundle
before = peak()
export_bundle(sys.argv[1], sys.argv[2])
print(peak() - before)
"""

RUN = """
import sys, numpy as np
from internvl_edge.runtime import InternVL
model = InternVL.load(sys.argv[1], device="cpu", verify="size")
data = np.load(sys.argv[2])
image = data["image"]
rows = model.encode_images([image])
logits = model.logits(data["ids"], [image])
np.savez(sys.argv[3], rows=rows, logits=logits[-4:])
"""


def true_width_config() -> dict[str, Any]:
    config = small_config(
        hidden=6144,
        heads=48,
        kv_heads=8,
        vision_hidden=3200,
        vision_heads=25,
        tile=448,
    )
    config["vision_config"]["intermediate_size"] = 12800
    config["llm_config"] |= {
        "intermediate_size": 16384,
        "vocab_size": 92553,
        "max_position_embeddings": 32768,
    }
    return config


@pytest.mark.slow
def test_true_width(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < DISK_NEEDED:
        pytest.skip(f"needs {DISK_NEEDED // GIB} GiB of disk")
    config = true_width_config()
    checkpoint = write_checkpoint(tmp_path / "checkpoint", config, shards=8)
    bundle = tmp_path / "bundle"
    assert int(_python(EXPORT, checkpoint, bundle)) < RSS_LIMIT

    random = np.random.default_rng(0)
    image = random.integers(0, 256, (448, 448, 3), dtype=np.uint8)
    context = json.loads((checkpoint / "added_tokens.json").read_text())["<IMG_CONTEXT>"]
    ids = np.array([1, *[context] * 256, *random.integers(3, 490, 20)])
    np.savez(tmp_path / "input.npz", image=image, ids=ids)
    _python(RUN, bundle, tmp_path / "input.npz", tmp_path / "output.npz")
    shutil.rmtree(bundle)
    got = np.load(tmp_path / "output.npz")
    reference = load_reference(checkpoint, config)
    reference.config.image_token_id = reference.model.config.image_token_id = context
    tiles = image[np.newaxis]  # one tile exactly: nothing to resize
    rows = reference_rows(reference, tiles)
    np.testing.assert_allclose(got["rows"], rows, rtol=0, atol=TOLERANCE)
    logits = reference_logits(reference, ids.tolist(), tiles)[-4:]
    np.testing.assert_allclose(got["logits"], logits, rtol=0, atol=TOLERANCE)


def _python(script: str, *arguments: Path) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
