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
        if told.get("format") not in (FORMAT, VISION_FORMAT) or told.get("version") != VERSION:
            raise ResultError(f"{named(path)} is no result of 'bench peers --json'; measure again")
        return cls(path.name, told)

    @property
    def of_vision(self) -> bool:
        """Whether towers were compared, not decoders."""
        return bool(self.content["format"] == VISION_FORMAT)

    @property
    def link(self) -> str:
        """What was run, in short, as a link to the file."""
        told = self.content
        words = f"{told['model']}, {told['layers']} layers"
        if self.of_vision:
            words += f", {told['precision']}"
        else:
            words += (
                f", {told['settings']['prompt']} tokens; block {told['block']},"
                f" {told['head_bits']}-bit head, {told['kv']} cache"
            )
        return f"[{words}](../bench/results/{self.file})"

    @property
    def rates(self) -> Iterator[tuple[str, dict[str, Mapping[str, float]]]]:
        """Of each peer its name, and the rates of each phase; of towers, tiles a second."""
        for peer in self.content["peers"]:
            if self.of_vision:
                yield (
                    peer["name"],
                    {
                        f"{count} tiles": {
                            "peer": 1 / peer["peer_s"][count],
                            "own": 1 / peer["own_s"][count],
                            "ratio": ratio,
                        }
                        for count, ratio in peer["ratio"].items()
                    },
                )
            else:
                decode = {f"decode of {count}": rate for count, rate in peer["decode"].items()}
                yield peer["name"], {"prefill": peer["prefill"], **decode}


def speeds(results: Sequence[Result]) -> str:
    """Return a Markdown table of tokens, or tiles, a second: the peer's, ours, the ratio."""
    measured = [found for result in results for _, found in result.rates]
    phases = list(dict.fromkeys(phase for found in measured for phase in found))
    lines = [("shapes", "beside", *phases), ("---",) * 2 + ("---:",) * len(phases)]
    for result in results:
        for name, found in result.rates:
            cells = [_cell(found[phase]) if phase in found else "" for phase in phases]
            lines.append((result.link, name, *cells))
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
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _versions(packages: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    rows = ((cell.replace("|", "\\|") for cell in line) for line in lines)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def tables(results: Sequence[Result]) -> str:
    """Return what docs/performance.md holds of these results: decoders, towers, systems."""
    kinds = ([found for found in results if found.of_vision is vision] for vision in (False, True))
    return "\n".join([*(speeds(kind) for kind in kinds if kind), systems(results)])


if __name__ == "__main__":
    stored = [Result.read(Path(name)) for name in sys.argv[1:]]
    print(tables(stored), *(headlines(found) for found in stored if not found.of_vision), sep="\n")
