"""Values beyond what a part's precision holds: said, with the part and the remedy, never answered.

float16 ends at 65,504. What goes beyond it becomes infinite, then not a number, and all that is
computed from it, too: the answer would be the first token of the vocabulary, for ever.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.contract import compute_dtype
from internvl_edge.bundle.errors import PrecisionError
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.bundle.remedies import Remedy

Part = Literal["vision", "language"]


class FiniteCheck:
    """Checks what the two parts of a bundle compute.

    Args:
        manifest: of the bundle.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def rows(self, rows: NDArray[np.floating]) -> None:
        """Raise PrecisionError unless rows `(rows, hidden)` of an image are finite numbers."""
        with np.errstate(over="ignore", invalid="ignore"):
            total = float(np.add.reduce(rows, axis=None, dtype=np.float32))
        # One pass without a second array; only a sum that is not finite is looked into.
        if not math.isfinite(total) and not np.isfinite(rows).all():
            raise self._error("vision")

    def logit(self, largest: float) -> None:
        """Raise PrecisionError unless the largest logit is a finite number. (Of logits that hold
        one that is none, `numpy.argmax` and the kernel on the device both find it.)"""
        if not math.isfinite(largest):
            raise self._error("language")

    def _error(self, part: Part) -> PrecisionError:
        manifest = self._manifest
        precision = {"vision": manifest.vision, "language": manifest.language}[part]
        said = f"the {part} part of this bundle ({precision}) computed values that are not finite"
        if compute_dtype(precision, manifest.dialect) == "float16":
            return PrecisionError(
                f"{said}: float16 ends at 65,504",
                {
                    Remedy.FP32_VISION if part == "vision" else Remedy.FP32_LANGUAGE: "",
                    Remedy.CALIBRATION: "its range check finds the layers that need float32",
                },
            )
        if part == "language" and manifest.kv == "fp16":
            return PrecisionError(
                f"{said}: its attention is float16, which ends at 65,504",
                [Remedy.CACHE_AS_COMPUTED],
            )
        return PrecisionError(f"{said}; the checkpoint's weights are damaged: get it again")
