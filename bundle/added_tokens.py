"""Tokens that stand beside a SentencePiece model: their texts, ids, and how they are treated."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from internvl_edge.bundle.errors import BundleError
from internvl_edge.bundle.quoting import quoted

CONFIG_FILE = "tokenizer_config.json"
ADDED_TOKENS_FILE = "added_tokens.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"

#: As `added_tokens_decoder` can spell it: nine digits.
_MAX_ID = 999_999_999


@dataclass(frozen=True)
class AddedToken:
    """A text that is one token wherever it stands.

    Attributes:
        text, id: of the token.
        special: whether it controls the conversation and is left out of answers.
        lstrip, rstrip: whether blanks before it, or behind it, are dropped.
        single_word: whether it is a token only where no letter touches it.
    """

    text: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


def read_added_tokens(
    config: Mapping[str, Any], read: Callable[[str], dict[str, Any]]
) -> list[AddedToken]:
    """Read the tokens a checkpoint adds.

    Args:
        config: tokenizer_config.json, whose `added_tokens_decoder` says all there is.
        read: another JSON file by its name, {} where it is not there: before that,
            added_tokens.json had the ids and special_tokens_map.json the special ones.

    Raises:
        BundleError: an entry is malformed.
    """
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict) and decoder:
        return [_described(token_id, entry) for token_id, entry in decoder.items()]
    special = set(_texts(read(SPECIAL_TOKENS_FILE).values()))
    added = []
    for text, token_id in read(ADDED_TOKENS_FILE).items():
        whole = isinstance(token_id, int) and not isinstance(token_id, bool)
        if not text or not whole or not 0 <= token_id <= _MAX_ID:
            raise BundleError(
                f"{ADDED_TOKENS_FILE} has a bad entry {quoted(text)}: {quoted(token_id)}"
            )
        added.append(AddedToken(text, token_id, special=not special or text in special))
    return added


def _described(token_id: str, entry: object) -> AddedToken:
    """One entry of `added_tokens_decoder`."""
    found = entry if isinstance(entry, dict) else {}
    text = found.get("content")
    flags = {
        name: found.get(name, False) for name in ("special", "lstrip", "rstrip", "single_word")
    }
    sound = all(isinstance(value, bool) for value in flags.values())
    if not (isinstance(text, str) and text and sound and re.fullmatch("[0-9]{1,9}", token_id)):
        raise BundleError(
            f"{CONFIG_FILE}: added_tokens_decoder has a bad entry {quoted(token_id)}:"
            f" {quoted(entry)}"
        )
    return AddedToken(text, int(token_id), **flags)


def _texts(values: Iterable[object]) -> Iterable[str]:
    """Token texts of special_tokens_map.json: strings, lists, or objects with a content."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from _texts([value.get("content")])
        elif isinstance(value, list):
            yield from _texts(value)
