"""Arguments as people write them are what they mean, or one error that names them."""

from __future__ import annotations

import io
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from internvl_edge.bundle.extras import example_room
from internvl_edge.runtime import (
    Chat,
    ImageError,
    InternVL,
    InternVLEdgeError,
    LimitError,
    Picture,
    PromptError,
    Sampling,
    UsageError,
    frames_prompt,
)

PIXELS = np.random.default_rng(3).integers(0, 256, (60, 80, 3), np.uint8)
PICTURE = Image.fromarray(PIXELS)
RECEIPT = example_room() / "receipt.png"
ONE: dict[str, Any] = {"max_new_tokens": 1, "max_tiles": 1}


def encoded() -> bytes:
    stream = io.BytesIO()
    PICTURE.save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def chat(golden_model: InternVL) -> Chat:
    return golden_model.chat(max_tiles=1)


@pytest.mark.parametrize("given", [str, lambda text: [text], lambda text: iter({text})])
def test_one_stop_text_is_one(golden_model: InternVL, given: Callable[[str], Any]) -> None:
    """Not its letters: each of them would end the answer."""
    text = golden_model.generate("Hello", max_new_tokens=20).text
    whole = text[3:7]
    got = golden_model.generate("Hello", max_new_tokens=20, stop=given(whole))
    assert got.text == text[: text.index(whole)].strip()
    assert golden_model.generate("Hello", max_new_tokens=20, stop=None).text == text


@pytest.mark.parametrize(
    "one",
    [str(RECEIPT), RECEIPT, RECEIPT.read_bytes(), bytearray(RECEIPT.read_bytes())],
    ids=["text", "path", "bytes", "bytearray"],
)
def test_one_picture_is_one(golden_model: InternVL, chat: Chat, one: Any) -> None:
    wanted = golden_model.generate("What?", [one], **ONE)
    for images in (one, (one,), iter([one])):
        got = golden_model.generate("What?", images, **ONE)
        assert got.timings.prompt_tokens == wanted.timings.prompt_tokens
    assert golden_model.encode_images(one, 1).shape == golden_model.encode_images([one], 1).shape
    chat.send("What?", one, max_new_tokens=1)


@pytest.mark.parametrize("one", [PICTURE, PIXELS], ids=["PIL", "array"])
def test_one_picture_of_pixels_is_one(golden_model: InternVL, one: Any) -> None:
    wanted = golden_model.generate("What?", [one], **ONE).timings.prompt_tokens
    assert golden_model.generate("What?", one, **ONE).timings.prompt_tokens == wanted
    frames = np.stack([PIXELS, PIXELS])
    two = golden_model.generate("What?", list(frames), **ONE).timings.prompt_tokens
    assert golden_model.generate("What?", frames, **ONE).timings.prompt_tokens == two > wanted


def test_none_is_the_default(golden_model: InternVL, chat: Chat) -> None:
    wanted = golden_model.generate("Hello")
    none = dict.fromkeys(("max_new_tokens", "max_tiles", "sampling", "stop", "system_message"))
    assert golden_model.generate("Hello", None, **none).token_ids == wanted.token_ids
    assert Sampling(**dict.fromkeys(vars(Sampling()))) == Sampling()
    chat.send("Hello", None, max_new_tokens=2, sampling=None, stop=None)


@pytest.mark.parametrize(
    "five", [5.0, np.int64(5), np.uint8(5), np.float32(5), Fraction(5), np.array(5)], ids=repr
)
def test_whole_numbers(golden_model: InternVL, five: Any) -> None:
    assert len(golden_model.generate("Hello", max_new_tokens=five).token_ids) == 5
    tiles = golden_model.tile(np.zeros((56, 56 * 9, 3), np.uint8), five)
    assert len(tiles) == 6
    sampling = Sampling(top_k=five, seed=five, temperature=five)
    assert sampling == Sampling(top_k=5, seed=5, temperature=5.0)
    assert {type(value) for value in vars(sampling).values()} <= {int, float}
    assert golden_model.generate([five, 7, 9], max_new_tokens=1).timings.prompt_tokens == 3


