"""What stands in the documents: links, headings, code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`]+)`")
FENCE = re.compile(r"^```(\w*)$")
#: How a line begins that is a command.
COMMAND = re.compile(r"(\$ )?([A-Z_]+=\S+ )*(cd|internvl-edge|make|pip|pytest|python3?) \S")
#: What stands between commands.
BETWEEN = {"&&", "|", ";"}


@dataclass(frozen=True)
class Document:
    """A document in parts.

    Attributes:
        path: where it lies.
        prose: its text outside of code blocks.
        blocks: code blocks: language ("" where none is told) and text.
    """

    path: Path
    prose: str
    blocks: list[tuple[str, str]]

    @property
    def name(self) -> str:
        """Path from the root of the repository."""
        return self.path.relative_to(ROOT).as_posix()

    def links(self) -> list[str]:
        """Targets of links and pictures, as written."""
        return LINK.findall(SPAN.sub("", self.prose))

    def anchors(self) -> set[str]:
        """Anchors of its headings, as GitHub makes them."""
        titles = re.findall(r"^#+ (.+)$", self.prose, re.MULTILINE)
        plain = [LINK.sub("", title).replace("`", "").strip().lower() for title in titles]
        return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}

    def spans(self) -> list[str]:
        """Code within the text: of one line, or of two."""
        return [" ".join(span.split()) for span in SPAN.findall(self.prose)]

    def commands(self) -> Iterator[list[str]]:
        """Words of every shell command in a code block or within the text."""
        for language, text in self.blocks:
            for line in text.replace("\\\n", " ").splitlines():
                if language == "sh" or (not language and COMMAND.match(line)):
                    yield from split(line.removeprefix("$ "))
        for span in filter(COMMAND.match, self.spans()):
            yield from split(span)


def split(line: str) -> Iterator[list[str]]:
    """Cut a shell line into the words of its commands, without settings before them."""
    words: list[str] = []
    for word in [*shlex.split(line, comments=True), ";"]:
        if word not in BETWEEN:
            words += [] if not words and re.match(r"[A-Z_]+=", word) else [word]
        elif words:
            yield words
            words = []


@cache
def read(path: Path) -> Document:
    """Read a document."""
    prose: list[str] = []
    blocks: list[tuple[str, str]] = []
    within: tuple[str, list[str]] | None = None
    for line in path.read_text(encoding="utf-8").splitlines():
        fence = FENCE.match(line)
        if fence is None:
            (prose if within is None else within[1]).append(line)
        elif within is None:
            within = (fence[1], [])
        else:
            blocks.append((within[0], "\n".join(within[1])))
            within = None
    assert within is None, f"a code block of {path} has no end"
    return Document(path, "\n".join(prose), blocks)


def documents() -> list[Document]:
    """Read all of them."""
    rooms = [ROOT / "bench/gpu/README.md", ROOT / "examples/tiny_ocr/README.md"]
    return [read(path) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *rooms]]
