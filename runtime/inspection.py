"""The `inspect` command: what a checkpoint or bundle is, how large, and whether it fits here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_edge.runtime.bundle import read_manifest
from internvl_edge.runtime.contract import CachePrecision
from internvl_edge.runtime.specs import ModelSpec

Report = dict[str, Any]

#: Bytes of one value in each precision.
ITEM_BYTES: dict[CachePrecision, int] = {"fp32": 4, "fp16": 2, "int8": 1}


def inspect_bundle(path: Path) -> Report:
    """Describe a bundle without reading its weights; plain values, ready for JSON.

    Raises:
        BundleError: not a bundle.
    """
    manifest = read_manifest(path)
    size = sum(entry.bytes for entry in manifest.files.values())
    return {
        "kind": "bundle",
        "path": str(path),
        "dialect": manifest.dialect,
        "precision": manifest.precision,
        "file_bytes": size,
        **describe(manifest.spec, manifest.parameters, manifest.kv),
        "fits_in_memory": fits_in_memory(size),
    }


def render(report: Report) -> str:
    """The report as aligned text."""
    lines = []
    for key, value in report.items():
        if isinstance(value, dict):
            lines.append(f"{key}:")
            lines += [f"  {name:22} {_value(name, item)}" for name, item in value.items()]
        else:
            lines.append(f"{key:24} {_value(key, value)}")
    return "\n".join(lines)


def describe(spec: ModelSpec, parameters: Mapping[str, int], cache: CachePrecision) -> Report:
    """What is the same for a checkpoint and a bundle; the KV cache is in `cache`."""
    vision, language = spec.vision, spec.language
    kv_token = 2 * language.num_hidden_layers * language.key_value_size * ITEM_BYTES[cache]
    most_tiles = spec.tiling.max_tiles + (spec.tiling.thumbnail and spec.tiling.max_tiles > 1)
    return {
        "parameters": dict(parameters),
        "vision": {
            "layers": vision.layers_run,
            "hidden_size": vision.hidden_size,
            "heads": vision.num_attention_heads,
            "norm": vision.norm_type + (" + qk norm" if vision.qk_normalization else ""),
            "tile_size": vision.tile_size,
            "tokens_per_tile": vision.tokens_per_tile,
            "pixel_shuffle": vision.ps_version,
        },
        "language": {
            "layers": language.num_hidden_layers,
            "hidden_size": language.hidden_size,
            "heads": f"{language.num_attention_heads} ({language.num_key_value_heads} KV)",
            "vocabulary": language.vocab_size,
            "trained_length": language.max_position_embeddings,
            "max_context": language.max_context,
        },
        "prompt": {"template": spec.prompt.template, "max_tiles": spec.tiling.max_tiles},
        "kv_cache": {
            "token_bytes": kv_token,
            "largest_image_bytes": kv_token * most_tiles * vision.tokens_per_tile,
        },
    }


def fits_in_memory(size: int) -> str:
    """Whether weights of `size` bytes fit the memory that is free now, and both figures."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    verdict = "yes" if size < free else "no"
    return f"{verdict}: weights {_bytes(size)}, free memory {_bytes(free)}"


def _value(name: str, value: object) -> str:
    if isinstance(value, int) and name.endswith("bytes"):
        return _bytes(value)
    if isinstance(value, int) and value >= 100_000:
        return f"{value:,}"
    if isinstance(value, int) and name in ITEM_BYTES:
        return _bytes(value)
    return str(value)


def _bytes(size: int) -> str:
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
