"""The dialects by the name a bundle records."""

from __future__ import annotations

from internvl_edge.export.dialects import Dialect
from internvl_edge.export.dialects.onnxruntime import OnnxRuntimeDialect
from internvl_edge.export.dialects.tensorrt_modern import ModernDialect
from internvl_edge.export.dialects.tensorrt_portable import PortableDialect
from internvl_edge.export.graph import GraphBuilder
from internvl_edge.export.plan import QuantPlan
from internvl_edge.runtime.contract import DialectName


def new_dialect(name: DialectName, graph: str, plan: QuantPlan, dtype: str) -> Dialect:
    """A dialect that writes a new graph.

    Args:
        graph: its name: "vision" or "language".
        dtype: it computes in; see `contract.compute_dtype`.
    """
    builder = GraphBuilder(graph)
    if name == "tensorrt":
        return ModernDialect(builder, plan, dtype)
    if name == "tensorrt-portable":
        return PortableDialect(builder, plan, dtype)
    return OnnxRuntimeDialect(builder, plan)
