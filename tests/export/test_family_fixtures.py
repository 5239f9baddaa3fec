"""Every folder of `tests/families`: a whole tiny model of each decoder family and layout.

What transformers' own classes computed, through an exported bundle and the runtime.
"""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from internvl_edge.bundle.rope import rope_base
from internvl_edge.export.bundle import export_bundle
from internvl_edge.runtime import InternVL

FAMILIES = Path(__file__).parents[1] / "families"
NAMES = sorted(path.name for path in FAMILIES.iterdir() if path.is_dir())
EMBEDDING_TOLERANCE = 1e-4
LOGIT_TOLERANCE = 2e-4
#: Cases that tell a conversation, and those that tell ids: a prompt beyond the trained length, and
#: an answer that crosses it.
TOLD, LENGTHS = ("main", "history", "system"), ("long", "cross")
CASES = (*TOLD, *LENGTHS)

Arrays = dict[str, NDArray[Any]]


class Fixture:
    """One folder, and the model exported from it in float32."""

    def __init__(self, name: str, folder: Path) -> None:
        self.path = FAMILIES / name
        self.meta: dict[str, Any] = json.loads((self.path / "meta.json").read_text("utf-8"))
        with np.load(self.path / "expected.npz") as data:
            self.arrays: Arrays = dict(data)
        bundle = export_bundle(self.path / "model", folder / "bundle")
        self.model = InternVL.load(bundle, device="cpu", threads=1, reuse_bytes=0)
        self.images = [Image.open(self.path / image) for image in self.meta["images"]]
        # What transformers' own layout has beside the pixels of the original's.
        self.tiles = self.arrays.get("tiles_u8_torchvision", self.arrays["tiles_u8"])

    def expected(self, case: str, name: str) -> NDArray[Any]:
        return self.arrays[name if case == "main" else f"{case}_{name}"]

    def conversation(self, case: str) -> tuple[str | None, list[tuple[str, str | None]]]:
        """System message and turns of a case."""
        told = self.meta["cases"][case]
        if "messages" in told:
            return _paired(told["messages"])
        if "turns" in told:
            return None, [(question, answer) for question, answer in told["turns"]]
        question = told.get("question", self.meta["question"])
        count = len(self.images) if case == "main" else 0
        return told.get("system"), [(self.model.inputs.question(question, count, 0), None)]


def _paired(messages: list[dict[str, Any]]) -> tuple[str | None, list[tuple[str, str | None]]]:
    """Messages of text as a system message and turns."""
    texts = [(one["role"], _text(one["content"])) for one in messages]
    system = texts.pop(0)[1] if texts[0][0] == "system" else None
    answers = [text for role, text in texts if role == "assistant"]
    questions = [text for role, text in texts if role == "user"]
    return system, list(zip_longest(questions, answers))


def _text(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else content[0]["text"]


@pytest.fixture(scope="module", params=NAMES)
def fixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    return Fixture(request.param, tmp_path_factory.mktemp("family"))


def test_tiles(fixture: Fixture) -> None:
    tiles = [fixture.model.tile(image, fixture.meta["max_tiles"]) for image in fixture.images]
    np.testing.assert_array_equal(np.concatenate(tiles), fixture.tiles)


def test_image_embeddings(fixture: Fixture) -> None:
    got = fixture.model.encode_images(fixture.images, fixture.meta["max_tiles"])
    expected = fixture.arrays["image_embeds"].reshape(got.shape)
    np.testing.assert_allclose(got, expected, rtol=0, atol=EMBEDDING_TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_prompts_logits_and_greedy_answers(fixture: Fixture, case: str) -> None:
    """Token ids, the first logits, every greedy id; of the main case every step's logits."""
    model = fixture.model
    if case not in fixture.meta["cases"]:
        pytest.skip(f"the fixture has no case {case}")
    ids = fixture.expected(case, "input_ids").tolist()
    greedy = fixture.expected(case, "greedy_ids").tolist()
    images = fixture.images if case == "main" else []
    if case in TOLD:
        system, turns = fixture.conversation(case)
        tiled = [model.tile_with_identity(image, fixture.meta["max_tiles"]) for image in images]
        assert model.encode_conversation(turns, tiled, system) == ids
    tiles = fixture.tiles[: len(fixture.tiles) if images else 0]
    first = fixture.expected(case, "first_logits")
    got = model.logits_of_tiles(ids, tiles)[-1]
    np.testing.assert_allclose(got, first, rtol=0, atol=LOGIT_TOLERANCE)
    prompt: Any = fixture.meta["question"] if images else ids
    reply = model.generate(
        prompt,
        images,
        max_tiles=fixture.meta["max_tiles"],
        max_new_tokens=len(greedy),
        extra_stops=False,
    )
    # The reference goes on beyond what is offered.
    room = model.spec.language.max_context - len(ids) + 1
    assert reply.token_ids == greedy[:room]
    if case == "main" and not _stretched(fixture, len(ids) + len(greedy)):
        steps = model.logits_of_tiles([*ids, *greedy[:-1]], tiles)[len(ids) - 1 :]
        expected = fixture.arrays["step_logits"]
        np.testing.assert_allclose(steps, expected, rtol=0, atol=LOGIT_TOLERANCE)


def _stretched(fixture: Fixture, tokens: int) -> bool:
    """Whether a sequence of so many tokens takes another table than its beginning."""
    language = fixture.model.spec.language
    return rope_base(language, tokens) != language.rope_theta


def test_stop_ids(fixture: Fixture) -> None:
    assert [fixture.model.stop_id] == fixture.meta["stop_ids"]
