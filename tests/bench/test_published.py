"""Every published checkpoint by name: inspected as it would lie on disk, and the README's table."""

from __future__ import annotations

import json
import re
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from whole_models import KINDS

from internvl_edge.bench.scale.members import CONFIGS
from internvl_edge.bench.scale.run import synthetic_spec
from internvl_edge.cli.main import main
from internvl_edge.export.checkpoint.config import describe_config
from internvl_edge.export.checkpoint.family import known_families
from internvl_edge.export.checkpoint.names import tensor_shapes
from internvl_edge.export.checkpoint.origin import stored_shapes
from internvl_edge.export.inspection import RECIPES, parameter_counts
from internvl_edge.export.sizes import bundle_bytes

TESTS = Path(__file__).parents[1]
README = TESTS.parent / "README.md"
#: Bytes of a bfloat16 number.
BYTES = 2
#: The last one has 36,000 tensors.
SLOWLY = [
    pytest.param(name, marks=pytest.mark.slow) if name.endswith("-a28b") else name
    for name in CONFIGS
]


def write_headers(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint of true size of which only the headers take room: the rest is a hole."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    described = describe_config(config)
    header, end = {}, 0
    for name, shape in stored_shapes(described.tensors(), tensor_shapes(described.spec)).items():
        size = BYTES
        for length in shape:
            size *= length
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    return folder


@pytest.mark.parametrize("name", SLOWLY)
def test_inspect(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kind, parameters, bytes at each precision, and whether it fits here."""
    config = dict(CONFIGS[name])
    folder = write_headers(tmp_path / name, config)
    assert main(["inspect", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    spec = describe_config(config).spec
    assert report["parameters"] == parameter_counts(spec)
    expected = {key: sum(bundle_bytes(spec, one).values()) for key, one in RECIPES.items()}
    assert report["bundle_bytes"] == expected
    assert report["fits_in_memory"].keys() == RECIPES.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_synthetic_models(name: str) -> None:
    """`bench scale NAME` knows all of them, whole and cut."""
    whole, cut = synthetic_spec(name, None), synthetic_spec(name, 1)
    assert whole == describe_config(CONFIGS[name]).spec
    assert (cut.vision.num_hidden_layers, cut.language.num_hidden_layers) == (1, 1)


# The README's table.


def published() -> dict[str, list[str]]:
    """Names of the published checkpoints of each architecture."""
    found = defaultdict(list)
    for name, config in CONFIGS.items():
        found[config["llm_config"]["architectures"][0]].append(name)
    return found


def fixtures() -> dict[str, list[str]]:
    """Names of the whole tiny checkpoints of each architecture, by what their config.json says."""
    kinds = {family.model_type: family.architectures[0] for family in known_families()}
    found = defaultdict(list)
    for path in sorted((TESTS / "families").glob("*/model/config.json")):
        config = json.loads(path.read_text())
        decoder = config.get("llm_config") or config["text_config"]
        told = decoder.get("architectures") or [kinds[decoder["model_type"]]]
        found[told[0]].append(path.parts[-3])
    return found


def shortened(names: list[str]) -> str:
    """Names with those of one series together: `InternVL2.5-4B/38B`."""
    series: dict[str, list[str]] = {}
    for name in names:
        parts = re.fullmatch(r"internvl(\d)(_5)?-(.*)", name)
        first = f"InternVL{parts[1]}{'.5' if parts[2] else ''}" if parts else name
        series.setdefault(first, []).extend([parts[3].upper()] if parts else [])
    return ", ".join(f"{one}-{'/'.join(sizes)}" if sizes else one for one, sizes in series.items())


def readme_table() -> str:
    """The table as it stands in the README, made of what is tested."""
    random = {*KINDS.values(), "InternLM2ForCausalLM"}
    rows = ["| decoder | published | compared with the reference's classes on |", "|---|---|---|"]
    known, whole = published(), fixtures()
    for family in known_families():
        (name,) = family.architectures
        checked = ["random shapes"] if name in random else []
        checked += [f"`{one}`" for one in whole[name]]
        checked += ["`golden`"] if name == "InternLM2ForCausalLM" else []
        rows.append(f"| `{name}` | {shortened(known[name]) or '-'} | {', '.join(checked)} |")
    return "\n".join(rows) + "\n"


def test_the_readmes_table() -> None:
    assert readme_table() in README.read_text(encoding="utf-8"), readme_table()
