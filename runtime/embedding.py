"""The token embedding table: memory-mapped on the host, gathered row by row.

It never reaches the device: a decode step needs one row of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.runtime import contract
from internvl_edge.runtime.bundle import Bundle
from internvl_edge.runtime.errors import BundleError


class EmbeddingTable:
    """Rows by token id, in the dtype the language graph takes.

    Args:
        table: `(vocab, hidden)`: floats, or int8 values to be multiplied by `scales`.
        scales: float32 `(vocab, blocks)`, one per `hidden / blocks` values; None for floats.
        dtype: of the rows.
    """

    def __init__(
        self, table: NDArray[np.generic], scales: NDArray[np.float32] | None, dtype: str
    ) -> None:
        self._table = table
        self._scales = scales
        self._dtype = dtype

    @classmethod
    def load(cls, bundle: Bundle) -> EmbeddingTable:
        """Map the table of a bundle.

        Raises:
            BundleError: the file is not the array the manifest promises.
        """
        language, manifest = bundle.spec.language, bundle.manifest
        table = _map(bundle, contract.EMBEDDING_TABLE)
        expected = (language.vocab_size, language.hidden_size)
        stored = contract.CACHE_DTYPE[manifest.embedding]
        if table.shape != expected or table.dtype != stored:
            raise BundleError(
                f"{contract.EMBEDDING_TABLE} is {table.dtype} {table.shape}, expected {stored}"
                f" {expected}; export again"
            )
        scales = _map(bundle, contract.EMBEDDING_SCALES) if manifest.embedding == "int8" else None
        return cls(table, scales, contract.compute_dtype(manifest.language, manifest.dialect))

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.floating]:
        """A fresh array `(len(ids), hidden)`."""
        rows = self._table[ids].astype(self._dtype)
        if self._scales is not None:
            scales = self._scales[ids]
            blocked = rows.reshape(*scales.shape, -1)  # (ids, blocks, hidden / blocks)
            blocked *= scales[..., np.newaxis]
        return rows


def _map(bundle: Bundle, name: str) -> NDArray[Any]:
    try:
        return np.asarray(np.load(bundle.file(name), mmap_mode="r"))
    except Exception as error:  # NumPy at a damaged header raises whatever it stumbles over
        raise BundleError(f"cannot read {bundle.file(name)}: {error}") from error
