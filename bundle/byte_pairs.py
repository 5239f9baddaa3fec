"""Byte pairs through the `tokenizers` library: Qwen's and Llama 3's kind, and fast files.

`tokenizer.json` says all of a tokenizer; `vocab.json` and `merges.txt` are Qwen's, with its rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from internvl_edge.bundle.added_tokens import CONFIG_FILE, AddedToken
from internvl_edge.bundle.errors import BundleError
from internvl_edge.bundle.quoting import quoted, reason
from internvl_edge.bundle.segments import AddedTokens, Segment, joined
from internvl_edge.bundle.signals import signals_held
from internvl_edge.bundle.text_form import TextForm, clean_up
from internvl_edge.bundle.token_files import (
    FAST_FILE,
    MERGES_FILE,
    VOCAB_FILE,
    TokenFiles,
    check_unicode,
    find_token,
    flag,
)

if TYPE_CHECKING:
    import tokenizers

#: How Qwen cuts text before byte pairs are joined.
_QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class BytePairTokenizer:
    """Text to ids and back.

    Args:
        model: splits, joins byte pairs, and puts what the model's files ask for around a text.
        cleans_up: whether its texts are cleaned up; see `clean_up`.
    """

    def __init__(self, model: tokenizers.Tokenizer, *, cleans_up: bool = False) -> None:
        model.no_truncation()
        model.no_padding()
        self._model = model
        added = model.get_added_tokens_decoder()
        found = [
            AddedToken(
                token.content,
                token_id,
                special=token.special,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                single_word=token.single_word,
            )
            for token_id, token in added.items()
        ]
        self.added = {token.text: token for token in found}
        self.added_ids = {token.id: token for token in found}
        self._finder = AddedTokens(self.added)
        self.cleans_up = cleans_up

    @classmethod
    def read_fast(cls, files: TokenFiles) -> BytePairTokenizer:
        """Read `tokenizer.json`.

        Raises:
            BundleError: it is missing or malformed, or the `tokenizers` library is.
        """
        library = load_tokenizers()
        try:
            model = library.Tokenizer.from_buffer(files.data(FAST_FILE))
        except BundleError:
            raise
        except Exception as error:  # the library knows no other
            raise BundleError(f"{FAST_FILE} is not a tokenizer: {reason(error)}") from error
        return cls(model, cleans_up=_cleans_up(files.json(CONFIG_FILE)))

    @classmethod
    def read_qwen(cls, files: TokenFiles) -> BytePairTokenizer:
        """Read `vocab.json` and `merges.txt`, and the added tokens beside them.

        Raises:
            BundleError: a file is missing or malformed, or the `tokenizers` library is.
        """
        library = load_tokenizers()
        config = files.json(CONFIG_FILE)
        added = files.added_tokens(config)
        vocab, merges = files.json(VOCAB_FILE), _merges(files.data(MERGES_FILE))
        try:
            model = library.Tokenizer(library.models.BPE(vocab=vocab, merges=merges))
        except Exception as error:  # the library knows no other
            raise BundleError(
                f"{VOCAB_FILE} and {MERGES_FILE} do not go together: {reason(error)}"
            ) from error
        model.normalizer = library.normalizers.NFC()
        bytes_of = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        pieces = library.pre_tokenizers.Split(library.Regex(_QWEN_PIECES), "isolated")
        model.pre_tokenizer = library.pre_tokenizers.Sequence([pieces, bytes_of])
        model.decoder = library.decoders.ByteLevel()
        for told in sorted(added, key=lambda token: token.id):
            token = library.AddedToken(
                told.text,
                special=told.special,
                lstrip=told.lstrip,
                rstrip=told.rstrip,
                single_word=told.single_word,
                normalized=False,
            )
            model.add_special_tokens([token]) if told.special else model.add_tokens([token])
            if (got := model.token_to_id(told.text)) != told.id:
                raise BundleError(
                    f"{quoted(told.text)} is token {told.id}, behind {VOCAB_FILE} it would be"
                    f" {got}; the files do not belong together"
                )
        return cls(model, cleans_up=_cleans_up(config))

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return int(max(self._model.get_vocab(with_added_tokens=True).values())) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with what the files put before it; special tokens in it are live.

        Raises:
            PromptError: the text is not Unicode.
        """
        check_unicode(text)
        return list(self._model.encode(text, add_special_tokens=True).ids)

    def encode_segments(self, segments: Sequence[Segment]) -> list[int]:
        """Ids of a prompt, as of `encode`; special tokens are live in control segments alone."""
        if not self._finder.spelled(segments):
            return self.encode(joined(segments))
        library = load_tokenizers()
        encoded = []
        for position, part in enumerate(self._finder.parts(segments)):
            check_unicode(part)
            model = self._model if position % 2 else self._letters
            encoded.append(model.encode(part, add_special_tokens=False))
        whole = library.Encoding.merge(encoded, growing_offsets=False)
        return list(self._model.post_process(whole, add_special_tokens=True).ids)

    @cached_property
    def _letters(self) -> tokenizers.Tokenizer:
        """The model without added tokens."""
        plain: tokenizers.Tokenizer = load_tokenizers().Tokenizer(self._model.model)
        if self._model.normalizer is not None:
            plain.normalizer = self._model.normalizer
        if self._model.pre_tokenizer is not None:
            plain.pre_tokenizer = self._model.pre_tokenizer
        return plain

    def decode(self, ids: Iterable[int], form: TextForm | None = None) -> str:
        """Text of `ids`; broken UTF-8 becomes U+FFFD."""
        form = form or TextForm()
        text = self.text_of_pieces([i for i in map(int, ids) if self._is_shown(i, form)])
        return clean_up(text) if form.clean_up and self.cleans_up else text

    def is_piece(self, token: int) -> bool:
        """Whether an id is of the vocabulary, added tokens included."""
        return self._model.id_to_token(token) is not None

    def is_open(self, token: int) -> bool:
        """Whether a piece is a byte: a row of them is read as one, or as none of it."""
        return token in self._bytes

    @cached_property
    def _bytes(self) -> frozenset[int]:
        """Ids of pieces that stand for one byte each, where the model reads them so."""
        names = (f"<0x{byte:02X}>" for byte in range(256))
        ids = [one for one in map(self._model.token_to_id, names) if one is not None]
        letter = self._model.token_to_id("<0x41>")
        falls_back = letter is not None and self.text_of_pieces([letter]) == "A"
        return frozenset(ids if falls_back else ())

    def is_text(self, added: AddedToken) -> bool:
        """Whether an added token is text like any other: each is."""
        return True

    def stands_apart(self, added: AddedToken) -> bool:
        """Whether a token divides the text: none does."""
        return False

    def text_of_pieces(self, ids: Sequence[int]) -> str:
        """Text of ids, those of added tokens included."""
        return str(self._model.decode(list(ids), skip_special_tokens=False))

    def _is_shown(self, token: int, form: TextForm) -> bool:
        added = self.added_ids.get(token)
        return added is None or not (added.special and form.skip_special_tokens)

    def token_id(self, text: str) -> int:
        """Id of an added token, by its text.

        Raises:
            BundleError: the tokenizer has no such token.
        """
        return find_token(self.added, text)


def _cleans_up(config: Mapping[str, Any]) -> bool:
    return flag(config, "clean_up_tokenization_spaces", default=False)


def load_tokenizers() -> Any:
    """Import the `tokenizers` library, which only such files need.

    Raises:
        BundleError: it is not installed.
    """
    try:
        with signals_held():
            import tokenizers
    except ModuleNotFoundError as error:
        raise BundleError(
            "this model's tokenizer needs the package tokenizers: pip install"
            " 'internvl-edge[tokenizers]'"
        ) from error
    return tokenizers


def _merges(data: bytes) -> list[tuple[str, str]]:
    """Pairs in the order they are joined in; a first line names a version."""
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise BundleError(f"{MERGES_FILE} is not UTF-8: {reason(error)}") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.rstrip("\r").partition(" ")
        if not left or not right or " " in right:
            raise BundleError(f"{MERGES_FILE}: line {number} is {quoted(line)}, expected a pair")
        pairs.append((left, right))
    return pairs
