"""Engines on disk: what is taken, what is refused and why."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_edge.bundle.manifest import Bundle, file_entry, open_bundle
from internvl_edge.bundle.seal import sealed
from internvl_edge.runtime import BundleError
from internvl_edge.runtime.backends.plans import (
    FOLDER,
    MANIFEST,
    PLANS,
    EngineManifest,
    Engines,
    Limits,
    Machine,
    Wanted,
    built_engines,
    changes,
    find_engines,
    read_engine_manifest,
    source_hashes,
    why_none,
)

ORIN = Machine(87, "tensorrt", "10.16.2", "Orin (nvgpu)", 13020)


def publish(bundle: Bundle, machine: Machine = ORIN, limits: Limits | None = None) -> Engines:
    """Engines whose plans are a few bytes."""
    aside = bundle.path / FOLDER / "aside"
    aside.mkdir(parents=True)
    for name in PLANS.values():
        (aside / name).write_bytes(name.encode())
    manifest = EngineManifest(
        machine=machine,
        limits=limits or Limits(4096),
        dialect=bundle.manifest.dialect,
        precision=bundle.manifest.precision,
        flags=(),
        source=source_hashes(bundle),
        files={name: file_entry(aside / name) for name in PLANS.values()},
    )
    (aside / MANIFEST).write_text(manifest.to_json())
    folder = aside.rename(aside.with_name(manifest.key))
    return Engines(folder, manifest)


@pytest.fixture
def opened(bundle: Path) -> Bundle:
    return open_bundle(bundle)


def test_what_was_built_here_is_found(opened: Bundle) -> None:
    published = publish(opened)
    assert find_engines(opened, ORIN) == published
    assert published.path.name.startswith("sm87-tensorrt-10.16.2-")
    for graph, name in PLANS.items():
        with published.plan(graph) as path:
            assert path.name == name


MACHINES = {
    "sm": replace(ORIN, sm=110),
    "library": replace(ORIN, library="tensorrt_rtx"),
    "version": replace(ORIN, version="10.3.0"),
    "gpu": replace(ORIN, gpu="NVIDIA Thor"),
    "driver": replace(ORIN, driver=12060),
}
SAID = {
    "sm": "compute capability was 87, is 110",
    "library": "TensorRT was tensorrt 10.16.2, is tensorrt_rtx 10.16.2",
    "version": "TensorRT was tensorrt 10.16.2, is tensorrt 10.3.0",
    "gpu": "GPU was Orin (nvgpu), is NVIDIA Thor",
    "driver": "driver was 13020, is 12060",
}


def test_every_field_of_the_machine_is_covered() -> None:
    assert MACHINES.keys() == asdict(ORIN).keys()


@pytest.mark.parametrize("field", MACHINES)
def test_another_machine(opened: Bundle, field: str) -> None:
    published = publish(opened)
    assert changes(published.manifest, opened, MACHINES[field]) == [SAID[field]]
    assert find_engines(opened, MACHINES[field]) is None
    said = why_none(opened, MACHINES[field])
    assert SAID[field] in said
    assert f"run 'internvl-edge build {opened.path}'" in said


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"dialect": "tensorrt"}, "dialect was tensorrt, is onnxruntime"),
        ({"precision": {"vision": "int8"}}, "precision was"),
        ({"flags": ("REFIT",)}, "builder flags was ['REFIT'], is []"),
        ({"source": {}}, "language.onnx is another file now"),
    ],
    ids=["dialect", "precision", "flags", "source"],
)
def test_another_build(opened: Bundle, changed: dict[str, Any], said: str) -> None:
    manifest = replace(publish(opened).manifest, **changed)
    assert said in "; ".join(changes(manifest, opened, ORIN))


def test_a_newer_driver_runs_them(opened: Bundle) -> None:
    publish(opened)
    assert find_engines(opened, replace(ORIN, driver=13030)) is not None


def test_engines_built_without_a_gpu_name_none(opened: Bundle) -> None:
    publish(opened, Machine(80, "tensorrt_rtx", "1.7.1.116"))
    here = Machine(80, "tensorrt_rtx", "1.7.1.116", "A100", 13020)
    assert find_engines(opened, here) is not None


def test_engines_of_two_gpus_lie_side_by_side(opened: Bundle) -> None:
    """Of one architecture, with one library: neither replaces the other's."""
    other = replace(ORIN, gpu="Orin Nano")
    published = {machine: publish(opened, machine) for machine in (ORIN, other)}
    for machine, engines in published.items():
        assert find_engines(opened, machine) == engines


def test_the_longest_context_is_taken(opened: Bundle) -> None:
    for context in (1024, 8192, 2048):
        publish(opened, limits=Limits(context))
    found = find_engines(opened, ORIN)
    assert found is not None
    assert found.manifest.limits.context == 8192
    assert find_engines(opened, ORIN, Wanted(8193)) is None
    assert "8193 is asked for" in why_none(opened, ORIN, Wanted(8193))


