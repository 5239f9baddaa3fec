"""The CPU matrix finds what is wrong, and says what it leaves out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import GOLDEN

from internvl_edge.export.bundle import export_bundle
from internvl_edge.runtime import InternVL
from internvl_edge.runtime.backends import sessions
from internvl_edge.runtime.backends.own_kernels import NO_KERNELS
from matrix import cpus
from matrix.arm64 import Skipped, call
from matrix.cpus import QUANTISED, Bound, Kind, Outcome
from matrix.on_cpu import PINNED_INPUTS, run_pinned
from matrix.pinned import write_pinned

EXACT, ALIKE = Kind("exact"), Kind("alike", exact=False)


def outcome() -> Outcome:
    random = np.random.default_rng(0)
    exact = random.standard_normal((8, 16)).astype(np.float32)
    arrays = {
        "float": exact,
        "pictures": 2 * exact,
        "pinned.0": exact.copy(),
        "pinned.1": 100 * exact,
    }
    for name in QUANTISED:
        noise = random.standard_normal(exact.shape).astype(np.float32)
        arrays[name] = exact + np.float32(0.03) * noise
    report: dict[str, Any] = {
        "demo": True,
        "own_vision": False,
        "form": "as stored",
        "wrong": {"as stored": [], "unsigned weights": ["w8a8"]},
        "answers": {name: ["12.50"] for name in QUANTISED},
    }
    return Outcome(report, arrays, 1.0)


def wrong_demo(got: Outcome) -> None:
    got.report["demo"] = False


def wrong_product(got: Outcome) -> None:
    got.report["form"] = "unsigned weights"


def wrong_answer(got: Outcome) -> None:
    got.report["answers"][QUANTISED[0]] = ["13.50"]


def noisier(got: Outcome) -> None:
    name = QUANTISED[1]
    got.arrays[name][:] += got.arrays[name] - got.arrays["float"]


def wrong_arithmetic(got: Outcome) -> None:
    """In the smallest of the arrays, so that only its own largest value shows it."""
    got.arrays["pinned.0"][0, 0] += 1e-3


def other_rounding(got: Outcome) -> None:
    """As much noise as before, in other places."""
    name = QUANTISED[1]
    got.arrays[name][:] = 2 * got.arrays["float"] - got.arrays[name]


@pytest.mark.parametrize(
    "spoil", [wrong_demo, wrong_product, wrong_answer, noisier, wrong_arithmetic]
)
@pytest.mark.parametrize("kind", [EXACT, ALIKE])
def test_each_fault_is_found(kind: Kind, spoil: Callable[[Outcome], None]) -> None:
    got = outcome()
    spoil(got)
    cpus._judge(kind, got, outcome())
    assert len(got.wrong) == 1


@pytest.mark.parametrize("kind", [EXACT, ALIKE])
def test_what_is_right_passes(kind: Kind) -> None:
    got = outcome()
    cpus._judge(kind, got, outcome())
    assert got.wrong == []


def test_only_an_exact_kind_must_round_alike() -> None:
    for kind, faults in ((EXACT, 1), (ALIKE, 0)):
        got = outcome()
        other_rounding(got)
        cpus._judge(kind, got, outcome())
        assert len(got.wrong) == faults


def other_pictures(got: Outcome) -> None:
    got.arrays["pictures"][0, 0] += 1e-3


@pytest.mark.parametrize("spoil", [other_rounding, other_pictures])
def test_every_kind_that_our_kernels_run_on_is_exact(spoil: Callable[[Outcome], None]) -> None:
    for ours, theirs, faults in ((True, True, 1), (True, False, 0), (False, True, 0)):
        got, native = outcome(), outcome()
        spoil(got)
        got.report["own_vision"], native.report["own_vision"] = ours, theirs
        cpus._judge(ALIKE, got, native)
        assert len(got.wrong) == faults


def test_a_missing_emulator_is_said(tmp_path: Path) -> None:
    with pytest.raises(Skipped, match="no-such-emulator is not installed"):
        cpus._command(Kind("other", "other", "no-such-emulator"), tmp_path, Bound(60))


def test_the_bound_is_said(tmp_path: Path) -> None:
    with pytest.raises(Skipped, match="bound"):
        cpus._run(cpus.KINDS[0], tmp_path, Bound(0))


def test_a_command_is_bounded() -> None:
    with pytest.raises(Skipped, match=r"sleep 60 took over 0 s"):
        call(["sleep", "60"], 0.1)


def test_a_failing_command_is_said() -> None:
    with pytest.raises(Skipped, match=r"sh -c failed: no network"):
        call(["sh", "-c", "echo no network >&2; exit 1"], 60)


@pytest.mark.parametrize(
    ("found", "user", "reason"),
    [("", 0, "there is no apt-get"), ("apt-get", 1000, "only root can")],
)
def test_why_the_emulator_is_not_installed(
    found: str,
    user: int,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cpus.shutil, "which", lambda name: name if name == found else None)
    monkeypatch.setattr(cpus.os, "geteuid", lambda: user)
    cpus._install(Bound(60))
    lacking = "qemu-user-static, g++-aarch64-linux-gnu"
    assert capsys.readouterr().out == f"not installed: {lacking}: {reason}\n"


@pytest.mark.slow
def test_given_roundings_decide_every_product(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same ones the outputs are the graph's own, by ONNX Runtime's operators; with others
    they are not."""
    monkeypatch.setattr(sessions, "vision_kernels", lambda bundle: NO_KERNELS)
    bundle = export_bundle(GOLDEN / "model", tmp_path / "bundle", vision="int8")
    model = InternVL.load(bundle, device="cpu", reuse_bytes=0)
    tiles = model.tile(GOLDEN / "images" / "img0.png")
    write_pinned(bundle, tmp_path / "pinned", tiles)
    embeddings = run_pinned(tmp_path / "pinned")[0]
    wanted = model.encode_images([GOLDEN / "images" / "img0.png"])
    np.testing.assert_array_equal(embeddings.reshape(wanted.shape), wanted)
    path = tmp_path / "pinned" / PINNED_INPUTS
    with np.load(path) as given:
        changed = dict(given)
    last = str(len(changed) - 2)
    changed[last] = np.roll(changed[last], 1, axis=-1)
    np.savez(path, **changed)
    assert np.abs(run_pinned(tmp_path / "pinned")[0] - embeddings).max() > 0
