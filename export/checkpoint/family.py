"""Decoder families: one module of `families/` each, found by the architecture in config.json."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import ClassVar

from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.export.checkpoint import families
from internvl_edge.export.checkpoint.names import decoder_prefix, language_shapes
from internvl_edge.export.checkpoint.origin import Origin, Table
from internvl_edge.export.checkpoint.section import Section

#: What each module of `families/` calls its `Family`.
FAMILY = "FAMILY"


class Family(ABC):
    """Decoders that one class of transformers' runs: their config, and where their tensors lie."""

    #: Names in `architectures` of the decoder's config.
    architectures: ClassVar[tuple[str, ...]]
    #: Its `model_type` in transformers' own layout; empty where transformers has no such class.
    model_type: ClassVar[str] = ""

    @abstractmethod
    def spec(self, llm: Section) -> LanguageSpec:
        """Read the decoder's section of config.json.

        Raises:
            CheckpointError: a key is missing, malformed, or asks for what is not supported.
        """

    @abstractmethod
    def tensors(self, spec: LanguageSpec) -> Table:
        """Return where every tensor of `names.language_shapes(spec)` lies, by canonical name."""


def layered(
    spec: LanguageSpec, outside: Mapping[str, Origin], prefix: str, layer: Mapping[str, Origin]
) -> Table:
    """Return a family's table from one layer's: only the tensors the decoder has are kept.

    Args:
        outside: origins of the tensors outside of the layers, by canonical name.
        prefix: how stored names of a layer's tensors begin, `{}` being its number.
        layer: origins within a layer; names of both kinds without the layer's prefix.
    """
    table = dict(outside)
    for number in range(spec.num_hidden_layers):
        here, there = decoder_prefix(number), prefix.format(number)
        table |= {f"{here}{name}": origin.under(there) for name, origin in layer.items()}
    return {name: table[name] for name in language_shapes(spec)}


@cache
def known_families() -> list[Family]:
    """Return every family there is, by the names of their modules."""
    modules = sorted(module.name for module in iter_modules(families.__path__))
    return [getattr(import_module(f"{families.__name__}.{name}"), FAMILY) for name in modules]


def family_of_architecture(llm: Section) -> Family:
    """Return the family of a decoder's section of config.json by its `architectures`.

    Raises:
        CheckpointError: the architecture is not told, or not supported.
    """
    told = llm.raw("architectures")
    known = {name: family for family in known_families() for name in family.architectures}
    if isinstance(told, list) and len(told) == 1 and told[0] in list(known):
        return known[told[0]]
    raise llm.bad("architectures", told, " or ".join(f"['{name}']" for name in known))


def family_of_model_type(text: Section) -> Family:
    """Return the family of a decoder's section of config.json by its `model_type`.

    Raises:
        CheckpointError: the kind is not told, or not supported.
    """
    told = text.raw("model_type")
    known = {family.model_type: family for family in known_families() if family.model_type}
    if told in list(known):
        return known[told]
    raise text.bad("model_type", told, "one of " + ", ".join(known))
