"""InternLM2's tokenizer: SentencePiece for text, special tokens matched before it.

The checkpoint's own files are read: `tokenizer.model`, and the special tokens from
`tokenizer_config.json` (or `added_tokens.json` and `special_tokens_map.json`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl_edge.bundle.errors import BundleError, PromptError
from internvl_edge.bundle.files import TOKENIZER_BYTES, check_regular, read_bytes
from internvl_edge.bundle.json_reader import JsonError, read_object
from internvl_edge.bundle.quoting import named, quoted, reason

MODEL_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"
ADDED_TOKENS_FILE = "added_tokens.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"

#: What a byte sequence that is not (yet) UTF-8 decodes to.
REPLACEMENT = "\ufffd"

#: As `added_tokens_decoder` can spell it: nine digits.
_MAX_ID = 999_999_999

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """Text to ids and back.

    Args:
        model_proto: serialized SentencePiece model.
        special: special token text to id; matched anywhere in the text, longest first.
        add_bos: whether `encode` prepends the BOS id, as the reference does.
    """

    def __init__(self, model_proto: bytes, special: Mapping[str, int], *, add_bos: bool) -> None:
        from sentencepiece import SentencePieceProcessor

        self._pieces = SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(model_proto)
            # A damaged piece is not UTF-8, which the first answer with it would meet.
            self._pieces.IdToPiece(list(range(self._pieces.GetPieceSize())))
        except (RuntimeError, UnicodeDecodeError) as error:
            raise BundleError(
                f"{MODEL_FILE} is not a SentencePiece model: {reason(error)}"
            ) from error
        self.special = dict(special)
        self._special_ids = frozenset(self.special.values())
        self._bos = [self._pieces.bos_id()] if add_bos else []
        longest_first = sorted(self.special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    @classmethod
    def load(cls, directory: Path, listed: Collection[str] | None = None) -> Tokenizer:
        """Read the tokenizer files of a checkpoint or bundle.

        Args:
            listed: names of the files that belong to it; others are as if they were not there.
                None: whatever is there.

        Raises:
            BundleError: a file is missing or malformed.
        """
        files = _Files(directory, listed)
        proto, config = files.model(), files.json(CONFIG_FILE)
        special = _special_tokens(files, config)
        if not special:
            raise BundleError(f"{named(directory)} names no special tokens; expected {CONFIG_FILE}")
        if _flag(config, "add_eos_token", default=False):
            raise BundleError(f"{CONFIG_FILE}: add_eos_token is true; supported: false")
        add_bos = _flag(config, "add_bos_token", default=True)
        return cls(proto, special, add_bos=add_bos)

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self._pieces.GetPieceSize(), max(self._special_ids) + 1)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with the BOS the reference prepends; special tokens in it are live.

        Raises:
            PromptError: the text is not Unicode: bytes of another encoding were let through.
        """
        if (bad := _LONE_SURROGATE.search(text)) is not None:
            raise PromptError(
                f"the text is not valid Unicode at character {bad.start()} ({bad.group()!a});"
                " encode it as UTF-8"
            )
        ids = list(self._bos)
        for position, part in enumerate(self._split.split(text)):
            if position % 2:
                ids.append(self.special[part])
            elif part:
                ids.extend(self._pieces.EncodeAsIds(part))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special tokens; broken UTF-8 becomes U+FFFD."""
        limit = self._pieces.GetPieceSize()
        kept = [int(i) for i in ids if i not in self._special_ids and 0 <= i < limit]
        return str(self._pieces.DecodeIds(kept))

    def token_id(self, text: str) -> int:
        """Id of a special token, by its text.

        Raises:
            BundleError: the tokenizer has no such token.
        """
        try:
            return self.special[text]
        except KeyError:
            raise BundleError(
                f"the tokenizer has no special token {quoted(text)}; its files do not belong to an"
                " InternVL checkpoint"
            ) from None


class TextStream:
    """Turns ids that arrive one by one into text, holding back incomplete UTF-8."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # the window decoded each time begins here
        self._shown = 0  # ids before this one were given out

    def push(self, token: int) -> str:
        """Add one id; return the text that is now certain (may be empty)."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids[self._start :])
        if text.endswith(REPLACEMENT):
            return ""
        return self._emit(text)

    def finish(self) -> str:
        """Return what was held back, broken or not."""
        return self._emit(self._tokenizer.decode(self._ids[self._start :]))

    def _emit(self, text: str) -> str:
        # Decoding [shown ids + new ids] and cutting off the shown text keeps pieces whose text
        # depends on their neighbour (a leading space, a byte sequence) right.
        shown = self._tokenizer.decode(self._ids[self._start : self._shown])
        self._start, self._shown = self._shown, len(self._ids)
        return text[len(shown) :]


class _Files:
    """The tokenizer files of a directory, those that are listed."""

    def __init__(self, directory: Path, listed: Collection[str] | None) -> None:
        self._directory = directory
        self._listed = listed

    def model(self) -> bytes:
        path = self._directory / MODEL_FILE
        if self._listed is not None and MODEL_FILE not in self._listed:
            raise BundleError(f"{named(self._directory)} lists no {MODEL_FILE}; export it anew")
        try:
            return read_bytes(path, TOKENIZER_BYTES)
        except OSError as error:
            raise BundleError(f"cannot read {named(path)}: {reason(error)}") from error

    def json(self, name: str) -> dict[str, Any]:
        path = self._directory / name
        if self._listed is not None and name not in self._listed:
            return {}
        try:
            return read_object(path)
        except FileNotFoundError:
            return {}
        except (OSError, JsonError) as error:
            raise BundleError(f"cannot read {named(path)}: {reason(error)}") from error


def _special_tokens(files: _Files, config: Mapping[str, Any]) -> dict[str, int]:
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict) and decoder:
        return dict(_added_token(i, entry) for i, entry in decoder.items())
    added = files.json(ADDED_TOKENS_FILE)
    for text, token_id in added.items():
        whole = isinstance(token_id, int) and not isinstance(token_id, bool)
        if not text or not whole or not 0 <= token_id <= _MAX_ID:
            raise BundleError(
                f"{ADDED_TOKENS_FILE} has a bad entry {quoted(text)}: {quoted(token_id)}"
            )
    return added


def _added_token(token_id: str, entry: object) -> tuple[str, int]:
    """Text and id of one entry of `added_tokens_decoder`."""
    text = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(text, str) or not text or not re.fullmatch(r"[0-9]{1,9}", token_id):
        raise BundleError(
            f"{CONFIG_FILE}: added_tokens_decoder has a bad entry {quoted(token_id)}:"
            f" {quoted(entry)}"
        )
    return text, int(token_id)


def _flag(config: Mapping[str, Any], key: str, *, default: bool) -> bool:
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, bool):
        raise BundleError(f"{CONFIG_FILE}: {key} is {quoted(value)}, expected true or false")
    return value


def tokenizer_files(directory: Path) -> Sequence[Path]:
    """The tokenizer files present in a checkpoint directory, for copying into a bundle.

    Raises:
        BundleError: one is no regular file, or larger than a tokenizer's.
    """
    names = (MODEL_FILE, CONFIG_FILE, ADDED_TOKENS_FILE, SPECIAL_TOKENS_FILE)
    present = [directory / name for name in names if (directory / name).exists()]
    for path in present:
        try:
            check_regular(path, TOKENIZER_BYTES)
        except OSError as error:
            raise BundleError(f"cannot read {named(path)}: {reason(error)}") from error
    return present
