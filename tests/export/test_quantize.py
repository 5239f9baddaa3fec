"""Packed formats against their own definition and against ONNX Runtime's operators."""

from __future__ import annotations

import itertools
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from sessions import cpu_session

from internvl_edge.export.checkpoint.weights import Weight
from internvl_edge.export.formats.packing import Channels, pack_blocks, pack_channels, pack_table
from internvl_edge.export.formats.plan import LinearPlan
from internvl_edge.export.formats.quantize import (
    BlockFormat,
    Blocks,
    block_bytes,
    dequantize_blocks,
    quantize_blocks,
    quantize_channels,
    unpack,
)
from internvl_edge.runtime import CheckpointError

forms = st.builds(
    BlockFormat,
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([16, 32, 64, 128]),
    symmetric=st.booleans(),
)


def _matrix(rows: int, columns: int, seed: int) -> NDArray[np.float32]:
    """Random rows, with an all-zero one, a constant one and an outlier among them."""
    weight = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    if rows > 2:
        weight[0], weight[1] = 0, 0.37
        weight[2, columns // 2] = 60
    return weight


@settings(max_examples=80, deadline=None)
@given(
    form=forms,
    rows=st.integers(1, 9),
    columns=st.integers(1, 300),
    seed=st.integers(0, 1000),
    clip=st.booleans(),
)
def test_blocks_come_back_within_half_a_step(
    form: BlockFormat, rows: int, columns: int, seed: int, clip: bool
) -> None:
    weight = _matrix(rows, columns, seed)
    blocks = quantize_blocks(weight, form, **({} if clip else {"ratios": (1.0,)}))
    count = -(-columns // form.block)
    assert blocks.packed.shape == (rows, count, form.block * form.bits // 8)
    assert blocks.scales.shape == (rows, count)
    stored = blocks.packed.nbytes + blocks.scales.nbytes
    stored += 0 if blocks.zero_points is None else blocks.zero_points.nbytes
    assert stored == block_bytes(rows, columns, form)
    back = dequantize_blocks(blocks, form, columns)
    assert back.shape == weight.shape
    step = np.repeat(blocks.scales, form.block, axis=1)[:, :columns]
    if not clip:
        # Asymmetric zero points are rounded as well: another half step at the ends of the range.
        limit = (0.5 if form.symmetric else 1.0) * step
        assert (np.abs(back - weight) <= limit * 1.001 + 1e-7).all()
    if rows > 2:
        assert (back[0] == 0).all()


@settings(max_examples=40, deadline=None)
@given(form=forms, columns=st.integers(16, 200), seed=st.integers(0, 1000))
def test_clipping_never_adds_error(form: BlockFormat, columns: int, seed: int) -> None:
    weight = _matrix(6, columns, seed)
    importance = np.random.default_rng(seed).random(columns).astype(np.float32) + 0.1

    def error(ratios: tuple[float, ...]) -> float:
        blocks = quantize_blocks(weight, form, importance=importance, ratios=ratios)
        back = dequantize_blocks(blocks, form, columns)
        return float(((back - weight) ** 2 * importance).sum())

    assert error((1.0, 0.9, 0.8, 0.7)) <= error((1.0,)) * (1 + 1e-5)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 100), seed=st.integers(0, 1000))
def test_channels_come_back_within_half_a_step(rows: int, columns: int, seed: int) -> None:
    weight = _matrix(rows, columns, seed)
    values, scales = quantize_channels(weight)
    assert np.abs(values.astype(int)).max(initial=0) <= 127
    back = values * scales[:, np.newaxis]
    assert (np.abs(back - weight) <= 0.5001 * scales[:, np.newaxis] + 1e-7).all()


@pytest.mark.parametrize(
    "form", [BlockFormat(4, 32), BlockFormat(8, 32), BlockFormat(4, 32, False)]
)
@pytest.mark.parametrize("columns", [64, 96])
def test_matmulnbits_reads_the_layout(form: BlockFormat, columns: int) -> None:
    """At accuracy level 0 the operator computes with the dequantised weight itself."""
    weight = _matrix(48, columns, 5)
    x = np.random.default_rng(1).standard_normal((7, columns)).astype(np.float32)
    parts = _arrays(pack_blocks(_weight(weight), LinearPlan("blocks", form=form)))
    attributes = {"K": columns, "N": 48, "bits": form.bits, "block_size": form.block}
    got = _run("MatMulNBits", x, parts, attributes)
    blocks = quantize_blocks(weight, form)
    expected = x @ dequantize_blocks(blocks, form, columns).T
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-3)  # sums of 96 terms up to 60


