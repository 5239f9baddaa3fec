"""Answers of a run, appended to a file as they come, so that an interrupted run goes on.

The first line says what the run is (bundle, data, options); each further one is an answer. A line
is whole on the disk before the next question is asked. What was torn by an interruption, the last
line at most, is dropped when the file is opened again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from internvl_edge.bundle.errors import DataError
from internvl_edge.bundle.files import DATA_BYTES, read_bytes
from internvl_edge.bundle.json_reader import parse_json
from internvl_edge.bundle.quoting import named, quoted, reason

FORMAT = "internvl-edge answers"
VERSION = 1


@dataclass(frozen=True)
class Answer:
    """The reply to one question, or its error.

    Attributes:
        id: the question's.
        prediction: the reply's text; empty where there is an error.
        score: 0..1 by the question's metric.
        error: why there is no reply.
    """

    id: str
    prediction: str
    score: float
    error: str | None = None


class Journal:
    """Answers by id, those of earlier runs included. Use as a context manager.

    Args:
        path: created, where it is absent, with the first answer.
        settings: what the answers depend on; stored, and compared when the file is opened again.
        known: the ids of the questions.

    Raises:
        DataError: the file is something else, was written by a run with other settings, is damaged
            before its last line, or answers a question twice or one that is not in the data.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], known: Collection[str]) -> None:
        self.path = path
        self.answers: dict[str, Answer] = {}
        self._header = _line({"format": FORMAT, "version": VERSION, **settings})
        self._known = known
        content = _content(path)
        whole = content[: content.rfind(b"\n") + 1]
        if whole:
            self._read(whole)
        elif not self._header.startswith(content):
            raise DataError(f"{named(path)} is not a file of answers; give another name")
        self._kept = len(whole)
        self._stream: BinaryIO | None = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            self._stream.close()

    def add(self, answer: Answer) -> None:
        """Store an answer; it is on the disk when this returns."""
        if self._stream is None:
            self._stream = self._open()
        _append(self._stream, _line(asdict(answer)))
        self.answers[answer.id] = answer

    def _open(self) -> BinaryIO:
        stream = self.path.open("r+b" if self.path.exists() else "w+b")
        stream.truncate(self._kept)
        stream.seek(self._kept)
        if not self._kept:
            _append(stream, self._header)
        return stream

    def _read(self, whole: bytes) -> None:
        first, *rest = whole.splitlines()
        self._check_header(first)
        for number, line in enumerate(rest, start=2):
            try:
                answer = _answer(line)
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(
                    f"{named(self.path)}:{number} is not an answer ({reason(error)}); remove the"
                    " line to have the question asked again"
                ) from error
            if answer.id in self.answers or answer.id not in self._known:
                problem = "twice" if answer.id in self.answers else "though it is not in the data"
                raise DataError(
                    f"{named(self.path)}:{number} answers question {quoted(answer.id)} {problem}"
                )
            self.answers[answer.id] = answer

    def _check_header(self, line: bytes) -> None:
        try:
            found = parse_json(line)
            known = found["format"] == FORMAT
        except (ValueError, TypeError, KeyError):
            known = False
        if not known:
            raise DataError(f"{named(self.path)} is not a file of answers; give another name")
        expected = json.loads(self._header)
        for key in [*expected, *(found.keys() - expected.keys())]:
            if found.get(key) != expected.get(key):
                raise DataError(
                    f"{named(self.path)} was written with {named(key)} {quoted(found.get(key))},"
                    f" this run has {quoted(expected.get(key))}; give another name, or the same"
                    " bundle, data and options to go on with it"
                )


def _content(path: Path) -> bytes:
    """Read what is stored already; return nothing where there is no file yet."""
    try:
        return read_bytes(path, DATA_BYTES)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise DataError(f"cannot read {named(path)}: {reason(error)}") from error


def _append(stream: BinaryIO, line: bytes) -> None:
    stream.write(line)
    stream.flush()
    os.fsync(stream.fileno())


def _line(entry: Mapping[str, Any]) -> bytes:
    # ASCII: no character of an answer can be taken for the end of a line.
    return json.dumps(entry).encode() + b"\n"


def _answer(line: bytes) -> Answer:
    answer = Answer(**parse_json(line))
    texts = isinstance(answer.id, str) and isinstance(answer.prediction, str)
    scored = isinstance(answer.score, (int, float)) and 0 <= answer.score <= 1
    if not texts or not scored or not isinstance(answer.error, (str, type(None))):
        raise ValueError("a field has another type")
    return answer
