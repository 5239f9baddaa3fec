"""Rows kept beyond the process: bounded, right, and never worth an answer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from internvl_edge.runtime import InternVL, LimitError
from internvl_edge.runtime.decoding.reuse import ImageStore, Shelf
from internvl_edge.runtime.images.folder import ImageFolder
from internvl_edge.runtime.images.identity import ImageIdentity

QUESTION = "<image>\nWhat is written here, line by line?"
IMAGE = ImageIdentity(b"p" * 32, None, 1, "model")
ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)


def picture(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (60, 80, 3), np.uint8)


def image(number: int) -> ImageIdentity:
    return replace(IMAGE, pixels=number.to_bytes(32, "little"))


def rows_from(store: ImageStore) -> NDArray[np.floating]:
    """As they are kept, or encoded anew."""
    kept = store.get(IMAGE)
    return store.put(IMAGE, ROWS.copy()) if kept is None else kept


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def load(bundle: Path, folder: Path, **options: Any) -> InternVL:
    return InternVL.load(bundle, device="cpu", threads=1, image_folder=folder, **options)


def test_rows_outlive_the_process(golden_bundle: Path, tmp_path: Path) -> None:
    first = load(golden_bundle, tmp_path).generate(QUESTION, [picture(0)], max_new_tokens=6)
    second = load(golden_bundle, tmp_path).generate(QUESTION, [picture(0)], max_new_tokens=6)
    assert (first.timings.tiles > 0, second.timings.tiles) == (True, 0)
    assert second.token_ids == first.token_ids


def test_another_tiling_finds_nothing(
    golden_bundle: Path, golden_model: InternVL, tmp_path: Path
) -> None:
    asked = {"max_tiles": 2, "max_new_tokens": 6}
    load(golden_bundle, tmp_path).generate(QUESTION, [picture(0)], max_tiles=6, max_new_tokens=6)
    second = load(golden_bundle, tmp_path).generate(QUESTION, [picture(0)], **asked)
    wanted = golden_model.generate(QUESTION, [picture(0)], **asked)
    assert second.token_ids == wanted.token_ids
    assert second.timings.tiles == wanted.timings.tiles


@pytest.mark.parametrize("damage", [b"", b"short", "flip", "cut"])
def test_damaged_rows_are_encoded_anew(tmp_path: Path, damage: Any) -> None:
    folder = ImageFolder(tmp_path)
    folder.save(IMAGE, ROWS)
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    file.write_bytes(data[:-1] if damage == "cut" else data if damage == "flip" else damage)
    assert folder.load(IMAGE) is None
    store = ImageStore(Shelf(1 << 20), folder)
    np.testing.assert_array_equal(rows_from(store), ROWS)
    np.testing.assert_array_equal(folder.load(IMAGE), ROWS)


@pytest.mark.parametrize(
    "other",
    [replace(IMAGE, model="other"), replace(IMAGE, tiles=2), replace(IMAGE, pixels=b"q" * 32)],
    ids=["model", "tiles", "pixels"],
)
def test_rows_under_another_images_name_are_not_taken(tmp_path: Path, other: ImageIdentity) -> None:
    folder = ImageFolder(tmp_path)
    folder.save(IMAGE, ROWS)
    (file,) = tmp_path.iterdir()
    file.rename(tmp_path / f"{other.digest.hex()}.rows")
    assert folder.load(other) is None


def removed(folder: Path) -> None:
    folder.rmdir()
    folder.parent.joinpath("gone").mkdir()


def replaced_by_a_file(folder: Path) -> None:
    folder.rmdir()
    folder.touch()


def a_folder_in_the_way(folder: Path) -> None:
    """Of the file that would be read, and written."""
    saved = ImageFolder(folder)
    saved.save(IMAGE, ROWS)
    (file,) = folder.iterdir()
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("damage", [removed, replaced_by_a_file, a_folder_in_the_way])
def test_a_folder_that_went_costs_no_answer(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "images"
    path.mkdir()
    store = ImageStore(Shelf(0), ImageFolder(path))
    damage(path)
    for _ in range(3):
        np.testing.assert_array_equal(rows_from(store), ROWS)
    assert len(caplog.records) <= 1


@pytest.mark.parametrize("call", ["os.replace", "os.scandir", "tempfile.mkstemp", "os.utime"])
def test_a_folder_that_cannot_be_written_is_said_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
) -> None:
    store = ImageStore(Shelf(0), ImageFolder(tmp_path))

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(call, fail)
    for _ in range(3):
        np.testing.assert_array_equal(rows_from(store), ROWS)
    (record,) = caplog.records
    assert "No space left on device; images are encoded anew" in record.getMessage()
    monkeypatch.undo()
    assert [file for file in tmp_path.iterdir() if file.suffix == ".partial"] == []


def test_an_interrupt_leaves_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ImageFolder(tmp_path).save(IMAGE, ROWS)
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_folder(golden_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LimitError, match=r"image_folder .*file is a file; name a folder"):
        load(golden_bundle, tmp_path / "file")


@pytest.mark.parametrize("bounds", [{"image_folder_bytes": 0}, {"image_folder_days": 0}], ids=str)
def test_bounds_are_positive(golden_bundle: Path, tmp_path: Path, bounds: dict[str, int]) -> None:
    with pytest.raises(LimitError, match=f"{next(iter(bounds))} is 0"):
        load(golden_bundle, tmp_path, **bounds)


def test_the_folder_is_bounded_in_bytes(tmp_path: Path) -> None:
    """Whoever wrote the rest: each new process looks first."""
    one = 3000
    rows = np.zeros(one, np.uint8)
    for number in range(100):
        ImageFolder(tmp_path).save(image(number), rows)
    total = size_of(tmp_path)
    limit = total // 4
    folder = ImageFolder(tmp_path, limit=limit)
    for number in range(100, 140):
        folder.save(image(number), rows)
        assert size_of(tmp_path) <= limit
    assert size_of(tmp_path) > 0.9 * limit
    assert folder.load(image(139)) is not None


def test_what_was_read_last_stays(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path)
    for number in range(8):
        folder.save(image(number), ROWS)
        file = tmp_path / f"{image(number).digest.hex()}.rows"
        os.utime(file, (1e9 + number, 1e9 + number))
    assert folder.load(image(0)) is not None
    small = ImageFolder(tmp_path, limit=size_of(tmp_path) // 4, days=1e6)
    small.save(image(8), ROWS)
    assert small.load(image(0)) is not None
    assert small.load(image(7)) is None


def test_old_rows_and_what_writers_left_go_and_nothing_else(tmp_path: Path) -> None:
    day = 24 * 3600
    for name, age in {
        f"{'a' * 64}.rows": 11 * day,  # too old
        f"{'b' * 64}.rows": 9 * day,
        f"{'c' * 16}-{'d' * 68}.rows": 11 * day,  # an earlier version's
        ".rows-dead.partial": day,
        ".rows-busy.partial": 10,
        "notes.rows": 99 * day,
        "tmpabcdef12.partial": 99 * day,
    }.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    (tmp_path / f"{'e' * 64}.rows").mkdir()
    ImageFolder(tmp_path, days=10).save(IMAGE, ROWS)
    assert {file.name for file in tmp_path.iterdir()} == {
        f"{'b' * 64}.rows",
        f"{'e' * 64}.rows",
        ".rows-busy.partial",
        "notes.rows",
        "tmpabcdef12.partial",
        f"{IMAGE.digest.hex()}.rows",
    }


def test_rows_larger_than_the_bound_are_not_kept(tmp_path: Path) -> None:
    ImageFolder(tmp_path, limit=100).save(IMAGE, ROWS)
    assert not list(tmp_path.iterdir())


def test_another_process_may_remove_files_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ImageFolder(tmp_path, limit=2000)
    for number in range(5):
        folder.save(image(number), ROWS)
    unlink = Path.unlink

    def first_another(self: Path, missing_ok: bool = False) -> None:
        unlink(self, missing_ok=True)
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", first_another)
    folder.save(image(9), np.zeros(1500, np.uint8))
    assert folder.load(image(9)) is not None
