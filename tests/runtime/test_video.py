"""Frames of videos: which, in what order, and how they are asked about."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_edge.runtime import (
    ImageError,
    InternVL,
    InternVLEdgeError,
    Picture,
    frames_prompt,
    video_frames,
)
from internvl_edge.runtime.images.video import frame_indices

av = pytest.importorskip("av")
FRAMES, RATE, SIDE = 40, 10, 64


@pytest.fixture(scope="module")
def video() -> bytes:
    """A frame's grey is six times its number."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="matroska") as container:
        track = container.add_stream("ffv1", rate=RATE)
        track.width = track.height = SIDE
        track.pix_fmt = "yuv420p"
        for number in range(FRAMES):
            pixels = np.full((SIDE, SIDE, 3), 6 * number, np.uint8)
            for packet in track.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in track.encode():
            container.mux(packet)
    return stream.getvalue()


def numbers(frames: list[Picture]) -> list[int]:
    return [round(float(np.mean(np.asarray(frame.source))) / 6) for frame in frames]


def reference_indices(bound: object, fps: float, max_frame: int, segments: int) -> list[int]:
    """`get_index` of the model cards of InternVL2 to 3.5, word for word but for its name."""
    if bound:
        start, end = bound[0], bound[1]  # type: ignore[index]
    else:
        start, end = -100000, 100000
    start_idx = max(0, round(start * fps))
    end_idx = min(round(end * fps), max_frame)
    seg_size = float(end_idx - start_idx) / segments
    return [int(start_idx + (seg_size / 2) + np.round(seg_size * idx)) for idx in range(segments)]


@given(
    st.integers(1, 5000),
    st.sampled_from([1.0, 24.0, 25.0, 30000 / 1001, 60.0]),
    st.integers(1, 64),
    st.one_of(st.none(), st.tuples(st.floats(0, 50), st.floats(0.1, 50))),
)
def test_frames_are_the_reference_s(
    frames: int, rate: float, count: int, bound: tuple[float, float] | None
) -> None:
    start, stop = (None, None) if bound is None else (bound[0], bound[0] + bound[1])
    if start is not None and round(start * rate) > frames - 1:
        with pytest.raises(ImageError, match="the video ends after"):
            frame_indices(frames, rate, count, start, stop)
        return
    wanted = None if start is None else (start, stop)
    found = frame_indices(frames, rate, count, start, stop)
    assert found == reference_indices(wanted, rate, frames - 1, count)
    assert all(0 <= index < frames for index in found)


def test_frames_by_time_and_by_number(video: bytes, tmp_path: Path) -> None:
    assert numbers(video_frames(video, count=4)) == frame_indices(FRAMES, RATE, 4, None, None)
    assert numbers(video_frames(video, indices=[0, 7, 39])) == [0, 7, 39]
    late = numbers(video_frames(video, count=3, start_s=2, stop_s=3))
    assert late == frame_indices(FRAMES, RATE, 3, 2, 3)
    assert 20 <= min(late) <= max(late) <= 30
    (tmp_path / "clip.mkv").write_bytes(video)
    assert numbers(video_frames(tmp_path / "clip.mkv", indices=[5])) == [5]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"count": 0}, "count is 0, it must be in 1..1024"),
        ({"count": 2.5}, "count is 2.5, it must be a whole number"),
        ({"count": "2"}, "count is '2', it must be a whole number"),
        ({"start_s": "3"}, "start_s is '3', it must be a number"),
        ({"stop_s": b"3"}, "stop_s is b'3', it must be a number"),
        ({"start_s": float("nan")}, "from nan s to None s are none"),
        ({"start_s": 3, "stop_s": 2}, "from 3 s to 2 s are none"),
        ({"start_s": 99}, "the video ends after 4.0 s, before 99 s"),
        ({"indices": [40]}, "has 40 frames, numbered from 0"),
        ({"indices": [3, 1]}, "ascending"),
        ({"indices": []}, "ascending"),
        ({"indices": [1.5]}, r"indices\[0\] is 1.5, it must be a whole number"),
        ({"indices": "12"}, "indices is '12', it must be a row of whole numbers"),
        ({"indices": 3}, "indices is 3, it must be a row of whole numbers"),
    ],
)
def test_frames_that_are_none(video: bytes, options: dict[str, object], said: str) -> None:
    with pytest.raises(InternVLEdgeError, match=said):
        video_frames(video, **options)  # type: ignore[arg-type]


def test_numbers_are_what_is_meant(video: bytes) -> None:
    plain = numbers(video_frames(video, count=2))
    assert numbers(video_frames(video, count=2.0)) == plain  # type: ignore[arg-type]
    assert numbers(video_frames(video, indices=np.array([0, 7]))) == [0, 7]  # type: ignore[arg-type]
    assert frames_prompt("What?", 2.0) == frames_prompt("What?", 2)  # type: ignore[arg-type]
    for asked, said in ((("What?", "2"), "frames is '2'"), ((b"What?", 2), "question is b'What")):
        with pytest.raises(InternVLEdgeError, match=said):
            frames_prompt(*asked)  # type: ignore[arg-type]


def test_a_video_at_home(video: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "clip.mkv").write_bytes(video)
    for path in ("~/clip.mkv", Path("~/clip.mkv")):
        assert numbers(video_frames(path, indices=[5])) == [5]


@pytest.mark.parametrize("source", ["none.mp4", b"no video", b"", 3, None, "/dev/zero"])
def test_what_is_no_video(source: object) -> None:
    with pytest.raises(ImageError):
        video_frames(source)  # type: ignore[arg-type]


def test_a_video_that_is_cut_short(video: bytes) -> None:
    for length in range(0, len(video), 997):
        try:
            frames = video_frames(video[:length], indices=[0, 39])
        except ImageError:
            continue
        assert numbers(frames) == [0, 39]


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImageError, match=r"pip install 'internvl-edge\[video\]'"):
        video_frames("x.mp4")


def test_a_question_about_frames(golden_model: InternVL, video: bytes) -> None:
    frames = video_frames(video, count=3)
    prompt = frames_prompt("What happens?", 3)
    assert prompt == "Frame1: <image>\nFrame2: <image>\nFrame3: <image>\nWhat happens?"
    told = golden_model.generate(prompt, frames, max_new_tokens=4)
    plain = [np.asarray(frame.source) for frame in frames]
    expected = golden_model.generate(prompt, plain, max_tiles=1, max_new_tokens=4)
    assert told.token_ids == expected.token_ids
    assert told.timings.prompt_tokens == expected.timings.prompt_tokens


def test_each_picture_has_its_own_tiling(golden_model: InternVL) -> None:
    wide = np.zeros((56, 56 * 4, 3), np.uint8)
    pictures = [Picture(wide, max_tiles=1), Picture(wide, max_tiles=2), wide]
    counts = [golden_model.tile_with_identity(picture, 4).tiles for picture in pictures]
    assert counts == [1, 3, 5]
