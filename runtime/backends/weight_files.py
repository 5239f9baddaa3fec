"""Where a graph that is given as bytes finds its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from internvl_edge.runtime.backends.graph_bytes import Model

_FOLDER = "session.model_external_initializers_file_folder_path"


def give_weights(model: bytes, graph: Path, options: Any) -> bytes:
    """Let a graph find its weights where it was read: beside it, or where a link leads.

    ONNX Runtime opens none that lie outside the folder it is told, and a cache of downloads has
    links alone in its folders.

    Args:
        model: a serialised `ModelProto`.
        graph: the file it comes from.
        options: `onnxruntime.SessionOptions`, which get the folder.

    Returns:
        The graph; changed, where its weights have another name than it says.
    """
    beside = graph.with_suffix(".data")
    weights = beside.resolve()
    linked = weights != beside.parent.resolve() / beside.name
    options.add_session_config_entry(_FOLDER, str(weights.parent if linked else beside.parent))
    if weights.name == beside.name:
        return model
    changed = Model.parse(model)
    changed.graph.move_weights(beside.name, weights.name)
    return changed.serialised()
