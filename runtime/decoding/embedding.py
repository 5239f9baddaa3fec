"""The token embedding table: memory-mapped on the host, gathered row by row.

It never reaches the device: a decode step needs one row of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle import contract
from internvl_edge.bundle.errors import BundleError
from internvl_edge.bundle.manifest import Bundle
from internvl_edge.bundle.quoting import named, quoted, reason
from internvl_edge.bundle.verified import HeldFiles


class EmbeddingTable:
    """Rows by token id, in the dtype the language graph takes.

    Args:
        table: `(vocab, hidden)`: floats, or int8 values to be multiplied by `scales`.
        scales: float32 `(vocab, blocks)`, one per `hidden / blocks` values; None for floats.
        dtype: of the rows.
        held: the files that are mapped.
    """

    def __init__(
        self,
        table: NDArray[np.generic],
        scales: NDArray[np.float32] | None,
        dtype: str,
        held: HeldFiles | None = None,
    ) -> None:
        self._table = table
        self._scales = scales
        self._dtype = dtype
        self._held = held

    @classmethod
    def load(cls, bundle: Bundle) -> EmbeddingTable:
        """Map the table of a bundle.

        Raises:
            BundleError: a file is not the array the manifest promises, or not the one verified.
        """
        language, manifest = bundle.spec.language, bundle.manifest
        rows, columns = language.vocab_size, language.hidden_size
        promised = {contract.EMBEDDING_TABLE: (contract.CACHE_DTYPE[manifest.embedding], columns)}
        if manifest.embedding == "int8":
            promised[contract.EMBEDDING_SCALES] = ("float32", contract.embedding_runs(columns))
        with bundle.verified.unchanged():
            held = bundle.verified.hold(promised)
            arrays = [
                _map(bundle.file(name), dtype, (rows, width))
                for name, (dtype, width) in promised.items()
            ]
        computed = contract.compute_dtype(manifest.language, manifest.dialect)
        return cls(arrays[0], arrays[1] if len(arrays) > 1 else None, computed, held)

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.floating]:
        """A fresh array `(len(ids), hidden)`.

        Raises:
            BundleError: a mapped file was written to since it was verified.
        """
        if self._held is not None:
            self._held.check()
        rows = self._table[ids].astype(self._dtype)
        if self._scales is not None:
            scales = self._scales[ids]
            blocked = rows.reshape(*scales.shape, -1)  # (ids, blocks, hidden / blocks)
            blocked *= scales[..., np.newaxis]
        return rows


def _map(path: Path, dtype: str, shape: tuple[int, int]) -> NDArray[Any]:
    """Map a whole .npy file that holds rows one after the other."""
    try:
        array = np.load(path, mmap_mode="r")
        whole = array.offset + array.nbytes == path.stat().st_size
    except Exception as error:  # NumPy at a damaged header raises whatever it stumbles over
        raise BundleError(f"cannot read {named(path)}: {reason(error)}") from error
    if array.shape != shape or array.dtype != dtype or not (array.flags.c_contiguous and whole):
        raise BundleError(
            f"{named(path)} is {array.dtype} {quoted(array.shape)}, expected {dtype} {shape}, row"
            " by row and nothing else; export again"
        )
    return np.asarray(array)
