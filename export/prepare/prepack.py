"""Storing weights as ONNX Runtime's CPU kernels want them, so that loading maps and copies nothing.

ONNX Runtime repacks the weights of a matrix product when a session is created: at true scale that
takes 17 s and as much anonymous memory as there are weights. It can save the packed form in the
graph's data file (`session.save_external_prepacked_constant_initializers`) and map it from there,
but keeps the original beside it, because it packs again at load and finds the stored form by a
hash of the result. Here nothing is kept beside it: the initializer is declared to be some bytes of
the file, and the hash stored is that of packing those. The bytes of all matrices overlap, so that a
load reads only as much of the file as the largest matrix has. Kernels compute with the packed form
either way, so results are the same bit for bit.

From 1.32 on ONNX Runtime compares the stored form with what it packs and refuses another. There
the original is kept, as it saves it itself: weights are mapped all the same, from twice the bytes.

The result fits one version of ONNX Runtime on one kind of CPU: see `runtime.prepared`.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from internvl_edge.bundle.disk import check_room
from internvl_edge.bundle.errors import PrepareError
from internvl_edge.bundle.quoting import reason
from internvl_edge.export.graphs.graph import ALIGNMENT
from internvl_edge.export.graphs.node_model import PACKED_OPERATORS, node_model
from internvl_edge.export.output.marker import scratch_folder
from internvl_edge.export.prepare.cut import cut_graph
from internvl_edge.export.prepare.split import split_outputs
from internvl_edge.export.prepare.unsigned import SHIFT, make_unsigned
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.prepared import WIDEST_BYTES

#: Smaller weights are left as they are.
LEAST_BYTES = 1 << 16
#: The external data entry that names a packed form: "key|offset;length;flags".
PREPACKED = "prepacked_0"


Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Packing:
    """The packed form of a weight.

    Attributes:
        key: how ONNX Runtime finds it: operator and hash of what packing the weight gives.
        data: the bytes.
        flags: as ONNX Runtime wrote them.
    """

    key: str
    data: Bytes
    flags: str


def prepack_graph(
    source: Path,
    targets: Sequence[Path],
    advance: Callable[[int], None],
    *,
    unsigned: bool = False,
) -> None:
    """Write a graph whose matrices are stored packed.

    Args:
        source: an ONNX file with external data.
        targets: files to write, one for each part the graph is cut into; the weights of each go
            beside it, as `<stem>.data`.
        advance: called with the bytes of each weight done.
        unsigned: store the weights of W8A8 products as unsigned bytes.

    Raises:
        PrepareError: ONNX Runtime packs in a way that cannot be stored like this.
    """
    model = onnx.load(str(source), load_external_data=False)
    flipped = make_unsigned(model) if unsigned else set()
    split_outputs(model, WIDEST_BYTES)
    for target, part in zip(targets, cut_graph(model, len(targets)), strict=True):
        _prepack_part(part, flipped, source.parent, target, advance)


def _prepack_part(
    model: onnx.ModelProto,
    flipped: set[str],
    folder: Path,
    target: Path,
    advance: Callable[[int], None],
) -> None:
    """Write one file; `folder` is where the model's weights lie, the `flipped` ones signed."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = {
        node.input[PACKED_OPERATORS[node.op_type][0]]: node
        for node in model.graph.node
        if node.op_type in PACKED_OPERATORS
    }
    with (
        target.with_suffix(".data").open("wb") as out,
        tempfile.TemporaryDirectory(dir=target.parent) as scratch,
    ):
        data = _Data(out)
        for tensor in model.graph.initializer:
            if tensor.data_location != TensorProto.EXTERNAL:
                continue
            original = read_external(tensor, folder)
            if tensor.name in flipped:
                original = original ^ np.uint8(SHIFT)
            probe = packing = None
            if tensor.name in readers and original.nbytes >= LEAST_BYTES:
                probe = _Probe(readers[tensor.name], tensors, folder, Path(scratch))
                packing = probe.packing(tensor.name, original)
            if probe is None or packing is None:
                data.append_plain(tensor, original)
            else:
                data.append_packed(tensor, original, packing, probe)
            advance(original.nbytes)
    onnx.save(model, str(target))


@functools.cache
def compares_packed() -> bool:
    """Try whether ONNX Runtime compares a stored form with what packing its weight gives.

    A small weight is stored with the form of another and opened. Where ONNX Runtime stores no form
    of it, it is taken to compare: what it would save itself is always right.
    """
    ort = load_onnxruntime()
    other, weight = (np.full(1 << 14, value, np.float32).view(np.uint8) for value in (2, 1))
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
    tensor = TensorProto(name="w", dims=(128, 128), data_type=TensorProto.FLOAT)
    tensor.data_location = TensorProto.EXTERNAL
    with scratch_folder() as folder:
        probe = _Probe(node, {"w": tensor}, folder, folder)
        foreign, own = (probe.packing("w", values) for values in (other, weight))
        if own is None or foreign is None:
            return True
        try:
            probe.open_with(replace(foreign, key=own.key), after=weight.nbytes)
        except ort.capi.onnxruntime_pybind11_state.Fail:
            return True
    return False


