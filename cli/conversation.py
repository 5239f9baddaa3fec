"""A conversation in the terminal: questions, answers as they come, and commands."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from internvl_edge.bundle.errors import InternVLEdgeError, OutputError, PromptError, UsageError
from internvl_edge.bundle.quoting import named, quoted
from internvl_edge.bundle.remedies import Remedy
from internvl_edge.cli.editing import edit_lines
from internvl_edge.cli.history import History
from internvl_edge.cli.progress import ProgressLine
from internvl_edge.cli.streams import print_json
from internvl_edge.runtime.chat import Chat
from internvl_edge.runtime.decoding.generation import TokenStream
from internvl_edge.runtime.decoding.request import Reply, Timings
from internvl_edge.runtime.images.sources import Picture

WELCOME = "Ask about the images. /help: commands; Ctrl-C ends an answer, Ctrl-D leaves."
PROMPT = "> "
#: What other programs are left with, and nobody asks about a picture.
LEAVING = ("exit", "quit", "exit()", "quit()", "bye")


@dataclass(frozen=True)
class Asking:
    """How each question is asked.

    Attributes:
        max_new_tokens, sampling, stop: see `InternVL.stream`.
        frame, upright: see `Picture`.
        json: whether replies are printed as lines of JSON.
    """

    max_new_tokens: int | None
    sampling: Mapping[str, float | None]
    stop: Sequence[str]
    frame: int | None
    upright: bool
    json: bool


class Conversation:
    """Asks what is typed.

    Args:
        begin: begins a new chat.
        chat: to go on with.
        asking: see there.
        look: returns into how many tiles a picture is cut.
        history: what was typed in earlier ones, and is kept of this one.
    """

    def __init__(
        self,
        begin: Callable[[], Chat],
        chat: Chat,
        asking: Asking,
        look: Callable[[Picture], int],
        history: History,
    ) -> None:
        self._begin, self._chat, self._asking, self._look = begin, chat, asking, look
        self._history, self._ended = history, False
        self._pictures: list[Picture] = []
        self._saved: set[Path] = set()
        self._commands: Mapping[str, tuple[str, Callable[[str], None]]] = {
            "/image": ("PATH: show a picture with the next question", self._image),
            "/save": ("FILE: write the conversation; chat --messages FILE goes on", self._save),
            "/reset": ("begin a new conversation", self._reset),
            "/quit": ("leave, as Ctrl-D does", self._quit),
            "/help": ("list the commands", self._help),
        }

    def show(self, paths: Sequence[str]) -> None:
        """Show pictures with the next question.

        Raises:
            ImageError: one cannot be read.
        """
        self._pictures += map(self._picture, paths)

    def ask(self, question: str) -> None:
        """Ask, and print the answer as it comes; an error leaves the conversation as it was.

        Raises:
            InternVLEdgeError: it cannot be asked, or not be answered.
        """
        asking = self._asking
        with ProgressLine(wanted=not asking.json) as progress:
            stream = self._chat.stream(
                question,
                self._pictures,
                max_new_tokens=asking.max_new_tokens,
                sampling=asking.sampling,
                stop=asking.stop,
                progress=progress,
            )
            if asking.json:
                print_json(as_dict(stream.finish()))
            else:
                try:
                    self._print(stream, progress)
                except KeyboardInterrupt:
                    if not sys.stdin.isatty():
                        raise
                reply = stream.close()
                progress.clear()
                print()
                told = summary(reply.timings, len(reply.token_ids))
                print(f"[{reply.finish_reason}] {told}", file=sys.stderr)
        self._pictures = []

    def _print(self, stream: TokenStream, progress: ProgressLine) -> None:
        """Print an answer as it comes; reasoning goes to standard error, which is no answer."""
        thought = False
        for piece in stream:
            progress.clear()
            if thought and not piece.thinking:
                print("\n", file=sys.stderr, flush=True)
            thought = piece.thinking
            print(piece, end="", flush=True, file=sys.stderr if thought else sys.stdout)

    def hold(self) -> None:
        """Ask every line of standard input.

        Raises:
            InternVLEdgeError: a line of a pipe cannot be asked, or there is none.
        """
        if sys.stdin.isatty():
            self._hold_at_terminal()
            return
        asked = 0
        while (line := _read_line("")) is not None:
            if line.strip():
                self.ask(line)
                asked += 1
        if not asked:
            raise PromptError("standard input has no question; write one a line, or pass --prompt")

    def _hold_at_terminal(self) -> None:
        edit_lines([*self._commands], self._history.lines())
        print(WELCOME)
        for picture in self._pictures:
            self._look(picture)  # what cannot be read is said now, not with every question
        while not self._ended:
            line: str | None = ""
            try:
                if (line := _read_line(PROMPT)) is None:
                    print()
                    return
                self._take(line)
            except InternVLEdgeError as error:
                # The conversation goes on as it was.
                print(f"error: {error.told(flags=True)}", file=sys.stderr)
            except KeyboardInterrupt:
                print("\ninterrupted before an answer" if line else "")

    def _take(self, line: str) -> None:
        """Do what a line says."""
        word, _, rest = line.strip().partition(" ")
        if not word:
            return
        self._history.add(line)
        if line in LEAVING:
            raise UsageError(
                f"/quit or Ctrl-D leaves; with a blank before it, {line} is a question"
            )
        if not line.startswith("/"):
            self.ask(line)
        elif word in self._commands:
            self._commands[word][1](rest.strip())
        else:
            raise UsageError(
                f"there is no command {quoted(word)}; /help lists them, and a line that begins"
                " with a blank is a question"
            )

    def _picture(self, path: str) -> Picture:
        return Picture(path, self._asking.frame, self._asking.upright)

    def _image(self, rest: str) -> None:
        paths = _paths(rest)
        if not paths:
            raise UsageError("/image needs the path of a picture")
        for path in paths:
            tiles = self._look(self._picture(path))
            print(f"{named(path)}: {tiles} tile{'s' * (tiles > 1)}, shown with the next question")
        self.show(paths)

    def _save(self, rest: str) -> None:
        paths = _paths(rest)
        if len(paths) != 1:
            raise UsageError("/save needs the path of a file")
        path = Path(paths[0]).expanduser()
        try:
            self._chat.save(path, overwrite=path.absolute() in self._saved)
        except OutputError as error:
            if Remedy.OVERWRITE not in error.remedies:
                raise
            raise OutputError(f"{error.message}; name another file") from error
        self._saved.add(path.absolute())
        turns = len(self._chat.history)
        print(f"wrote {turns} turn{'s' * (turns != 1)} to {named(path)}")

    def _reset(self, rest: str) -> None:
        self._chat, self._pictures = self._begin(), []
        print("a new conversation")

    def _quit(self, rest: str) -> None:
        self._ended = True

    def _help(self, rest: str) -> None:
        for name, (text, _) in self._commands.items():
            print(f"{name:8}{text}")
        print("Anything else is a question. Ctrl-C ends an answer, Ctrl-D leaves.")


def summary(timings: Timings, tokens: int) -> str:
    """One line about a reply: what was computed, how fast."""
    ttft = timings.ttft_s
    first = f"{ttft:.2f} s" if ttft >= 1 else f"{ttft * 1e3:.1f} ms"
    cached = f" ({timings.cached_tokens} cached)" if timings.cached_tokens else ""
    tiles = f", {timings.tiles} tile{'s' * (timings.tiles > 1)}" if timings.tiles else ""
    return (
        f"TTFT {first}, {timings.decode_tokens_per_s:.0f} tok/s; {tokens} tokens after"
        f" {timings.prompt_tokens}{cached}{tiles}"
    )


def as_dict(reply: Reply) -> dict[str, object]:
    """Return a reply as `--json` prints it."""
    timings = reply.timings
    return {
        "text": reply.text,
        "thinking": reply.thinking,
        "token_ids": reply.token_ids,
        "finish_reason": reply.finish_reason,
        "timings": {
            **vars(timings),
            "ttft_s": timings.ttft_s,
            "decode_tokens_per_s": timings.decode_tokens_per_s,
        },
    }


def _paths(text: str) -> list[str]:
    """Paths as a shell would read them; one that is there as it was typed is taken so."""
    with suppress(OSError, ValueError):
        if text and Path(text).expanduser().exists():
            return [text]
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{quoted(text)}: {error}") from error


def _read_line(prompt: str) -> str | None:
    try:
        return input(prompt)
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise PromptError(f"the prompt is not text in {error.encoding}: {error.reason}") from error
