"""Accuracy of one bundle, or of two beside each other, on the user's data.

    internvl-edge bench accuracy BUNDLE [BUNDLE2] --data FILE.jsonl [--metric NAME] ...

Answers are greedy and go to a file as they come (`journal`), so that an interrupted run goes on
where it stopped. A question whose image cannot be read is a failure that is counted and scores 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from internvl_edge.bench.answers.datasets import Dataset, Question, load_dataset
from internvl_edge.bench.answers.journal import Answer, Journal
from internvl_edge.bench.common.greedy import ONE_BY_ONE
from internvl_edge.bench.common.intervals import Comparison, Estimate
from internvl_edge.bench.common.machine import describe_machine
from internvl_edge.bench.common.stored import check_writable, write_result
from internvl_edge.bundle.contract import MANIFEST
from internvl_edge.bundle.errors import DataError, ImageError, LimitError, PromptError, UsageError
from internvl_edge.bundle.manifest import read_manifest, sha256_file
from internvl_edge.bundle.quoting import named
from internvl_edge.export.progress import progress_bar
from internvl_edge.runtime import InternVL
from internvl_edge.runtime.devices import Device

#: Failures named on the terminal; the file of answers has all of them.
NAMED_FAILURES = 5


@dataclass(frozen=True)
class RunOptions:
    """Options that every question is asked with.

    Attributes:
        suffix: follows every question instead of its metric's own.
        max_new_tokens: longest answer instead of the metric's own.
        max_tiles: most tiles per image, without thumbnail; None is the checkpoint's own.
        limit: only so many questions from the beginning of the file.
    """

    suffix: str | None = None
    max_new_tokens: int | None = None
    max_tiles: int | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Engine:
    """The device and threads that run a bundle."""

    device: Device = "auto"
    threads: int | None = None


@dataclass(frozen=True)
class BundleReport:
    """Scores and failures of one bundle.

    Attributes:
        bundle: its directory.
        answers: file of its answers.
        scores: by metric.
        failures: ids of the questions without a reply, and why; they are among the scores as 0.
    """

    bundle: str
    answers: str
    scores: Mapping[str, Estimate]
    failures: Mapping[str, str]


def run_evaluation(
    bundles: Sequence[Path],
    data: Path,
    *,
    metric: str | None,
    options: RunOptions,
    engine: Engine,
    outputs: Sequence[Path],
    report: Path | None,
) -> int:
    """Evaluate, print, and write the report; returns the exit status.

    Args:
        bundles: one, or two to be compared.
        outputs: file of answers of each bundle; empty for the default names.
        report: JSON file for what is printed.

    Raises:
        DataError: the data or the answers of an earlier run cannot be used.
        UsageError: options out of range.
    """
    _check(bundles, outputs, options)
    check_writable(report)
    dataset = load_dataset(data, metric)
    questions = dataset.questions[: options.limit]
    paths = list(outputs) or [
        Path(f"{data.stem}-{bundle.resolve().name}.answers.jsonl") for bundle in bundles
    ]
    if len({path.resolve() for path in paths}) != len(paths):
        raise DataError(
            f"both bundles would write {named(paths[0])}; name the files with -o A -o B"
        )
    answers = [
        answer_questions(bundle, dataset, path, options, engine)
        for bundle, path in zip(bundles, paths, strict=True)
    ]
    reports = [
        _report(bundle, path, questions, given)
        for bundle, path, given in zip(bundles, paths, answers, strict=True)
    ]
    comparison = compare(questions, *answers) if len(bundles) == 2 else {}
    print("\n".join(_table(reports, comparison)))
    if report is not None:
        content = {
            "data": str(data),
            "data_sha256": dataset.sha256,
            "options": asdict(options),
            "bundles": [asdict(entry) for entry in reports],
            "comparison": {name: asdict(entry) for name, entry in comparison.items()},
            "machine": describe_machine(engine.threads or 0),
        }
        write_result(content, report)
    return 0


def answer_questions(
    bundle: Path, dataset: Dataset, output: Path, options: RunOptions, engine: Engine
) -> dict[str, Answer]:
    """Ask what `output` has no answer to yet; the model is loaded only if there is such."""
    questions = dataset.questions[: options.limit]
    read_manifest(bundle)
    settings = {
        "bundle": sha256_file(bundle / MANIFEST),
        "data": dataset.sha256,
        "metric": dataset.metric,
        "suffix": options.suffix,
        "max_new_tokens": options.max_new_tokens,
        "max_tiles": options.max_tiles,
    }
    known = {question.id for question in dataset.questions}
    with Journal(output, settings, known) as journal:
        pending = [question for question in questions if question.id not in journal.answers]
        if pending:
            model = InternVL.load(bundle, device=engine.device, threads=engine.threads)
            with progress_bar(bundle.resolve().name, unit="question") as start:
                advance = start(len(questions))
                advance(len(questions) - len(pending))
                for question in pending:
                    journal.add(ask(model, question, options))
                    advance(1)
        return dict(journal.answers)


def ask(model: InternVL, question: Question, options: RunOptions) -> Answer:
    """One question, greedily; what cannot be asked is an answer with an error and no score."""
    try:
        reply = model.generate(
            question.prompt(options.suffix),
            question.images,
            max_new_tokens=options.max_new_tokens or question.scoring.max_new_tokens,
            max_tiles=options.max_tiles,
            sampling=ONE_BY_ONE,
        )
    except (ImageError, PromptError, LimitError) as error:
        return Answer(question.id, "", 0.0, str(error))
    return Answer(question.id, reply.text, question.score(reply.text))


def estimates(questions: Sequence[Question], answers: Mapping[str, Answer]) -> dict[str, Estimate]:
    """Mean score by metric."""
    return {
        metric: Estimate.of([answers[question.id].score for question in group])
        for metric, group in _by_metric(questions).items()
    }


def compare(
    questions: Sequence[Question], first: Mapping[str, Answer], second: Mapping[str, Answer]
) -> dict[str, Comparison]:
    """The second's scores against the first's, question by question, by metric."""
    return {
        metric: Comparison.of(
            [first[question.id].score for question in group],
            [second[question.id].score for question in group],
        )
        for metric, group in _by_metric(questions).items()
    }


def _by_metric(questions: Sequence[Question]) -> dict[str, list[Question]]:
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.metric, []).append(question)
    return groups


def _report(
    bundle: Path, output: Path, questions: Sequence[Question], answers: Mapping[str, Answer]
) -> BundleReport:
    failures = {
        question.id: error
        for question in questions
        if (error := answers[question.id].error) is not None
    }
    return BundleReport(str(bundle), str(output), estimates(questions, answers), failures)


def _table(reports: Sequence[BundleReport], comparison: Mapping[str, Comparison]) -> list[str]:
    lines = [f"{'bundle':24} {'metric':16} {'questions':>9} {'score':>7} {'95% interval':>16}"]
    for report in reports:
        for metric, score in report.scores.items():
            interval = f"{100 * score.low:.2f} to {100 * score.high:.2f}"
            lines.append(
                f"{Path(report.bundle).resolve().name:24} {metric:16} {score.count:9}"
                f" {100 * score.mean:7.2f} {interval:>16}"
            )
    for metric, change in comparison.items():
        test = "" if change.p_value is None else f"; McNemar's exact test p = {change.p_value:.3g}"
        lines.append(
            f"second less first, {metric}: {100 * change.difference:+.2f}"
            f" ({100 * change.low:+.2f} to {100 * change.high:+.2f});"
            f" {change.lost} questions lower, {change.gained} higher{test}"
        )
    for report in reports:
        lines += _failures(report)
    return lines


def _failures(report: BundleReport) -> list[str]:
    if not report.failures:
        return []
    named = list(report.failures.items())[:NAMED_FAILURES]
    return [
        f"{Path(report.bundle).resolve().name}: {len(report.failures)} failed and scored 0 (see"
        f" {report.answers}):",
        *(f"  {identity}: {error}" for identity, error in named),
    ]


def _check(bundles: Sequence[Path], outputs: Sequence[Path], options: RunOptions) -> None:
    if not 1 <= len(bundles) <= 2:
        raise UsageError(f"{len(bundles)} bundles; give one, or two to compare them")
    if outputs and len(outputs) != len(bundles):
        raise UsageError(f"{len(outputs)} files of answers (-o) for {len(bundles)} bundles")
    for name in ("limit", "max_new_tokens", "max_tiles"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}, it must be at least 1")