def test_a_packed_matrix_is_held_once() -> None:
    """Beside it are what the threads work on and a block of the float matrix, not its pieces."""
    rows, columns = 1 << 14, 1 << 12
    block = _matrix(256, columns, 0)
    weight = Weight("w", "float32", (rows, columns), lambda: itertools.repeat(block, rows // 256))
    (values, *_) = pack_blocks(weight, LinearPlan("blocks", form=BlockFormat(8, 32), ratios=(1.0,)))
    tracemalloc.start()
    (packed,) = values.blocks()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert packed.nbytes == rows * columns
    assert peak < 1.7 * packed.nbytes


def test_qgemm_reads_the_layout() -> None:
    """Integer product, per-row scales and int32 bias, exactly as defined."""
    weight, x = _matrix(20, 40, 2), np.random.default_rng(1).standard_normal((5, 40))
    bias = np.linspace(-1, 1, 20).astype(np.float32)
    plan = LinearPlan("int8", input_scale=float(np.abs(x).max() / 127))
    values, scales, int_bias = _channel_arrays(
        pack_channels(_weight(weight), _weight(bias), plan)[0]
    )
    quantized = np.clip(np.rint(x / np.float32(plan.input_scale)) + 128, 0, 255).astype(np.uint8)
    scale = np.array(plan.input_scale, np.float32)
    inputs = [scale, np.array(128, np.uint8), values, scales, np.zeros(20, np.int8), int_bias]
    got = _run("QGemm", quantized, inputs, {"transB": 1})
    product = (quantized.astype(np.int64) - 128) @ values.T.astype(np.int64) + int_bias
    expected = product * (scales.astype(np.float64) * plan.input_scale)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    step = scales * plan.input_scale
    assert (np.abs(int_bias * step - bias) <= 0.5001 * step).all()


@given(parts=st.integers(1, 20), seed=st.integers(0, 99))
def test_gain_and_parts_change_nothing_but_the_scales(parts: int, seed: int) -> None:
    """Any sign of gain, and zero; the parts together are the whole."""
    weight, random = _matrix(20, 16, seed), np.random.default_rng(seed)
    bias, gain = random.standard_normal((2, 20)).astype(np.float32)
    gain[3] = 0
    plan = LinearPlan("int8", input_scale=0.05)
    (plain,) = pack_channels(_weight(weight), _weight(bias), plan)
    packed = pack_channels(_weight(weight), _weight(bias), plan, _weight(gain), parts)
    values, scales, int_bias = _channel_arrays(plain)
    runs = [_channel_arrays(channels) for channels in packed]
    got = [np.concatenate(part) for part in zip(*runs, strict=True)]
    np.testing.assert_array_equal(got[0], values)
    np.testing.assert_array_equal(got[1], scales * gain)
    np.testing.assert_array_equal(got[2], int_bias)


def test_qgemm_takes_scales_of_any_sign() -> None:
    weight, x = _matrix(20, 40, 2), np.random.default_rng(1).integers(0, 256, (5, 40), np.uint8)
    gain, bias = np.linspace(-2, 2, 20, dtype=np.float32), np.ones(20, np.float32)
    gain[7] = 0
    (packed,) = pack_channels(
        _weight(weight), _weight(bias), LinearPlan("int8", input_scale=0.1), _weight(gain)
    )
    values, scales, int_bias = _channel_arrays(packed)
    scale, zero = np.array(0.1, np.float32), np.array(128, np.uint8)
    inputs = [scale, zero, values, scales, np.zeros(20, np.int8), int_bias]
    got = _run("QGemm", x, inputs, {"transB": 1})
    expected = ((x.astype(np.float32) - 128) * 0.1 @ weight.T + bias) * gain
    step = np.abs(weight).max(axis=1) / 127 * np.abs(gain)
    # Half a step of the weight for each of 40 inputs up to 12.8, and half a step of the bias.
    assert (np.abs(got - expected) <= (20 * 12.8 + 0.1) * step + 1e-6).all()
    assert not got[:, 7].any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_agree_with_onnxruntimes_quantiser(symmetric: bool) -> None:
    """Scales, values and the error of the layer's output, on the same weight and inputs."""
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits

    rows, columns, block = 64, 256, 32
    weight = np.random.default_rng(4).standard_normal((rows, columns)).astype(np.float32)
    count = columns // block
    packed = np.zeros((rows, count, block // 2), np.uint8)
    scales = np.zeros(rows * count, np.float32)
    zeros = np.zeros((rows, (count + 1) // 2), np.uint8)
    source = np.ascontiguousarray(weight.T)
    quantize_matmul_4bits(packed, source, scales, zeros, block, rows, columns, symmetric)
    theirs = Blocks(packed, scales.reshape(rows, count), None if symmetric else zeros)
    form = BlockFormat(4, block, symmetric)
    ours = quantize_blocks(weight, form, ratios=(1.0,))
    clipped = quantize_blocks(weight, form)
    if symmetric:
        # Theirs puts the largest value at -8 (scales may be negative, which TensorRT does not
        # take), ours at +-7: steps 8/7 as wide. Clipping makes up for it.
        np.testing.assert_allclose(ours.scales, np.abs(theirs.scales) * (8 / 7), rtol=1e-6)
    else:
        np.testing.assert_allclose(ours.scales, theirs.scales, rtol=1e-6)
        np.testing.assert_array_equal(ours.zero_points, theirs.zero_points)
        # At a tie of two values either may be taken.
        steps = unpack(ours.packed, 4).astype(int) - unpack(theirs.packed, 4)
        assert np.abs(steps).max() <= 1
        assert np.count_nonzero(steps) <= 0.001 * steps.size
    x = np.random.default_rng(5).standard_normal((500, columns)).astype(np.float32)
    backs = [dequantize_blocks(blocks, form, columns) for blocks in (theirs, ours, clipped)]
    for error in (
        [float(((back - weight) ** 2).mean()) for back in backs],
        [float(((x @ (back - weight).T) ** 2).mean()) for back in backs],
    ):
        assert error[1] <= ((8 / 7) ** 2 if symmetric else 1.01) * error[0]
        assert error[2] < 1.05 * error[0]


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 12), columns=st.integers(1, 90), seed=st.integers(0, 999))
def test_channels_agree_with_onnxruntimes_quantiser(rows: int, columns: int, seed: int) -> None:
    from onnxruntime.quantization.quant_utils import quantize_data

    weight = _matrix(rows, columns, seed)
    values, scales = quantize_channels(weight)
    for row, ours, scale in zip(weight, values, scales, strict=True):
        zero, their_scale, theirs = quantize_data(row, TensorProto.INT8, symmetric=True)
        assert zero == 0
        assert scale == pytest.approx(float(their_scale), rel=1e-6)
        assert np.abs(ours.astype(int) - theirs).max() <= 1  # either side of a tie
        theirs_back, ours_back = theirs * their_scale, ours * scale
        assert np.abs(ours_back - row).max() <= np.abs(theirs_back - row).max() + 1e-5 * scale


def test_table_comes_back() -> None:
    table = _matrix(11, 256, 3)
    values, scales = _arrays(pack_table(_weight(table)))
    assert (values.shape, scales.shape) == ((11, 256), (11, 2))
    back = values.reshape(11, 2, 128) * scales[..., np.newaxis]
    limit = 0.5001 * scales[..., np.newaxis] + 1e-7
    assert (np.abs(back - table.reshape(11, 2, 128)) <= limit).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_weights_are_named(value: float) -> None:
    weight = _matrix(4, 32, 0)
    weight[3, 3] = value
    parts = pack_blocks(_weight(weight), LinearPlan("blocks", form=BlockFormat(4, 32)))
    with pytest.raises(CheckpointError, match=r"some\.weight holds NaN or infinite"):
        _arrays(parts)


@pytest.mark.parametrize(("bits", "block"), [(5, 32), (4, 48)])
def test_unsupported_formats_are_refused(bits: int, block: int) -> None:
    with pytest.raises(ValueError, match="supported"):
        BlockFormat(bits, block)


def _weight(array: NDArray[np.float32]) -> Weight:
    return Weight.held("some.weight", array)


def _arrays(parts: list[Weight]) -> list[NDArray[Any]]:
    arrays = [np.concatenate(list(part.cast_blocks())) for part in parts]
    for part, array in zip(parts, arrays, strict=True):
        assert (array.shape, str(array.dtype)) == (part.shape, part.dtype)
    return arrays


def _channel_arrays(channels: Channels) -> list[NDArray[Any]]:
    return _arrays([channels.values, channels.scales, channels.bias])


def _run(
    op: str, x: NDArray[Any], inputs: list[NDArray[Any]], attributes: dict[str, int]
) -> NDArray[np.float32]:
    """One com.microsoft operator on `x`, the other inputs as initializers."""
    names = [f"i{index}" for index in range(len(inputs))]
    node = helper.make_node(op, ["x", *names], ["y"], domain="com.microsoft", **attributes)
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", kind, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for array, name in zip(inputs, names, strict=True)],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = cpu_session(model.SerializeToString())
    return np.asarray(session.run(None, {"x": x})[0])
