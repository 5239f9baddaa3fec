"""An export at true size: what it says of how it was made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from internvl_edge.bench.scale import run
from internvl_edge.cli.main import main


def test_the_figures_say_how_integers_were_rounded(
    integer_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given: list[dict[str, Any]] = []

    def export(source: object, output: Path, **options: Any) -> None:
        given.append(options)
        shutil.copytree(integer_bundle, output)

    monkeypatch.setattr(run, "export_bundle", export)
    words = ["-o", str(tmp_path / "bundle"), "--vision", "int8", "--language", "int4"]
    figures = tmp_path / "figures.json"
    assert main(["bench", "scale", "internvl2_5-1b", *words, "--json", str(figures)]) == 0
    (options,) = given
    told = json.loads(figures.read_text(encoding="utf-8"))["options"]
    assert told["naive"] is options["options"].naive is True
    assert told["block"] == options["options"].block
    with pytest.raises(SystemExit):
        main(["bench", "scale", "--help"])
    assert "rounded to nearest" in " ".join(capsys.readouterr().out.split())
