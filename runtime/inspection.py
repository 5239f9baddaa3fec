"""The `inspect` command: what a checkpoint or bundle is, how large, and whether it fits here."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_edge.bundle.contract import (
    LANGUAGE_GRAPH,
    QUANTISATION_REPORT,
    ROTARY_MULTIPLE,
    VISION_GRAPH,
    CachePrecision,
)
from internvl_edge.bundle.errors import BundleError
from internvl_edge.bundle.json_reader import read_object
from internvl_edge.bundle.manifest import Bundle, Manifest, read_manifest
from internvl_edge.bundle.quoting import named, reason
from internvl_edge.bundle.spec_fields import written
from internvl_edge.bundle.specs import GenerationSpec, LanguageSpec, ModelSpec
from internvl_edge.kernels.cpu import cpu_features
from internvl_edge.runtime.backends.blocks import PROBES, bundle_kernel
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.own_kernels import (
    bundle_attention,
    left_products,
    mapped_graphs,
)
from internvl_edge.runtime.backends.prepared import is_prepared, why_none
from internvl_edge.runtime.backends.products import bundle_form, products_of
from internvl_edge.runtime.backends.tower import bundle_tower
from internvl_edge.runtime.free_memory import available_memory
from internvl_edge.runtime.memory import plan_memory

Report = dict[str, Any]

#: Tokens of question and answer in the memory that `inspect` states.
TEXT_TOKENS = 512

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
        **_parts(manifest, size),
        **_outside_float16(path, manifest),
        **describe(manifest.spec, manifest.parameters, manifest.kv),
        "memory": _memory(path, manifest),
        "here": _here(path, manifest),
    }


def _here(path: Path, manifest: Manifest) -> Report:
    """Describe how this machine's CPU runs the bundle; `doctor` says more of the machine."""
    products = products_of(manifest)
    bundle = Bundle(path, manifest)
    left = left_products(manifest, mapped_graphs(bundle))
    form = bundle_form(manifest, left).name if products else "none"
    blocks = {"block_products": str(bundle_kernel(bundle))} if {*PROBES} & {*products} else {}
    tower = {"vision_kernels": str(bundle_tower(manifest))} if "w8a8" in products else {}
    return {
        "integer_products": f"{', '.join(products)}: {form}" if products else form,
        **tower,
        **blocks,
        "attention": str(bundle_attention(bundle)),
        "onnxruntime": load_onnxruntime().__version__,
        "cpu_features": " ".join(cpu_features()),
        "prepared": "fits" if is_prepared(bundle) else why_none(bundle) or "no",
    }


def _memory(path: Path, manifest: Manifest) -> Report:
    """Peak memory of one answer on the CPU, for one tile and for the largest picture."""
    spec = manifest.spec
    most = spec.tiling.max_tiles + (spec.tiling.thumbnail and spec.tiling.max_tiles > 1)
    bundle = Bundle(path, manifest)
    prepared, mapped = is_prepared(bundle), mapped_graphs(bundle)
    scores = bundle_attention(bundle).library is None

    def total(tiles: int, *, low_memory: bool) -> int:
        tokens = tiles * spec.vision.tokens_per_tile + TEXT_TOKENS
        return plan_memory(
            manifest,
            tokens=tokens,
            tiles=tiles,
            prepared=prepared,
            low_memory=low_memory,
            mapped=mapped,
            scores=scores,
        ).total

    return {
        "weights": _how_loaded(prepared, mapped),
        "one_tile_bytes": total(1, low_memory=False),
        "one_tile_low_memory_bytes": total(1, low_memory=True),
        f"{most}_tiles_bytes": total(most, low_memory=False),
        "available_bytes": available_memory(),
    }


def _how_loaded(prepared: bool, mapped: frozenset[str]) -> str:
    """Say how weights come into memory."""
    if mapped == {VISION_GRAPH, LANGUAGE_GRAPH}:
        return "mapped as they are"
    if prepared:
        return "mapped from prepared files"
    parts = {VISION_GRAPH: "those of vision mapped", LANGUAGE_GRAPH: "those in blocks mapped"}
    return ", ".join(["copied when loaded", *(parts[graph] for graph in parts if graph in mapped)])


def _parts(manifest: Manifest, size: int) -> Report:
    """Bytes and precision of each part; what is no weight is graphs, tokenizer and padding."""
    if not manifest.parts:  # an older bundle
        return {}
    parts = {
        name: {"bytes": entry.bytes, "precision": _precision(entry.precision)}
        for name, entry in manifest.parts.items()
    }
    rest = size - sum(entry.bytes for entry in manifest.parts.values())
    return {"parts": parts | {"graphs_and_padding": {"bytes": rest, "precision": ""}}}


