"""How token ids become text, whatever the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

#: What a byte sequence that is not (yet) UTF-8 decodes to.
REPLACEMENT = "\ufffd"

#: What `clean_up` joins, in this order.
_JOINED = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


@dataclass(frozen=True)
class TextForm:
    """How ids become text.

    Attributes:
        skip_special_tokens: whether control tokens are left out.
        clean_up: whether blanks before punctuation are dropped, where the checkpoint's tokenizer
            does.
    """

    skip_special_tokens: bool = True
    clean_up: bool = True


def clean_up(text: str) -> str:
    """Drop blanks before punctuation and English endings, as transformers' tokenizers do."""
    for apart, joined in _JOINED:
        text = text.replace(apart, joined)
    return text