class _Data:
    """The weights' file as it grows."""

    def __init__(self, out: BinaryIO) -> None:
        self._out, self._path = out, Path(out.name)
        self._packed = 0
        self._digests: dict[str, bytes] = {}  # by key, of the stored form

    def append_plain(self, tensor: TensorProto, original: Bytes) -> None:
        """Append a weight as it is and point its initializer there."""
        _point(tensor, self._path.name, self._append(original), original.nbytes)

    def append_packed(
        self, tensor: TensorProto, original: Bytes, packing: Packing, probe: _Probe
    ) -> None:
        """Append a packed weight and point its initializer to bytes whose packing leads to it."""
        if compares_packed():
            start = self._append(original)
            offset = self._append(packing.data)
        else:
            offset = self._append(packing.data)
            start, key = self._leading_to(offset, tensor.name, original.nbytes, packing, probe)
            packing = replace(packing, key=key)
        _point(tensor, self._path.name, start, original.nbytes)
        _store(tensor, packing, offset)

    def _leading_to(
        self, offset: int, name: str, nbytes: int, packing: Packing, probe: _Probe
    ) -> tuple[int, str]:
        """Find bytes of the file whose packing no other form is found by; returns their offset and
        its key."""
        digest = hashlib.sha256(packing.data.data).digest()
        for start in self._windows(offset, nbytes):
            window = np.fromfile(self._path, np.uint8, nbytes, offset=start)
            again = probe.packing(name, window)
            if again is None:
                raise PrepareError(f"{name}: ONNX Runtime packs it only for some values")
            if self._digests.setdefault(again.key, digest) == digest:
                self._packed += 1
                return start, again.key
        raise PrepareError(f"{name}: its packed form cannot be told from another's")

    def _append(self, data: Bytes) -> int:
        self._out.write(bytes(-self._out.tell() % ALIGNMENT))
        offset = self._out.tell()
        self._out.write(data.data)
        self._out.flush()
        return offset

    def _windows(self, offset: int, nbytes: int) -> Iterator[int]:
        """Where `nbytes` may be declared to lie: near the file's beginning, each at another place,
        or, while that is too short, where the packed form begins."""
        yield from range(self._packed * ALIGNMENT, self._out.tell() - nbytes, ALIGNMENT)
        self._out.write(bytes(max(0, offset + nbytes - self._out.tell())))
        self._out.flush()
        yield offset


class _Probe:
    """One node by itself, through which ONNX Runtime shows how it packs a weight."""

    def __init__(
        self, node: onnx.NodeProto, tensors: dict[str, TensorProto], folder: Path, scratch: Path
    ) -> None:
        self._node = node
        self._tensors = [tensors[name] for name in node.input if name in tensors]
        self._folder = folder
        self._scratch = scratch

    def packing(self, name: str, values: Bytes) -> Packing | None:
        """What ONNX Runtime stores for weight `name` when it holds `values`; None: nothing."""
        ort = load_onnxruntime()

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(self._scratch / "packed.onnx")
        for key, value in (
            ("session.optimized_model_external_initializers_file_name", "packed.data"),
            ("session.optimized_model_external_initializers_min_size_in_bytes", str(LEAST_BYTES)),
            ("session.save_external_prepacked_constant_initializers", "1"),
        ):
            options.add_session_config_entry(key, value)
        path = self._write(name, values)
        try:
            ort.InferenceSession(
                path, options, providers=["CPUExecutionProvider"], enable_fallback=False
            )
        except Exception as error:  # ONNX Runtime's have no common class, and no code for a disk
            check_room(self._scratch / "packed.data", 2 * values.nbytes)
            raise PrepareError(f"{name}: ONNX Runtime does not pack it: {reason(error)}") from error
        saved = onnx.load(str(self._scratch / "packed.onnx"), load_external_data=False)
        stored = [
            entry.value
            for tensor in saved.graph.initializer
            if tensor.name == name  # not there: float16, which becomes another tensor in float32
            for entry in tensor.external_data
            if entry.key.startswith("prepacked_")
        ]
        if not stored:
            return None
        key, *forms = stored[0].split("|")
        if len(stored) > 1 or len(forms) > 1:
            raise PrepareError(f"{name}: ONNX Runtime packs it into several parts")
        offset, length, flags = forms[0].split(";")
        data = np.fromfile(self._scratch / "packed.data", np.uint8, int(length), offset=int(offset))
        return Packing(key, data, flags)

    def open_with(self, packing: Packing, *, after: int) -> None:
        """Open the node last written with its weight, of `after` bytes, stored as `packing`."""
        with (self._scratch / "probe.data").open("ab") as out:
            out.write(packing.data.data)
        path = str(self._scratch / "probe.onnx")
        model = onnx.load(path, load_external_data=False)
        _store(model.graph.initializer[0], packing, after)
        onnx.save(model, path)
        ort = load_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what it refuses is the answer, not an error
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def _write(self, name: str, values: Bytes) -> str:
        """The node as a model of its own, weight `name` replaced; returns its path."""
        node, initializers = self._node, []
        with (self._scratch / "probe.data").open("wb") as out:
            for tensor in self._tensors:
                copy = TensorProto()
                copy.CopyFrom(tensor)
                if tensor.data_location == TensorProto.EXTERNAL:
                    array = values if tensor.name == name else read_external(tensor, self._folder)
                    _point(copy, "probe.data", out.tell(), array.nbytes)
                    out.write(array.data)
                initializers.append(copy)
        path = self._scratch / "probe.onnx"
        onnx.save(node_model(node, {held.name: held for held in initializers}), str(path))
        return str(path)


def _point(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def _store(tensor: TensorProto, packing: Packing, offset: int) -> None:
    """Say where the packed form of an external initializer lies in its file."""
    stored = f"{packing.key}|{offset};{packing.data.nbytes};{packing.flags}"
    tensor.external_data.add(key=PREPACKED, value=stored)


def read_external(tensor: TensorProto, folder: Path) -> Bytes:
    """The bytes of an external initializer, mapped."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return np.memmap(
        folder / entries["location"],
        np.uint8,
        "r",
        int(entries["offset"]),
        (int(entries["length"]),),
    )
