"""The language part as an OpenVINO model: the graph that optimum-intel makes of it, built directly.

Keys and values are states of the model, as in OpenVINO GenAI, and a row of the batch goes on from
the row that `beam_idx` names. Weights are packed as NNCF's `INT4_ASYM` and `INT8_ASYM` do by
default: unsigned with a zero point, rounded to nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bench.peers.layout import (
    TRANSFORMERS,
    Tensor,
    llama_tensors,
    peer_kind,
    read_tensor,
)
from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.export.checkpoint.checkpoint import WeightSource

#: Inputs of the model.
IDS, POSITIONS, BEAMS = "input_ids", "position_ids", "beam_idx"
#: Columns that share a scale in an INT4 matrix: NNCF's default.
GROUP = 128

Bits = Literal[4, 8, 16]


@dataclass(frozen=True)
class Packing:
    """Bits of a weight: of the decoder's matrices, and of the head; 16 is float16."""

    matrices: Bits = 4
    head: Bits = 8


def write_openvino(source: WeightSource, path: Path, packing: Packing) -> Path:
    """Write model.xml and model.bin; packed weights are held in memory.

    Args:
        path: of the .xml file.

    Raises:
        LimitError: the decoder is of no kind that peers know; see `peer_kind`.
        CheckpointError: a value is NaN or infinite.
        RangeError: a finite value does not fit float16.
    """
    peer_kind(source.spec.language)
    import openvino

    model = _Builder(source, packing).model()
    openvino.save_model(model, path, compress_to_fp16=False)
    return path


@dataclass(frozen=True)
class Groups:
    """A matrix as unsigned integers: `(values - zeros) * scales` in groups of columns.

    Attributes:
        values: uint8 `(rows, groups, columns of a group)`.
        zeros: uint8 `(rows, groups, 1)`.
        scales: float16 `(rows, groups, 1)`.
    """

    values: NDArray[np.uint8]
    zeros: NDArray[np.uint8]
    scales: NDArray[np.float16]

    @classmethod
    def rounded(cls, weight: NDArray[np.floating], bits: int, group: int) -> Groups:
        """Round float `(rows, columns)`, which hold a whole number of groups, to nearest."""
        wide = weight.astype(np.float32).reshape(len(weight), -1, group)
        low = np.minimum(wide.min(2, keepdims=True), 0)
        high = np.maximum(wide.max(2, keepdims=True), 0)
        top = 2**bits - 1
        scales = np.maximum((high - low) / top, np.finfo(np.float16).tiny).astype(np.float16)
        steps = scales.astype(np.float32)
        zeros = np.clip(np.rint(-low / steps), 0, top)
        values = np.clip(np.rint(wide / steps) + zeros, 0, top)
        return cls(values.astype(np.uint8), zeros.astype(np.uint8), scales)


@dataclass(frozen=True)
class Places:
    """Nodes that every layer's attention takes: what follows from the rows' positions, and from
    which row of the batch each goes on."""

    cos: Any
    sin: Any
    mask: Any
    beams: Any


