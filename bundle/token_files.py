"""The tokenizer files of a checkpoint or bundle: their names, and what their JSON says."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from internvl_edge.bundle.added_tokens import (
    ADDED_TOKENS_FILE,
    CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    AddedToken,
    read_added_tokens,
)
from internvl_edge.bundle.errors import BundleError, PromptError
from internvl_edge.bundle.files import TOKENIZER_BYTES, check_regular, read_bytes
from internvl_edge.bundle.json_reader import JsonError, read_object
from internvl_edge.bundle.quoting import named, quoted, reason

#: A SentencePiece model.
MODEL_FILE = "tokenizer.model"
#: All of a tokenizer, as the `tokenizers` library writes it.
FAST_FILE = "tokenizer.json"
#: Of byte pairs.
VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"

#: Files that make a tokenizer of each kind, the kind that is taken first standing first. A fast
#: file made from a SentencePiece model puts other spaces than the class the models were used with.
KINDS = ((MODEL_FILE,), (FAST_FILE,), (VOCAB_FILE, MERGES_FILE))
#: What says more of any kind.
BESIDE = (CONFIG_FILE, ADDED_TOKENS_FILE, SPECIAL_TOKENS_FILE)

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class TokenFiles:
    """The tokenizer files of a directory, those that are listed.

    Args:
        listed: names of the files that belong to it; others are as if they were not there. None:
            whatever is there.
    """

    def __init__(self, directory: Path, listed: Collection[str] | None) -> None:
        self._directory = directory
        self._listed = listed

    def kind(self, prefer: str | None = None) -> tuple[str, ...]:
        """Return the names of the files that make a tokenizer here; those of the first if none.

        Args:
            prefer: a file whose kind comes before the others.
        """
        kinds = sorted(KINDS, key=lambda names: prefer not in names)
        found = (names for names in kinds if all(map(self._has, names)))
        return next(found, KINDS[0])

    def data(self, name: str) -> bytes:
        """Read a whole file.

        Raises:
            BundleError: it is not listed, or cannot be read.
        """
        path = self._directory / name
        if self._listed is not None and name not in self._listed:
            raise BundleError(f"{named(self._directory)} lists no {name}; export it anew")
        try:
            return read_bytes(path, TOKENIZER_BYTES)
        except OSError as error:
            raise BundleError(f"cannot read {named(path)}: {reason(error)}") from error

    def json(self, name: str) -> dict[str, Any]:
        """Read an object; an absent file is an empty one.

        Raises:
            BundleError: it cannot be read, or is no object.
        """
        path = self._directory / name
        if self._listed is not None and name not in self._listed:
            return {}
        try:
            return read_object(path)
        except FileNotFoundError:
            return {}
        except (OSError, JsonError) as error:
            raise BundleError(f"cannot read {named(path)}: {reason(error)}") from error

    def added_tokens(self, config: Mapping[str, Any]) -> list[AddedToken]:
        """Return the added tokens.

        Args:
            config: what CONFIG_FILE says.

        Raises:
            BundleError: none is special, or one is malformed.
        """
        added = read_added_tokens(config, self.json)
        if not any(token.special for token in added):
            raise BundleError(
                f"{named(self._directory)} names no special tokens; expected {CONFIG_FILE}"
            )
        return added

    def named_tokens(self, config: Mapping[str, Any]) -> frozenset[str]:
        """Return the tokens that are called special by name: BOS, EOS and the like, and lists.

        Args:
            config: what CONFIG_FILE says.
        """
        told = {**self.json(SPECIAL_TOKENS_FILE), **config}
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        listed = told.get("additional_special_tokens")
        values = [told.get(name) for name in names]
        values += listed if isinstance(listed, list) else []
        texts = (value.get("content") if isinstance(value, dict) else value for value in values)
        return frozenset(text for text in texts if isinstance(text, str))

    def _has(self, name: str) -> bool:
        if self._listed is not None:
            return name in self._listed
        return os.path.lexists(self._directory / name)


def flag(config: Mapping[str, Any], key: str, *, default: bool) -> bool:
    """Return a flag of CONFIG_FILE; null is absent.

    Raises:
        BundleError: it is neither true nor false.
    """
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, bool):
        raise BundleError(f"{CONFIG_FILE}: {key} is {quoted(value)}, expected true or false")
    return value


def check_unicode(text: object) -> None:
    """Raise PromptError for what is no text, or not of Unicode: bytes of another encoding were let
    through."""
    if not isinstance(text, str):
        raise PromptError(f"the text is {quoted(text)}, it must be text")
    if (bad := _LONE_SURROGATE.search(text)) is not None:
        raise PromptError(
            f"the text is not valid Unicode at character {bad.start()} ({bad.group()!a});"
            " encode it as UTF-8"
        )


def find_token(tokens: Mapping[str, AddedToken], text: str) -> int:
    """Return the id of an added token.

    Raises:
        BundleError: there is no such token.
    """
    try:
        return tokens[text].id
    except KeyError:
        raise BundleError(
            f"the tokenizer has no special token {quoted(text)}; its files do not belong to an"
            " InternVL checkpoint"
        ) from None


def tokenizer_files(directory: Path, prefer: str | None = None) -> list[Path]:
    """Return the tokenizer files of a checkpoint directory, for copying into a bundle.

    Args:
        prefer: see `TokenFiles.kind`.

    Raises:
        BundleError: one is no regular file, or larger than a tokenizer's.
    """
    names = (*TokenFiles(directory, None).kind(prefer), *BESIDE)
    present = [directory / name for name in names if os.path.lexists(directory / name)]
    for path in present:
        try:
            check_regular(path, TOKENIZER_BYTES)
        except OSError as error:
            raise BundleError(f"cannot read {named(path)}: {reason(error)}") from error
    return present
