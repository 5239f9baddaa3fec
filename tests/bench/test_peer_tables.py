"""Tables are what stored results say, and the documents hold them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from internvl_edge.bench.peers.table import Result, headlines, speeds, systems, tables
from internvl_edge.bundle.errors import ResultError

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "bench" / "results").glob("peers-*.json"))
#: What the README's two ratios come from.
HEADLINE = "peers-internvl-chat-v1-5-2-layers"

PEER: dict[str, Any] = {
    "name": "llama.cpp Q4_0",
    "versions": {"llama-cpp-python": "1.2.3"},
    "features": "AVX512_VNNI = 1 | OPENMP = 1",
    "call": "llama_decode",
    "prefill": {"peer": 200.4, "own": 300.6, "ratio": 1.5},
    "decode": {"1": {"peer": 20.04, "own": 30.06, "ratio": 1.5}},
}
STORED: dict[str, Any] = {
    "format": "internvl-edge peers",
    "version": 2,
    "model": "some-model",
    "layers": 2,
    "kv": "fp32",
    "block": 128,
    "head_bits": 4,
    "settings": {"prompt": 256},
    "machine": {"libraries": {"onnxruntime": "1.31.1"}},
    "features": "avx512_vnni",
    "peers": [PEER],
}
TOWERS: dict[str, Any] = {
    **STORED,
    "format": "internvl-edge peers vision",
    "precision": "int8",
    "peers": [
        {**PEER, "peer_s": {"1": 0.5}, "own_s": {"1": 0.25}, "ratio": {"1": 2.0}, "name": "torch"}
    ],
}


def test_speeds() -> None:
    other = copy.deepcopy(STORED)
    other["peers"][0]["decode"]["8"] = {"peer": 1.234, "own": 2.5, "ratio": 2.026}
    table = speeds([Result("a.json", STORED), Result("b.json", other)])
    assert table.splitlines() == [
        "| shapes | beside | prefill | decode of 1 | decode of 8 |",
        "| --- | --- | ---: | ---: | ---: |",
        "| [some-model, 2 layers, 256 tokens; block 128, 4-bit head, fp32 cache]"
        "(../bench/results/a.json) | llama.cpp Q4_0 | 200 → 301: 1.50x | 20 → 30.1: 1.50x |  |",
        "| [some-model, 2 layers, 256 tokens; block 128, 4-bit head, fp32 cache]"
        "(../bench/results/b.json) | llama.cpp Q4_0 | 200 → 301: 1.50x | 20 → 30.1: 1.50x"
        " | 1.23 → 2.5: 2.03x |",
    ]


def test_towers() -> None:
    lines = speeds([Result("v.json", TOWERS)]).splitlines()
    assert lines[0] == "| shapes | beside | 1 tiles |"
    assert lines[2].endswith("| torch | 2 → 4: 2.00x |")


def test_systems_are_listed_once() -> None:
    lines = systems([Result("a.json", STORED), Result("b.json", STORED)]).splitlines()
    assert len(lines) == 4
    assert lines[3] == (
        "| llama.cpp Q4_0 | llama-cpp-python 1.2.3 | llama_decode"
        " | AVX512_VNNI = 1 \\| OPENMP = 1 |"
    )


def test_the_best_of_a_system_counts() -> None:
    other = copy.deepcopy(STORED)
    better = copy.deepcopy(PEER) | {"name": "llama.cpp Q4_K_M"}
    better["prefill"]["ratio"], better["decode"]["1"]["ratio"] = 1.4, 1.6
    other["peers"].append(better)
    assert headlines(Result("a.json", other)) == "1.40x and 1.50x llama.cpp's"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "no result of 'bench peers --json'"),
        ("[]", "no result of 'bench peers --json'"),
        ('{"format": "internvl-edge peers", "version": 1}', "measure again"),
        ("{", "cannot read"),
    ],
)
def test_other_files_are_refused(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(ResultError, match=said):
        Result.read(tmp_path / "a.json")
    with pytest.raises(ResultError, match="cannot read"):
        Result.read(tmp_path / "none.json")


def test_a_stored_result_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(STORED), encoding="utf-8")
    assert Result.read(tmp_path / "a.json") == Result("a.json", STORED)


def test_the_page_holds_the_tables() -> None:
    """It is what `python -m internvl_edge.bench.peers.table bench/results/peers-*.json` prints."""
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for table in tables([Result.read(path) for path in RESULTS]).split("\n\n"):
        assert table.strip() in text


def test_the_readme_holds_the_headlines() -> None:
    (found,) = [path for path in RESULTS if path.name.startswith(HEADLINE)]
    assert headlines(Result.read(found)) in (ROOT / "README.md").read_text(encoding="utf-8")