@pytest.mark.parametrize("sampling", [{"temperature": 0.7, "seed": 3}, {"top_k": 4.0}, {}], ids=str)
def test_sampling_by_its_fields(golden_model: InternVL, sampling: dict[str, Any]) -> None:
    wanted = golden_model.generate("Hello", max_new_tokens=9, sampling=Sampling(**sampling))
    got = golden_model.generate("Hello", max_new_tokens=9, sampling=sampling)
    assert got.token_ids == wanted.token_ids


@pytest.mark.parametrize("temperature", [1e-308, 5e-324, 1e-6])
@pytest.mark.parametrize("top_k", [0, 3])
def test_next_to_no_temperature_is_greedy(
    golden_model: InternVL, temperature: float, top_k: int
) -> None:
    cold = Sampling(temperature=temperature, top_k=top_k, seed=1)
    assert cold.greedy
    wanted = golden_model.generate("Hello", max_new_tokens=9)
    assert golden_model.generate("Hello", max_new_tokens=9, sampling=cold).token_ids == (
        wanted.token_ids
    )


@pytest.mark.parametrize(
    "extreme",
    [
        {"repetition_penalty": 1e-308},
        {"repetition_penalty": 1e308},
        {"repetition_penalty": 1e-308, "temperature": 1e-5},
        {"temperature": 1e308, "top_p": 5e-324},
        {"temperature": 1.0, "min_p": 5e-324},
        {"temperature": 1e-5, "top_p": 0.5, "min_p": 1.0},
    ],
    ids=str,
)
def test_extremes_still_draw_a_token(golden_model: InternVL, extreme: dict[str, float]) -> None:
    assert golden_model.generate("Hello", max_new_tokens=9, sampling={**extreme, "seed": 0})


REFUSED: list[tuple[dict[str, Any], type[InternVLEdgeError], str]] = [
    ({"max_new_tokens": "5"}, LimitError, "max_new_tokens is '5', it must be a whole number"),
    ({"max_new_tokens": 4.5}, LimitError, "max_new_tokens is 4.5, it must be a whole number"),
    ({"max_new_tokens": True}, LimitError, "max_new_tokens is True"),
    ({"max_new_tokens": float("nan")}, LimitError, "max_new_tokens is nan"),
    ({"max_tiles": "2"}, LimitError, "max_tiles is '2', it must be a whole number"),
    ({"prompt": b"What is the TOTAL?"}, PromptError, "prompt must be text or a row of token ids"),
    ({"prompt": [1.9, 2.9]}, PromptError, r"prompt\[0\] is 1.9, it must be a token id"),
    ({"prompt": [[1, 2]]}, PromptError, r"prompt\[0\] is \[1, 2\], it must be a token id"),
    ({"prompt": [5, None]}, PromptError, r"prompt\[1\] is None"),
    ({"prompt": 7}, PromptError, "prompt must be text or a row of token ids, not 7"),
    ({"stop": 7}, PromptError, "stop is 7, it must be one of the texts, or a list of them"),
    ({"stop": b"a"}, PromptError, "stop is b'a'"),
    ({"stop": ["a", 7]}, PromptError, r"stop\[1\] is 7, it must be text"),
    ({"sampling": 0.5}, LimitError, "sampling is 0.5, it must be a Sampling or its fields"),
    ({"sampling": {"heat": 1}}, LimitError, "sampling has no field 'heat'; known: min_p, "),
    ({"sampling": {"top_k": 1.5}}, LimitError, "top_k is 1.5, it must be a whole number"),
    ({"images": 7}, ImageError, "PIL.Image or uint8 array, not int"),
    ({"images": {"a": 1}}, ImageError, "images is {'a': 1}, it must be one of the pictures"),
    ({"system_message": 7}, PromptError, "system_message is 7, it must be text"),
    ({"ignore_eos": "no"}, LimitError, "ignore_eos is 'no', it must be True or False"),
]


