"""The tables of docs/performance.md and the README that stored results of `bench peers` make.

python -m internvl_edge.bench.peers.table bench/results/peers-*.json
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_edge.bundle.errors import ResultError
from internvl_edge.bundle.files import DATA_BYTES
from internvl_edge.bundle.json_reader import JsonError, read_json
from internvl_edge.bundle.quoting import named, reason

FORMAT = "internvl-edge peers"
VISION_FORMAT = "internvl-edge peers vision"
VERSION = 2
#: What the README compares with: the better of each system's forms counts.
HEADLINES = {"llama.cpp": ("llama.cpp Q4_0", "llama.cpp Q4_K_M"), "OpenVINO": ("OpenVINO INT4",)}


@dataclass(frozen=True)
class Result:
    """A stored result, and the name of its file."""

    file: str
    content: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read a file.

        Raises:
            ResultError: unreadable, or no such result.
        """
        try:
            content = read_json(path, DATA_BYTES)
        except (OSError, JsonError) as error:
            raise ResultError(f"cannot read {named(path)}: {reason(error)}") from error
        told = content if isinstance(content, dict) else {}
        if (told.get("format"), told.get("version")) != (FORMAT, VERSION):
            raise ResultError(f"{named(path)} is no result of 'bench peers --json'; measure again")
        return cls(path.name, told)

    @property
    def shapes(self) -> str:
        """What was run, in short."""
        told, settings = self.content, self.content["settings"]
        return (
            f"{told['model']}, {told['layers']} layers, {settings['prompt']} tokens; block"
            f" {told['block']}, {told['head_bits']}-bit head, {told['kv']} cache"
        )

    @property
    def rates(self) -> Iterator[tuple[str, dict[str, Mapping[str, float]]]]:
        """Of each peer its name, and the rates of each phase."""
        for peer in self.content["peers"]:
            decode = {f"decode of {count}": rate for count, rate in peer["decode"].items()}
            yield peer["name"], {"prefill": peer["prefill"], **decode}


def speeds(results: Sequence[Result]) -> str:
    """Return a Markdown table of tokens a second: the peer's, ours, the ratio."""
    rates = [found for result in results for _, found in result.rates]
    phases = list(dict.fromkeys(phase for found in rates for phase in found))
    lines = [("shapes", "beside", *phases), ("---",) * 2 + ("---:",) * len(phases)]
    for result in results:
        for name, found in result.rates:
            cells = [_cell(found[phase]) if phase in found else "" for phase in phases]
            lines.append((f"[{result.shapes}](../bench/results/{result.file})", name, *cells))
    return _markdown(lines)


def systems(results: Sequence[Result]) -> str:
    """Return a Markdown table of what was compared: versions, calls, what each said of the CPU."""
    lines = [("system", "version", "how it was called", "what it says of itself"), ("---",) * 4]
    for result in results:
        told = result.content
        own = told["machine"]["libraries"]
        lines.append(
            (
                "internvl-edge",
                _versions(own),
                "`InternVL.load`, `Engine.prefill` and `run`",
                told["features"],
            )
        )
        lines += [
            (peer["name"], _versions(peer["versions"]), peer["call"], peer["features"])
            for peer in told["peers"]
        ]
    return _markdown(list(dict.fromkeys(lines)))


def headlines(result: Result) -> str:
    """Return the README's words: ratios of prefill and decode of one sequence, by system."""
    rates = dict(result.rates)
    words = []
    for system, names in HEADLINES.items():
        measured = [rates[name] for name in names if name in rates]
        if measured:
            prefill, decode = (
                min(found[phase]["ratio"] for found in measured)
                for phase in ("prefill", "decode of 1")
            )
            words.append(f"{prefill:.2f}x and {decode:.2f}x {system}'s")
    return ", ".join(words)


def _cell(rate: Mapping[str, float]) -> str:
    return f"{_short(rate['peer'])} → {_short(rate['own'])}: {rate['ratio']:.2f}x"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _versions(packages: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    found = [Result.read(Path(name)) for name in sys.argv[1:]]
    print(speeds(found), systems(found), *map(headlines, found), sep="\n")
