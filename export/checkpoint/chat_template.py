"""The chat template of a checkpoint in transformers' own layout: only what the runtime writes too.

A template is compared with the converter's text, and where it differs, by what it renders; nothing
of Jinja leaves the export.
"""

from __future__ import annotations

import re
from typing import Any

from internvl_edge.bundle.errors import CheckpointError
from internvl_edge.bundle.extras import extra_installed
from internvl_edge.bundle.prompt import IMAGE_CONTEXT, IMAGE_PLACEHOLDER
from internvl_edge.bundle.quoting import quoted, reason
from internvl_edge.export.checkpoint.beside import (
    TEMPLATE_JSON,
    TEMPLATE_TEXT,
    TEXT,
    TOKENIZER_CONFIG,
    Beside,
)

#: As transformers' converter writes it; older ones have `<image>` for the image's slot.
KNOWN = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)

_TEXT = {"type": "text", "text": "How many?"}
#: A system message, an image, two turns.
_PROBES: tuple[list[dict[str, Any]], ...] = (
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [_TEXT]}],
    [{"role": "user", "content": [{"type": "image"}, _TEXT]}],
    [
        {"role": "user", "content": [_TEXT]},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": [_TEXT]},
    ],
)


def check_template(beside: Beside) -> None:
    """Raise CheckpointError unless the checkpoint's template renders what the runtime does."""
    template = _told(beside)
    if template is None:
        raise CheckpointError(
            f"the checkpoint has no chat template: expected {TEMPLATE_TEXT}, {TEMPLATE_JSON}, or"
            f" one in {TOKENIZER_CONFIG}"
        )
    if _plain(template) == _plain(KNOWN):
        return
    for probe in _PROBES:
        expected = _rendered(KNOWN, probe)
        got = _rendered(template, probe)
        if got != expected:
            raise CheckpointError(
                f"the checkpoint's chat template writes {quoted(got)} for a conversation that is"
                f" written {quoted(expected)} here; only the template of transformers' converter"
                " is supported"
            )


def _told(beside: Beside) -> str | None:
    """Return the template that counts: of several places, the first."""
    places: list[Any] = [
        beside.get(TEMPLATE_TEXT, {}).get(TEXT),
        beside.get(TEMPLATE_JSON, {}).get("chat_template"),
        beside.get(TOKENIZER_CONFIG, {}).get("chat_template"),
    ]
    for told in places:
        if isinstance(told, list):
            named = {entry.get("name"): entry for entry in told if isinstance(entry, dict)}
            told = named.get("default", {}).get("template")
        if isinstance(told, str):
            return told
    return None


def _plain(template: str) -> str:
    """Return a template without Jinja's control of whitespace, images written alike."""
    bare = re.sub(r"(\{[%{])-?\s*|\s*-?([%}]\})", r"\1\2", template)
    bare = re.sub(r"([%}]\})\s+(\{[%{])", r"\1\2", bare).strip()
    return bare.replace(IMAGE_PLACEHOLDER, IMAGE_CONTEXT).replace("\\n", "\n")


def _rendered(template: str, messages: list[dict[str, Any]]) -> str:
    with extra_installed("export"):
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    try:
        text = environment.from_string(template).render(
            messages=messages, add_generation_prompt=True
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint's chat template cannot be rendered: {reason(error)}"
        ) from error
    return text.replace(IMAGE_PLACEHOLDER, IMAGE_CONTEXT)
