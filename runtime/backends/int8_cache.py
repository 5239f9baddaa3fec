"""Whether ONNX Runtime's attention on the CPU takes int8 keys and values: tried, not looked up.

Up to 1.24 it has no such inputs; 1.25 and 1.26 accept the graph and fail when it runs. So one
attention is run, in `probes/cache.onnx` as `export` writes it.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from internvl_edge.bundle import contract
from internvl_edge.bundle.errors import DeviceError
from internvl_edge.bundle.remedies import Remedy
from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.trials import open_probe, probe_options, succeeds

#: The probe's attention; all scales of its cache are one.
SPEC = LanguageSpec(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=1,
    rms_norm_eps=1e-5,
    bias=False,
    max_position_embeddings=2,
    rope_theta=1e4,
    rope_type="default",
    rope_factor=1.0,
)
#: Queries, keys and values of the rows; what attention gives; the cache written.
QKV, ATTENDED, KEY, VALUE = "qkv", "attended", "key", "value"
#: What to do where it is not taken.
REMEDY = "install onnxruntime 1.27 or later (Python 3.11 or later)"

#: The graph of one attention.
PROBE = Path(__file__).with_name("probes") / "cache.onnx"
_ROWS = 2


def check_int8_cache() -> None:
    """Raise DeviceError unless the installed ONNX Runtime runs a bundle with an int8 KV cache."""
    if not takes_int8_cache():
        raise DeviceError(
            "the bundle's KV cache is int8, which the attention of onnxruntime"
            f" {load_onnxruntime().__version__} does not take on the CPU; {REMEDY}",
            [Remedy.CACHE_AS_COMPUTED],
        )


@functools.cache
def takes_int8_cache() -> bool:
    """Whether int8 keys and values come back as they were given."""
    return succeeds("int8 cache", map(Path.read_bytes, [PROBE]), _comes_back)


def _comes_back() -> bool:
    """The first row sees itself alone, so that its result is its value."""
    values = np.arange(SPEC.head_dim, dtype=np.float32) - SPEC.head_dim // 2
    width = SPEC.query_size + 2 * SPEC.key_value_size
    qkv = np.zeros((_ROWS, width), np.float32)
    qkv[:, -SPEC.key_value_size :] = values
    half = (_ROWS, SPEC.head_dim // 2)
    empty = np.zeros(contract.cache_shape(SPEC, _ROWS), np.int8)
    feeds = {
        QKV: qkv,
        contract.ROPE_COS: np.ones(half, np.float32),
        contract.ROPE_SIN: np.zeros(half, np.float32),
        contract.LAST_POSITION: np.array([_ROWS - 1], np.int32),
        contract.TOTAL_LENGTH: np.array(_ROWS, np.int32),
        contract.past_key(0): empty,
        contract.past_value(0): empty,
    }
    try:
        session = open_probe(str(PROBE), probe_options({}))
        attended, cached = session.run([ATTENDED, VALUE], feeds)
    except Exception:  # noqa: BLE001 - ONNX Runtime's errors have no common class
        return False
    heads = attended[0].reshape(SPEC.num_attention_heads, SPEC.head_dim)
    return bool((heads == values).all() and (cached == values).all())
