"""Sequences through each system, all behind the same calls.

A prompt is token ids, and logits of last positions come back to the host, as a greedy loop needs
them. Choosing the next token is not part of it. Several sequences begin with one prompt: what is
measured is a step of all of them, which takes as long as if their prompts differed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bench.peers.llamacpp import LlamaCpp, system_info
from internvl_edge.bench.peers.openvino_engine import OpenVinoEngine
from internvl_edge.bench.peers.torch_engines import OptimumEngine, TransformersEngine
from internvl_edge.kernels.cpu import cpu_features
from internvl_edge.runtime import InternVL
from internvl_edge.runtime.decoding.sequence import TokenSequence

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


class Engine(Protocol):
    """A loaded model and its sequences."""

    @property
    def features(self) -> str:
        """What of the CPU it uses, and what it chose by itself: in its own words."""

    def prefill(self, ids: Ids) -> Logits:
        """Begin anew with one sequence, the prompt `(tokens,)`; logits `(vocab,)` of its last
        position."""

    def fork(self, count: int) -> None:
        """Go on with `count` sequences, each of which is the prompt and nothing else."""

    def decode(self, tokens: Ids) -> Logits:
        """Append a token `(sequences,)` to each; logits `(sequences, vocab)`."""


class OwnEngine:
    """This runtime over a bundle: embedding gather, chunked prefill and KV caches as in use."""

    def __init__(self, path: Path, threads: int, context: int, sequences: int) -> None:
        self._model = InternVL.load(
            path, device="cpu", threads=threads, verify="size", reuse_bytes=0
        )
        backend = self._model.engine.backend
        self._caches = [backend.new_cache(context) for _ in range(sequences)]
        self._prompt = 0

    @property
    def features(self) -> str:
        return f"{self._model.engine.backend.description}; {' '.join(cpu_features())}"

    def prefill(self, ids: Ids) -> Logits:
        self._prompt = len(ids)
        cache = self._caches[0]
        cache.state.truncate(0)
        sequence = TokenSequence.build(ids.tolist(), self._model.context_id, [])
        logits, _ = self._model.engine.prefill(cache, sequence)
        return logits

    def fork(self, count: int) -> None:
        first = self._caches[0]
        first.state.truncate(self._prompt)
        signatures, base = first.state.content()
        assert base is not None  # a prompt is under one
        for cache in self._caches[1:count]:
            cache.state.truncate(0)
            cache.state.reserve(self._prompt)
            cache.copy_rows(first, 0, self._prompt)
            cache.state.extend(signatures, base)

    def decode(self, tokens: Ids) -> Logits:
        engine = self._model.engine
        runs = [
            engine.following(cache, [int(token)], 0)
            for cache, token in zip(self._caches, tokens, strict=False)
        ]
        size = engine.most_runs
        passes = [engine.run(runs[i : i + size]) for i in range(0, len(runs), size)]
        return np.stack([found.logits for done in passes for (found,) in done])


class LlamaCppEngine:
    """llama.cpp over a GGUF file."""

    def __init__(self, path: Path, threads: int, context: int, sequences: int) -> None:
        self._model = LlamaCpp(path, threads, context, sequences)
        self._prompt = 0

    @property
    def features(self) -> str:
        return system_info()

    def prefill(self, ids: Ids) -> Logits:
        self._model.reset()
        self._prompt = len(ids)
        (logits,) = self._model.append_ids(ids)
        return np.asarray(logits)

    def fork(self, count: int) -> None:
        self._model.truncate(self._prompt)
        self._model.fork(count)

    def decode(self, tokens: Ids) -> Logits:
        return self._model.append_to_each(tokens)


#: By the name a worker is asked for: made of a path, threads, positions and most sequences.
ENGINES: dict[str, Callable[[Path, int, int, int], Engine]] = {
    "internvl-edge": OwnEngine,
    "llama.cpp": LlamaCppEngine,
    "openvino": OpenVinoEngine,
    "transformers": partial(TransformersEngine, compiled=False),
    "transformers-compiled": partial(TransformersEngine, compiled=True),
    "optimum": OptimumEngine,
}
