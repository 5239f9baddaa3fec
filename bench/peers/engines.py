"""One sequence through each system, all behind the same two calls.

A sequence is always token ids, and logits of its last position come back to the host, as a greedy
loop needs them. Choosing the next token is not part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bench.peers.llamacpp import LlamaCpp
from internvl_edge.runtime import InternVL
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.decoding.sequence import TokenSequence

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


class Engine(Protocol):
    """A loaded model and one sequence."""

    def prefill(self, ids: Ids) -> Logits:
        """Begin anew with the prompt `(tokens,)`; logits `(vocab,)` of its last position."""

    def decode(self, token: int) -> Logits:
        """Append a token; logits `(vocab,)`."""


class OwnEngine:
    """This runtime over a bundle: embedding gather, chunked prefill and KV cache as in use."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        self._model = InternVL.load(
            path, device="cpu", threads=threads, verify="size", reuse_bytes=0
        )
        self._cache = self._model.engine.backend.new_cache(context)

    def prefill(self, ids: Ids) -> Logits:
        self._cache.state.truncate(0)
        sequence = TokenSequence.build(ids.tolist(), self._model.context_id, [])
        logits, _ = self._model.engine.prefill(self._cache, sequence)
        return logits

    def decode(self, token: int) -> Logits:
        return self._model.engine.decode(self._cache, token)


class LlamaCppEngine:
    """llama.cpp over a GGUF file."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        self._model = LlamaCpp(path, threads, context)

    def prefill(self, ids: Ids) -> Logits:
        self._model.reset()
        return self._append(ids)

    def decode(self, token: int) -> Logits:
        return self._append(np.array([token]))

    def _append(self, ids: Ids) -> Logits:
        (logits,) = self._model.append_ids(ids)
        return np.asarray(logits)


class TransformersEngine:
    """transformers over a Llama checkpoint, in bfloat16.

    Args:
        compiled: decode through `torch.compile` over a static cache, as `generate` does with
            `cache_implementation="static"`; prefill stays eager there too.
    """

    def __init__(self, path: Path, threads: int, context: int, *, compiled: bool) -> None:
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

        torch.set_num_threads(threads)
        self._torch = torch
        auto: Any = AutoModelForCausalLM  # its methods carry no types
        model = auto.from_pretrained(path, dtype=torch.bfloat16).eval()
        self._model = model
        self._step = torch.compile(model.forward) if compiled else model.forward
        self._new_cache: Callable[[], Any] = partial(DynamicCache, config=model.config)
        if compiled:
            self._new_cache = partial(StaticCache, config=model.config, max_cache_len=context)
        self._cache: Any = None
        self._length = 0

    def prefill(self, ids: Ids) -> Logits:
        self._cache, self._length = self._new_cache(), 0
        return self._run(self._model.forward, ids)

    def decode(self, token: int) -> Logits:
        return self._run(self._step, np.array([token]))

    def _run(self, forward: Any, ids: Ids) -> Logits:
        torch = self._torch
        positions = torch.arange(self._length, self._length + len(ids))[None]
        with torch.no_grad():
            output = forward(
                input_ids=torch.from_numpy(ids)[None],
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._length += len(ids)
        return np.asarray(output.logits[0, -1].float().numpy())


class OptimumEngine:
    """Optimum's ONNX Runtime model, exported from a Llama checkpoint, in float32."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        ort = load_onnxruntime()
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        self._torch = torch
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self._model = ORTModelForCausalLM.from_pretrained(
            path, export=True, session_options=options, use_io_binding=True
        )
        self._cache: Any = None
        self._length = 0

    def prefill(self, ids: Ids) -> Logits:
        self._cache, self._length = None, 0
        return self._run(ids)

    def decode(self, token: int) -> Logits:
        return self._run(np.array([token]))

    def _run(self, ids: Ids) -> Logits:
        torch = self._torch
        self._length += len(ids)
        output = self._model(
            input_ids=torch.from_numpy(ids)[None],
            attention_mask=torch.ones(1, self._length, dtype=torch.int64),
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = output.past_key_values
        return np.asarray(output.logits[0, -1].numpy())


#: By the name a worker is asked for.
ENGINES: dict[str, Callable[[Path, int, int], Engine]] = {
    "internvl-edge": OwnEngine,
    "llama.cpp": LlamaCppEngine,
    "transformers": partial(TransformersEngine, compiled=False),
    "transformers-compiled": partial(TransformersEngine, compiled=True),
    "optimum": OptimumEngine,
}
