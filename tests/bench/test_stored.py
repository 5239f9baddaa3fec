"""Results: where they cannot be written is said before hours of measuring, not after."""

from __future__ import annotations

from pathlib import Path

import pytest

from internvl_edge.cli.main import main


@pytest.mark.parametrize(
    "words",
    [
        ["accuracy"],
        ["accuracy", "none", "--data", "none.jsonl"],
        ["accuracy", "fidelity", "none", "--reference", "none"],
        ["kernels", "engines"],
        ["latency", "none"],
        ["memory", "none"],
        ["accuracy", "layerwise", "none"],
        ["peers"],
        ["scale", "internvl-chat-v1-5", "-o", "none"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("target", ["there/is/none.json", "."])
def test_a_result_that_cannot_be_written(
    words: list[str],
    target: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words, "--json", target]) == 2
    assert f"cannot write {target}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
