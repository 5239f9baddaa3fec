"""What `progress` is told: every tile and every token, in order, and how many there are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from internvl_edge.runtime import InternVL, Progress, UsageError
from internvl_edge.runtime.decoding import passes

PICTURE = np.random.default_rng(0).integers(0, 256, (90, 300, 3), np.uint8)


@pytest.fixture
def told() -> list[Progress]:
    return []


def stages(told: list[Progress]) -> dict[str, list[tuple[int, int]]]:
    found: dict[str, list[tuple[int, int]]] = {}
    for one in told:
        found.setdefault(one.stage, []).append((one.done, one.total))
    return found


def test_tiles_then_tokens(
    golden_model: InternVL, told: list[Progress], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "VISION_BYTES", 1)  # a tile at a time
    monkeypatch.setattr(passes, "MAX_CHUNK", 16)
    tiles = len(golden_model.tile(PICTURE))
    assert tiles > 2
    reply = golden_model.generate(
        "What?", [PICTURE, PICTURE], max_new_tokens=2, progress=told.append
    )
    found = stages(told)
    assert list(found) == ["tiles", "prompt"]
    assert found["tiles"] == [(done, 2 * tiles) for done in range(2 * tiles + 1)]
    tokens = reply.timings.prompt_tokens
    assert found["prompt"] == [(done, tokens) for done in [*range(0, tokens, 16), tokens]]
    assert reply.timings.tiles == 2 * tiles


def test_what_is_known_is_done(golden_bundle: Path, told: list[Progress]) -> None:
    model = InternVL.load(golden_bundle, device="cpu", threads=1)
    model.encode_images([PICTURE])
    chat = model.chat()
    chat.send("What?", [PICTURE], max_new_tokens=2, progress=told.append)
    tiles = len(model.tile(PICTURE))
    assert stages(told)["tiles"] == [(0, tiles), (tiles, tiles)]
    told.clear()
    reply = chat.send("And?", max_new_tokens=2, progress=told.append)
    first, *_, last = told
    assert first == Progress("prompt", reply.timings.cached_tokens, reply.timings.prompt_tokens)
    assert first.done > 0
    assert last.done == last.total == reply.timings.prompt_tokens


def test_what_it_raises_ends_the_answer(golden_model: InternVL) -> None:
    def stop(progress: Progress) -> None:
        raise TimeoutError(progress.stage)

    chat = golden_model.chat()
    with pytest.raises(TimeoutError, match="tiles"):
        chat.send("What?", [PICTURE], progress=stop)
    assert chat.history == []
    assert chat.send("What?", max_new_tokens=2).token_ids
    with pytest.raises(UsageError, match="progress is 'loud', it must be a function"):
        chat.send("What?", progress="loud")  # type: ignore[arg-type]