def _outside_float16(path: Path, manifest: Manifest) -> Report:
    """Linear layers kept in float32 and what for, where calibration found any."""
    if QUANTISATION_REPORT not in manifest.files:
        return {}
    reasons: dict[str, list[str]] = {}
    try:
        report = read_object(path / QUANTISATION_REPORT)
        for value in report.get("outside_float16") or ():
            if value["place"] == "norm":  # norms compute in float32 anyway
                continue
            loss = "overflows" if value["sqnr_db"] is None else f"{value['sqnr_db']:.0f} dB"
            cause = f"{value['place']} reaches {value['largest']:.3g} ({loss})"
            reasons.setdefault(value["weight"], []).append(cause)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BundleError(
            f"cannot read {named(path / QUANTISATION_REPORT)}: {reason(error)}; export again"
        ) from error
    return {"kept_fp32": {name: ", ".join(why) for name, why in reasons.items()}} if reasons else {}


def _precision(counts: Mapping[str, int]) -> str:
    """`int8`, or `int8 (176), fp16 (4)` where matrices differ."""
    if len(counts) < 2:
        return next(iter(counts), "")
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{label} ({count})" for label, count in ranked)


def render(report: Report, width: int | None = None) -> str:
    """Return the report as aligned text.

    Args:
        width: columns that a value is broken to, between words; None breaks none.
    """
    lines = []
    for key, value in report.items():
        if isinstance(value, dict):
            lines.append(f"{key}:")
            unit = "bytes" if key.endswith("bytes") else ""
            lines += [
                _line(f"  {name:22} ", _value(name + unit, item), width)
                for name, item in value.items()
            ]
        else:
            lines.append(_line(f"{key:24} ", _value(key, value), width))
    return "\n".join(lines)


def _line(name: str, value: str, width: int | None) -> str:
    """A name and its value, which stays in its column."""
    if width is None or len(name) + len(value) <= width:
        return f"{name}{value}"
    return textwrap.fill(
        value,
        width,
        initial_indent=name,
        subsequent_indent=" " * 25,
        break_long_words=False,
        break_on_hyphens=False,
    )


def describe(spec: ModelSpec, parameters: Mapping[str, int], cache: CachePrecision) -> Report:
    """Describe what a checkpoint and a bundle share; the KV cache is in `cache`."""
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
            "head_size": _head_size(language),
            "rotary": _rotary(language),
            **_experts(language),
            "vocabulary": language.vocab_size,
            "trained_length": language.max_position_embeddings,
            "max_context": language.max_context,
        },
        "prompt": {
            "template": spec.prompt.template,
            "max_tiles": spec.tiling.max_tiles,
            "sampling": _sampling(spec.generation),
        },
        "kv_cache": {
            "token_bytes": kv_token,
            "largest_image_bytes": kv_token * most_tiles * vision.tokens_per_tile,
        },
    }


def fits_in_memory(size: int) -> str:
    """Say whether weights of `size` bytes fit the memory that is free now, with both figures."""
    free = available_memory()
    verdict = "yes" if size < free else "no"
    return f"{verdict}: weights {_bytes(size)}, free memory {_bytes(free)}"


def _value(name: str, value: object) -> str:
    if isinstance(value, dict):  # one part
        return f"{_bytes(value['bytes']):>12} {value['precision']}".rstrip()
    if isinstance(value, int) and name.endswith("bytes"):
        return _bytes(value)
    if isinstance(value, int) and value >= 100_000:
        return f"{value:,}"
    return str(value)


def _bytes(size: int) -> str:
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"


def _head_size(language: LanguageSpec) -> str:
    """The size, what is done to heads, and whether they take the slower way on the CPU."""
    said = [str(language.head_dim)]
    if language.qk_norm:
        said.append("queries and keys normed")
    if language.head_dim % ROTARY_MULTIPLE:
        said.append(f"rotated before attention: no multiple of {ROTARY_MULTIPLE}")
    return ", ".join(said)


def _rotary(language: LanguageSpec) -> str:
    if language.rope_type == "default":
        return f"theta {language.rope_theta:.6g}"
    return f"theta {language.rope_theta:.6g}, {language.rope_type} by {language.rope_factor:.6g}"


def _sampling(told: GenerationSpec) -> str:
    """What the checkpoint has answers drawn with, where the caller does not say."""
    return ", ".join(f"{name} {value:.6g}" for name, value in written(told).items()) or "greedy"


def _experts(language: LanguageSpec) -> Report:
    if language.experts is None:
        return {}
    return {"experts": f"{language.experts}, {language.experts_per_token} a token"}
