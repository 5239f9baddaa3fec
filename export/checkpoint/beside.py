"""Files beside config.json that say how a checkpoint is used."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from internvl_edge.bundle.errors import CheckpointError
from internvl_edge.bundle.files import read_bytes
from internvl_edge.bundle.json_reader import JsonError, read_object
from internvl_edge.bundle.quoting import named, reason

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE_JSON = "chat_template.json"
TEMPLATE_TEXT = "chat_template.jinja"

#: The key a text stands under that is no object.
TEXT = "text"
#: All; a checkpoint in the original layout has its pictures and prompts told in config.json.
ALL = (PREPROCESSOR, PROCESSOR, GENERATION, TOKENIZER_CONFIG, TEMPLATE_JSON, TEMPLATE_TEXT)
ORIGINAL = (GENERATION,)
_TEMPLATE_BYTES = 1 << 20

Beside = Mapping[str, Mapping[str, Any]]
NOTHING_BESIDE: Beside = MappingProxyType({})


def read_beside(directory: Path, names: Collection[str] = ALL) -> Beside:
    """Read those that are there, by file name; a template as `{TEXT: ...}`.

    Args:
        names: those to be read.

    Raises:
        CheckpointError: one is malformed or cannot be read.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for name in names:
        path = directory / name
        try:
            if name == TEMPLATE_TEXT:
                found[name] = {TEXT: read_bytes(path, _TEMPLATE_BYTES).decode("utf-8")}
            else:
                found[name] = read_object(path)
        except FileNotFoundError:
            continue
        except (OSError, JsonError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read {named(path)}: {reason(error)}") from error
    return found
