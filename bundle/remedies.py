"""What helps after an error, as data: each front end spells it its own way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import NamedTuple


class Spelling(NamedTuple):
    """One remedy in words, beginning with a verb."""

    #: On the command line, with its options.
    command: str
    #: In Python, with parameters.
    library: str


class Remedy(Enum):
    """A thing that a caller can do."""

    LOW_MEMORY = Spelling("pass --low-memory", "pass low_memory=True")
    LOWER_CONTEXT = Spelling("lower --max-context", "lower max_context")
    RAISE_CONTEXT = Spelling("raise --max-context", "raise max_context")
    LOWER_SEQUENCES = Spelling("lower --max-sequences", "lower max_sequences")
    LOWER_TILES = Spelling("lower --max-tiles", "lower max_tiles")
    INT8_CACHE = Spelling("export with --kv int8", "export with kv='int8'")
    SMALL_WEIGHTS = Spelling(
        "export with --vision int8 --language int4", "export with vision='int8', language='int4'"
    )
    FP32_VISION = Spelling("export with --vision fp32", "export with vision='fp32'")
    FP32_LANGUAGE = Spelling("export with --language fp32", "export with language='fp32'")
    INT8_VISION = Spelling("export with --vision int8", "export with vision='int8'")
    INT8_LANGUAGE = Spelling("export with --language int8", "export with language='int8'")
    FP32_CACHE = Spelling("export with --kv fp32", "export with kv='fp32'")
    CACHE_AS_COMPUTED = Spelling("export without --kv", "export with kv=None")
    FOR_TENSORRT = Spelling("export --for tensorrt", "export with dialect='tensorrt'")
    FOR_PORTABLE = Spelling(
        "export --for tensorrt-portable", "export with dialect='tensorrt-portable'"
    )
    FOR_ONNXRUNTIME = Spelling("export without --for", "export with dialect='onnxruntime'")
    CALIBRATION = Spelling(
        "export with --calibration data of this kind", "export with calibration data of this kind"
    )
    OVERWRITE = Spelling("pass --overwrite", "pass overwrite=True")
    SYMMETRIC = Spelling("leave --asymmetric out", "pass symmetric=True")
    BLOCK_128 = Spelling("pass --block 128", "pass block=128")
    OTHER_BLOCK = Spelling("pass another --block", "pass another block")
    RAISE_BUDGET = Spelling("raise --budget", "raise budget")
    ON_CPU = Spelling("pass --device cpu", "pass device='cpu'")
    ON_TENSORRT = Spelling("pass --device tensorrt", "pass device='tensorrt'")
    BUILD_ENGINES = Spelling("pass --auto-build", "pass build_engines=...")
    PREPARE = Spelling("run 'internvl-edge prepare'", "run 'internvl-edge prepare'")
    PREPARE_ELSEWHERE = Spelling(
        "prepare it on a larger machine with this CPU and onnxruntime, and copy 'prepared'",
        "prepare it on a larger machine with this CPU and onnxruntime, and copy 'prepared'",
    )
    NEW_CHAT = Spelling("begin a new chat (/reset)", "begin a new chat")
    DROP_OLDEST = Spelling("pass --drop-oldest", "pass drop_oldest=True")
    FEWER_IMAGES = Spelling("give fewer images", "give fewer images")
    LESS_TEXT = Spelling("give less text", "give less text")
    CLOSE_PROGRAMS = Spelling("close other programs", "close other programs")
    ADD_SWAP = Spelling("add swap", "add swap")
    FREE_SPACE = Spelling("free some space", "free some space")
    OTHER_DISK = Spelling("choose another disk", "choose another disk")
    OTHER_OUTPUT = Spelling("choose another output", "choose another output")


#: Remedies in the order of their use, each with what it gains ("saves 2.10 GiB") or "".
Remedies = Mapping[Remedy, str]


def told(remedies: Remedies, *, flags: bool) -> str:
    """Return remedies as one phrase: "lower max_tiles, give less text, or add swap"."""
    words = [
        (remedy.value.command if flags else remedy.value.library) + (f" ({gain})" if gain else "")
        for remedy, gain in remedies.items()
    ]
    if len(words) < 3:
        return " or ".join(words)
    return f"{', '.join(words[:-1])}, or {words[-1]}"


def without_gains(remedies: Iterable[Remedy]) -> dict[Remedy, str]:
    """Return remedies whose gain is not known."""
    return dict.fromkeys(remedies, "")
