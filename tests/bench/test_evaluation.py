"""Accuracy on the user's data: resuming, failures, comparison, and the files they leave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import GOLDEN
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from internvl_edge.bench.answers import evaluation
from internvl_edge.bench.answers.datasets import DataError, Question, load_dataset
from internvl_edge.bench.answers.evaluation import Engine, RunOptions, answer_questions, ask
from internvl_edge.bench.answers.journal import Answer, Journal
from internvl_edge.cli.main import main
from internvl_edge.runtime import InternVL

IMAGE = GOLDEN / "images" / "img0.png"
SETTINGS = {"bundle": "b", "data": "d"}
IDS = ["1", "zwei", "三\n"]


def write_data(folder: Path, count: int = 4, **change: Any) -> Path:
    lines = [
        {
            "id": str(number),
            "image": str(IMAGE),
            "question": f"What is {number}?",
            "answers": ["x"],
            "metric": "anls" if number % 2 else "exact",
            **change,
        }
        for number in range(count)
    ]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def fake_answer(identity: str) -> Answer:
    return Answer(identity, f"reply to {identity}", 0.5, None if identity != "zwei" else "torn")


def fill(path: Path, asked: list[str]) -> bytes:
    """Answer what the journal lacks."""
    with Journal(path, SETTINGS, IDS) as journal:
        for identity in IDS:
            if identity not in journal.answers:
                asked.append(identity)
                journal.add(fake_answer(identity))
        assert [journal.answers[identity] for identity in IDS] == [*map(fake_answer, IDS)]
    return path.read_bytes()


class TestJournal:
    @settings(
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        deadline=None,
        max_examples=40,
    )
    @given(data=st.data())
    def test_cut_anywhere_it_goes_on(self, tmp_path: Path, data: st.DataObject) -> None:
        """Whatever part of the file survives, the rest is asked, once, and the file is the same."""
        path = tmp_path / "answers.jsonl"
        path.unlink(missing_ok=True)
        asked: list[str] = []
        whole = fill(path, asked)
        assert asked == IDS
        kept = whole[: data.draw(st.integers(0, len(whole)))]
        path.write_bytes(kept)
        answered = max(kept.count(b"\n") - 1, 0)
        again: list[str] = []
        assert fill(path, again) == whole
        assert again == IDS[answered:]

    def test_whole_lines_are_on_the_disk_at_once(self, tmp_path: Path) -> None:
        path = tmp_path / "answers.jsonl"
        with Journal(path, SETTINGS, IDS) as journal:
            assert not path.exists()
            for count, identity in enumerate(IDS, start=2):
                journal.add(fake_answer(identity))
                assert path.read_bytes().count(b"\n") == count

    @pytest.mark.parametrize("key", ["bundle", "data"])
    def test_another_run_s_file(self, tmp_path: Path, key: str) -> None:
        path = tmp_path / "answers.jsonl"
        whole = fill(path, [])
        with pytest.raises(DataError, match=f"written with {key}"):
            Journal(path, SETTINGS | {key: "other"}, IDS)
        assert path.read_bytes() == whole

    @pytest.mark.parametrize(
        "content", [b"notes", b"notes\n", b"[1]\n", b'{"format": "x"}\n', b"\xff\n"]
    )
    def test_some_other_file_is_left_alone(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "notes.txt"
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a file of answers"):
            Journal(path, SETTINGS, IDS)
        assert path.read_bytes() == content

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda lines: [*lines, lines[1]], ":5 answers question '1' twice"),
            (lambda lines: [lines[0], b'{"id": "4", "prediction": "", "score": 0}'], "not in the"),
            (lambda lines: [lines[0], b"{", *lines[1:]], ":2 is not an answer"),
            (lambda lines: [lines[0], lines[1].replace(b"0.5", b"5")], ":2 is not an answer"),
            (lambda lines: [lines[0], b'{"id": "1"}'], ":2 is not an answer"),
            (lambda lines: [lines[0], b"3"], ":2 is not an answer"),
        ],
    )
    def test_damage_before_the_last_line(
        self, tmp_path: Path, change: Callable[[list[bytes]], list[bytes]], message: str
    ) -> None:
        path = tmp_path / "answers.jsonl"
        lines = fill(path, []).splitlines()
        path.write_bytes(b"\n".join(change(lines)) + b"\n")
        with pytest.raises(DataError, match=message):
            Journal(path, SETTINGS, IDS)


class TestRun:
    def test_interrupted_and_resumed(
        self, golden_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dataset = load_dataset(write_data(tmp_path))
        options, engine = RunOptions(max_new_tokens=3, max_tiles=1), Engine("cpu", 1)
        asked: list[str] = []

        def until(count: int) -> None:
            def counted(model: InternVL, question: Question, options: RunOptions) -> Answer:
                if len(asked) == count:
                    raise KeyboardInterrupt
                asked.append(question.id)
                return ask(model, question, options)

            monkeypatch.setattr(evaluation, "ask", counted)

        until(2)
        path = tmp_path / "answers.jsonl"
        with pytest.raises(KeyboardInterrupt):
            answer_questions(golden_bundle, dataset, path, options, engine)
        assert path.read_bytes().count(b"\n") == 3
        until(-1)
        answers = answer_questions(golden_bundle, dataset, path, options, engine)
        assert asked == ["0", "1", "2", "3"]
        assert list(answers) == asked
        whole = path.read_bytes()
        # All is answered: neither model nor file is touched.
        monkeypatch.setattr(InternVL, "load", None)
        assert answer_questions(golden_bundle, dataset, path, options, engine) == answers
        assert path.read_bytes() == whole
        with pytest.raises(DataError, match="max_tiles"):
            answer_questions(golden_bundle, dataset, path, RunOptions(max_new_tokens=3), engine)

    def test_replies_are_the_model_s(self, golden_model: InternVL, tmp_path: Path) -> None:
        (question,) = load_dataset(write_data(tmp_path, 1)).questions
        options = RunOptions(suffix="", max_new_tokens=4, max_tiles=1)
        expected = golden_model.generate("What is 0?", [IMAGE], max_new_tokens=4, max_tiles=1)
        assert ask(golden_model, question, options).prediction == expected.text

    def test_two_bundles(
        self, golden_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A damaged image and a missing one are failures with a name; the run goes on."""
        path = write_data(tmp_path, 3)
        (tmp_path / "torn.png").write_bytes(IMAGE.read_bytes()[:100])
        bad = {"question": "?", "answers": ["x"], "metric": "exact"}
        with path.open("a") as stream:
            for name in ("torn", "gone"):
                stream.write(json.dumps({"id": name, "image": f"{name}.png", **bad}) + "\n")
        files = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
        report = tmp_path / "report.json"
        words = ["--max-new-tokens", "2", "--max-tiles", "1", "--device", "cpu", "--threads", "1"]
        outputs = ["-o", str(files[0]), "-o", str(files[1]), "--json", str(report)]
        bundles = [str(golden_bundle), str(golden_bundle)]
        command = ["bench", "accuracy", "--data", str(path), *words, *outputs, *bundles]
        assert main(command) == 0
        printed = capsys.readouterr().out
        assert "2 failed and scored 0" in printed
        assert "torn: " in printed
        assert "McNemar" in printed
        content = json.loads(report.read_text())
        for entry in content["bundles"]:
            assert set(entry["failures"]) == {"torn", "gone"}
            assert entry["scores"]["exact"]["count"] == 4
            assert entry["scores"]["anls"]["count"] == 1
        assert content["comparison"]["exact"]["p_value"] == 1
        assert content["comparison"]["exact"]["difference"] == 0

    def test_limit_then_the_rest(
        self, golden_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without -o the file is named after data and bundle, in the current folder."""
        monkeypatch.chdir(tmp_path)
        path = write_data(tmp_path, 3)
        words = ["bench", "accuracy", str(golden_bundle), "--data", str(path), "--device", "cpu"]
        words += ["--max-new-tokens", "1", "--max-tiles", "1"]
        output = tmp_path / f"data-{golden_bundle.name}.answers.jsonl"
        assert main([*words, "--limit", "2"]) == 0
        first = output.read_bytes()
        assert first.count(b"\n") == 3
        assert main(words) == 0
        assert output.read_bytes().startswith(first)
        assert output.read_bytes().count(b"\n") == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "0"], "--limit is 0"),
        (["--max-tiles", "0"], "--max-tiles is 0"),
        (["--max-new-tokens", "-1"], "--max-new-tokens is -1"),
        (["-o", "a", "-o", "b"], "2 files of answers"),
        (["--threads", "0"], "--threads is 0"),
        (["second", "third"], "3 bundles"),
        (["elsewhere/no-bundle"], "both bundles would write"),
        ([], "not a bundle"),
    ],
)
def test_mistakes(
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_data(tmp_path)
    assert main(["bench", "accuracy", "no-bundle", "--data", str(path), *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]
