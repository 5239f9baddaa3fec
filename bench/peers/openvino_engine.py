"""OpenVINO over a model of `openvino_writer`; see `engines.Engine`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bench.peers.openvino_writer import BEAMS, IDS, POSITIONS

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


class OpenVinoEngine:
    """One batch of sequences on the CPU plug-in, with its defaults beside the threads."""

    def __init__(self, path: Path, threads: int, context: int, sequences: int) -> None:
        import openvino

        core = openvino.Core()
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self._model = core.compile_model(path, "CPU", settings)
        self._request = self._model.create_infer_request()
        self._prompt: list[NDArray[Any]] = []
        self._length = self._prompt_length = 0
        self._beams = np.zeros(1, np.int32)

    @property
    def features(self) -> str:
        wanted = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")
        told = [f"{name} {self._model.get_property(name).to_string()}" for name in wanted]
        group = self._model.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")
        return ", ".join([*told, f"DYNAMIC_QUANTIZATION_GROUP_SIZE {group}"])

    def prefill(self, ids: Ids) -> Logits:
        self._request.reset_state()
        self._length, self._beams = 0, np.zeros(1, np.int32)
        (logits,) = self._run(ids[None])
        self._prompt_length = self._length
        self._prompt = [state.state.data.copy() for state in self._request.query_state()]
        return np.asarray(logits)

    def fork(self, count: int) -> None:
        import openvino

        for state, values in zip(self._request.query_state(), self._prompt, strict=True):
            state.state = openvino.Tensor(values)
        self._length = self._prompt_length
        self._beams = np.zeros(count, np.int32)  # each goes on from the only row

    def decode(self, tokens: Ids) -> Logits:
        return self._run(tokens[:, None])

    def _run(self, ids: Ids) -> Logits:
        positions = np.arange(self._length, self._length + ids.shape[1])
        inputs = {IDS: ids, POSITIONS: np.repeat(positions[None], len(ids), 0), BEAMS: self._beams}
        result = self._request.infer(inputs, share_inputs=True)
        self._length += ids.shape[1]
        self._beams = np.arange(len(ids), dtype=np.int32)
        return np.asarray(result[0])[:, -1].copy()
