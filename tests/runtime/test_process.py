"""A model stays in its process and is not copied: both are said, neither hangs."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from internvl_edge.runtime import InternVL, ProcessError

WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": pickle.dumps,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "deepcopy in a list": lambda thing: copy.deepcopy([thing]),
}

#: Forks while a thread generates and holds what it holds; the child says what each call raised.
FORK = """
import faulthandler, json, os, sys, threading, time, warnings
warnings.simplefilter("ignore")
from internvl_edge.runtime import InternVL, ProcessError

model = InternVL.load(sys.argv[1], device="cpu", threads=2)
chat, left = model.chat(), model.chat()
chat.send("Hello", max_new_tokens=2)
begun = left.stream("And?", max_new_tokens=400)
next(begun)
threading.Thread(target=lambda: [model.generate(str(n)) for n in range(99)], daemon=True).start()
time.sleep(0.2)
calls = {
    "generate": lambda: model.generate("What?"),
    "stream": lambda: model.stream([3, 4]),
    "chat": model.chat,
    "send": lambda: chat.send("What?"),
    "send after a stream": lambda: left.send("What?"),
    "next": lambda: next(begun),
    "close": begun.close,
    "finish": begun.finish,
    "tile": lambda: model.tile(b""),
    "encode_images": lambda: model.encode_images([b""]),
    "logits": lambda: model.logits([3, 4]),
    "logits_of_tiles": lambda: model.logits_of_tiles([3], []),
}
child = os.fork()
if not child:
    faulthandler.dump_traceback_later(20, exit=True)
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "nothing"
        except ProcessError as error:
            found[name] = str(error)
    print(json.dumps(found), flush=True)
    os._exit(0)
os.waitpid(child, 0)
print(len(model.generate("Still there?", max_new_tokens=3).token_ids), flush=True)
os._exit(0)
"""


#: Forks with the model's threads there, one of them at work; the child goes as a process does.
LEAVE = """
import asyncio, faulthandler, os, sys, warnings
warnings.simplefilter("ignore")
from internvl_edge.runtime import InternVL

model = InternVL.load(sys.argv[1], device="cpu", threads=1)
model.generate_batch([{"prompt": "What?", "images": sys.argv[2], "max_new_tokens": 2}])

under_way = model.astream("Hello", max_new_tokens=400)
loop = asyncio.new_event_loop()
loop.run_until_complete(under_way.__anext__())
child = os.fork()
if child:
    left = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(left, len(model.generate("Still there?", max_new_tokens=3).token_ids))
else:
    faulthandler.dump_traceback_later(20, exit=True)
    model.close()
"""


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_neither_pickled_nor_copied(golden_model: InternVL, way: Callable[[Any], Any]) -> None:
    chat = golden_model.chat()
    stream = chat.stream("Hello", max_new_tokens=2)
    for thing in (golden_model, chat, stream):
        name = type(thing).__name__
        with pytest.raises(ProcessError, match=f"{name} objects cannot be pickled or copied; load"):
            way(thing)
    assert stream.finish().token_ids  # as it was


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system has no fork")
def test_a_forked_process_is_told(golden_bundle: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(golden_bundle)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    told, parent = done.stdout.splitlines()
    found = json.loads(told)
    assert all("was forked from it; load the bundle here" in text for text in found.values()), found
    assert len(found) == 12
    assert int(parent) == 3


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system has no fork")
def test_a_forked_process_closes_the_model_and_ends(golden_bundle: Path, tmp_path: Path) -> None:
    """It waited for threads that it had not."""
    picture = tmp_path / "picture.png"
    Image.new("RGB", (60, 40), "white").save(picture)
    done = subprocess.run(
        [sys.executable, "-c", LEAVE, str(golden_bundle), str(picture)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["0", "3"], done.stderr
