"""Shared fixtures: the golden data and bundles exported from it, once per session."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import GOLDEN
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray
from PIL import Image

from internvl_edge.export.bundle import export_bundle
from internvl_edge.runtime import InternVL

# Tests open sessions of their own before the runtime does; see `runtime.ort`.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# What tests type is not the user's.
os.environ["INTERNVL_EDGE_HISTORY"] = ""

# A busy machine draws and runs slowly, which says nothing about what is tested.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


#: What a test marked slow takes unless it says how long.
SLOW_SECONDS = 10


def pytest_configure(config: pytest.Config) -> None:
    """Keep the order of the files below; left alone, workers take those of most tests first."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first: begun last, they would leave one worker alone.

    Workers take whole files (`--dist loadfile`): what the tests of one share is made once. Groups
    would do the same, but pytest-xdist 3.8 does not see them under pytest 9.2.
    """
    seconds: Counter[Path] = Counter()
    for item in items:
        if mark := item.get_closest_marker("slow"):
            seconds[item.path] += mark.kwargs.get("seconds", SLOW_SECONDS)
    items.sort(key=lambda item: -seconds[item.path])


@pytest.fixture(scope="module")
def the_gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The only one: files that use it take turns, whichever worker they are in."""
    with (tmp_path_factory.getbasetemp().parent / "gpu.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def golden_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint exported in float32."""
    return export_bundle(GOLDEN / "model", tmp_path_factory.mktemp("golden") / "bundle")


@pytest.fixture
def bundle(golden_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the golden bundle, to be damaged."""
    return Path(shutil.copytree(golden_bundle, tmp_path / "bundle"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the golden checkpoint, to be damaged."""
    return Path(shutil.copytree(GOLDEN / "model", tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def golden_model(golden_bundle: Path) -> InternVL:
    """Keeps nothing between answers: what one test asked must not help the next."""
    return InternVL.load(golden_bundle, device="cpu", threads=2, reuse_bytes=0)


@pytest.fixture(scope="session")
def golden_images() -> dict[str, Image.Image]:
    """The golden pictures by stem, as Pillow opened them (RGBA and grey ones included)."""
    images = {}
    for path in sorted((GOLDEN / "images").glob("*.png")):
        image = Image.open(path)
        image.load()
        images[path.stem] = image
    return images


@pytest.fixture(scope="session")
def golden_chats() -> dict[str, dict[str, Any]]:
    """The reference's chat runs by name: prompt, question, images, response."""
    cases = json.loads((GOLDEN / "chat.json").read_text(encoding="utf-8"))["cases"]
    return {case["name"]: case for case in cases}


def golden_arrays(name: str) -> dict[str, NDArray[Any]]:
    """One .npz of the golden data."""
    with np.load(GOLDEN / f"{name}.npz") as data:
        return dict(data)


@pytest.fixture(scope="session")
def logits_arrays() -> dict[str, NDArray[Any]]:
    return golden_arrays("logits")


@pytest.fixture(scope="session")
def vision_arrays() -> dict[str, NDArray[Any]]:
    return golden_arrays("vision")


@pytest.fixture(scope="session")
def chat_arrays() -> dict[str, NDArray[Any]]:
    return golden_arrays("chat_ids")


@pytest.fixture(scope="session")
def tile_arrays() -> dict[str, NDArray[Any]]:
    return golden_arrays("tiles")


@pytest.fixture(autouse=True)
def _terminating() -> Iterator[None]:
    """`main` takes SIGTERM over; give it back."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
