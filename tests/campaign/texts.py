"""Random texts of many scripts through every tokenizer there are files for, beside transformers.

    cd tests && python -m campaign.texts --texts 10000 --old PYTHON

Ids are those of transformers' own class, and the streamed text is the decoded text, of the text's
ids and of as many random ones. The models with a SentencePiece file were used with the slow classes
of transformers 4.37.2, which later versions lack: PYTHON has that version.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from checkpoints import GOLDEN
from transformers import AutoTokenizer

from internvl_edge.bundle.text_stream import TextStream
from internvl_edge.bundle.token_files import FAST_FILE, MODEL_FILE
from internvl_edge.bundle.tokenizer import Tokenizer, load_tokenizer

FAMILIES = Path(__file__).parents[1] / "families"
FOLDERS = {"golden": GOLDEN / "model"}
FOLDERS |= {path.parent.name: path for path in sorted(FAMILIES.glob("*/model"))}
#: Digests of the slow classes' ids of the first texts, for those who lack that version.
DIGESTS = GOLDEN / "slow_tokenizers.json"
DIGESTED = 300

#: First and last characters of scripts and of signs, some of them never assigned.
SCRIPTS = (
    *((0x00, 0x1F), (0x20, 0x7E), (0xA1, 0x17F), (0x250, 0x2AF), (0x300, 0x36F), (0x370, 0x3FF)),
    *((0x400, 0x52F), (0x531, 0x58F), (0x591, 0x5F4), (0x600, 0x6FF), (0x900, 0x97F)),
    *((0x980, 0x9FE), (0xB80, 0xBFA), (0xE01, 0xE5B), (0xF00, 0xFDA), (0x1000, 0x109F)),
    *((0x10A0, 0x10FF), (0x1100, 0x11FF), (0x1200, 0x137C), (0x1780, 0x17F9), (0x1E00, 0x1FFF)),
    *((0x2000, 0x206F), (0x2070, 0x20CF), (0x2100, 0x214F), (0x2190, 0x22FF), (0x2500, 0x25FF)),
    *((0x2600, 0x27BF), (0x3000, 0x30FF), (0x3400, 0x34FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3)),
    *((0xE000, 0xE0FF), (0xF900, 0xFAFF), (0xFB00, 0xFDFF), (0xFE00, 0xFE6F), (0xFF00, 0xFFEF)),
    *((0x10330, 0x1034A), (0x12000, 0x12030), (0x1D400, 0x1D4FF), (0x1F300, 0x1FAFF)),
    *((0x20000, 0x20100), (0xE0020, 0xE007F)),
)
#: What splitting, composing and cleaning up treat in a way of their own.
WORDS = (
    *("the", "can't", "I'M", "we'LL", "12345", "3.14", "  ", "\n", "\n\n", " \n ", "\r\n", "\t"),
    *("\u2581", "<0x0A>", "def f(x):\n    return x", "http://a.b/c?d=e", "'s", " 's", "...", "!?"),
    *("\u00e9", "e\u0301", "\u200d", "\ufeff", "\u00a0", "\u3000", "<|im", "_end|>", "</s>x"),
    *(" .", " ,", " n't", "don 't"),
)

#: Prints the ids of texts by the slow class; its own copy of transformers has no more.
SLOW = """
import json, sys, transformers
assert transformers.__version__ == "4.37.2", transformers.__version__
for path, legacy, texts in json.load(sys.stdin):
    told = {} if legacy is None else {"legacy": legacy}
    model = transformers.LlamaTokenizer.from_pretrained(path, **told)
    print(json.dumps([model(text)["input_ids"] for text in texts]))
"""


@dataclass
class Found:
    """What one tokenizer did.

    Attributes:
        texts: how many were tried.
        ids: those whose ids are not the reference's; None: there was no reference.
        streams: those, and random ids, whose streamed text is not the decoded text.
    """

    texts: int
    ids: list[str] | None = None
    streams: list[object] = field(default_factory=list)


def random_texts(name: str, tokenizer: Tokenizer, count: int) -> list[str]:
    """Return texts of words, scripts and the tokenizer's own added tokens; always the same."""
    return [_text(random.Random(f"{name} {one}"), sorted(tokenizer.added)) for one in range(count)]


