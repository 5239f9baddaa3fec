"""language.onnx: embeddings and KV cache -> decoder -> logits of the rows asked for."""

from __future__ import annotations

from dataclasses import dataclass

from internvl_edge.bundle import contract
from internvl_edge.bundle.contract import CachePrecision, LanguagePrecision
from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.export.checkpoint.names import HEAD, NORM, decoder_prefix
from internvl_edge.export.checkpoint.weights import Weight, WeightReader
from internvl_edge.export.graphs.dialects import CacheNames, Dialect, Experts, HeadNorms


def build_language(
    spec: LanguageSpec,
    dialect: Dialect,
    reader: WeightReader,
    precision: LanguagePrecision,
    cache: CachePrecision,
) -> None:
    """Write the whole decoder into `dialect.graph`."""
    graph = dialect.graph
    for tensor in contract.language_inputs(spec, precision, cache, dialect.name):
        graph.input(tensor)
    outputs = {t.name: t for t in contract.language_outputs(spec, cache, dialect.name)}
    hidden, residual = contract.EMBEDDINGS, ""
    for layer in range(spec.num_hidden_layers):
        step = decoder_layer(spec, dialect, reader, layer, hidden, residual)
        hidden, residual = step.hidden, step.residual
        graph.output(step.key, outputs[contract.present_key(layer)])
        graph.output(step.value, outputs[contract.present_value(layer)])
    logits = head(spec, dialect, reader, hidden, residual)
    graph.output(logits, outputs[contract.LOGITS])


@dataclass(frozen=True)
class LayerStep:
    """Values after one layer: its output is `hidden + residual`."""

    hidden: str
    residual: str
    key: str
    value: str


def decoder_layer(
    spec: LanguageSpec,
    dialect: Dialect,
    reader: WeightReader,
    layer: int,
    hidden: str,
    residual: str,
) -> LayerStep:
    """One layer on `hidden + residual` (`residual` may be empty), both `(tokens, hidden)`."""
    prefix = decoder_prefix(layer)
    with dialect.graph.scope(f"layers.{layer}"):
        norm = reader.tensor(f"{prefix}attention_norm.weight")
        normed, residual = _add_norm(dialect, hidden, residual, norm, spec, "attention_norm")
        hidden, key, value = _attention(spec, dialect, reader, layer, normed)
        norm = reader.tensor(f"{prefix}ffn_norm.weight")
        normed, residual = _add_norm(dialect, hidden, residual, norm, spec, "ffn_norm")
        hidden = _feed_forward(spec, dialect, reader, layer, normed)
    return LayerStep(hidden, residual, key, value)


def head(
    spec: LanguageSpec, dialect: Dialect, reader: WeightReader, hidden: str, residual: str
) -> str:
    """Final norm and output matrix: float32 logits `(rows, vocab)` of the rows asked for."""
    graph = dialect.graph
    norm = reader.tensor(NORM)
    normed, _ = _add_norm(dialect, hidden, residual, norm, spec, "norm")
    # Only the rows asked for reach the head: 92,553 columns are most of a short prompt's work.
    rows = graph.node("Gather", [normed, contract.LOGIT_ROWS], "rows", {"axis": 0})
    logits = dialect.linear(rows, reader.tensor(HEAD), None, "head")
    return graph.cast(logits, "float32", "logits")


def _add_norm(
    dialect: Dialect, hidden: str, residual: str, weight: Weight, spec: LanguageSpec, name: str
) -> tuple[str, str]:
    """Residual sum and its norm; the first layer has no residual yet."""
    if not residual:
        return dialect.rms_norm(hidden, weight, spec.rms_norm_eps, name), hidden
    return dialect.add_rms_norm(hidden, residual, weight, spec.rms_norm_eps, name)


def _attention(
    spec: LanguageSpec, dialect: Dialect, reader: WeightReader, layer: int, x: str
) -> tuple[str, str, str]:
    """Attention output `(tokens, hidden)`, present key, present value."""
    prefix = decoder_prefix(layer)
    with dialect.graph.scope("attention"):
        bias = reader.tensor(f"{prefix}qkv.bias") if spec.has_qkv_bias else None
        qkv = dialect.linear(x, reader.tensor(f"{prefix}qkv.weight"), bias, "wqkv")
        cache = CacheNames(
            layer=layer,
            past_key=contract.past_key(layer),
            past_value=contract.past_value(layer),
            norms=_head_norms(spec, reader, prefix),
        )
        y, key, value = dialect.cached_attention(qkv, cache, spec, "attend")
        bias = reader.tensor(f"{prefix}out.bias") if spec.bias else None
        return dialect.linear(y, reader.tensor(f"{prefix}out.weight"), bias, "wo"), key, value


def _head_norms(spec: LanguageSpec, reader: WeightReader, prefix: str) -> HeadNorms | None:
    if not spec.qk_norm:
        return None
    query, key = (reader.tensor(f"{prefix}{name}.weight") for name in ("q_norm", "k_norm"))
    return HeadNorms(query, key, spec.rms_norm_eps)


def _feed_forward(
    spec: LanguageSpec, dialect: Dialect, reader: WeightReader, layer: int, x: str
) -> str:
    """down(silu(gate x) * up x), of all or of the experts that are chosen."""
    prefix = decoder_prefix(layer)
    with dialect.graph.scope("feed_forward"):
        if spec.has_experts(layer):
            return dialect.mixture(x, _experts(spec, reader, prefix), "experts")
        gate = dialect.linear(x, reader.tensor(f"{prefix}gate.weight"), None, "w1")
        up = dialect.linear(x, reader.tensor(f"{prefix}up.weight"), None, "w3")
        gated = dialect.gated_silu(gate, up, "gated")
        return dialect.linear(gated, reader.tensor(f"{prefix}down.weight"), None, "w2")


def _experts(spec: LanguageSpec, reader: WeightReader, prefix: str) -> Experts:
    names = (f"{prefix}{name}.weight" for name in ("router", "experts_gated", "experts_down"))
    router, gated, down = map(reader.tensor, names)
    return Experts(router, gated, down, spec.experts_per_token or 1, spec.experts_normed)
