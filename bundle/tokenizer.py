"""Tokenizers of every kind: text to ids and back, and text from ids that arrive one by one.

The checkpoint's own files are read; see `token_files`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from internvl_edge.bundle.added_tokens import AddedToken
from internvl_edge.bundle.byte_pairs import BytePairTokenizer
from internvl_edge.bundle.segments import Segment
from internvl_edge.bundle.sentence_pieces import SentencePieceTokenizer
from internvl_edge.bundle.text_form import TextForm
from internvl_edge.bundle.token_files import FAST_FILE, MODEL_FILE, TokenFiles


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
        added: the added tokens by their text.
        added_ids: and by their id.
        cleans_up: whether its texts are cleaned up; see `clean_up`.
    """

    added: dict[str, AddedToken]
    added_ids: dict[int, AddedToken]
    cleans_up: bool

    @property
    def size(self) -> int:
        """One more than the largest id."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with the BOS the reference prepends; special tokens in it are live.

        Raises:
            PromptError: the text is not Unicode: bytes of another encoding were let through.
        """

    def encode_segments(self, segments: Sequence[Segment]) -> list[int]:
        """Ids of a prompt, as of `encode`; special tokens are live in control segments alone.

        Raises:
            PromptError: see `encode`.
        """

    def decode(self, ids: Iterable[int], form: TextForm | None = None) -> str:
        """Text of `ids` as the reference writes it; broken UTF-8 becomes U+FFFD.

        Ids that are none are left out.
        """

    def is_piece(self, token: int) -> bool:
        """Whether an id is of the vocabulary, not added to it."""

    def is_open(self, token: int) -> bool:
        """Whether what a piece means may change with the one that follows."""

    def is_text(self, added: AddedToken) -> bool:
        """Whether an added token that is shown is text like any other."""

    def stands_apart(self, added: AddedToken) -> bool:
        """Whether it divides the text; others are control tokens within it."""

    def text_of_pieces(self, ids: Sequence[int]) -> str:
        """Text of ids of the vocabulary."""

    def token_id(self, text: str) -> int:
        """Id of a special token, by its text.

        Raises:
            BundleError: the tokenizer has no such token.
        """


def load_tokenizer(directory: Path, listed: Collection[str] | None = None) -> Tokenizer:
    """Read the tokenizer files of a checkpoint or bundle.

    Args:
        listed: names of the files that belong to it; others are as if they were not there.
            None: whatever is there.

    Raises:
        BundleError: a file is missing or malformed.
    """
    files = TokenFiles(directory, listed)
    first = files.kind()[0]
    if first == MODEL_FILE:
        return SentencePieceTokenizer.read(files)
    if first == FAST_FILE:
        return BytePairTokenizer.read_fast(files)
    return BytePairTokenizer.read_qwen(files)
