"""config.json to `ModelSpec`: documented defaults, and a refusal by name of what is unknown."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from internvl_edge.bundle.errors import CheckpointError
from internvl_edge.bundle.specs import ModelSpec, inconsistency
from internvl_edge.export.checkpoint import native, original
from internvl_edge.export.checkpoint.beside import NOTHING_BESIDE, Beside
from internvl_edge.export.checkpoint.family import Family
from internvl_edge.export.checkpoint.generation import read_generation
from internvl_edge.export.checkpoint.layouts import NATIVE, ORIGINAL, Layout
from internvl_edge.export.checkpoint.names import EMBEDDING, HEAD
from internvl_edge.export.checkpoint.origin import Table
from internvl_edge.export.checkpoint.section import Section


@dataclass(frozen=True)
class Description:
    """What config.json says: the model, and by its family what its tensors are called."""

    spec: ModelSpec
    family: Family
    layout: Layout

    def holding(self, stored: Collection[str]) -> Description:
        """Return the same of a checkpoint with these tensors.

        Which generation of the layout's names it has, and whether its head is one of its own,
        show in the names.
        """
        named = replace(self, layout=self.layout.holding(stored))
        language = replace(self.spec.language, tied_head=False)
        untied = replace(named, spec=replace(self.spec, language=language))
        return untied if set(untied.tensors()[HEAD].names) <= set(stored) else named

    def tensors(self) -> Table:
        """Return where every tensor of the model lies in the checkpoint, by canonical name."""
        decoder = self.family.tensors(self.spec.language)
        if self.spec.language.tied_head:
            decoder[HEAD] = decoder[EMBEDDING]
        return self.layout.vision(self.spec) | {
            name: origin.renamed(self.layout.decoder) for name, origin in decoder.items()
        }


def parse_config(config: Mapping[str, Any]) -> ModelSpec:
    """Read config.json; see `describe_config`."""
    return describe_config(config).spec


def describe_config(config: Mapping[str, Any], beside: Beside = NOTHING_BESIDE) -> Description:
    """Read config.json, in either layout.

    Args:
        beside: the objects in other files of the checkpoint that are read, by file name.

    Raises:
        CheckpointError: a key is missing or malformed, contradicts another, or names something not
            supported.

    Warns:
        CheckpointWarning: see `read_generation`.
    """
    top = Section(config, "")
    top.refuse_quantised()
    kind = top.one_of("model_type", (original.MODEL_TYPE, native.MODEL_TYPE))
    if kind == native.MODEL_TYPE:
        spec, family = native.read_native(top, beside)
        layout = NATIVE
    else:
        spec, family = original.read_original(top)
        layout = ORIGINAL
    spec = replace(spec, generation=read_generation(beside))
    if (problem := inconsistency(spec)) is not None:
        raise CheckpointError(f"config.json: {problem}")
    return Description(spec, family, layout)