@pytest.mark.parametrize(("given", "error", "said"), REFUSED, ids=[said for *_, said in REFUSED])
def test_what_is_left_is_refused_by_name(
    golden_model: InternVL, given: dict[str, Any], error: type[InternVLEdgeError], said: str
) -> None:
    with pytest.raises(error, match=said):
        golden_model.generate(**{"prompt": "Hello", **given})


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
@pytest.mark.parametrize("value", ["1", b"1", True, [1], 1j, Decimal(1)], ids=repr)
def test_fields_of_sampling_are_numbers(name: str, value: Any) -> None:
    with pytest.raises(LimitError, match=f"^{name} is .* it must be a number$"):
        Sampling(**{name: value})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"threads": "2"}, "threads is '2', it must be a whole number"),
        ({"threads": 2**31}, "threads is 2147483648, it must be at most 1024"),
        ({"max_context": "2"}, "max_context is '2', it must be a whole number"),
        ({"reuse_bytes": "1"}, "reuse_bytes is '1'"),
        ({"reuse_bytes": -1}, "reuse_bytes is -1, it must be at least 0"),
        ({"image_folder": 7}, "image_folder is 7, it must be a path"),
        ({"image_folder": "a\0b"}, "a path has no NUL in it"),
        ({"image_folder": "\ud800"}, "image_folder is '\\ud800', it is no path"),
        ({"path": "\ud800"}, "path is '\\ud800', it is no path"),
        ({"image_folder": "{}", "image_folder_bytes": "1"}, "image_folder_bytes is '1'"),
        ({"image_folder": "{}", "image_folder_days": "1"}, "image_folder_days is '1'"),
        ({"low_memory": "no"}, "low_memory is 'no', it must be True or False"),
        ({"verify": ["hash"]}, "verify is "),
        ({"device": ["cpu"]}, "unknown device "),
        ({"path": 7}, "path is 7, it must be a path"),
        ({"path": ""}, "path is '', it must be a path"),
        ({"build_engines": 5}, "build_engines is 5, it must be a function"),
    ],
    ids=str,
)
def test_loading_names_what_it_does_not_take(
    golden_bundle: Path, tmp_path: Path, given: dict[str, Any], said: str
) -> None:
    if given.get("image_folder") == "{}":
        given = {**given, "image_folder": tmp_path}
    with pytest.raises(InternVLEdgeError) as caught:
        InternVL.load(**{"path": golden_bundle, "device": "cpu", **given})
    assert said in str(caught.value)


def test_loading_takes_what_is_meant(golden_bundle: Path) -> None:
    given: dict[str, Any] = {"threads": 1.0, "max_context": np.int32(64), "reuse_bytes": None}
    model = InternVL.load(str(golden_bundle), device="cpu", **given)
    assert model.max_context == 64


def test_paths_at_home(
    golden_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of bundles, folders of images and conversations, as of pictures."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "bundle").symlink_to(golden_bundle)
    model = InternVL.load("~/bundle", device="cpu", threads=1, image_folder=Path("~/rows"))
    chat = model.chat(max_tiles=1)
    chat.send("What?", [PIXELS], max_new_tokens=1)
    chat.save("~/chat.json")
    assert model.chat(messages=Path("~/chat.json")).history == chat.history
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "chat.json", "rows"]


@pytest.mark.parametrize(
    ("history", "said"),
    [
        (5, "history is 5, it must be one of the turns"),
        (["What?"], r"history\[0\] is 'What\?', it must be a question and its answer"),
        ([("a", "b"), ("c",)], r"history\[1\] is \('c',\), it must be a question and its answer"),
        ([("a", None)], r"history\[0\]\[1\] is None, it must be text"),
        ([(b"a", "b")], r"history\[0\]\[0\] is b'a', it must be text"),
    ],
    ids=str,
)
def test_a_history_is_questions_and_answers(
    golden_model: InternVL, history: Any, said: str
) -> None:
    chat = golden_model.chat()
    chat.history = [("a", "b")]
    with pytest.raises(PromptError, match=said):
        chat.history = history
    assert chat.history == [("a", "b")]


