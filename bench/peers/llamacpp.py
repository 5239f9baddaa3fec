"""llama.cpp through llama-cpp-python's C bindings: quantise a GGUF, run it by ids or embeddings."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.errors import BundleError, CapacityError, MeasurementError
from internvl_edge.bundle.quoting import named

#: llama.cpp's file types by the name people know them by.
FILE_TYPES = {"F16": 1, "Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15}

#: Rows of one pass: llama.cpp's own defaults.
BATCH = 512
#: `ggml_log_level` from which on a message is an error.
ERROR = 4


def quantize_gguf(source: Path, target: Path, kind: str, threads: int) -> Path:
    """Quantise a float GGUF with llama.cpp's own quantiser.

    Args:
        kind: one of `FILE_TYPES`.

    Raises:
        BundleError: llama.cpp does not take the file.
    """
    import llama_cpp

    silence()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[kind]
    params.nthread = threads
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    if status:
        target.unlink(missing_ok=True)
        raise BundleError(
            f"llama.cpp could not quantise {named(source)} to {kind} (status {status})"
        )
    return target


def system_info() -> str:
    """Return what llama.cpp was built for and found here, in its own words."""
    import llama_cpp

    silence()
    return str(llama_cpp.llama_print_system_info().decode()).strip(" |\n")


def silence() -> None:
    """Stop llama.cpp from logging anything but errors to stderr."""
    import llama_cpp

    llama_cpp.llama_log_set(quiet_log(), ctypes.c_void_p())


@cache
def quiet_log() -> Any:
    """The callback, made once: llama.cpp keeps its address, so it must live as long."""
    import llama_cpp

    def log(level: int, text: bytes, _: object) -> None:
        if level == ERROR:
            print(text.decode(errors="replace"), end="", file=sys.stderr)

    return llama_cpp.llama_log_callback(log)


class LlamaCpp:
    """A GGUF file and sequences over it, on the CPU with llama.cpp's defaults.

    Args:
        path: the file.
        threads: of prefill and of decode.
        context: positions of the KV cache, of each sequence.
        sequences: most of them; each has a cache of its own, as in llama.cpp's server.

    Raises:
        BundleError: llama.cpp does not take the file.
        CapacityError: it has no memory for the cache.
    """

    def __init__(self, path: Path, threads: int, context: int, sequences: int = 1) -> None:
        import llama_cpp

        self._api = llama_cpp
        silence()
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        if not self._model:
            raise BundleError(
                f"llama.cpp does not take {named(path)}; convert the checkpoint again"
            )
        params = llama_cpp.llama_context_default_params()
        # llama.cpp rounds the part of each sequence up to a multiple of 256.
        params.n_ctx, params.n_seq_max = context * sequences, sequences
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            llama_cpp.llama_model_free(self._model)
            raise CapacityError(f"llama.cpp made no context of {context} tokens for {named(path)}")
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._hidden = llama_cpp.llama_model_n_embd(self._model)
        self.context = context
        self._lengths = [0] * sequences

    @property
    def length(self) -> int:
        """Positions of the first sequence."""
        return self._lengths[0]

    def close(self) -> None:
        """Give its memory back; the object is of no use afterwards."""
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)

    def reset(self) -> None:
        """Forget the first sequence."""
        self.truncate(0)

    def truncate(self, length: int) -> None:
        """Forget the first sequence's positions from `length` on."""
        if length < self.length:
            self._forget(0, length)

    def fork(self, count: int) -> None:
        """Make the sequences from the second to the `count`-th copies of the first."""
        memory = self._api.llama_get_memory(self._context)
        for sequence in range(1, len(self._lengths)):
            self._forget(sequence, 0)
            if sequence < count:
                self._api.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
                self._lengths[sequence] = self.length

    def append_ids(self, ids: NDArray[np.int64], *, every: bool = False) -> NDArray[np.float32]:
        """Append token ids `(tokens,)` to the first sequence; see `append_rows`."""
        return self._append(ids.astype(np.int32), every)

    def append_rows(
        self, rows: NDArray[np.floating], *, every: bool = False
    ) -> NDArray[np.float32]:
        """Append embeddings `(tokens, hidden)` to the first sequence.

        Args:
            every: logits of every position, not of the last one only.

        Returns:
            Logits `(1, vocab)` or `(tokens, vocab)`.

        Raises:
            MeasurementError: the KV cache is full.
        """
        return self._append(np.ascontiguousarray(rows, np.float32), every)

    def append_to_each(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append one token to each of the first sequences, in one batch.

        Args:
            ids: int64 `(sequences,)`.

        Returns:
            Logits `(sequences, vocab)`.

        Raises:
            MeasurementError: the KV cache is full.
        """
        return self._pass(ids.astype(np.int32), range(len(ids)), range(len(ids)))

    def _append(self, values: NDArray[Any], every: bool) -> NDArray[np.float32]:
        parts = [values[i : i + BATCH] for i in range(0, len(values), BATCH)]
        logits = []
        for part in parts:
            last = [len(part) - 1] if part is parts[-1] else []
            wanted = range(len(part)) if every else last
            logits.append(self._pass(part, [0] * len(part), wanted))
        return np.concatenate(logits)

    def _pass(
        self, values: NDArray[Any], sequences: Sequence[int], wanted: Sequence[int]
    ) -> NDArray[np.float32]:
        """Run a batch: of each value the sequence it is appended to, and which want logits."""
        api, count = self._api, len(values)
        batch = api.llama_batch_init(count, self._hidden if values.ndim == 2 else 0, 1)
        target = batch.embd if values.ndim == 2 else batch.token
        ctypes.memmove(target, values.ctypes.data, values.nbytes)
        batch.n_tokens = count
        lengths = list(self._lengths)
        for i, sequence in enumerate(sequences):
            batch.pos[i] = lengths[sequence]
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = i in wanted
            lengths[sequence] += 1
        status = api.llama_decode(self._context, batch)
        api.llama_batch_free(batch)
        if status:
            raise MeasurementError(f"llama.cpp refused {count} tokens at {self.length} ({status})")
        self._lengths = lengths
        logits = [
            np.ctypeslib.as_array(api.llama_get_logits_ith(self._context, i), (self._vocab,)).copy()
            for i in wanted
        ]
        return np.stack(logits) if logits else np.empty((0, self._vocab), np.float32)

    def _forget(self, sequence: int, length: int) -> None:
        memory = self._api.llama_get_memory(self._context)
        self._api.llama_memory_seq_rm(memory, sequence, length, -1)
        self._lengths[sequence] = length
