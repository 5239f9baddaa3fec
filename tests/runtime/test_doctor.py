"""The doctor says what a bug report needs, truly, and nothing of the user."""

from __future__ import annotations

import getpass
import json
import re
from importlib import metadata
from pathlib import Path

import numpy as np
import onnxruntime
import PIL
import pytest

from internvl_edge.cli.main import main
from internvl_edge.kernels.build import BuildError
from internvl_edge.runtime import doctor
from internvl_edge.runtime.backends import products
from internvl_edge.runtime.backends.products import AS_STORED, Form, Product, exact_form
from internvl_edge.runtime.doctor import examine


def test_versions_are_the_installed_ones() -> None:
    packages = examine()["packages"]
    assert packages["numpy"] == np.__version__
    assert packages["pillow"] == PIL.__version__
    assert packages["onnxruntime"].split(",")[0] == onnxruntime.__version__


def test_json_and_text_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for part in ("packages", "products", "devices", "extras"):
        for name, value in report[part].items():
            assert re.search(rf"^  {re.escape(name)} +{re.escape(str(value))}$", text, re.MULTILINE)


def test_nothing_names_the_user() -> None:
    text = json.dumps(examine())
    assert str(Path.home()) not in text
    assert f"/{getpass.getuser()}" not in text


def test_an_inexact_form_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_exact(form: Form, product: Product) -> bool:
        return product == "int4" or (product == "w8a8" and form != AS_STORED)

    monkeypatch.setattr(products, "_is_exact", is_exact)
    monkeypatch.setattr(doctor, "exact_form", exact_form.__wrapped__)
    said = examine()["products"]
    assert said["int4"] == "as stored"
    assert said["w8a8"] == "unsigned weights (inexact: as stored)"
    assert said["int8"].startswith("no exact form (inexact: as stored, ")


def test_why_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler() -> Path:
        raise BuildError("no C++ compiler found\nand more")

    monkeypatch.setattr(doctor, "cpu_library", no_compiler)
    assert examine()["kernels"]["tiling"] == "Pillow, exact and slower (no C++ compiler found)"


def test_a_version_that_was_not_tried_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "is_tried", lambda version: False)
    assert "not tried (1.2" in examine()["packages"]["onnxruntime"]


def test_what_an_extra_lacks_counts_those_it_includes(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "numpy>=1.26",
        'onnx>=1.17; extra == "export"',
        'no-such-thing>=1; (sys_platform == "linux") and extra == "peers"',
        'internvl-edge[export]; extra == "peers"',
        'internvl-edge[export,peers]; extra == "bench"',
        'another.absence; extra == "bench"',
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    assert examine()["extras"] == {
        "bench": "lacks another.absence, no-such-thing",
        "export": "installed",
        "peers": "lacks no-such-thing",
    }


def test_inspect_says_how_a_bundle_runs_here(
    golden_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(golden_bundle), "--json"]) == 0
    here = json.loads(capsys.readouterr().out)["here"]
    assert here["integer_products"] == "none"
    assert here["onnxruntime"] == onnxruntime.__version__
    assert here["prepared"] == "no"
