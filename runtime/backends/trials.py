"""What was tried on this machine and found right, remembered in the user's cache.

What is tried before it is trusted takes milliseconds at every start, so it is not tried again until
something it depends on has changed. What was found wrong is: a lack of memory looks the same.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from internvl_edge.bundle.files import read_bytes, write_bytes
from internvl_edge.kernels.build import user_cache
from internvl_edge.runtime.backends.machine import machine_key
from internvl_edge.runtime.backends.ort import load_onnxruntime

#: Of a file that holds what was found.
_FINDING_BYTES = 1 << 10
_RIGHT = "right"


def succeeds(name: str, inputs: Iterable[bytes], trial: Callable[[], bool]) -> bool:
    """Return whether a trial succeeds on this machine, or has with everything as it is now.

    Args:
        name: tells trials of the same inputs apart.
        inputs: all that it depends on beside the machine, ONNX Runtime and the code of this room.
        trial: tells whether what it tries is right.
    """
    try:
        key = trial_key([name.encode(), *inputs])
    except OSError:  # one cannot be read: the trial tells what that means
        return trial()
    if recalled(key) == _RIGHT:
        return True
    right = trial()
    if right:
        remember(key, _RIGHT)
    return right


def trial_key(inputs: Iterable[bytes]) -> str:
    """Return a name of all that a trial depends on: the machine, ONNX Runtime, the code of this
    room, and further inputs."""
    version = load_onnxruntime().get_build_info()
    digest = hashlib.sha256()
    for part in (machine_key().encode(), version.encode(), _code(), *inputs):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


@functools.cache
def _code() -> bytes:
    paths = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).digest()


def recalled(key: str) -> str | None:
    """Return what was found with this key; None where nothing is known, or it is damaged."""
    with contextlib.suppress(OSError, ValueError):
        found, _, of = read_bytes(_place(key), _FINDING_BYTES).decode().partition("\n")
        if of == key:
            return found
    return None


def remember(key: str, found: str) -> None:
    """Keep a line for `recalled`; where it cannot be written, it is tried again next time."""
    place = _place(key)
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(place, f"{found}\n{key}".encode(), overwrite=True)


def _place(key: str) -> Path:
    return user_cache() / "trials" / key[:32]


def open_probe(model: str | bytes, options: Any) -> Any:
    """Open what is tried as `onnxruntime.InferenceSession`; see `probe_options`."""
    return load_onnxruntime().InferenceSession(model, options, providers=["CPUExecutionProvider"])


def probe_options(entries: Mapping[str, str]) -> Any:
    """Return `onnxruntime.SessionOptions` of one thread, which does not log what fails.

    Args:
        entries: of the session's configuration.
    """
    options = load_onnxruntime().SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return options
