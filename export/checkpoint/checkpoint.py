"""Reading a Hugging Face checkpoint: config and safetensors, lazily, refusing what is unsafe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from internvl_edge.bundle.errors import CheckpointError
from internvl_edge.bundle.files import FileIdentity, check_no_pointer
from internvl_edge.bundle.json_reader import JsonError, read_object
from internvl_edge.bundle.quoting import named, quoted, reason
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.export.checkpoint.beside import ALL, ORIGINAL, read_beside
from internvl_edge.export.checkpoint.config import describe_config
from internvl_edge.export.checkpoint.names import tensor_shapes
from internvl_edge.export.checkpoint.native import is_native
from internvl_edge.export.checkpoint.origin import (
    Rows,
    check_names,
    check_shapes,
    read_as_stored,
    read_in_order,
    stored_shapes,
    without_buffers,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

#: Bytes read at a time. Keeps the resident part of a memory-mapped shard small: the output head
#: of the 26B model alone is 1.1 GB.
BLOCK_BYTES = 64 << 20
#: Stored tensors that a message names of those that make one; experts are made of hundreds.
MOST_NAMES = 3

_FLOATS = ("F32", "F16", "BF16")

_GIVE = "give the folder of a Hugging Face checkpoint (config.json, *.safetensors, tokenizer.model)"


class WeightSource(Protocol):
    """Where `export` takes weights from: a checkpoint directory, or anything of this shape.

    Tensors go by their canonical names; see `names`.
    """

    spec: ModelSpec

    def shape(self, name: str) -> tuple[int, ...]: ...

    def blocks(self, name: str) -> Iterator[NDArray[np.generic]]:
        """Yield the tensor in order, as runs of rows of its first axis."""

    def origin(self, name: str) -> str:
        """Return what the tensor is called where it comes from, for messages."""


class FloatSource(WeightSource, Protocol):
    """Weights as they are stored, which calibration looks at."""

    def as_stored(self, name: str) -> Iterator[NDArray[np.generic]]:
        """Yield the same rows in the order they are stored in, which holds none of them."""

    def order(self, name: str) -> NDArray[np.int64] | None:
        """Return which of the rows as stored each row is; None where they are in order."""


class ModelSource(FloatSource, Protocol):
    """A whole model to export: weights, and where its tokenizer is."""

    directory: Path

    @property
    def identity(self) -> list[str]:
        """What tells it from another: an interrupted calibration goes on with the same only."""


class Checkpoint:
    """A checkpoint directory in either layout, checked against its own config.

    Args:
        directory: holds config.json and one or many safetensors files.

    Raises:
        CheckpointError: not readable, unsafe, of an unknown kind, or tensors that are missing,
            unmapped or of the wrong shape.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        config = _read_json(self.directory / "config.json")
        beside = read_beside(self.directory, ALL if is_native(config) else ORIGINAL)
        described = describe_config(config, beside)
        self._files = without_buffers(_tensor_files(self.directory))
        described = described.holding(self._files)
        self.spec = described.spec
        self._table = described.tensors()
        self._shapes = tensor_shapes(self.spec)
        self._identities = {path: FileIdentity.at(path) for path in set(self._files.values())}
        expected = stored_shapes(self._table, self._shapes)
        check_names(self._files, expected)
        check_shapes(self._read_shapes(), expected)

    @property
    def identity(self) -> list[str]:
        """Which tensor lies where, and of each file what changes when it is written or replaced."""
        files = sorted(set(self._files.values()))
        return [*(f"{name} {path.name}" for name, path in self._files.items()), *map(_state, files)]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def blocks(self, name: str) -> Iterator[NDArray[np.generic]]:
        """Yield the tensor in order, as runs of rows of at most about `BLOCK_BYTES` bytes.

        One whose rows are stored in another order is one block.
        """
        yield from read_in_order(self._table[name], partial(self._run, self._shapes[name]))

    def as_stored(self, name: str) -> Iterator[NDArray[np.generic]]:
        yield from read_as_stored(self._table[name], partial(self._run, self._shapes[name]))

    def order(self, name: str) -> NDArray[np.int64] | None:
        return self._table[name].order

    def origin(self, name: str) -> str:
        names = self._table[name].names
        if len(names) > MOST_NAMES:
            return f"{names[0]} to {names[-1]} ({len(names)} tensors)"
        return " and ".join(names)

    def _run(self, shape: tuple[int, ...], part: Rows) -> Iterator[NDArray[np.generic]]:
        """Yield a part of a tensor of this shape."""
        row_bytes = max(1, int(np.prod(shape[1:]))) * 4
        step = max(1, BLOCK_BYTES // row_bytes)
        end = shape[0] if part.stop is None else part.stop
        for start in range(part.start, end, step):
            yield self._read(part.name, start, min(start + step, end))

    def _read(self, name: str, start: int, stop: int) -> NDArray[np.generic]:
        # The shard is mapped anew for every block: closing it is what returns its pages.
        path = self._files[name]
        try:
            with safe_open(path, "numpy") as shard:
                values = np.array(shard.get_slice(name)[start:stop])
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path.name}: cannot read {name}: {reason(error)}") from error
        if FileIdentity.at(path) != self._identities[path]:
            raise CheckpointError(
                f"{named(path)} was replaced or changed while it was read; export it again"
            )
        return values

    def _read_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for path in sorted(set(self._files.values())):
            with _open(path) as shard:
                held = set(shard.keys())
                for name in [name for name, file in self._files.items() if file == path]:
                    if name not in held:
                        raise CheckpointError(
                            f"{path.name} lacks {named(name)}, which {INDEX} puts there"
                        )
                    view = shard.get_slice(name)
                    if view.get_dtype() not in _FLOATS:
                        raise CheckpointError(
                            f"{path.name}: {named(name)} is {view.get_dtype()}; supported:"
                            f" {_FLOATS}"
                        )
                    shapes[name] = tuple(view.get_shape())
        return shapes


