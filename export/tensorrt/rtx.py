"""Building one graph with TensorRT for RTX, which needs no GPU, and what that tells.

TensorRT for RTX parses ONNX and builds plans on a machine without a GPU; its plans load in itself
only, so the plan is not kept.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from internvl_edge.bundle.errors import EngineBuildError, MissingExtraError
from internvl_edge.bundle.quoting import named
from internvl_edge.export.output.marker import scratch_folder
from internvl_edge.export.tensorrt.builder import Built, Request, ShapeRange, build_in_process

LIBRARY = "tensorrt_rtx"
#: Compute capabilities TensorRT for RTX 1.7 can build for without a GPU, of those in use.
CAPABILITIES = (80, 86, 89, 120)


@dataclass(frozen=True)
class Trial:
    """A build whose plan was not kept; `plan_bytes` is its size."""

    built: Built
    plan_bytes: int


def require_builder() -> str:
    """Return the version of the installed builder.

    Raises:
        DeviceError: it is not installed.
    """
    if importlib.util.find_spec(LIBRARY) is None:
        raise MissingExtraError(
            "checking a TensorRT graph needs TensorRT for RTX (no GPU), for Linux on x86-64 or"
            " Windows",
            extra="tensorrt",
        )
    return importlib.metadata.version(LIBRARY)


def build(model: bytes, path: Path, profile: Mapping[str, ShapeRange], capability: int) -> Trial:
    """Parse and build a graph.

    Args:
        model: the serialised ONNX graph, weights outside.
        path: where the graph lies; its weights are found beside it.
        profile: a range for each input that has a symbolic dimension.
        capability: one of `CAPABILITIES`.

    Raises:
        DeviceError: the builder is not installed.
        EngineBuildError: it does not take the graph, or died, or lists no layers that can be read.
    """
    require_builder()
    with scratch_folder() as folder:
        plan = folder / "plan"
        request = Request(LIBRARY, str(path), profile, capability, None, (), None, str(plan))
        built = build_in_process(request, model, lambda phase, done, steps: None)
        if not built.layers:
            raise EngineBuildError(
                f"{named(path)} builds, but the layers TensorRT for RTX lists cannot be read; use"
                " the version internvl-edge was tested with (constraints.txt)"
            )
        return Trial(built, plan.stat().st_size)
