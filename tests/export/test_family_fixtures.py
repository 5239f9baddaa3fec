"""Every folder of `tests/families`: a whole tiny model of each decoder family and layout.

What transformers' own classes computed, through an exported bundle and the runtime.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from internvl_edge.export.bundle import export_bundle
from internvl_edge.runtime import InternVL

FAMILIES = Path(__file__).parents[1] / "families"
NAMES = sorted(path.name for path in FAMILIES.iterdir() if path.is_dir())
EMBEDDING_TOLERANCE = 1e-4
LOGIT_TOLERANCE = 2e-4

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

    def expected(self, case: str, name: str) -> NDArray[Any]:
        return self.arrays[name if case == "main" else f"{case}_{name}"]

    def turns(self, case: str) -> list[tuple[str, str | None]]:
        told = self.meta["cases"][case]
        if "turns" in told:
            return [(question, answer) for question, answer in told["turns"]]
        return [(told.get("question", self.meta["question"]), None)]


@pytest.fixture(scope="module", params=NAMES)
def fixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    return Fixture(request.param, tmp_path_factory.mktemp("family"))


def test_tiles(fixture: Fixture) -> None:
    tiles = [fixture.model.tile(image, fixture.meta["max_tiles"]) for image in fixture.images]
    np.testing.assert_array_equal(np.concatenate(tiles), fixture.arrays["tiles_u8"])


def test_image_embeddings(fixture: Fixture) -> None:
    got = fixture.model.encode_images(fixture.images, max_tiles=fixture.meta["max_tiles"])
    expected = fixture.arrays["image_embeds"].reshape(got.shape)
    np.testing.assert_allclose(got, expected, rtol=0, atol=EMBEDDING_TOLERANCE)


@pytest.mark.parametrize("case", ["main", "history", "system"])
def test_prompts_and_greedy_answers(fixture: Fixture, case: str) -> None:
    """Token ids, the first logits, and every greedy id; in the main case every step's logits."""
    model, told = fixture.model, fixture.meta["cases"].get(case)
    if told is None:
        pytest.skip(f"the fixture has no case {case}")
    images = fixture.images if case == "main" else []
    tiled = [model.tile_with_identity(image, fixture.meta["max_tiles"]) for image in images]
    ids = model.encode_conversation(fixture.turns(case), tiled, told.get("system"))
    assert ids == fixture.expected(case, "input_ids").tolist()
    greedy = fixture.expected(case, "greedy_ids").tolist()
    got = model.logits([*ids, *greedy[:-1]], images, fixture.meta["max_tiles"])[len(ids) - 1 :]
    first = fixture.expected(case, "first_logits")
    np.testing.assert_allclose(got[0], first, rtol=0, atol=LOGIT_TOLERANCE)
    prompt: Any = fixture.meta["question"] if images else ids
    reply = model.generate(
        prompt, images, max_tiles=fixture.meta["max_tiles"], max_new_tokens=len(greedy)
    )
    assert reply.token_ids == greedy
    if case == "main":
        steps = fixture.arrays["step_logits"]
        np.testing.assert_allclose(got[: len(steps)], steps, rtol=0, atol=LOGIT_TOLERANCE)


def test_stop_ids(fixture: Fixture) -> None:
    assert [fixture.model.stop_id] == fixture.meta["stop_ids"]
