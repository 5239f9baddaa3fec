"""Prompts in segments: what a template writes is control, what people and models said is text.

Text that spells a control token is encoded as the letters it consists of, so that nobody can forge
a turn or an image by writing one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from internvl_edge.bundle.added_tokens import AddedToken

#: Special tokens that say something about a picture: they end no turn, and questions about a place
#: are asked with them.
MARKUP = frozenset(["<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"])
#: Tokens that structure a prompt even where a checkpoint's files do not call them special.
STRUCTURE = re.compile(r"<\|.+\|>|</?s>|</?img>|<IMG_CONTEXT>")


@dataclass(frozen=True)
class Segment:
    """A stretch of a prompt.

    Attributes:
        text: what is written there.
        control: whether control tokens in it are live.
    """

    text: str
    control: bool


def joined(segments: Iterable[Segment]) -> str:
    """Return the text of segments, in which one can no longer tell who wrote what."""
    return "".join(segment.text for segment in segments)


class AddedTokens:
    """Finds added tokens in text.

    Args:
        tokens: by their text; matched anywhere, longest first.
    """

    def __init__(self, tokens: Mapping[str, AddedToken]) -> None:
        self._tokens = tokens
        #: Ids that text never becomes.
        self.guarded = frozenset(token.id for token in tokens.values() if _is_guarded(token))
        free = [token.text for token in tokens.values() if token.id not in self.guarded]
        self._any, self._free = _pattern(tokens), _pattern(free)

    def spelled(self, segments: Iterable[Segment]) -> bool:
        """Return whether text spells a token that only control segments may have."""
        texts = ("".join(part.text for part in run) for run in _texts(segments))
        found = (match[0] for text in texts for match in self._any.finditer(text))
        return any(self._tokens[text].id in self.guarded for text in found)

    def parts(self, segments: Iterable[Segment]) -> list[str]:
        """Return text and added tokens in turn; "" for what is not there."""
        parts = [""]
        for segment in segments:
            first, *others = (self._any if segment.control else self._free).split(segment.text)
            parts[-1] += first
            parts += others
        for place in range(1, len(parts), 2):
            self._strip(parts, place)
        return parts

    def _strip(self, parts: list[str], place: int) -> None:
        """Treat what stands beside a token as the token asks for."""
        token = self._tokens[parts[place]]
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


def _is_guarded(token: AddedToken) -> bool:
    if token.text in MARKUP:
        return False
    return token.special or STRUCTURE.fullmatch(token.text) is not None


def _texts(segments: Iterable[Segment]) -> Iterator[Iterator[Segment]]:
    """Stretches of segments that are text."""
    return (run for control, run in groupby(segments, lambda part: part.control) if not control)


def _pattern(texts: Collection[str]) -> re.Pattern[str]:
    """A pattern of any of the texts; of none of them, one that never matches."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or r"(?!)") + ")")