class Odd:
    """Answers nothing rightly."""

    def __repr__(self) -> str:
        raise RuntimeError


ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**70, 0.0, 1.0, 2.5, -0.0, 1e-308, 1e308, float("nan"),
    float("inf"), 1j, "", "1", "a", "\0", "\ud800", "x" * 5000, b"", b"\xff", bytearray(b"a"),
    [], [None], ["a"], [0], [[]], [b"a"], (), ("a", 1), {}, {"a": 1}, {1: 2}, set(), {"a"},
    range(3), np.int64(3), np.float32(0.5), np.bool_(True), np.array(3), np.array("a"),
    np.zeros(0), np.zeros((2, 2)), np.zeros((0, 5, 5, 3), np.uint8), np.array([None, 1]),
    Decimal("1.5"), Fraction(1, 3), Path("nowhere"), object(), Odd(), int, len, Ellipsis,
    Sampling(), PICTURE, PIXELS, memoryview(b"abc"), iter([1]), Exception("a"),
]  # fmt: skip


def calls(model: InternVL, chat: Chat) -> dict[str, tuple[Callable[..., object], list[str]]]:
    """Public calls, and the arguments that are tried of each."""
    asked = ["prompt", "images", "max_new_tokens", "sampling", "stop", "ignore_eos"]
    asked += ["skip_special_tokens", "clean_up", "priority"]
    told = [*asked, "max_tiles", "system_message", "messages"]
    return {
        "generate": (model.generate, told),
        "stream": (lambda **given: model.stream(**given).finish(), told),
        "send": (chat.send, asked),
        "chat": (model.chat, ["system_message", "max_tiles", "messages"]),
        "tile": (model.tile, ["image", "max_tiles"]),
        "encode_images": (model.encode_images, ["images", "max_tiles"]),
        "logits": (model.logits, ["token_ids", "images", "max_tiles"]),
        "logits_of_tiles": (model.logits_of_tiles, ["token_ids", "tiles"]),
        "Sampling": (Sampling, list(vars(Sampling()))),
        "Picture": (Picture, ["frame", "upright"]),
        "frames_prompt": (frames_prompt, ["question", "frames", "first"]),
    }


#: What each call is given beside the odd value.
USUAL: dict[str, Any] = {
    "generate": {"prompt": "Hello", "max_new_tokens": 1},
    "stream": {"prompt": "Hello", "max_new_tokens": 1},
    "send": {"prompt": "Hello", "max_new_tokens": 1},
    "tile": {"image": PIXELS},
    "encode_images": {"images": [PIXELS]},
    "Picture": {"source": PIXELS},
    "frames_prompt": {"question": "What?", "frames": 2},
    "logits": {"token_ids": [3, 4]},
    "logits_of_tiles": {"token_ids": [3, 4], "tiles": np.zeros((0, 56, 56, 3), np.uint8)},
}


def refusal(call: Callable[..., object], given: dict[str, Any]) -> str:
    """What our error says, or nothing."""
    try:
        call(**given)
    except InternVLEdgeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", [*USUAL, "chat", "Sampling"])
def test_odd_values_are_taken_or_refused(
    golden_model: InternVL, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but our errors, on one line of bounded length, for whatever value."""
    monkeypatch.chdir(tmp_path)
    tried = 0
    call, arguments = calls(golden_model, golden_model.chat(max_tiles=1))[name]
    for argument in arguments:
        for value in ODD:
            if name == "send":
                call = golden_model.chat(max_tiles=1).send
            given = {**USUAL.get(name, {}), argument: value}
            if argument == "messages":
                given.pop("prompt", None)
            if argument in ("max_new_tokens", "ignore_eos"):
                given["stop"] = list("abcdefghijklmnopqrstuvwxyz ")  # a long answer ends soon
            said = refusal(call, given)
            assert "\n" not in said
            assert len(said) < 700, (argument, value)
            tried += 1
    assert tried == len(arguments) * len(ODD)


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: model.generate("Hello", max_token=5),
        lambda model: model.stream("Hello", max_token=5),
        lambda model: model.chat().send("Hello", max_token=5),
        lambda model: model.chat().stream("Hello", max_token=5),
    ],
    ids=["generate", "stream", "send", "chat.stream"],
)
def test_an_unknown_option_is_named(
    golden_model: InternVL, ask: Callable[[InternVL], object]
) -> None:
    known = r"there is no option 'max_token'; known: clean_up, .*max_new_tokens, "
    with pytest.raises(UsageError, match=known):
        ask(golden_model)
    with pytest.raises(UsageError, match="there is no option 'messages'"):
        golden_model.chat().send("Hello", messages=[])  # type: ignore[call-arg]
