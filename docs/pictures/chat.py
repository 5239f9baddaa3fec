"""Draw chat.svg: a terminal in which the demo's model is asked about its receipt.

    python docs/pictures/chat.py

The conversation is held anew each time, by the real command in a pseudo-terminal.
"""

from __future__ import annotations

import base64
import io
import os
import pty
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from internvl_edge.bundle.extras import example_room
from internvl_edge.export.bundle import export_bundle

PICTURE = Path(__file__).with_suffix(".svg")
RECEIPT = example_room() / "receipt.png"
QUESTIONS = ("What is the TOTAL?", "What is the DATE?", "What is the SHOP?")

#: As typed, in a folder that holds the demo's bundle and receipt.
WORDS = ("chat", "bundle", RECEIPT.name, "--device", "cpu")
PROGRAM = "import sys; from internvl_edge.cli.main import main; sys.exit(main(sys.argv[1:]))"

PROMPT = "> "
END_OF_INPUT = "\x04"
#: Seconds without a word after which the command is taken to hang.
PATIENCE = 60

COLUMNS = 80
CHARACTER, LINE, MARGIN, BAR = 7.8, 20, 18, 34
RECEIPT_WIDTH = 300
STYLE = """
  text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
         fill: #d7dae0; white-space: pre }
  .typed { fill: #7fd88f; font-weight: 600 }
  .aside { fill: #7d8590 }
  .name { fill: #aab1bb }
"""


def main() -> None:
    """Hold the conversation and write the picture."""
    with tempfile.TemporaryDirectory() as folder:
        PICTURE.write_text(draw(converse(Path(folder))), encoding="utf-8")


def converse(folder: Path) -> list[str]:
    """Export the demo's model into a folder and ask it; returns the terminal's lines.

    Raises:
        TimeoutError: the command says nothing for `PATIENCE` seconds.
        CalledProcessError: it fails.
    """
    export_bundle(example_room() / "checkpoint", folder / "bundle")
    (folder / RECEIPT.name).write_bytes(RECEIPT.read_bytes())
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", PROGRAM, *WORDS]
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        # With such a terminal line editing sends no escape sequences.
        env=os.environ | {"TERM": "dumb", "INTERNVL_EDGE_HISTORY": ""},
    )
    os.close(theirs)
    try:
        said = "".join(_talk(ours))
        status = process.wait(PATIENCE)
    finally:
        os.close(ours)
        process.kill()  # one that hangs; nothing, where it has ended
        process.wait()
    if status:
        raise subprocess.CalledProcessError(status, command, said)
    # The last prompt is the one that was answered with the end of the input.
    lines = said.replace("\r\n", "\n").removesuffix(f"{PROMPT}\n").split("\n")
    # What stands before a carriage return was written over: progress.
    shown = [line.rpartition("\r")[2] for line in lines[:-1]]
    return [f"$ internvl-edge {' '.join(WORDS)}", *shown]


def _talk(terminal: int) -> Iterator[str]:
    """Answer each prompt with the next question; yields what the terminal shows."""
    words = iter([*(f"{question}\n" for question in QUESTIONS), END_OF_INPUT])
    said = ""
    while piece := _read(terminal):
        said += piece
        yield piece
        if said.endswith(f"\n{PROMPT}"):
            os.write(terminal, next(words).encode())


def _read(terminal: int) -> str:
    """Read what is there, waiting for something; "" once the other side is closed."""
    if not select.select([terminal], [], [], PATIENCE)[0]:
        raise TimeoutError(f"the command said nothing for {PATIENCE} s")
    try:
        return os.read(terminal, 4096).decode()
    except OSError:  # Linux says so of a terminal that nobody holds
        return ""


def draw(lines: Sequence[str]) -> str:
    """Return an SVG of a terminal with these lines, the receipt beside it."""
    width = round(COLUMNS * CHARACTER + 3 * MARGIN + RECEIPT_WIDTH)
    text, bottom = [], BAR
    for line in lines:
        parts = []
        for row in _rows(line):
            bottom += LINE
            parts.append(f'<tspan x="{MARGIN}" y="{bottom}">{escape(row)}</tspan>')
        text.append(f'<text class="{_kind(line)}">{"".join(parts)}</text>')
    height = bottom + MARGIN
    dots = [
        f'<circle cx="{MARGIN + 4 + 18 * place}" cy="{BAR / 2:g}" r="5.5" fill="{colour}"/>'
        for place, colour in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
            f' width="{width}" height="{height}" role="img">',
            "<title>A terminal in which internvl-edge answers questions about a receipt</title>",
            f"<style>{STYLE}</style>",
            f'<rect width="{width}" height="{height}" rx="9" fill="#161b22"/>',
            *dots,
            *text,
            *_receipt(width - MARGIN - RECEIPT_WIDTH),
            "</svg>\n",
        ]
    )


def _rows(line: str) -> list[str]:
    """Cut a line where the terminal ends."""
    return [line[start : start + COLUMNS] for start in range(0, max(len(line), 1), COLUMNS)]


def _kind(line: str) -> str:
    """Return what a line is: typed, said beside the answer, or the answer."""
    if line.startswith(("$ ", PROMPT)):
        return "typed"
    return "aside" if line.startswith(("[", "Ask ")) else "answer"


def _receipt(left: int) -> list[str]:
    """Return the receipt with its name below it."""
    stored = io.BytesIO()
    with Image.open(RECEIPT) as image:
        height = round(RECEIPT_WIDTH * image.height / image.width)
        image.convert("RGB").save(stored, "JPEG", quality=75)
    data = base64.b64encode(stored.getvalue()).decode()
    return [
        f'<image x="{left}" y="{BAR + 8}" width="{RECEIPT_WIDTH}" height="{height}"'
        f' href="data:image/jpeg;base64,{data}"/>',
        f'<text class="name" x="{left}" y="{BAR + 8 + height + LINE}">{RECEIPT.name}</text>',
    ]


if __name__ == "__main__":
    main()
