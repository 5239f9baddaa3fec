"""Where a canonical tensor lies in a checkpoint: whole, joined of parts, or with its rows moved."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.errors import CheckpointError
from internvl_edge.bundle.quoting import named, quoted

Shape = tuple[int, ...]

#: Ends the names of rotary frequencies, which old versions of transformers stored.
_BUFFER = "rotary_emb.inv_freq"

#: Ends the names of what AWQ and GPTQ, bitsandbytes, FP8 and compressed-tensors store of a weight.
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|SCB|weight\.(absmax|quant_map|quant_state\..+)"
    r"|weight_(scale|scale_inv|packed|shape|zero_point)|input_scale)$"
)


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` of a stored tensor; a stop of None is its end."""

    name: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Origin:
    """Runs of stored rows, one after another, that make a canonical tensor.

    Attributes:
        order: the row, counted over all parts, that each canonical row is; None keeps their order.
            Shorter than the tensor, it holds within each run of so many rows.
    """

    parts: tuple[Rows, ...]
    order: NDArray[np.int64] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The stored tensors."""
        return tuple(part.name for part in self.parts)

    def under(self, prefix: str) -> Origin:
        """Return the same origin with a prefix put before the stored names."""
        return self.renamed(lambda name: f"{prefix}{name}")

    def renamed(self, rename: Callable[[str], str]) -> Origin:
        """Return the same origin with the stored names changed."""
        parts = tuple(replace(part, name=rename(part.name)) for part in self.parts)
        return replace(self, parts=parts)


Table = dict[str, Origin]
ReadRows = Callable[[Rows], Iterator[NDArray[np.generic]]]


def whole(name: str) -> Origin:
    """Return the origin of a tensor that is stored as it is."""
    return Origin((Rows(name),))


def reordered(name: str, order: NDArray[np.int64]) -> Origin:
    """Return the origin of a tensor whose rows are stored in another order."""
    return Origin((Rows(name),), order)


def joined(parts: Mapping[str, int]) -> Origin:
    """Return the origin of a tensor stored in parts: their names, in order, and rows of each."""
    return Origin(tuple(Rows(name, 0, rows) for name, rows in parts.items()))


def cut(name: str, start: int, stop: int) -> Origin:
    """Return the origin of a tensor that is a run of another's rows."""
    return Origin((Rows(name, start, stop),))


def stored_shapes(table: Mapping[str, Origin], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return every stored tensor and its shape.

    Args:
        table: origins by canonical name.
        shapes: of the canonical tensors.
    """
    found: dict[str, Shape] = {}
    for name, origin in table.items():
        rows, *rest = shapes[name]
        for part in origin.parts:
            stop = rows if part.stop is None else part.stop
            before = found.get(part.name, (0,))[0]
            found[part.name] = (max(before, stop), *rest)
    return found


def read_in_order(origin: Origin, read: ReadRows) -> Iterator[NDArray[np.generic]]:
    """Yield a canonical tensor as runs of its rows.

    A run whose rows are moved is held while it is read; any other tensor streams.
    """
    if origin.order is None:
        yield from read_as_stored(origin, read)
        return
    size, held = len(origin.order), 0
    blocks: list[NDArray[np.generic]] = []
    for block in read_as_stored(origin, read):
        blocks.append(block)
        held += len(block)
        if held < size:
            continue
        rows = np.concatenate(blocks)
        whole = held - held % size
        for start in range(0, whole, size):
            yield rows[start : start + size][origin.order]
        blocks, held = [rows[whole:]], held - whole


def read_as_stored(origin: Origin, read: ReadRows) -> Iterator[NDArray[np.generic]]:
    """Yield the same rows in the order they are stored in: nothing is held."""
    for part in origin.parts:
        yield from read(part)


def without_buffers(files: Mapping[str, Path]) -> dict[str, Path]:
    """Leave out what old transformers stored though it follows from config.json."""
    return {name: path for name, path in files.items() if not name.endswith(_BUFFER)}


def check_names(names: Iterable[str], expected: Mapping[str, Shape]) -> None:
    """Raise CheckpointError unless the names are exactly the expected ones."""
    found = set(names)
    lora = sorted(name for name in found if "lora_" in name or name.startswith("base_model."))
    if lora:
        raise CheckpointError(
            f"the checkpoint holds unmerged LoRA tensors ({named(lora[0])}); merge them into the"
            " model"
        )
    if packed := sorted(name for name in found - expected.keys() if _QUANTISED.search(name)):
        raise CheckpointError(
            f"the weights are already quantised: the checkpoint holds {named(packed[0])}; export"
            " the original checkpoint, the 16-bit one"
        )
    if missing := sorted(expected.keys() - found):
        raise CheckpointError(f"{len(missing)} tensors are missing: {_some(missing)}")
    if unmapped := sorted(found - expected.keys()):
        raise CheckpointError(
            f"{len(unmapped)} tensors are not part of the architecture in config.json:"
            f" {_some(unmapped)}"
        )


def check_shapes(shapes: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Raise CheckpointError unless every tensor has the shape config.json implies."""
    wrong = [
        f"{name} is {quoted(list(shapes[name]))}, config.json implies {list(shape)}"
        for name, shape in sorted(expected.items())
        if shapes[name] != shape
    ]
    if wrong:
        raise CheckpointError(f"{len(wrong)} tensors have the wrong shape: {wrong[0]}")


def _some(names: list[str]) -> str:
    return ", ".join(map(named, names[:5])) + (", ..." if len(names) > 5 else "")
