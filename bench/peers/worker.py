"""One engine in a process of its own: requests as lines of JSON on stdin, answers on stdout.

Every system brings a thread pool; in one process they would share caches, allocators and OpenMP
settings. A worker that waits for its turn sleeps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bench.common.machine import installed_versions
from internvl_edge.bundle.errors import DeviceError

if TYPE_CHECKING:
    from internvl_edge.bench.peers.engines import Engine
    from internvl_edge.bench.peers.towers import Tower

MODULE = "internvl_edge.bench.peers.worker"


@dataclass(frozen=True)
class Round:
    """One prompt and what followed it.

    Attributes:
        prompt: its tokens.
        prefill_s: seconds it took.
        decode_s: by the number of sequences, seconds of each step of all of them.
    """

    prompt: int
    prefill_s: float
    decode_s: dict[int, tuple[float, ...]]


class Worker:
    """The other end of a worker process.

    Args:
        engine: a name of `engines.ENGINES` or `towers.TOWERS`.
        path: what it reads.
        numbers: what else it is made of, in their order; threads are the first.
        python: interpreter that has the engine's packages.

    Attributes:
        features: what the engine says it uses of this CPU.

    Raises:
        DeviceError: the engine did not start; says why.
    """

    def __init__(
        self,
        engine: str,
        path: Path,
        numbers: Sequence[int],
        python: str = sys.executable,
    ) -> None:
        self._engine = engine
        command = [python, "-m", MODULE, engine, str(path), *map(str, numbers)]
        environment = os.environ | {"OMP_NUM_THREADS": str(numbers[0])}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env=environment,
        )
        self.features: str = self._read()["features"]

    def round(self, prompt: Sequence[int], new_tokens: int, sequences: Sequence[int]) -> Round:
        """Prefill the prompt; for each number of sequences that begin with it, decode so many
        tokens of each."""
        request = {"prompt": list(prompt), "new_tokens": new_tokens, "sequences": list(sequences)}
        answer = self._ask(request)
        steps = zip(sequences, map(tuple, answer["decode_s"]), strict=True)
        return Round(len(prompt), answer["prefill_s"], dict(steps))

    def encode(self, tiles: int, side: int) -> float:
        """Encode so many tiles of that many pixels a side; return the seconds it took."""
        return float(self._ask({"tiles": tiles, "side": side})["encode_s"])

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _ask(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Mapping[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {}
        if not line or "error" in answer:
            self.close()
            reason = answer.get("error", f"its process ended ({self._process.returncode})")
            raise DeviceError(f"{self._engine}: {reason}")
        return answer


def versions(packages: Sequence[str], python: str = sys.executable) -> dict[str, str]:
    """Versions of installed packages as another interpreter sees them; absent ones are left out."""
    command = [python, "-m", MODULE, "versions", *packages]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if result.returncode:
        said = result.stderr.strip().splitlines()
        raise DeviceError(f"{python} does not run this package: {said[-1] if said else 'no word'}")
    return dict(json.loads(result.stdout))


def main(arguments: Sequence[str]) -> int:
    """Serve one engine until stdin ends."""
    if arguments[0] == "versions":
        print(json.dumps(installed_versions(arguments[1:])))
        return 0
    name, path, *numbers = arguments
    # Libraries print: only answers may reach the pipe.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    try:
        from internvl_edge.bench.peers.engines import ENGINES
        from internvl_edge.bench.peers.towers import TOWERS

        kinds: dict[str, Any] = {**ENGINES, **TOWERS}
        engine = kinds[name](Path(path), *map(int, numbers))
    except Exception as error:  # noqa: BLE001  whatever the library raises is the answer
        answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        return 1
    answers.write(json.dumps({"features": engine.features}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        answer = _encode(engine, request) if "tiles" in request else _round(engine, request)
        answers.write(json.dumps(answer) + "\n")
    return 0


def _round(engine: Engine, request: Mapping[str, Any]) -> dict[str, Any]:
    prompt = np.array(request["prompt"], np.int64)
    started = time.perf_counter()
    engine.prefill(prompt)
    prefill = time.perf_counter() - started
    steps = [_steps(engine, prompt, count, request["new_tokens"]) for count in request["sequences"]]
    return {"prefill_s": prefill, "decode_s": steps}


def _encode(tower: Tower, request: Mapping[str, Any]) -> dict[str, Any]:
    shape = (request["tiles"], request["side"], request["side"], 3)
    tiles = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    started = time.perf_counter()
    tower.encode(tiles)
    return {"encode_s": time.perf_counter() - started}


def _steps(engine: Engine, prompt: NDArray[np.int64], count: int, new_tokens: int) -> list[float]:
    """Seconds of each step of so many sequences behind the prompt."""
    engine.fork(count)
    seconds = []
    for step in range(new_tokens):
        tokens = np.resize(np.roll(prompt, -step), count)
        started = time.perf_counter()
        engine.decode(tokens)
        seconds.append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
