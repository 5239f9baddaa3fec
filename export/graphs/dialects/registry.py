"""The dialects by the name a bundle records."""

from __future__ import annotations

from internvl_edge.bundle.contract import DialectName
from internvl_edge.export.formats.plan import QuantPlan
from internvl_edge.export.graphs.dialects import Dialect
from internvl_edge.export.graphs.dialects.onnxruntime import OnnxRuntimeDialect
from internvl_edge.export.graphs.dialects.tensorrt_modern import ModernDialect
from internvl_edge.export.graphs.dialects.tensorrt_portable import PortableDialect
from internvl_edge.export.graphs.graph import GraphBuilder


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
