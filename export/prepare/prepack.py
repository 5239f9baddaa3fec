"""Storing weights as ONNX Runtime's CPU kernels want them, so that they are mapped, not copied.

ONNX Runtime repacks the weights of a matrix product when a session is created, into as much
anonymous memory as there are weights. It can save the packed form beside the originals in the
graph's data file (`session.save_external_prepacked_constant_initializers`) and map it from there.
Opening such a file packs each weight once more, one at a time, to find or to compare the stored
form: what is saved is memory, not time. Kernels compute with the packed form either way, so results
are the same bit for bit.

The result fits one version of ONNX Runtime on one kind of CPU: see `runtime.backends.prepared`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from internvl_edge.bundle.disk import check_room
from internvl_edge.bundle.errors import PrepareError
from internvl_edge.bundle.quoting import named, reason
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.products import Form
from internvl_edge.runtime.backends.sessions import Provider, session_options

if TYPE_CHECKING:
    import onnxruntime as ort

#: Smaller weights stay in the graph. ONNX Runtime puts larger ones at the beginning of a page; the
#: packed form of others may lie between the bounds that kernels look for, and they compute NaN.
LEAST_BYTES = 1 << 20
#: Packed weights are larger: column sums and scales lie between them (12 % at block 128).
GROWTH = 1.15


def prepack_graph(source: Path, target: Path, form: Form) -> ort.InferenceSession:
    """Open a graph on the CPU and save it as it was optimised and packed.

    Args:
        source: an ONNX file with external data in `<stem>.data` beside it.
        target: the ONNX file to write; its weights go beside it, as `<stem>.data`.
        form: of the integer products.

    Returns:
        The session that was saved, which holds its packed weights in memory of its own.

    Raises:
        PrepareError: ONNX Runtime does not save it.
        OSError: the disk is full.
    """
    options = session_options(Provider(form=form), None)
    options.log_severity_level = 4  # it warns that the file is for this machine
    options.optimized_model_filepath = str(target)
    data = target.with_suffix(".data")
    for key, value in (
        ("session.optimized_model_external_initializers_file_name", data.name),
        ("session.optimized_model_external_initializers_min_size_in_bytes", str(LEAST_BYTES)),
        ("session.save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(key, value)
    try:
        session = load_onnxruntime().InferenceSession(
            str(source), options, providers=["CPUExecutionProvider"], enable_fallback=False
        )
    except Exception as error:  # ONNX Runtime's have no common class, and no code for a disk
        check_room(data, packed_bytes(source.with_suffix(".data").stat().st_size))
        raise PrepareError(
            f"ONNX Runtime does not save {named(source)} packed: {reason(error)}"
        ) from error
    data.touch()  # of a model without large weights there is none
    return session


def packed_bytes(nbytes: int) -> int:
    """Return how much disk so many bytes of weights take at most, packed and as they were."""
    return int(nbytes * (1 + GROWTH))
