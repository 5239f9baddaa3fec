"""Quantised weights as TensorRT reads them: what `DequantizeLinear` takes, zero point 0."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.errors import OptionsError
from internvl_edge.bundle.remedies import Remedy
from internvl_edge.export.checkpoint.weights import Weight
from internvl_edge.export.formats.packing import Packed, Part, pack_blocks
from internvl_edge.export.formats.plan import LinearPlan
from internvl_edge.export.formats.quantize import BlockFormat, Floats, quantize_channels, unpack

#: Block lengths of INT4 weights in TensorRT's documentation ("Quantized Types", 10.0 to 11.4).
#: RTX 1.7 builds others too; engines for Jetson need not.
BLOCKS = (64, 128)


def check_form(weight: Weight, form: BlockFormat) -> None:
    """See that TensorRT takes a weight `(out, in)` in this format; 8 bits are stored by row.

    Raises:
        OptionsError: a stored zero point, or INT4 of another block length or with a part of one.
    """
    if not form.symmetric:
        raise OptionsError("TensorRT takes no stored zero points", [Remedy.SYMMETRIC])
    if form.bits == 8:
        return
    if form.block not in BLOCKS:
        raise OptionsError(
            f"TensorRT takes INT4 weights in blocks of {' or '.join(map(str, BLOCKS))}, not of"
            f" {form.block}",
            [Remedy.BLOCK_128],
        )
    if weight.shape[1] % form.block:
        raise OptionsError(
            f"{weight.label} has {weight.shape[1]} inputs, which is no multiple of the block"
            f" {form.block}, and TensorRT takes whole blocks only",
            [Remedy.OTHER_BLOCK, Remedy.INT8_LANGUAGE],
        )


def pack_columns(weight: Weight, plan: LinearPlan, scale_dtype: str) -> list[Weight]:
    """Values int4 `(in, out)` and scales `(in / block, out)`, blocks along axis 0.

    The same integers and scales as the onnxruntime dialect's, the scales rounded to their dtype.
    """
    rows, columns = weight.shape
    values, scales = pack_blocks(replace(weight, dtype="float32"), plan)
    count = scales.shape[1]

    def turned_values() -> Iterator[NDArray[np.generic]]:
        (packed,) = values.blocks()  # (rows, blocks, block / 2)
        yield from _turned(np.asarray(packed, np.uint8))

    def turned_scales() -> Iterator[NDArray[np.generic]]:
        (stored,) = scales.blocks()  # (rows, blocks)
        # The parser refuses a scale of zero, which a block of next to nothing would round to.
        yield np.maximum(stored.T, np.finfo(scale_dtype).smallest_subnormal)

    return [
        Weight(values.name, "int4", (columns, rows), turned_values),
        Weight(scales.name, scale_dtype, (count, rows), turned_scales),
    ]


def pad_to_even(weight: Weight) -> Weight:
    """The weight `(out, in)`, with a row of zeros where `out` is odd.

    RTX 1.7 multiplies by int8 as it is stored only where the result's width is even: for the
    92,553 rows of InternLM2's head it would write 1.1 GB of float16 on every pass.
    """
    rows, columns = weight.shape
    if rows % 2 == 0:
        return weight

    def blocks() -> Iterator[NDArray[np.generic]]:
        yield from weight.blocks()
        yield np.zeros((1, columns), np.float32)

    return replace(weight, shape=(rows + 1, columns), blocks=blocks)


def pack_rows(weight: Weight, scale_dtype: str) -> list[Weight]:
    """int8 values `(out, in)` and one scale per row `(out,)`."""
    parts = [
        Part("", "int8", weight.shape),
        Part(".scales", scale_dtype, (weight.shape[0],)),
    ]

    def quantize(block: Floats) -> tuple[NDArray[np.generic], ...]:
        return quantize_channels(block, scale_dtype)

    return Packed(replace(weight, dtype="float32"), parts, quantize).weights()


def _turned(packed: NDArray[np.uint8]) -> Iterator[NDArray[np.generic]]:
    """Transposed, one row of blocks at a time: bytes of two neighbours in a row."""
    for block in range(packed.shape[1]):
        unsigned = unpack(packed[:, block], 4).T  # (block, rows)
        # Moving the zero point from 8 to 0 flips the sign bit of the nibble. A block has an even
        # number of rows, so pairs may span the end of one but never the end of a block.
        nibbles = (unsigned ^ 8).reshape(-1)
        yield nibbles[0::2] | (nibbles[1::2] << 4)
