"""SentencePiece for text, added tokens matched before it: InternLM2 and Llama's slow classes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from internvl_edge.bundle.added_tokens import CONFIG_FILE, AddedToken
from internvl_edge.bundle.errors import BundleError
from internvl_edge.bundle.quoting import reason
from internvl_edge.bundle.segments import AddedTokens, Segment
from internvl_edge.bundle.signals import signals_held
from internvl_edge.bundle.text_form import TextForm, clean_up
from internvl_edge.bundle.token_files import (
    MODEL_FILE,
    TokenFiles,
    check_unicode,
    find_token,
    flag,
)

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

#: What SentencePiece writes for a space.
_SPACE = "\u2581"
#: A second `normalizer_spec` with `add_dummy_prefix` false: protobuf merges it into the first.
_NO_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer:
    """Text to ids and back.

    Args:
        model_proto: serialized SentencePiece model.
        added: tokens beside it; matched anywhere in the text, longest first.
        add_bos: whether `encode` prepends the BOS id, as the reference does.
        cleans_up: whether its texts are cleaned up; see `clean_up`.
        legacy: whether each stretch of text between added tokens gets the model's own prefix, a
            space; otherwise only the whole text does.
        named: tokens that the files call special by name: BOS, EOS, and additional ones.
    """

    def __init__(
        self,
        model_proto: bytes,
        added: Sequence[AddedToken],
        *,
        add_bos: bool,
        cleans_up: bool = True,
        legacy: bool = True,
        named: Collection[str] = (),
    ) -> None:
        self._proto = model_proto
        self._pieces = _processor(model_proto)
        self._legacy = legacy
        self._named = named
        self._limit = int(self._pieces.GetPieceSize())
        self.added = {token.text: token for token in added}
        self.added_ids = {token.id: token for token in added}
        self.cleans_up = cleans_up
        self._bos = [self._pieces.bos_id()] if add_bos else []
        self._finder = AddedTokens(self.added)

    @classmethod
    def read(cls, files: TokenFiles) -> SentencePieceTokenizer:
        """Read the files of a checkpoint or bundle.

        Raises:
            BundleError: a file is missing or malformed.
        """
        proto, config = files.data(MODEL_FILE), files.json(CONFIG_FILE)
        added = files.added_tokens(config)
        if flag(config, "add_eos_token", default=False):
            raise BundleError(f"{CONFIG_FILE}: add_eos_token is true; supported: false")
        add_bos = flag(config, "add_bos_token", default=True)
        legacy = flag(config, "legacy", default=True)
        return cls(
            proto,
            added,
            add_bos=add_bos,
            cleans_up=_cleans_up(config),
            legacy=legacy,
            named=() if legacy else files.named_tokens(config),  # only the newer rules ask
        )

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self._limit, max(self.added_ids) + 1)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with the BOS the reference prepends; special tokens in it are live.

        Raises:
            PromptError: the text is not Unicode: bytes of another encoding were let through.
        """
        return self._encode([Segment(text, True)], self._encode_text)

    def encode_segments(self, segments: Sequence[Segment]) -> list[int]:
        """Ids of a prompt, as of `encode`; special tokens are live in control segments alone."""
        return self._encode(segments, self._encode_guarded)

    def _encode(
        self, segments: Sequence[Segment], encode: Callable[[str], Sequence[int]]
    ) -> list[int]:
        """Ids of segments, with `encode` for the text between added tokens."""
        for segment in segments:
            check_unicode(segment.text)
        if not self._legacy:
            segments = _prefixed(segments)
        ids: list[int] = []
        parts = self._finder.parts(segments)
        for position, part in enumerate(parts):
            if position % 2 and part:
                ids.append(self.added[part].id)
            elif part:
                ids.extend(encode(part))
        lone = not self._legacy and parts[0] == _SPACE and len(parts) > 1
        if lone and parts[1] in self._named:
            ids = ids[1:]
        return [*self._bos, *ids]

    @cached_property
    def _plain(self) -> SentencePieceProcessor:
        """The model without its own prefix."""
        return _processor(self._proto + _NO_PREFIX)

    def _encode_guarded(self, text: str) -> list[int]:
        """Ids of text, none of them a control token's."""
        ids = self._encode_text(text)
        if self._finder.guarded.isdisjoint(ids):
            return ids
        # A piece of the model's own that an added token has as well: letter by letter it is none.
        letters = (token for letter in text[1:] for token in self._encode_inner(letter))
        return [*self._encode_text(text[:1]), *letters]

    def _encode_text(self, text: str) -> list[int]:
        return list(self._pieces.EncodeAsIds(text)) if self._legacy else self._encode_inner(text)

    def _encode_inner(self, text: str) -> list[int]:
        """Ids of text without a prefix."""
        if not text.startswith((_SPACE, " ")):
            return list(self._plain.EncodeAsIds(text))
        # SentencePiece would lose a leading space: it stands behind something that is cut off.
        unknown = self._plain.IdToPiece(self._plain.unk_id())
        skipped = len(self._plain.EncodeAsIds(unknown))
        return list(self._plain.EncodeAsIds(unknown + text))[skipped:]

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

    def token_id(self, text: str) -> int:
        """Id of a special token, by its text.

        Raises:
            BundleError: the tokenizer has no such token.
        """
        return find_token(self.added, text)

    def is_open(self, token: int) -> bool:
        """Whether a later piece changes what one means: broken UTF-8 aside, none does."""
        return False

    def is_text(self, added: AddedToken) -> bool:
        """Whether an added token is text like any other: none is."""
        return False


def _prefixed(segments: Sequence[Segment]) -> list[Segment]:
    """Put the prefix of the whole text before its first segment that has any."""
    found = [Segment(part.text.replace(_SPACE, " "), part.control) for part in segments]
    for place, part in enumerate(found):
        if part.text:
            found[place] = Segment(_SPACE + part.text, part.control)
            break
    return found


def _processor(model_proto: bytes) -> SentencePieceProcessor:
    with signals_held():
        from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(model_proto)
        # A damaged piece is not UTF-8, which the first answer with it would meet.
        pieces.IdToPiece(list(range(pieces.GetPieceSize())))
    except (RuntimeError, UnicodeDecodeError) as error:
        raise BundleError(f"{MODEL_FILE} is not a SentencePiece model: {reason(error)}") from error
    return pieces


def _cleans_up(config: Mapping[str, Any]) -> bool:
    """Whether texts are cleaned up: the slow InternLM2 tokenizer always does, others if told."""
    name = config.get("tokenizer_class")
    if name is None or (isinstance(name, str) and name.startswith("InternLM2")):
        return True
    return flag(config, "clean_up_tokenization_spaces", default=False)