def _text(chance: random.Random, added: Sequence[str]) -> str:
    parts: list[str] = []
    for _ in range(chance.randint(0, 6)):
        kind = chance.random()
        if kind < 0.4:
            parts.append(chance.choice(added if kind < 0.15 else WORDS))
        else:
            first, last = chance.choice(SCRIPTS)
            count = chance.randint(1, 10)
            parts += (chr(chance.randint(first, last)) for _ in range(count))
        parts.append(" " * (chance.random() < 0.3))
    return "".join(parts)


def is_slow(folder: Path) -> bool:
    """Tell whether a tokenizer was used with a slow class."""
    return (folder / MODEL_FILE).exists() and not (folder / FAST_FILE).exists()


def expected_ids(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of the installed transformers' class."""
    model = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return [model(text)["input_ids"] for text in texts]


def slow_ids(python: str, folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of the slow class; InternLM2's own encodes as Llama's of before `legacy`."""
    legacy = True if folder == FOLDERS["golden"] else None
    asked = json.dumps([(str(folder), legacy, list(texts))])
    done = subprocess.run(
        [python, "-c", SLOW], input=asked, capture_output=True, text=True, check=True
    )
    found: list[list[int]] = json.loads(done.stdout)
    return found


def digest(ids: Sequence[int]) -> str:
    """Name ids in few letters."""
    return hashlib.sha256(json.dumps([*ids]).encode()).hexdigest()[:16]


def streamed(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the text of ids that arrive one by one."""
    stream = TextStream(tokenizer)
    return "".join([*map(stream.push, ids), stream.finish()])


def tried(name: str, count: int, old: str | None) -> Found:
    """Try one tokenizer."""
    folder, chance = FOLDERS[name], random.Random(name)
    tokenizer = load_tokenizer(folder)
    texts = random_texts(name, tokenizer, count)
    found, ids = Found(count), [tokenizer.encode(text) for text in texts]
    if not is_slow(folder) or old is not None:
        slow = is_slow(folder) and old is not None
        expected = slow_ids(str(old), folder, texts) if slow else expected_ids(folder, texts)
        pairs = zip(texts, ids, expected, strict=True)
        found.ids = [text for text, got, wanted in pairs if got != wanted]
    drawn = [chance.choices(range(tokenizer.size + 3), k=chance.randint(0, 40)) for _ in texts]
    found.streams = [
        one for one in [*ids, *drawn] if streamed(tokenizer, one) != tokenizer.decode(one)
    ]
    return found


def write_digests(old: str) -> None:
    """Write what the slow classes give of the first texts of each."""
    told = {}
    for name, folder in FOLDERS.items():
        if is_slow(folder):
            texts = random_texts(name, load_tokenizer(folder), DIGESTED)
            told[name] = [digest(ids) for ids in slow_ids(old, folder, texts)]
    DIGESTS.write_text(json.dumps({"transformers": "4.37.2", "ids": told}, indent=0) + "\n")


def main() -> int:
    """Try all, and print a row for each; exit status 1: something differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--old", metavar="PYTHON", help="has transformers 4.37.2 and sentencepiece")
    parser.add_argument("--write", action="store_true", help=f"write {DIGESTS.name} with --old")
    arguments = parser.parse_args()
    if arguments.write:
        write_digests(arguments.old)
        return 0
    wrong = 0
    for name in FOLDERS:
        found = tried(name, arguments.texts, arguments.old)
        ids = "-" if found.ids is None else len(found.ids)
        print(f"| `{name}` | {found.texts} | {ids} | {2 * found.texts} | {len(found.streams)} |")
        for one in [*(found.ids or [])[:3], *found.streams[:3]]:
            print(f"  {one!r}")
        wrong += len(found.ids or ()) + len(found.streams)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
