"""The demo of who has installed the runtime alone: the bundle that ships with the example."""

from __future__ import annotations

import json

import ml_dtypes  # noqa: F401 - NumPy's bfloat16
import numpy as np
from command_line import BLOCK, run
from safetensors.numpy import load_file

from internvl_edge.bundle.extras import example_room
from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.export.checkpoint.config import parse_config
from internvl_edge.runtime.decoding.embedding import EmbeddingTable

ROOM = example_room()
#: All that the runtime does not bring.
EXTRAS = ["onnx", "safetensors", "ml_dtypes", "tqdm"]


def test_the_demo_answers_without_the_export_extra() -> None:
    ended = run("demo", "--device", "cpu", hook=BLOCK.format(names=EXTRAS))
    assert ended.returncode == 0, ended.stderr
    assert "as it ships: exporting needs internvl-edge[export]" in ended.stdout
    assert ended.stdout.count("(right)") == 2


def test_the_bundle_is_the_checkpoint_s() -> None:
    """Its hashes differ from one version of the exporter to the next; what it says does not."""
    bundle = open_bundle(ROOM / "bundle")
    config = json.loads((ROOM / "checkpoint" / "config.json").read_text(encoding="utf-8"))
    assert bundle.spec == parse_config(config)
    tensors = load_file(ROOM / "checkpoint" / "model.safetensors")
    stored = tensors["language_model.model.tok_embeddings.weight"].astype(np.float32)
    rows = EmbeddingTable.load(bundle).rows(np.arange(len(stored)))
    scale = np.abs(stored).max(axis=1, keepdims=True) / 127
    assert (np.abs(rows - stored) <= 0.51 * scale + 1e-6).all()  # rounded to 8 bits a row
