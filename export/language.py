"""language.onnx: embeddings and KV cache -> InternLM2 -> logits of the rows asked for."""

from __future__ import annotations

from internvl_edge.export.dialects import CacheNames, Dialect
from internvl_edge.export.mapping import LANGUAGE
from internvl_edge.export.weights import Weight, WeightReader, wqkv_rows
from internvl_edge.runtime import contract
from internvl_edge.runtime.contract import Precision, Tensor
from internvl_edge.runtime.specs import LanguageSpec


def build_language(
    spec: LanguageSpec, dialect: Dialect, reader: WeightReader, precision: Precision
) -> None:
    """Write the whole decoder into `dialect.graph`."""
    graph = dialect.graph
    for tensor in contract.language_inputs(spec, precision):
        graph.input(tensor)
    outputs = {tensor.name: tensor for tensor in contract.language_outputs(spec, precision)}
    hidden, residual = contract.EMBEDDINGS, ""
    for layer in range(spec.num_hidden_layers):
        prefix = f"{LANGUAGE}.model.layers.{layer}"
        with graph.scope(f"layers.{layer}"):
            norm = reader.tensor(f"{prefix}.attention_norm.weight")
            normed, residual = _add_norm(dialect, hidden, residual, norm, spec, "attention_norm")
            hidden = _attention(spec, dialect, reader, layer, normed, outputs)
            norm = reader.tensor(f"{prefix}.ffn_norm.weight")
            normed, residual = _add_norm(dialect, hidden, residual, norm, spec, "ffn_norm")
            hidden = _feed_forward(dialect, reader, f"{prefix}.feed_forward", normed)
    norm = reader.tensor(f"{LANGUAGE}.model.norm.weight")
    normed, _ = _add_norm(dialect, hidden, residual, norm, spec, "norm")
    # Only the rows asked for reach the head: 92,553 columns are most of a short prompt's work.
    rows = graph.node("Gather", [normed, contract.LOGIT_ROWS], "rows", {"axis": 0})
    logits = dialect.linear(rows, reader.tensor(f"{LANGUAGE}.output.weight"), None, "head")
    logits = graph.node("Cast", [logits], "logits", {"to": 1})  # float32
    graph.output(logits, outputs[contract.LOGITS])


def _add_norm(
    dialect: Dialect, hidden: str, residual: str, weight: Weight, spec: LanguageSpec, name: str
) -> tuple[str, str]:
    """Residual sum and its norm; the first layer has no residual yet."""
    if not residual:
        return dialect.rms_norm(hidden, weight, spec.rms_norm_eps, name), hidden
    return dialect.add_rms_norm(hidden, residual, weight, spec.rms_norm_eps, name)


def _attention(
    spec: LanguageSpec,
    dialect: Dialect,
    reader: WeightReader,
    layer: int,
    x: str,
    outputs: dict[str, Tensor],
) -> str:
    prefix = f"{LANGUAGE}.model.layers.{layer}.attention"
    order = wqkv_rows(spec)
    with dialect.graph.scope("attention"):
        bias = reader.reordered(f"{prefix}.wqkv.bias", order) if spec.bias else None
        qkv = dialect.linear(x, reader.reordered(f"{prefix}.wqkv.weight", order), bias, "wqkv")
        cache = CacheNames(
            past_key=contract.past_key(layer),
            past_value=contract.past_value(layer),
            last_position=contract.LAST_POSITION,
            total_length=contract.TOTAL_LENGTH,
            rope_cos=contract.ROPE_COS,
            rope_sin=contract.ROPE_SIN,
        )
        y, key, value = dialect.cached_attention(qkv, cache, spec, "attend")
        dialect.graph.output(key, outputs[contract.present_key(layer)])
        dialect.graph.output(value, outputs[contract.present_value(layer)])
        bias = reader.tensor(f"{prefix}.wo.bias") if spec.bias else None
        return dialect.linear(y, reader.tensor(f"{prefix}.wo.weight"), bias, "wo")


def _feed_forward(dialect: Dialect, reader: WeightReader, prefix: str, x: str) -> str:
    """w2(silu(w1 x) * w3 x)"""
    with dialect.graph.scope("feed_forward"):
        gate = dialect.linear(x, reader.tensor(f"{prefix}.w1.weight"), None, "w1")
        up = dialect.linear(x, reader.tensor(f"{prefix}.w3.weight"), None, "w3")
        gated = dialect.graph.node("Mul", [dialect.silu(gate, "silu"), up], "gated")
        return dialect.linear(gated, reader.tensor(f"{prefix}.w2.weight"), None, "w2")