def test_those_are_taken_that_are_for_as_many_sequences_as_are_asked_for(opened: Bundle) -> None:
    """Though others have a longer context."""
    for context, sequences in ((1024, 4), (8192, 1), (2048, 4), (512, 6)):
        publish(opened, limits=Limits(context, rows=sequences, sequences=sequences))
    for wanted, context in ((Wanted(), 8192), (Wanted(None, 3), 2048), (Wanted(300, 5), 512)):
        found = find_engines(opened, ORIN, wanted)
        assert found is not None
        assert found.manifest.limits.context == context
    assert find_engines(opened, ORIN, Wanted(1024, 5)) is None
    said = why_none(opened, ORIN, Wanted(1024, 5))
    assert "sequences were 4, 5 are asked for" in said
    assert said.endswith(
        f"run 'internvl-edge build {opened.path} --max-context 1024 --max-sequences 5'"
    )


def test_of_one_context_those_of_most_sequences_are_taken(opened: Bundle) -> None:
    for sequences in (2, 8, 4):
        publish(opened, limits=Limits(1024, rows=sequences, sequences=sequences))
    found = find_engines(opened, ORIN)
    assert found is not None
    assert found.manifest.limits.sequences == 8


def test_engines_built_earlier_take_one_sequence(opened: Bundle) -> None:
    published = publish(opened)
    data = json.loads(published.manifest.to_json())
    _without(data, ["limits", "sequences"])
    (published.path / MANIFEST).write_text(json.dumps(sealed(data)))
    assert find_engines(opened, ORIN) == published
    assert published.manifest.limits.sequences == 1


def test_the_closest_is_named(opened: Bundle) -> None:
    publish(opened, replace(ORIN, version="10.3.0", gpu="other"))
    closest = publish(opened, replace(ORIN, version="10.13.0"))
    assert why_none(opened, ORIN).startswith(str(closest.path))


def test_none_were_built(opened: Bundle) -> None:
    assert find_engines(opened, ORIN) is None
    assert "has no engines for this machine" in why_none(opened, ORIN)


def test_what_is_being_written_is_not_looked_at(opened: Bundle) -> None:
    published = publish(opened)
    published.path.rename(published.path.with_name(f"{published.path.name}.partial-123"))
    assert built_engines(opened) == []


@pytest.mark.parametrize("graph", PLANS)
def test_an_altered_plan_is_refused(opened: Bundle, graph: str) -> None:
    """The same size, another byte."""
    published = publish(opened)
    plan = published.path / PLANS[graph]
    plan.write_bytes(b"x" + plan.read_bytes()[1:])
    with pytest.raises(BundleError, match="was altered"), published.plan(graph):
        pass
    plan.unlink()
    with pytest.raises(BundleError, match="is missing"), published.plan(graph):
        pass


def test_a_plan_put_there_by_hand_is_not_loaded(opened: Bundle) -> None:
    """A folder without a manifest is nothing; a manifest lists both plans or is damaged."""
    folder = opened.path / FOLDER / "sm87-tensorrt-10.16.2-0123456789ab"
    folder.mkdir(parents=True)
    (folder / "language.plan").write_bytes(b"code")
    assert built_engines(opened) == []
    data = json.loads(publish(opened).manifest.to_json())
    del data["files"]["vision.plan"]
    (folder / MANIFEST).write_text(json.dumps(sealed(data)))
    with pytest.raises(BundleError, match="does not list both plans"):
        built_engines(opened)


def _without(data: Any, path: list[str]) -> None:
    for key in path[:-1]:
        data = data[key]
    del data[path[-1]]


@pytest.mark.parametrize(
    "path", [["format"], ["machine"], ["machine", "gpu"], ["limits", "rows"], ["files"], ["flags"]]
)
def test_a_manifest_with_something_missing(opened: Bundle, path: list[str]) -> None:
    published = publish(opened)
    data = json.loads(published.manifest.to_json())
    _without(data, path)
    (published.path / MANIFEST).write_text(json.dumps(sealed(data)))
    with pytest.raises(BundleError, match="build the engines again"):
        find_engines(opened, ORIN)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["format", "version", "machine", "limits", "dialect", "precision", "flags", "source", "files"]
)


@given(key=KEYS, value=JSON, cut=st.integers(0, 400))
def test_a_damaged_manifest_is_one_error_or_as_good_as_before(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    manifest = EngineManifest(
        ORIN,
        Limits(8),
        "tensorrt",
        {},
        (),
        {},
        {n: file_entry(Path(__file__)) for n in PLANS.values()},
    )
    text = json.dumps(sealed(json.loads(manifest.to_json()) | {key: value}))
    for content in (text, text[:cut]):
        (folder / MANIFEST).write_text(content)
        try:
            read = read_engine_manifest(folder)
        except BundleError:
            continue
        assert read.machine == ORIN or key == "machine"
    shutil.rmtree(folder)
