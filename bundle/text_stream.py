"""Token ids that arrive one by one to text: what is given out is never taken back."""

from __future__ import annotations

import re

from internvl_edge.bundle.text_form import REPLACEMENT, TextForm, clean_up
from internvl_edge.bundle.tokenizer import Tokenizer

#: An end of text that a later character may join: each rule of `clean_up` begins with a blank, and
#: these characters are all that may stand between it and the last one of a rule.
_HELD = re.compile(r" [ 'nvr]*$")


class CleanUp:
    """Applies `clean_up` to a text that arrives in pieces."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, piece: str) -> str:
        """Add text; return what is now certain."""
        text = self._held + piece
        held = _HELD.search(text)
        cut = len(text) if held is None else held.start()
        self._held = text[cut:]
        return clean_up(text[:cut])

    def finish(self) -> str:
        """Return what was held back."""
        held, self._held = self._held, ""
        return clean_up(held)


class TextStream:
    """Turns ids that arrive one by one into text, holding back incomplete UTF-8, rows of bytes
    that are not yet at their end, and blanks that `clean_up` may drop.

    The pieces join to `Tokenizer.decode` of all ids; but where control tokens are kept, the blank
    that it puts before a text which one of them follows is left out.
    """

    def __init__(self, tokenizer: Tokenizer, form: TextForm | None = None) -> None:
        self._tokenizer = tokenizer
        self._form = form or TextForm()
        self._cleaner = CleanUp() if self._form.clean_up and tokenizer.cleans_up else None
        self._ids: list[int] = []  # of a run of pieces without control tokens
        self._start = 0  # the window decoded each time begins here
        self._shown = 0  # ids before this one were given out
        self._any = False  # text was given out
        self._apart = False  # the next text stands apart from it
        self._controlled = False  # a control token came last

    def push(self, token: int) -> str:
        """Add one id; return the text that is now certain (may be empty)."""
        added = self._tokenizer.added_ids.get(token)
        if added is None:
            return self._piece(token)
        if added.special and self._form.skip_special_tokens:
            return ""
        if self._tokenizer.is_text(added):
            return self._piece(token)
        if not self._tokenizer.stands_apart(added):
            return self._control(added.text)
        text = self._joined(self._end_segment())
        self._apart = self._any
        text += self._joined(added.text)
        self._apart = True
        return text

    def finish(self) -> str:
        """Return what was held back, broken or not."""
        pending = self._apart and bool(self._ids)
        text = self._joined(self._end_segment())
        return text or (" " if pending else "")

    def _piece(self, token: int) -> str:
        if not self._tokenizer.is_piece(token):
            return ""
        self._ids.append(token)
        self._controlled = False
        text = self._tokenizer.text_of_pieces(self._ids[self._start :])
        if text.endswith(REPLACEMENT) or self._tokenizer.is_open(token):
            return ""
        return self._joined(self._cleaned(self._fresh(text)))

    def _control(self, text: str) -> str:
        """A control token within the text."""
        blank = "" if self._ids or self._controlled else " "
        found = self._cleaned(self._end_run() + blank + text)
        self._controlled = True
        return self._joined(found)

    def _fresh(self, text: str) -> str:
        """What of a window's text was not given out."""
        # Decoding [shown ids + new ids] and cutting off the shown text keeps pieces whose text
        # depends on their neighbour (a leading space, a byte sequence) right.
        shown = self._tokenizer.text_of_pieces(self._ids[self._start : self._shown])
        fresh = text[len(shown) :]
        if fresh:  # a window that begins with pieces of no text would lose the blank behind them
            self._start, self._shown = self._shown, len(self._ids)
        return fresh

    def _end_run(self) -> str:
        text = self._fresh(self._tokenizer.text_of_pieces(self._ids[self._start :]))
        self._ids, self._start, self._shown = [], 0, 0
        return text

    def _end_segment(self) -> str:
        text = self._cleaned(self._end_run())
        self._controlled = False
        return text + self._cleaner.finish() if self._cleaner else text

    def _cleaned(self, text: str) -> str:
        return self._cleaner.push(text) if self._cleaner else text

    def _joined(self, text: str) -> str:
        """Text with the blank before it, if it stands apart."""
        if not text:
            return ""
        text = " " + text if self._apart else text
        self._any, self._apart = True, False
        return text
