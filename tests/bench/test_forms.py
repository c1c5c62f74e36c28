"""Suite `forms`: every form passes its gate, and a wrong result gets no number."""

from dataclasses import replace

import pytest

from opsd_kernels.bench.shapes import Setting
from opsd_kernels.bench.suites import forms

TINY = Setting(64, 32, 501, "float32")
CASES = [pytest.param(form, id=f"{form.mode}: {form.name}") for form in forms.FORMS]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", CASES)
def test_every_form_passes_its_gate(form, dtype):
    verdict = forms.gate(form, TINY.at(dtype=dtype, mode=form.mode))
    assert verdict.failure is None, verdict.failure
    assert verdict.loss_error < 5e-3 and (verdict.gradient_error is None) == (form.mode == "statistics")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", CASES)
def test_a_wrong_result_gets_no_number(form, dtype):
    def make(case):
        op = form.make(case)
        return lambda *sides, **options: 1.04 * op(*sides, **options)

    wrong, setting = replace(form, make=make), TINY.at(dtype=dtype, mode=form.mode)
    assert "no number" in forms.gate(wrong, setting).failure


def test_a_form_that_fails_its_gate_is_a_row(monkeypatch):
    first, second = (form for form in forms.FORMS if form.mode == "statistics")
    wrong = replace(first, reference=lambda case: lambda *sides, **options: 2 * first.reference(case)(*sides))
    monkeypatch.setattr(forms, "FORMS", (wrong, second))
    rows = forms.compare_forms(TINY.at(mode="statistics"), {"rounds": (3, 3), "seconds": 1.0})
    assert [row.variant for row in rows] == ["", wrong.name, second.name]
    assert "no number" in rows[1].reason and rows[1].ms is None and rows[1].target is None
    assert rows[2].reason is None and rows[2].ratio.median > 0


@pytest.mark.parametrize("form", [case for case in CASES if case.values[0].mode != "statistics"])
def test_a_wrong_gradient_gets_no_number(form):
    """In fp32, whose gate holds the gradient of every form."""

    def make(case):
        op = form.make(case)

        def wrong(*sides, **options):
            loss = op(*sides, **options)
            return loss + 0.04 * (loss - loss.detach())

        return wrong

    verdict = forms.gate(replace(form, make=make), TINY.at(mode=form.mode))
    assert "no number" in verdict.failure
