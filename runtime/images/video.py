"""Frames of a video, chosen as the reference chooses them (spec: the published inference example).

frames = video_frames("clip.mp4", count=8)
model.generate(frames_prompt("What happens?", len(frames)), frames)
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.errors import ImageError, UsageError
from internvl_edge.bundle.files import at_home, check_regular
from internvl_edge.bundle.prompt import IMAGE_PLACEHOLDER
from internvl_edge.bundle.quoting import named, quoted, reason
from internvl_edge.bundle.signals import signals_held
from internvl_edge.runtime.arguments import number_or, text, whole, whole_numbers
from internvl_edge.runtime.images.sources import Picture

VideoLike: TypeAlias = "str | os.PathLike[str] | bytes"

#: Most frames of one question: as many tiles as the largest picture may have.
MAX_FRAMES = 1024


def video_frames(
    video: VideoLike,
    *,
    count: int = 8,
    start_s: float | None = None,
    stop_s: float | None = None,
    indices: Sequence[int] | None = None,
    max_tiles: int = 1,
) -> list[Picture]:
    """Decode frames of a video, each one picture of at most `max_tiles` tiles.

    Args:
        video: path or encoded bytes of a file that FFmpeg reads.
        count: how many, evenly spread over the time asked for: the middle of each of so many parts.
        start_s, stop_s: seconds from the beginning; None is its beginning and its end.
        indices: frames by number from 0 instead, ascending.
        max_tiles: of each frame; the models were trained with one.

    Raises:
        ImageError: the `video` extra is not installed, the file is no video or is damaged, or it
            has no such frames.
    """
    with _opened(video) as (container, label):
        stream = container.streams.video[0]
        times = [float(packet.pts) for packet in container.demux(stream) if packet.pts is not None]
        if not times:
            raise ImageError(f"{label} has no frames")
        rate = float(stream.average_rate or 1)
        wanted = (
            frame_indices(len(times), rate, count, start_s, stop_s)
            if indices is None
            else _checked(indices, len(times), label)
        )
        container.seek(0)
        frames = _decode(container, stream, wanted, label)
    return [Picture(frame, max_tiles=max_tiles) for frame in frames]


def frame_indices(
    frames: int, rate: float, count: int, start_s: float | None, stop_s: float | None
) -> list[int]:
    """Choose `count` frames as the reference's `get_index` does.

    Args:
        frames: how many there are.
        rate: frames a second.

    Raises:
        ImageError: a bound or the count makes no sense.
    """
    count = whole("count", count)
    if not 1 <= count <= MAX_FRAMES:
        raise ImageError(f"count is {quoted(count)}, it must be in 1..{MAX_FRAMES}")
    begin, end = number_or("start_s", start_s, 0.0), number_or("stop_s", stop_s, np.inf)
    if not 0 <= begin < end:
        raise ImageError(f"frames from {quoted(start_s)} s to {quoted(stop_s)} s are none")
    last = frames - 1
    first = max(0, round(begin * rate))
    stop = last if stop_s is None else min(round(end * rate), last)
    if first > last:
        raise ImageError(f"the video ends after {frames / rate:.1f} s, before {quoted(start_s)} s")
    part = (stop - first) / count
    return [int(first + part / 2 + np.round(part * number)) for number in range(count)]


def frames_prompt(question: str, frames: int, *, first: int = 1) -> str:
    """Write a question about frames as the reference does: `Frame1: <image>` and so on.

    Raises:
        PromptError, UsageError: an argument is none; the message names it.
    """
    start, count = whole("first", first), whole("frames", frames)
    if not 0 <= count <= MAX_FRAMES:
        raise UsageError(f"is {quoted(count)}, it must be in 0..{MAX_FRAMES}", option="frames")
    numbers = range(start, start + count)
    lines = [f"Frame{number}: {IMAGE_PLACEHOLDER}\n" for number in numbers]
    return "".join([*lines, text("question", question)])


def _checked(indices: Sequence[int], frames: int, label: str) -> list[int]:
    found = whole_numbers("indices", indices)
    if not 1 <= len(found) <= MAX_FRAMES or found != sorted(set(found)):
        raise ImageError(f"indices are {quoted(found)}; give 1 to {MAX_FRAMES} numbers, ascending")
    if found[0] < 0 or found[-1] >= frames:
        raise ImageError(f"{label} has {frames} frames, numbered from 0, not {quoted(found)}")
    return found


def _decode(
    container: Any, stream: Any, wanted: Sequence[int], label: str
) -> list[NDArray[np.uint8]]:
    """Decode up to the last frame that is wanted: `(H, W, 3)` each; one may be wanted twice."""
    left, frames = set(wanted), {}
    for number, frame in enumerate(container.decode(stream)):
        if number in left:
            frames[number] = frame.to_ndarray(format="rgb24")
            left.remove(number)
        if not left:
            break
    if left:
        raise ImageError(f"{label} ends before frame {min(left)}; it is damaged or cut short")
    return [frames[number] for number in wanted]


@contextmanager
def _opened(video: VideoLike) -> Iterator[tuple[Any, str]]:
    try:
        with signals_held():
            import av
    except ImportError as error:
        raise ImageError(
            "videos need PyAV: pip install 'internvl-edge[video]'; or give frames as pictures"
        ) from error
    if isinstance(video, (bytes, bytearray, memoryview)):
        source, label = io.BytesIO(video), f"{len(video)} bytes of a video"
    else:
        source, label = _path(video)
    try:
        with av.open(source) as container:
            if not container.streams.video:
                raise ImageError(f"{label} has no pictures in it")
            yield container, label
    except av.error.FFmpegError as error:
        raise ImageError(f"{label} cannot be decoded: {reason(error)}") from error


def _path(video: object) -> tuple[Any, str]:
    if not isinstance(video, (str, os.PathLike)):
        raise ImageError(f"a video is a path or bytes, not {type(video).__name__}")
    path, label = at_home(os.fsdecode(video)), named(video)
    try:
        check_regular(path)
    except OSError as error:
        raise ImageError(f"cannot read video {quoted(str(video))}: {reason(error)}") from error
    return path, label
