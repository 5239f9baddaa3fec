"""Rates of the integer product's forms: one of them in use, and exact."""

from __future__ import annotations

import pytest

from internvl_edge.bench.kernels import products as measured
from internvl_edge.bench.kernels.products import measure_forms
from internvl_edge.runtime.backends.products import AS_STORED, UNSIGNED, exact_form


def test_one_form_is_in_use_and_exact() -> None:
    rates = {rate.form: rate for rate in measure_forms(1, (4, 64, 32))}
    assert list(rates) == ["float32", AS_STORED.name, UNSIGNED.name]
    assert all(rate.gflops > 0 for rate in rates.values())
    (used,) = (rate for rate in rates.values() if rate.used)
    assert used.form == exact_form(("w8a8",)).name
    assert used.exact


def test_an_inexact_form_is_not_called_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {AS_STORED.name: ["w8a8"], UNSIGNED.name: []}
    monkeypatch.setattr(measured, "wrong_products", lambda form, products: wrong[form.name])
    monkeypatch.setattr(measured, "exact_form", lambda products: UNSIGNED)
    rates = {rate.form: (rate.exact, rate.used) for rate in measure_forms(1, (2, 32, 16))}
    assert rates == {
        "float32": (True, False),
        AS_STORED.name: (False, False),
        UNSIGNED.name: (True, True),
    }
