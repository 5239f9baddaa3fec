"""transformers and Optimum over a Llama checkpoint; see `engines.Engine`.

Several sequences are a batch; it is run anew from its prompt when their number changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.runtime.backends.ort import load_onnxruntime

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


class _OneBatch(ABC):
    """Sequences that are rows of one batch."""

    def __init__(self) -> None:
        self._cache: Any = None
        self._prompt, self._length = np.empty(0, np.int64), 0

    def prefill(self, ids: Ids) -> Logits:
        self._prompt = ids
        (logits,) = self._begin(ids[None])
        return np.asarray(logits)

    def fork(self, count: int) -> None:
        self._begin(np.repeat(self._prompt[None], count, 0))

    @abstractmethod
    def _begin(self, ids: Ids) -> Logits:
        """Run prompts `(sequences, tokens)` in an empty cache; logits `(sequences, vocab)`."""


class TransformersEngine(_OneBatch):
    """transformers over a Llama checkpoint, in bfloat16.

    Args:
        compiled: decode through `torch.compile` over a static cache, as `generate` does with
            `cache_implementation="static"`; prefill stays eager there too.
    """

    def __init__(
        self, path: Path, threads: int, context: int, sequences: int, *, compiled: bool
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

        super().__init__()
        torch.set_num_threads(threads)
        self._torch = torch
        auto: Any = AutoModelForCausalLM  # its methods carry no types
        model = auto.from_pretrained(path, dtype=torch.bfloat16).eval()
        self._model = model
        self._step = torch.compile(model.forward) if compiled else model.forward
        self._new_cache: Callable[[], Any] = partial(DynamicCache, config=model.config)
        if compiled:
            self._new_cache = partial(StaticCache, config=model.config, max_cache_len=context)

    @property
    def features(self) -> str:
        return f"bfloat16, {self._torch.backends.cpu.get_cpu_capability()}"

    def decode(self, tokens: Ids) -> Logits:
        return self._run(self._step, tokens[:, None])

    def _begin(self, ids: Ids) -> Logits:
        self._cache, self._length = self._new_cache(), 0
        return self._run(self._model.forward, ids)

    def _run(self, forward: Any, ids: Ids) -> Logits:
        torch = self._torch
        positions = torch.arange(self._length, self._length + ids.shape[1])[None]
        with torch.no_grad():
            output = forward(
                input_ids=torch.from_numpy(ids),
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._length += ids.shape[1]
        return np.asarray(output.logits[:, -1].float().numpy())


class OptimumEngine(_OneBatch):
    """Optimum's ONNX Runtime model, exported from a Llama checkpoint, in float32."""

    def __init__(self, path: Path, threads: int, context: int, sequences: int) -> None:
        ort = load_onnxruntime()
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        super().__init__()
        self._torch = torch
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self._model = ORTModelForCausalLM.from_pretrained(
            path, export=True, session_options=options, use_io_binding=True
        )

    @property
    def features(self) -> str:
        return "float32"

    def decode(self, tokens: Ids) -> Logits:
        return self._run(tokens[:, None])

    def _begin(self, ids: Ids) -> Logits:
        self._cache, self._length = None, 0
        return self._run(ids)

    def _run(self, ids: Ids) -> Logits:
        torch = self._torch
        self._length += ids.shape[1]
        output = self._model(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.ones(len(ids), self._length, dtype=torch.int64),
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = output.past_key_values
        return np.asarray(output.logits[:, -1].numpy())
