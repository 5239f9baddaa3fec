"""A bundle whose files are links, as a cache of downloads has them, answers as the files do."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest

from internvl_edge.bundle.contract import LANGUAGE_GRAPH
from internvl_edge.bundle.extras import example_room
from internvl_edge.runtime import InternVL
from internvl_edge.runtime.backends.sequence_nodes import SequenceAxis

ROOM = example_room()


def linked(bundle: Path, to: Path, *, renamed: bool) -> Path:
    """Links to a bundle's files, which have names of their own where a cache keeps them by hash."""
    (snapshot := to / "snapshots" / "main").mkdir(parents=True)
    (blobs := to / "blobs").mkdir()
    for index, file in enumerate(sorted(bundle.iterdir())):
        blob = blobs / (f"{index:064x}" if renamed else file.name)
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))
    return snapshot


@pytest.mark.parametrize("renamed", [True, False], ids=["by hash", "by name"])
@pytest.mark.parametrize("kind", ["quantised", "float"])
def test_a_bundle_of_links(golden_bundle: Path, tmp_path: Path, kind: str, renamed: bool) -> None:
    bundle = ROOM / "bundle" if kind == "quantised" else golden_bundle
    got = [
        InternVL.load(path, device="cpu", threads=1)
        .generate("What is the TOTAL?", [ROOM / "receipt.png"], max_new_tokens=7)
        .token_ids
        for path in (bundle, linked(bundle, tmp_path, renamed=renamed))
    ]
    assert got[0] == got[1]


@pytest.mark.parametrize("renamed", [True, False], ids=["by hash", "by name"])
def test_a_graph_with_an_axis_of_sequences(
    golden_bundle: Path, tmp_path: Path, renamed: bool
) -> None:
    graph = linked(golden_bundle, tmp_path, renamed=renamed) / LANGUAGE_GRAPH
    options = onnxruntime.SessionOptions()
    model = SequenceAxis().give(graph, options)
    assert isinstance(model, bytes)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    assert session.get_inputs()


def test_a_folder_that_is_a_link_is_named_as_it_is(golden_bundle: Path, tmp_path: Path) -> None:
    """Its own path may be none that ONNX Runtime takes."""
    (real := tmp_path / "caf\udce9").mkdir()
    for file in golden_bundle.iterdir():
        (real / file.name).write_bytes(file.read_bytes())
    (link := tmp_path / "link").symlink_to(real)
    reply = InternVL.load(link, device="cpu", threads=1).generate("Hello", max_new_tokens=2)
    assert len(reply.token_ids) == 2
