"""The taxonomy of errors: codes, both spellings, old names, the page that lists them."""

from __future__ import annotations

import importlib
import pickle
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import internvl_edge.runtime as public
from internvl_edge.bundle import errors
from internvl_edge.bundle.errors import (
    HTTP_STATUS,
    BusyError,
    CapacityError,
    ContextError,
    DeviceError,
    ExportError,
    ImageError,
    InputError,
    InternVLEdgeError,
    LimitError,
    MissingExtraError,
    OptionsError,
    OutputError,
    PromptError,
    RangeError,
    ResultError,
    UsageError,
)
from internvl_edge.bundle.remedies import Remedy, told

ROOT = Path(__file__).parents[2]
ROOMS = ("bundle", "kernels", "runtime", "calib_data", "export", "bench", "cli")
#: They import what is no part of every installation.
OPTIONAL = re.compile(r"bench\.(peers\.(engines|llamacpp|backend|gguf)|gpu\.torch)")


def every_class() -> list[type[InternVLEdgeError]]:
    """All classes of errors of all rooms, imported for it."""
    for room in ROOMS:
        package = importlib.import_module(f"internvl_edge.{room}")
        for module in pkgutil.walk_packages(package.__path__, f"internvl_edge.{room}."):
            if not OPTIONAL.search(module.name):
                importlib.import_module(module.name)
    found = dict.fromkeys(_below(InternVLEdgeError))
    return [kind for kind in found if kind.__module__.startswith("internvl_edge.")]


def _below(kind: type[InternVLEdgeError]) -> Iterator[type[InternVLEdgeError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _below(child)


def test_every_class_has_a_code_of_its_own_in_one_file() -> None:
    classes = every_class()
    assert len(classes) > 20
    codes = [kind.code for kind in classes]
    assert len(set(codes)) == len(codes)
    for kind in classes:
        assert kind.__module__ == errors.__name__
        assert "code" in vars(kind)
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", kind.code)
        assert getattr(public, kind.__name__) is kind
        assert kind.__name__ in public.__all__


def test_the_page_lists_every_class() -> None:
    """Each row is what the class says of itself."""
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    expected = [
        [
            kind.code,
            kind.__name__,
            ", ".join(base.__name__ for base in kind.__bases__ if base is not Exception),
            str(kind.__doc__).splitlines()[0],
            str(HTTP_STATUS.get(kind.code, 500)),
        ]
        for kind in every_class()
    ]
    assert sorted(rows) == sorted(expected)


def test_statuses_are_of_codes_that_exist() -> None:
    assert HTTP_STATUS.keys() <= {kind.code for kind in every_class()}
    assert set(HTTP_STATUS.values()) == {400, 413, 429, 503}


@pytest.mark.parametrize(
    ("kind", "caught_as"),
    [
        (UsageError, (LimitError,)),
        (ContextError, (LimitError, InputError)),
        (CapacityError, (LimitError, ExportError)),
        (OutputError, (LimitError, ExportError)),
        (BusyError, (ExportError,)),
        (OptionsError, (ExportError,)),
        (RangeError, (ExportError,)),
        (MissingExtraError, (ExportError, DeviceError)),
        (ResultError, (LimitError,)),
        (ImageError, (InputError,)),
        (PromptError, (InputError,)),
    ],
)
def test_what_caught_an_error_before_catches_it(
    kind: type[InternVLEdgeError], caught_as: tuple[type[InternVLEdgeError], ...]
) -> None:
    for old in caught_as:
        with pytest.raises(old):
            raise kind("so")


def test_both_spellings() -> None:
    error = CapacityError(
        "too much", 2, 1, {Remedy.LOW_MEMORY: "saves 1 GiB", Remedy.CLOSE_PROGRAMS: ""}
    )
    assert str(error) == "too much; pass low_memory=True (saves 1 GiB) or close other programs"
    assert error.told(flags=True) == (
        "too much; pass --low-memory (saves 1 GiB) or close other programs"
    )
    usage = UsageError("is 0, it must be at least 1", [Remedy.ON_CPU], option="max_new_tokens")
    assert str(usage) == "max_new_tokens is 0, it must be at least 1; pass device='cpu'"
    assert usage.told(flags=True) == (
        "--max-new-tokens is 0, it must be at least 1; pass --device cpu"
    )
    extra = MissingExtraError("this needs onnx", extra="export")
    assert str(extra) == "this needs onnx: pip install 'internvl-edge[export]'"
    assert str(InternVLEdgeError("as it is")) == "as it is"


def test_remedies_are_a_list_in_words() -> None:
    three = dict.fromkeys([Remedy.LOWER_TILES, Remedy.LESS_TEXT, Remedy.ADD_SWAP], "")
    assert told(three, flags=False) == "lower max_tiles, give less text, or add swap"
    assert told({}, flags=True) == ""


@pytest.mark.parametrize("remedy", Remedy)
def test_a_remedy_names_options_only_on_the_command_line(remedy: Remedy) -> None:
    assert "--" not in remedy.value.library
    assert "=" not in remedy.value.command


@pytest.mark.parametrize(
    "kind", [*dict.fromkeys(_below(InternVLEdgeError))], ids=lambda kind: kind.code
)
def test_an_error_goes_between_processes(kind: type[InternVLEdgeError]) -> None:
    error = kind("got 2, the limit is 1", [Remedy.LESS_TEXT])
    if isinstance(error, CapacityError):
        error = CapacityError("got 2, the limit is 1", 2, 1, [Remedy.LESS_TEXT])
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)
    assert vars(again) == vars(error)
