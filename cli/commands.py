"""Every command: one line of help and the module that declares and runs it.

A module named here has `add_arguments(parser)` and `run(arguments)`, which returns the exit status.
It is imported when its command is typed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

PROGRAM = "internvl-edge"


@dataclass(frozen=True)
class Command:
    """A word of the command line.

    Attributes:
        help: one line about it.
        module: what declares and runs it, below `internvl_edge`; None: only a name before others.
        extra: the extra whose packages it imports; None: it needs the runtime's only.
        parts: words that may follow it.
    """

    help: str
    module: str | None = None
    extra: str | None = None
    parts: Mapping[str, Command] = field(default_factory=dict)


BENCH = {
    "accuracy": Command(
        "answers to your questions, scored as the datasets do; or tiny_ocr's table",
        "bench.answers.run",
        "export",
        {
            "fidelity": Command(
                "KL divergence, agreement and perplexity against the float bundle",
                "bench.answers.fidelity",
                "export",
            ),
            "layerwise": Command(
                "the decoder beside transformers' layers in float32, one at a time",
                "bench.answers.layerwise",
                "train",
            ),
            "convert": Command(
                "a dataset's official layout to FILE.jsonl", "bench.peers.converters", "export"
            ),
        },
    ),
    "latency": Command(
        "every phase of an answer, beside its limit",
        "bench.latency.run",
        "export",
        {
            "profile": Command(
                "where the time goes, by block and operator", "bench.latency.operators", "export"
            ),
            "throughput": Command(
                "many at once: tokens a second and waiting against concurrency",
                "bench.latency.throughput",
                "export",
            ),
            "speculation": Command(
                "what guessing ahead gives: real answers at a bundle's pace",
                "bench.latency.speculation",
                "export",
            ),
            "compare": Command(
                "two latency results, and what is chance", "bench.latency.compare", "bench"
            ),
        },
    ),
    "memory": Command(
        "planned beside measured memory, for one prompt", "bench.latency.memory", "export"
    ),
    "estimate": Command("memory and speed on a GPU not at hand", "bench.estimate.run", "bench"),
    "scale": Command(
        "export a released model's true shapes with drawn weights, rounded to nearest, measured",
        "bench.scale.run",
        "bench",
    ),
    "kernels": Command(
        "tiling, pixel shuffle, INT4 product: others' beside ours",
        "bench.kernels.run",
        "export",
        {
            "precision": Command(
                "integers against float, at true width", "bench.answers.precision", "bench"
            ),
            "engines": Command(
                "what building TensorRT engines takes, no GPU", "bench.gpu.engines", "bench"
            ),
        },
    ),
    "peers": Command(
        "llama.cpp, OpenVINO, transformers and Optimum on the same weights, in turns",
        "bench.peers.run",
        "peers",
        {
            "vision": Command("their vision towers, in turns", "bench.peers.vision", "bench"),
        },
    ),
}

#: What subjects of `bench` were called before, and are called now.
RENAMED = {
    "fidelity": "accuracy fidelity",
    "convert": "accuracy convert",
    "layerwise": "accuracy layerwise",
    "profile": "latency profile",
    "compare": "latency compare",
    "precision": "kernels precision",
    "engines": "kernels engines",
    "synthetic": "scale",
}

COMMANDS = Command(
    "Edge inference runtime for InternVL 1.5 and its family",
    parts={
        "demo": Command("run the bundled tiny model on a real picture", "cli.demo"),
        "inspect": Command("what a checkpoint or bundle is, and its sizes", "cli.inspection"),
        "doctor": Command(
            "what this machine runs with, and what optional parts lack: for bug reports",
            "cli.doctor",
        ),
        "export": Command("Hugging Face checkpoint to bundle", "export.command", "export"),
        "prepare": Command(
            "store a bundle's weights as this CPU's kernels want them: mapped at load",
            "export.prepare.command",
            "export",
        ),
        "build": Command(
            "TensorRT engines of a bundle, for one GPU", "export.tensorrt.command", "export"
        ),
        "chat": Command("ask about images, once or in a conversation", "cli.chat"),
        "bench": Command("measure beside a reference, correctness first", parts=BENCH),
    },
)