def _state(path: Path) -> str:
    status = path.stat()
    times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
    return f"{path.name} {status.st_size} {times} {status.st_dev} {status.st_ino}"


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Tensor name to the file that holds it."""
    single = directory / SINGLE
    if (directory / INDEX).exists():
        files = _indexed_files(directory)
        # transformers takes the single file then, other tools the shards: one of both is stale.
        if single.exists() and single not in files.values():
            raise CheckpointError(
                f"{named(directory)} holds both {SINGLE} and {INDEX} with other files, such as"
                f" {next(iter(files.values())).name}; remove what an earlier save left"
            )
        return files
    if not single.exists():
        raise CheckpointError(_no_weights(directory))
    with _open(single) as shard:
        return dict.fromkeys(shard.keys(), single)


def _indexed_files(directory: Path) -> dict[str, Path]:
    weight_map = _read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX} has no 'weight_map'")
    files = {}
    for name, file in weight_map.items():
        place = f"{INDEX} puts {named(name)} into {quoted(file)}"
        if not isinstance(file, str) or Path(file).name != file or {"\\", "\0"} & set(file):
            raise CheckpointError(f"{place}; a shard must be a file of the same directory")
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{place}, not a .safetensors file")
        files[name] = directory / file
    return files


def _open(path: Path) -> Any:
    try:
        check_no_pointer(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {named(path)}: {reason(error)}") from error
    try:
        return safe_open(path, "numpy")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{named(path)} is not a complete safetensors file: {reason(error)}; download it again"
        ) from error


def _no_weights(directory: Path) -> str:
    pickles = sorted(p.name for p in directory.glob("*.bin")) or sorted(
        p.name for suffix in ("*.pt", "*.pth", "*.ckpt") for p in directory.glob(suffix)
    )
    if pickles:
        return (
            f"{named(directory)} holds only pickled weights ({pickles[0]}); loading a pickle can"
            " run any code, so it is refused: convert to safetensors first"
        )
    if _is_adapter(directory):
        return _adapter(directory)
    return f"{named(directory)} has neither {SINGLE} nor {INDEX}"


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        return read_object(path)
    except FileNotFoundError:
        if _is_adapter(path.parent):
            raise CheckpointError(_adapter(path.parent)) from None
        raise CheckpointError(
            f"{named(path.parent)} is not a checkpoint directory: it has no {path.name}; {_GIVE}"
        ) from None
    except NotADirectoryError:
        raise CheckpointError(f"{named(path.parent)} is no folder; {_GIVE}") from None
    except (OSError, JsonError) as error:
        raise CheckpointError(f"cannot read {named(path)}: {reason(error)}") from error


def _is_adapter(directory: Path) -> bool:
    return (directory / "adapter_config.json").exists()


def _adapter(directory: Path) -> str:
    return f"{named(directory)} is a LoRA adapter; merge it into its base model and export that"