class _Builder:
    """Makes the graph of one model, layer by layer."""

    def __init__(self, source: WeightSource, packing: Packing) -> None:
        import openvino
        import openvino.opset13 as op

        self._ov, self._op = openvino, op
        self._source, self._packing = source, packing
        self._spec: LanguageSpec = source.spec.language
        self._tensors = {tensor.name: tensor for tensor in llama_tensors(source, TRANSFORMERS)}
        self._sinks: list[Any] = []

    def model(self) -> Any:
        """Return the model: ids and positions int64 `(batch, tokens)`, beams int32 `(batch,)` ->
        float32 logits of the last position `(batch, 1, vocab)`."""
        op, spec, names = self._op, self._spec, TRANSFORMERS
        ids = op.parameter([-1, -1], np.int64, IDS)
        positions = op.parameter([-1, -1], np.int64, POSITIONS)
        beams = op.parameter([-1], np.int32, BEAMS)
        for node, name in ((ids, IDS), (positions, POSITIONS), (beams, BEAMS)):
            node.output(0).get_tensor().set_names({name})
        table = self._matrix(f"{names.embedding}.weight", self._packing.head)
        x = op.gather(table, ids, self._integers(0))
        places = Places(*self._angles(positions), self._mask(positions), beams)
        for layer in range(spec.num_hidden_layers):
            prefix = names.layer.format(layer)
            norm = names.norms
            normed = self._rms(x, f"{prefix}.{norm['attention_norm']}.weight")
            x = op.add(x, self._attention(normed, prefix, layer, places))
            normed = self._rms(x, f"{prefix}.{norm['ffn_norm']}.weight")
            x = op.add(x, self._mlp(normed, prefix))
        last = op.slice(x, [-1], [np.iinfo(np.int64).max], [1], [1])
        normed = self._rms(last, f"{names.norm}.weight")
        logits = self._linear(normed, names.head, self._packing.head)
        logits.output(0).get_tensor().set_names({"logits"})
        result = op.result(logits)
        return self._ov.Model([result], self._sinks, [ids, positions, beams], "decoder")

    def _attention(self, x: Any, prefix: str, layer: int, places: Places) -> Any:
        op, spec, names = self._op, self._spec, TRANSFORMERS
        heads, kv_heads, width = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        parts = [
            self._heads(self._linear(x, f"{prefix}.{name}", self._packing.matrices), count)
            for name, count in zip(names.query_key_value, (heads, kv_heads, kv_heads), strict=True)
        ]
        for i, norm in enumerate(("q_norm", "k_norm") if spec.qk_norm else ()):
            parts[i] = self._rms(parts[i], f"{prefix}.{names.norms[norm]}.weight")
        query, key, value = (op.transpose(part, self._integers(0, 2, 1, 3)) for part in parts)
        query, key = self._rotated(query, places), self._rotated(key, places)
        key = self._state(key, places.beams, f"past.{layer}.key")
        value = self._state(value, places.beams, f"past.{layer}.value")
        keys, values = (self._repeated(part, heads // kv_heads) for part in (key, value))
        y = op.scaled_dot_product_attention(query, keys, values, places.mask, causal=False)
        y = op.transpose(y, self._integers(0, 2, 1, 3))
        y = op.reshape(y, self._integers(0, 0, heads * width), special_zero=True)
        return self._linear(y, f"{prefix}.{names.linears['out']}", self._packing.matrices)

    def _mlp(self, x: Any, prefix: str) -> Any:
        op, bits = self._op, self._packing.matrices
        gate, up, down = (f"{prefix}.{TRANSFORMERS.linears[n]}" for n in ("gate", "up", "down"))
        gated = op.multiply(op.swish(self._linear(x, gate, bits)), self._linear(x, up, bits))
        return self._linear(gated, down, bits)

    def _heads(self, x: Any, count: int) -> Any:
        """`(batch, tokens, heads * width)` -> `(batch, tokens, heads, width)`."""
        shape = self._integers(0, 0, count, self._spec.head_dim)
        return self._op.reshape(x, shape, special_zero=True)

    def _repeated(self, x: Any, times: int) -> Any:
        """Keys or values `(batch, kv heads, keys, width)` for every query head."""
        if times == 1:
            return x
        op, spec = self._op, self._spec
        wide = op.unsqueeze(x, self._integers(2))
        target = op.concat(
            [
                op.gather(op.shape_of(x), self._integers(0, 1), self._integers(0)),
                self._integers(times),
                op.gather(op.shape_of(x), self._integers(2, 3), self._integers(0)),
            ],
            0,
        )
        wide = op.broadcast(wide, target, broadcast_spec="BIDIRECTIONAL")
        shape = self._integers(0, spec.num_attention_heads, -1, spec.head_dim)
        return op.reshape(wide, shape, special_zero=True)

    def _state(self, new: Any, beams: Any, name: str) -> Any:
        """Keys or values of the earlier passes with the new ones behind them."""
        op, spec = self._op, self._spec
        info = self._ov.op.util.VariableInfo()
        shape = [-1, spec.num_key_value_heads, -1, spec.head_dim]
        info.data_shape = self._ov.PartialShape(shape)
        info.data_type, info.variable_id = self._ov.Type.f32, name
        variable = self._ov.op.util.Variable(info)
        batch = op.gather(op.shape_of(beams), self._integers(0), self._integers(0))
        empty = [batch, *map(self._integers, (spec.num_key_value_heads, 0, spec.head_dim))]
        initial = op.broadcast(np.float32(0), op.concat(empty, 0))
        past = self._ov.op.read_value(initial, variable)
        whole = op.concat([op.gather(past, beams, self._integers(0)), new], 2)
        self._sinks.append(self._ov.op.assign(whole, variable))
        return whole

    def _mask(self, positions: Any) -> Any:
        """Zero where a key is not behind a row's position, else the lowest value: `(batch, 1,
        tokens, keys)`."""
        op = self._op
        count = op.add(op.reduce_max(positions, self._integers(0, 1)), np.int64(1))
        every = op.range(np.int64(0), count, np.int64(1), "i64")
        seen = op.less_equal(every, op.unsqueeze(positions, self._integers(-1)))
        mask = op.select(seen, np.float32(0), np.finfo(np.float32).min)
        return op.unsqueeze(mask, self._integers(1))

    def _angles(self, positions: Any) -> tuple[Any, Any]:
        """Cosines and sines `(batch, 1, tokens, width)`."""
        op, spec = self._op, self._spec
        width = spec.head_dim
        inverse = spec.rope_theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        if spec.rope_type == "linear":
            inverse /= spec.rope_factor
        places = op.convert(op.unsqueeze(positions, self._integers(1, -1)), "f32")
        angles = op.multiply(places, inverse.astype(np.float32))
        both = op.concat([angles, angles], -1)
        return op.cos(both), op.sin(both)

    def _rotated(self, x: Any, places: Places) -> Any:
        op, half = self._op, self._spec.head_dim // 2
        # Split so, it is recognised as a rotary embedding.
        first, second = op.variadic_split(x, self._scalar(3), [half, half]).outputs()
        turned = op.concat([op.multiply(second, np.float32(-1)), first], -1)
        return op.add(op.multiply(x, places.cos), op.multiply(turned, places.sin))

    def _rms(self, x: Any, name: str) -> Any:
        op = self._op
        mean = op.reduce_mean(op.power(x, np.float32(2)), self._integers(-1), keep_dims=True)
        root = op.sqrt(op.add(mean, np.float32(self._spec.rms_norm_eps)))
        normed = op.multiply(x, op.divide(np.float32(1), root))
        return op.multiply(normed, self._read(self._tensors[name], "float32"))

    def _linear(self, x: Any, name: str, bits: Bits) -> Any:
        y = self._op.matmul(x, self._matrix(f"{name}.weight", bits), False, True)
        bias = self._tensors.get(f"{name}.bias")
        return y if bias is None else self._op.add(y, self._read(bias, "float32"))

    def _matrix(self, name: str, bits: Bits) -> Any:
        """A weight `(out, in)` as the float32 values that its integers stand for."""
        op, tensor = self._op, self._tensors[name]
        if bits == 16:
            return op.convert(op.constant(self._read(tensor, "float16")), "f32")
        weight = self._read(tensor, "float32")
        columns = weight.shape[1]
        group = GROUP if bits == 4 and columns % GROUP == 0 else columns
        packed = Groups.rounded(weight, bits, group)
        values, zeros = (
            op.convert(self._integer_constant(part, bits), "f16")
            for part in (packed.values, packed.zeros)
        )
        scaled = op.multiply(op.subtract(values, zeros), op.constant(packed.scales))
        whole = op.reshape(scaled, self._integers(*weight.shape), special_zero=False)
        return op.convert(whole, "f32")

    def _integer_constant(self, values: NDArray[np.uint8], bits: Bits) -> Any:
        if bits == 8:
            return self._op.constant(values)
        flat = values.reshape(-1)
        pairs = np.ascontiguousarray(flat[::2] | flat[1::2] << 4)
        tensor = self._ov.Tensor(pairs, values.shape, self._ov.Type.u4)
        return self._ov.op.Constant(tensor, shared_memory=False)

    def _read(self, tensor: Tensor, dtype: str) -> NDArray[Any]:
        return read_tensor(self._source, tensor, dtype)

    def _integers(self, *values: int) -> Any:
        return self._op.constant(np.array(values, np.int64))

    def _scalar(self, value: int) -> Any:
        return self._op.constant(np.int64(value))
