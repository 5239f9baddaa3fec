"""The table of docs/models.md: every published checkpoint, its parameters and its bundles' sizes.

python -m internvl_edge.bench.scale.models_table
"""

from __future__ import annotations

from internvl_edge.bench.scale.members import CONFIGS
from internvl_edge.export.checkpoint.config import describe_config
from internvl_edge.export.inspection import RECIPES, parameter_counts
from internvl_edge.export.sizes import bundle_bytes

_HEADER = ("checkpoint", "decoder", "template", "parameters", *(f"{name}, GB" for name in RECIPES))


def models_table() -> str:
    """Return the table as Markdown: parameters in billions, computed sizes in GB (10^9 bytes)."""
    rows = [_HEADER, ("---",) * 3 + ("---:",) * (len(_HEADER) - 3)]
    for name, config in CONFIGS.items():
        described = describe_config(config)
        spec = described.spec
        sizes = [sum(bundle_bytes(spec, recipe).values()) / 1e9 for recipe in RECIPES.values()]
        rows.append(
            (
                name,
                described.family.architectures[0].removesuffix("ForCausalLM"),
                spec.prompt.template,
                f"{parameter_counts(spec)['total'] / 1e9:.2f} B",
                *(f"{size:.1f}" for size in sizes),
            )
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


if __name__ == "__main__":
    print(models_table(), end="")
