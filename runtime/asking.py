"""Arguments of everything that answers, told once; and what is asked with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict, cast

from internvl_edge.bundle.errors import UsageError
from internvl_edge.bundle.quoting import quoted
from internvl_edge.bundle.text_form import TextForm
from internvl_edge.runtime.arguments import (
    flag,
    function_or_none,
    prompts,
    texts,
    token_ids,
    whole_or,
)
from internvl_edge.runtime.backends import Cache
from internvl_edge.runtime.decoding.inputs import Inputs
from internvl_edge.runtime.decoding.progress import ProgressCallback
from internvl_edge.runtime.decoding.request import Request, Timings
from internvl_edge.runtime.decoding.sampling import Sampling
from internvl_edge.runtime.images.identity import TiledImage
from internvl_edge.runtime.images.sources import Images
from internvl_edge.runtime.messages import Messages, asked

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AnswerOptions(TypedDict, total=False):
    """How an answer is made.

    Attributes:
        max_new_tokens: the answer ends there with finish_reason "length"; the checkpoint's own or
            1,024 unless told otherwise.
        sampling: the checkpoint's own, which is `InternVL.sampling`, or greedy unless told
            otherwise; fields by name leave the others as they are there.
        stop: texts that end the answer; they are not part of it.
        extra_stops: end at tokens that end answers of other models too, where the vocabulary has
            them (`<|endoftext|>`, `</s>`, `<|im_end|>`, `<|end|>`), which is the default: a
            fine-tune may have learnt another than its template's. False ends as the reference does.
        ignore_eos: go on after the model's own end of the answer, to `max_new_tokens` or a stop
            text: for measurements.
        skip_special_tokens: leave control tokens out of the text, as the reference does, which is
            the default; False shows `<ref>`, `<box>` and their like. Tokens that are added but not
            special are always there.
        clean_up: drop blanks before punctuation (`5 .` becomes `5.`) where the reference's
            tokenizer does, which is the default; False gives the text as it was generated.
        progress: called as the prompt is worked through; see `Progress`.
        priority: where requests wait for each other, those of a larger one begin earlier; 0 unless
            told otherwise.
    """

    max_new_tokens: int | None
    sampling: Sampling | Mapping[str, Any] | None
    stop: str | Sequence[str] | None
    extra_stops: bool | None
    ignore_eos: bool | None
    skip_special_tokens: bool | None
    clean_up: bool | None
    progress: ProgressCallback | None
    priority: int | None


class PromptOptions(AnswerOptions, total=False):
    """How an answer is made, and its prompt.

    Attributes:
        messages: a whole conversation instead of a prompt and its images; see `read_messages`.
        max_tiles: most tiles per image, without thumbnail; None is the checkpoint's own.
        system_message: instead of the checkpoint's.
        control_tokens: whether a text that spells one (`<|im_end|>`, `<IMG_CONTEXT>`) has it, as
            the reference does; else it is text, and nobody forges a turn by writing one.
        thinking: ask for reasoning before the answer, by the published system message unless one
            is told, and keep it apart: `Reply.thinking`, and pieces that say so.
    """

    messages: Messages | None
    max_tiles: int | None
    system_message: str | None
    control_tokens: bool | None
    thinking: bool | None


@dataclass(frozen=True)
class Started:
    """An answer that was just asked for: when, and where its time goes."""

    timings: Timings = field(default_factory=Timings)
    at: float = field(default_factory=time.perf_counter)

    def tiled(self) -> None:
        """Note that the images are cut."""
        self.timings.preprocess_s = time.perf_counter() - self.at


def check_names(options: Mapping[str, Any], kind: type) -> None:
    """Raise UsageError where an option is none of a TypedDict's."""
    known = sorted(kind.__annotations__)
    for name in options:
        if name not in known:
            raise UsageError(f"there is no option {quoted(name)}; known: {', '.join(known)}")


def new_tokens(inputs: Inputs, options: AnswerOptions) -> int:
    """Return the most tokens of an answer.

    Raises:
        UsageError: it is no whole number.
    """
    return whole_or("max_new_tokens", options.get("max_new_tokens"), inputs.max_new_tokens)


def request(
    inputs: Inputs,
    ids: Sequence[int],
    images: Sequence[TiledImage],
    options: AnswerOptions,
    started: Started,
    cache: Cache | None = None,
    *,
    thinking: bool = False,
) -> Request:
    """Return the request for an answer to token ids.

    Args:
        inputs: of the model.
        cache, thinking: see `Request`.

    Raises:
        PromptError, LimitError: an option is not what it must be; the message names it.
    """
    extra = flag("extra_stops", options.get("extra_stops"), default=True)
    return Request(
        ids,
        {*inputs.stop_ids, *(inputs.extra_stop_ids if extra else ())},
        images,
        max_new_tokens=new_tokens(inputs, options),
        sampling=Sampling.of(options.get("sampling"), inputs.sampling),
        stop=texts("stop", options.get("stop")),
        ignore_eos=flag("ignore_eos", options.get("ignore_eos")),
        form=TextForm(
            flag("skip_special_tokens", options.get("skip_special_tokens"), default=True),
            flag("clean_up", options.get("clean_up"), default=True),
        ),
        thinking=thinking,
        cache=cache,
        progress=function_or_none("progress", options.get("progress")),
        timings=started.timings,
        started=started.at,
        priority=whole_or("priority", options.get("priority"), 0),
    )


def prompt_request(
    inputs: Inputs,
    prompt: str | Sequence[int] | None,
    images: Images,
    **options: Unpack[PromptOptions],
) -> Request:
    """Return the request for an answer to one prompt; see `InternVL.stream`.

    Raises:
        ImageError, PromptError, LimitError: it cannot be answered.
    """
    check_names(options, PromptOptions)
    started = Started()
    told = asked(prompt, images, options.get("messages"), options.get("system_message"), inputs)
    thinking = flag("thinking", options.get("thinking"))
    system_message = inputs.system_message(told.system_message, thinking=thinking)
    tiled = told.tile(inputs, options.get("max_tiles"))
    started.tiled()
    if isinstance(prompt, str) or prompt is None:
        live = flag("control_tokens", options.get("control_tokens"))
        ids = inputs.conversation(told.turns, tiled, system_message, control_tokens=live)
    else:
        ids = token_ids("prompt", prompt)
    answer = cast(AnswerOptions, options)
    return request(inputs, ids, tiled, answer, started, thinking=thinking)


def item_requests(
    inputs: Inputs, items: Any, options: PromptOptions
) -> Iterator[Callable[[], Request]]:
    """Return what makes the requests for several prompts; see `InternVL.generate_batch`.

    Args:
        options: those that a prompt does not have itself.

    Raises:
        PromptError, UsageError: at once, where there are no prompts, or an option is unknown.
    """
    check_names(options, PromptOptions)
    return (partial(_item_request, inputs, one, options) for one in prompts("prompts", items))


def _item_request(inputs: Inputs, item: Any, options: PromptOptions) -> Request:
    own: dict[str, Any] = dict(item) if isinstance(item, Mapping) else {"prompt": item}
    prompt, images = own.pop("prompt", None), own.pop("images", ())
    check_names(own, PromptOptions)
    together = cast(PromptOptions, {**options, **own})
    return prompt_request(inputs, prompt, images, **together)
