"""InternLM2's tokenizer: SentencePiece for text, special tokens matched before it.

The checkpoint's own files are read: `tokenizer.model`, and the special tokens from
`tokenizer_config.json` (or `added_tokens.json` and `special_tokens_map.json`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
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

MODEL_FILE = "tokenizer.model"

#: What a byte sequence that is not (yet) UTF-8 decodes to.
REPLACEMENT = "\ufffd"

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

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


class Tokenizer:
    """Text to ids and back.

    Args:
        model_proto: serialized SentencePiece model.
        added: tokens beside it; matched anywhere in the text, longest first.
        add_bos: whether `encode` prepends the BOS id, as the reference does.
        cleans_up: whether its texts are cleaned up; see `clean_up`.
    """

    def __init__(
        self,
        model_proto: bytes,
        added: Sequence[AddedToken],
        *,
        add_bos: bool,
        cleans_up: bool = True,
    ) -> None:
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
        self._limit = int(self._pieces.GetPieceSize())
        self.added = {token.text: token for token in added}
        self.added_ids = {token.id: token for token in added}
        self.cleans_up = cleans_up
        self._bos = [self._pieces.bos_id()] if add_bos else []
        longest_first = sorted(self.added, key=len, reverse=True)
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
        added = read_added_tokens(config, files.json)
        if not any(token.special for token in added):
            raise BundleError(f"{named(directory)} names no special tokens; expected {CONFIG_FILE}")
        if _flag(config, "add_eos_token", default=False):
            raise BundleError(f"{CONFIG_FILE}: add_eos_token is true; supported: false")
        add_bos = _flag(config, "add_bos_token", default=True)
        return cls(proto, added, add_bos=add_bos, cleans_up=_cleans_up(config))

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self._limit, max(self.added_ids) + 1)

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
        for position, part in enumerate(self._parts(text)):
            if position % 2 and part:
                ids.append(self.added[part].id)
            elif part:
                ids.extend(self._pieces.EncodeAsIds(part))
        return ids

    def decode(self, ids: Iterable[int], form: TextForm | None = None) -> str:
        """Text of `ids` as the reference writes it; broken UTF-8 becomes U+FFFD.

        Added tokens that are shown stand apart, between blanks. Ids that are none are left out.
        """
        form = form or TextForm()
        parts: list[str] = []
        segment: list[int] = []
        for token in map(int, ids):
            added = self.added_ids.get(token)
            if added is not None and added.special and form.skip_special_tokens:
                continue
            if added is not None and self.stands_apart(added):
                parts += filter(None, [self._segment(segment, form)])
                parts.append(added.text)
                segment = []
            elif added is not None or self.is_piece(token):
                segment.append(token)
        return " ".join([*parts, self._segment(segment, form)] if segment else parts)

    def is_piece(self, token: int) -> bool:
        """Whether an id is one of the SentencePiece model's own."""
        return 0 <= token < self._limit

    def stands_apart(self, added: AddedToken) -> bool:
        """Whether a token divides the text; others are control tokens within it."""
        return not added.special or added.id >= self._limit

    def text_of_pieces(self, ids: Sequence[int]) -> str:
        """Text of ids of the SentencePiece model's own."""
        return str(self._pieces.DecodeIds(list(ids)))

    def _segment(self, ids: Sequence[int], form: TextForm) -> str:
        """Text of pieces and control tokens."""
        text, run, controlled = "", list[int](), False
        for token in ids:
            if (added := self.added_ids.get(token)) is None:
                run.append(token)
            else:
                # The reference's blank: before the text that leads to a control token.
                text += "" if controlled else " "
                text += self.text_of_pieces(run) + added.text
                run = []
            controlled = added is not None
        text += self.text_of_pieces(run)
        return clean_up(text) if form.clean_up and self.cleans_up else text

    def _parts(self, text: str) -> list[str]:
        """Text and added tokens in turn; "" for what is not there."""
        parts = self._split.split(text)
        for place in range(1, len(parts), 2):
            token = self.added[parts[place]]
            before, after = parts[place - 1], parts[place + 1]
            if token.rstrip:
                after = after.lstrip()
            if token.lstrip:
                before = before.rstrip()
            if token.single_word and before and not before.endswith(" "):
                before, parts[place] = before + token.text, ""
            elif token.single_word and after and not after.startswith(" "):
                after, parts[place] = token.text + after, ""
            parts[place - 1], parts[place + 1] = before, after
        return parts

    def token_id(self, text: str) -> int:
        """Id of a special token, by its text.

        Raises:
            BundleError: the tokenizer has no such token.
        """
        try:
            return self.added[text].id
        except KeyError:
            raise BundleError(
                f"the tokenizer has no special token {quoted(text)}; its files do not belong to an"
                " InternVL checkpoint"
            ) from None


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


def _cleans_up(config: Mapping[str, Any]) -> bool:
    """Whether texts are cleaned up: the slow InternLM2 tokenizer always does, others if told."""
    name = config.get("tokenizer_class")
    if name is None or (isinstance(name, str) and name.startswith("InternLM2")):
        return True
    return _flag(config, "clean_up_tokenization_spaces", default=False)


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
