"""The documents' picture of a chat: what it shows is what the demo's model answers."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from internvl_edge.bundle.extras import example_room
from internvl_edge.runtime import InternVL

SCRIPT = Path(__file__).parents[1] / "docs" / "pictures" / "chat.py"
#: Times and rates, which are others in each run.
MEASURED = re.compile(r"TTFT [\d.]+ m?s, \d+ tok/s")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    pytest.importorskip("pty", reason="pseudo-terminals are Unix's")
    specification = importlib.util.spec_from_file_location("chat_picture", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def shown(svg: str) -> list[str]:
    """Lines of the terminal, without what is measured."""
    texts = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return [MEASURED.sub("TTFT _", "".join(text.itertext())) for text in texts]


def test_the_picture_is_what_the_model_answers(script: ModuleType, tmp_path: Path) -> None:
    stored = shown(script.PICTURE.read_text(encoding="utf-8"))
    assert stored == shown(script.draw(script.converse(tmp_path)))

    fields = json.loads((example_room() / "receipt.json").read_text())["fields"]
    chat = InternVL.load(tmp_path / "bundle", device="cpu", threads=1).chat()
    for number, question in enumerate(script.QUESTIONS):
        answer = chat.send(question, [script.RECEIPT] if number == 0 else []).text
        assert answer == fields[question.removeprefix("What is the ").removesuffix("?")]
        place = stored.index(f"> {question}")
        assert stored[place + 1] == answer
        assert stored[place + 2].startswith("[stop] ")


def test_long_lines_are_cut_and_markup_is_shown(script: ModuleType) -> None:
    lines = ["$ a", "<b> & " * 40, ""]
    assert shown(script.draw(lines))[:3] == lines
