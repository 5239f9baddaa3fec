"""What the shelf says it holds is what the process grew by."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from internvl_edge.bundle.extras import example_room
from internvl_edge.export.bundle import export_bundle

LIMIT = 32 << 20

#: Short chats, in text or about a picture that was not shown before.
CONVERSE = """
import json, sys
import numpy as np
from internvl_edge.runtime import InternVL

bundle, limit, pictures = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "pictures"
model = InternVL.load(bundle, device="cpu", threads=1, reuse_bytes=limit)

def resident():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024

def converse(number):
    image = np.random.default_rng(number).integers(0, 256, (40, 40, 3), np.uint8)
    chat = model.chat(max_tiles=1)
    chat.send(f"{number * 7919 % 100003} what is it?", [image] * pictures, max_new_tokens=4)

for number in range(20):  # pools and arenas are as large as they get
    converse(number)
shelf = model.answering.prefixes._shelf
before, told = resident(), shelf.nbytes
for number in range(20, 900):
    converse(number)
print(json.dumps({"grown": resident() - before, "told": shelf.nbytes - told, "all": shelf.nbytes}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "pictures"])
def test_the_process_grows_by_what_is_told(tmp_path: Path, kind: str) -> None:
    """To within a tenth: of the rest of the process nothing grows with the number of chats, but
    what the C library keeps free between blocks, and pages that two blocks share, are not told."""
    bundle = export_bundle(example_room() / "checkpoint", tmp_path / "bundle")
    done = subprocess.run(
        [sys.executable, "-c", CONVERSE, str(bundle), str(LIMIT), kind],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert 0.9 * LIMIT < found["all"] <= LIMIT  # it is full
    assert abs(found["grown"] - found["told"]) < 0.1 * found["told"]
