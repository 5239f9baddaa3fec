"""Conversations to prompt text: templates, image slots, stop tokens.

Strings are the reference's to the letter: no newline between turns before InternVL 2.5.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from internvl_edge.bundle.errors import PromptError
from internvl_edge.bundle.quoting import quoted
from internvl_edge.bundle.segments import Segment, joined

IMAGE_PLACEHOLDER = "<image>"
IMAGE_START = "<img>"
IMAGE_CONTEXT = "<IMG_CONTEXT>"
IMAGE_END = "</img>"

#: What ends an answer in one family or another: a fine-tune may end with another than its own.
END_TOKENS = ("<|endoftext|>", "</s>", "<|im_end|>", "<|end|>")

#: Around the reasoning of an answer, in InternVL 3.5.
THINK_START = "<think>"
THINK_END = "</think>"
#: The system message that was published to ask for it.
THINKING_MESSAGE = (
    "You are an AI assistant that rigorously follows this response protocol:\n\n"
    "1. First, conduct a detailed analysis of the question. Consider different angles, potential"
    " solutions, and reason through the problem step-by-step. Enclose this entire thinking process"
    " within <think> and </think> tags.\n\n"
    "2. After the thinking section, provide a clear, concise, and direct answer to the user's"
    " question. Separate the answer from the think section with a newline.\n\n"
    "Ensure that the thinking process is thorough but remains focused on the query. The final"
    " answer should be standalone and not reference the thinking section."
)

_INTERNVL = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
    "英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_INTERNVL_2_5 = (
    "你是书生·万象，英文名是InternVL，"
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)


#: A question: text, or segments where images stand in it.
Question: TypeAlias = "str | Sequence[Segment]"


@dataclass(frozen=True)
class Template:
    """The way one family of checkpoints writes a conversation.

    `system`, `user` and `assistant` open a turn, `separator` closes the first two; a finished
    answer stands between `answer_start` and `answer_end`.

    Attributes:
        system_message: what stands in the system turn; None: there is none unless the caller
            gives a message.
        numbers_images: whether several images are numbered.
    """

    system: str
    user: str
    assistant: str
    separator: str
    answer_end: str
    stop: str
    system_message: str | None
    answer_start: str = ""
    numbers_images: bool = True

    def segments(
        self, turns: Sequence[tuple[Question, str | None]], system_message: str | None
    ) -> list[Segment]:
        """Prompt of a conversation; an answer of None (or empty) is the one to be generated."""
        message = self.system_message if system_message is None else system_message
        found: list[Segment] = []
        if message is not None:
            found += self._turn(self.system, [Segment(message, False)])
        for question, answer in turns:
            asked = [Segment(question, False)] if isinstance(question, str) else question
            found += [*self._turn(self.user, asked), Segment(self.assistant, True)]
            if answer:
                found.append(Segment(self.answer_start, True))
                found += [Segment(answer, False), Segment(self.answer_end, True)]
        return found

    def _turn(self, start: str, content: Iterable[Segment]) -> list[Segment]:
        return [Segment(start, True), *content, Segment(self.separator, True)]

    def render(
        self, turns: Sequence[tuple[Question, str | None]], system_message: str | None
    ) -> str:
        """Return the text of `segments`, which is the reference's."""
        return joined(self.segments(turns, system_message))


def _chatml(
    system_message: str | None, newline: str = "", *, numbers_images: bool = True
) -> Template:
    end = f"<|im_end|>{newline}"
    return Template(
        system="<|im_start|>system\n",
        user="<|im_start|>user\n",
        assistant="<|im_start|>assistant\n",
        separator=end,
        answer_end=end,
        stop="<|im_end|>",
        system_message=system_message,
        numbers_images=numbers_images,
    )


#: Of checkpoints in transformers' own layout, whatever their decoder.
NATIVE_TEMPLATE = "internvl-hf"

_TEMPLATES = {
    NATIVE_TEMPLATE: _chatml(None, newline="\n", numbers_images=False),
    "internlm2-chat": _chatml(_INTERNVL),
    "Hermes-2": _chatml(_INTERNVL),
    "internvl2_5": _chatml(_INTERNVL_2_5, newline="\n"),
    "phi3-chat": Template(
        system="<|system|>\n",
        user="<|user|>\n",
        assistant="<|assistant|>\n",
        separator="<|end|>",
        answer_end="<|end|>",
        stop="<|end|>",
        system_message=_INTERNVL,
    ),
    "internvl_zh": Template(
        system="",
        user="<human>: ",
        assistant="<bot>:",
        separator=" ",
        answer_end="</s>",
        stop="</s>",
        system_message="",
        answer_start=" ",
    ),
}


def get_template(name: str) -> Template:
    """Template by the name in config.json.

    Raises:
        PromptError: unknown name.
    """
    try:
        return _TEMPLATES[name]
    except KeyError:
        raise PromptError(
            f"unknown prompt template {quoted(name)}; known: {', '.join(_TEMPLATES)}"
        ) from None


def place_images(
    question: str, new_images: int, earlier_images: int, *, numbered: bool = True
) -> str:
    """Give a question one `<image>` per new image, unless its author placed them.

    One image alone is written `<image>` on a line of its own; several are numbered
    `Image-1: <image>` ... through the whole conversation, the convention of the training data.

    Args:
        numbered: see `Template.numbers_images`.

    Raises:
        PromptError: empty question, or another number of `<image>` than of images.
    """
    if not question.strip():
        raise PromptError("the prompt is empty; ask something about the image or the text")
    placed = question.count(IMAGE_PLACEHOLDER)
    if placed == new_images:
        return question
    if placed:
        raise PromptError(
            f"the prompt has {placed} {IMAGE_PLACEHOLDER} for {new_images} images; write one per"
            " image, or none to have them put first"
        )
    if not numbered:
        return f"{IMAGE_PLACEHOLDER}\n" * new_images + question
    if earlier_images + new_images == 1:
        return f"{IMAGE_PLACEHOLDER}\n{question}"
    numbers = range(earlier_images + 1, earlier_images + new_images + 1)
    return "".join(f"Image-{i}: {IMAGE_PLACEHOLDER}\n" for i in numbers) + question


def expand_images(question: str, rows: Iterator[int]) -> list[Segment]:
    """Replace each `<image>`, left to right, by its slots.

    Args:
        rows: image rows of the conversation's images; one number is taken per `<image>`.
    """
    first, *others = question.split(IMAGE_PLACEHOLDER)
    found = [Segment(first, False)]
    for part in others:
        slots = f"{IMAGE_START}{IMAGE_CONTEXT * next(rows)}{IMAGE_END}"
        found += [Segment(slots, True), Segment(part, False)]
    return found
