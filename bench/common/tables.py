"""A latency result as aligned text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

#: Phases in the order of a conversation, and what people call them.
PHASES = {
    "decode_image": "decode image",
    "tile": "tile",
    "vision": "vision",
    "vision_per_tile": "vision per tile",
    "prefill": "prefill",
    "ttft": "first token",
    "itl": "next token",
    "end_to_end": "end to end",
    "second_turn_ttft": "first token, turn 2",
}
COLD_PHASES = ("interpreter", "import", "load", "first_token", "total")


def render_text(result: Mapping[str, Any]) -> str:
    """Machine, ceilings, then every bundle and point. Times in milliseconds."""
    lines = [*_head(result)]
    for model in result["models"]:
        lines += ["", *_model(model, result["energy_source"])]
    lines += [f"note: {note}" for note in result["notes"]]
    return "\n".join(lines)


def machine_line(result: Mapping[str, Any]) -> str:
    """Processor, threads, clock, governor, power mode, library."""
    machine = result["machine"]
    clock = machine["frequency_mhz"]
    parts = [
        f"{machine['cpu']} ({machine['architecture']})",
        f"{machine['threads']} of {machine['cores']} cores",
        "clock not available" if clock is None else f"{clock:.0f} MHz",
        f"governor {machine['governor'] or 'not available'}",
        f"power mode {machine['power_mode'] or 'not available'}",
        *(f"{name} {version}" for name, version in machine["libraries"].items()),
    ]
    return ", ".join(parts)


def ceiling_line(result: Mapping[str, Any]) -> str:
    """Bandwidths and matrix products, as measured."""
    ceilings = result["ceilings"]
    rates = [
        f"{dtype} {rate / 1e9:.0f} GOP/s" for dtype, rate in ceilings["operations_per_s"].items()
    ]
    return (
        f"read {ceilings['read_bytes_per_s'] / 1e9:.1f} GB/s,"
        f" copy {ceilings['copy_bytes_per_s'] / 1e9:.1f} GB/s, {', '.join(rates)}"
    )


def precision_line(model: Mapping[str, Any]) -> str:
    precision = model["precision"]
    return f"vision {precision['vision']}, language {precision['language']}, KV {precision['kv']}"


def point_line(point: Mapping[str, Any]) -> str:
    rates = point["rates"]
    decode = rates["decode_tokens_per_s"]
    return (
        f"{point['tiles']} tiles, {point['prompt_tokens']} prompt tokens"
        f" ({point['text_tokens']} of text), {point['new_tokens']} new:"
        f" prefill {rates['prefill_tokens_per_s']:.0f} tok/s"
        + (f", decode {decode:.1f} tok/s" if decode else "")
    )


def energy_line(point: Mapping[str, Any], source: str | None) -> str:
    energy = point["energy"]
    if energy is None:
        return "energy not available"
    return (
        f"energy {energy['joules']['median']:.2f} J, {energy['watts']['median']:.1f} W,"
        f" {energy['joules_per_token']:.3f} J per token ({source})"
    )


def settings_line(result: Mapping[str, Any]) -> str:
    settings = result["settings"]
    return (
        f"{settings['rounds']} rounds of {settings['runs']} runs after {settings['warmup']} of"
        " warm-up, the model loaded anew in each"
    )


def memory_line(model: Mapping[str, Any]) -> str:
    cold = model["cold_start"]
    return (
        f"files {model['file_bytes'] / 1e6:.1f} MB, resident {cold['loaded_rss_bytes'] / 1e6:.0f}"
        f" MB when loaded, {cold['peak_rss_bytes'] / 1e6:.0f} MB at most ({cold['tiles']} tiles)"
    )


def _head(result: Mapping[str, Any]) -> Iterator[str]:
    yield machine_line(result)
    yield f"ceilings measured now: {ceiling_line(result)}"
    yield settings_line(result)
    yield "times in ms: median, quartiles, tails; the bound is what the ceilings allow"


def _model(model: Mapping[str, Any], source: str | None) -> Iterator[str]:
    yield f"{model['name']}: {precision_line(model)}; {model['backend']}"
    yield f"  {memory_line(model)}"
    cold = model["cold_start"]["phases"]
    parts = ", ".join(f"{name} {1e3 * cold[name]['median']:.0f}" for name in COLD_PHASES)
    yield f"  cold start: {parts} ms"
    for point in model["points"]:
        yield ""
        yield f"  {point_line(point)}"
        yield (
            f"  {'':20} {'median':>9} {'p25':>9} {'p75':>9} {'p90':>9} {'p99':>9}"
            f" {'outliers':>8} {'bound':>9} {'of bound':>9}"
        )
        for name in (name for name in PHASES if name in point["phases"]):
            yield f"  {PHASES[name]:20} {_row(point, name)}"
        yield f"  {energy_line(point, source)}"


def _row(point: Mapping[str, Any], name: str) -> str:
    summary = point["phases"][name]
    columns = [f"{1e3 * summary[key]:9.3f}" for key in ("median", "p25", "p75", "p90", "p99")]
    columns.append(f"{summary['outliers']:5d}/{len(summary['samples']):<2d}")
    limit = point["limits"].get(name)
    if limit is not None:
        columns += [f"{1e3 * limit['bound_s']:9.3f}", f"{limit['percent']:8.0f}%"]
    return " ".join(columns)
