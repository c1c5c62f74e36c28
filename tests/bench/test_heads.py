"""Suite `heads`: every form passes its gate, wrong ops get no number, limits hold where they are stated."""

from dataclasses import replace

import pytest
import torch

from opsd_kernels import QuantizedHead, linear_divergence
from opsd_kernels.bench.measure.gate import Verdict
from opsd_kernels.bench.shapes import SHAPES, Setting
from opsd_kernels.bench.suites import heads
from opsd_kernels.testing.heads import quantise

TINY = Setting(64, 32, 501, "float32")
QUICK = {"rounds": (3, 3), "seconds": 1.0}
CASES = [
    pytest.param(form, TINY.at(head=head, mode=mode), id=f"{head}, {mode}: {form.name}")
    for head, mode, forms in heads.GROUPS
    for form in forms
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form, setting", CASES)
def test_every_form_passes_its_gate(form, setting, dtype):
    verdict = heads.gate(form, setting.at(dtype=dtype))
    assert verdict.failure is None, verdict.failure
    assert 0 < verdict.gradient_error < (1e-5 if dtype == "float32" else 0.02)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form, setting", CASES)
def test_a_wrong_gradient_gets_no_number(form, setting, dtype):
    """The loss is right, and every gradient 4 % too large."""

    def wrong(*sides, **options):
        loss = linear_divergence(*sides, **options)
        return loss + 0.04 * (loss - loss.detach())

    verdict = heads.gate(form, setting.at(dtype=dtype), wrong)
    assert "no number: " in verdict.failure and "gradient of" in verdict.failure
    assert verdict.gradient_error is None


def without_adapter(*sides, student_lora, **options):
    A, B, _ = student_lora
    return linear_divergence(*sides, **options) + 0 * (A.sum() + B.sum())


def without_its_gradient(*sides, student_lora, **options):
    A, B, scaling = student_lora
    return linear_divergence(*sides, student_lora=(A, B.detach(), scaling), **options) + 0 * B.sum()


def first_teacher(h, W, states, weights, *, teacher_index, **options):
    return linear_divergence(h, W, states[0], weights[0], **options)


def first_tokens(h, W, t, Wt, *, student_vocab_ids, **options):
    return linear_divergence(h, W, t, Wt[: len(W)], **options)


def unscaled(h, W, t, Wt, **options):
    def bare(head):
        if not isinstance(head, QuantizedHead):
            return head
        return QuantizedHead(head.values, 1.02 * head.scales, None, head.block_size)

    return linear_divergence(h, bare(W), t, bare(Wt), **options)


WRONG = {
    "adapter": (without_adapter, without_its_gradient),
    "teachers": (first_teacher,),
    "by ids": (first_tokens,),
    "int8": (unscaled,),
    "float8": (unscaled,),
}


@pytest.mark.parametrize(
    "form, setting, op",
    [
        pytest.param(*case.values, op, id=f"{case.id}, {op.__name__}")
        for case in CASES
        for sign, ops in WRONG.items()
        if sign in case.values[0].name
        for op in ops
    ],
)
def test_an_op_without_the_form_gets_no_number(form, setting, op):
    assert "no number" in heads.gate(form, setting, op).failure


@pytest.fixture
def open_gate(monkeypatch):
    """Save the time of gates: test_every_form_passes_its_gate and the test of a failing form have them."""
    monkeypatch.setattr(heads, "gate", lambda form, setting: Verdict(0.0, 0.0))


@pytest.mark.slow
@pytest.mark.usefixtures("open_gate")
@pytest.mark.parametrize(
    "head, mode, forms", heads.GROUPS, ids=lambda x: x if isinstance(x, str) else x[-1].name
)
def test_rows_of_a_group(head, mode, forms):
    rows = heads.compare_heads(TINY.at(head=head, mode=mode), forms, QUICK)
    assert [row.variant for row in rows] == [form.name for form in forms]
    assert len({row.key for row in rows}) == len(rows)
    for row in rows:
        assert (row.suite, row.head, row.mode) == ("heads", head, mode)
        assert row.reason is None and row.ms.n == 3 and row.base == forms[0].name
        assert row.target is None, "limits are stated at one size"
    assert rows[0].ratio.median == 1


def test_a_form_that_fails_its_gate_is_a_row():
    """Even where the base is wrong, the others keep their ratio to it."""
    head, mode, forms = heads.GROUPS[0]
    wrong = replace(forms[0], reference=lambda *sides, **options: 2 * forms[0].reference(*sides, **options))
    rows = heads.compare_heads(TINY.at(head=head, mode=mode), (wrong, forms[1]), QUICK)
    assert "no number" in rows[0].reason and rows[0].ms is None
    assert rows[1].reason is None and rows[1].ratio.median > 0


@pytest.mark.slow
@pytest.mark.usefixtures("open_gate")
def test_limits_at_the_size_that_they_are_stated_at(monkeypatch):
    monkeypatch.setattr(heads, "STATED_AT", SHAPES["tiny"])
    found = {}
    for head, mode, forms in heads.GROUPS:
        for row in heads.compare_heads(TINY.at(head=head, mode=mode), forms, {**QUICK, "rounds": (1, 1)}):
            found[row.head, row.variant] = row.target
    assert {key: limit for key, limit in found.items() if limit} == {
        ("shared", "adapter of rank 16"): 1.08,
        ("two heads", "adapter of rank 16"): 1.08,
        ("two heads", "three teachers by index"): 1.05,
    }


def test_all_rows_of_a_report_have_keys_of_their_own():
    keys = [(head, mode, form.name) for head, mode, forms in heads.GROUPS for form in forms]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("block", [None, (32, 10)], ids=["rows", "blocks"])
@pytest.mark.parametrize(
    "dtype, bits, step", [(torch.int8, 8, 1 / 254), (torch.int8, 4, 1 / 14), (torch.float8_e4m3fn, 8, 1 / 16)]
)
def test_quantised_values_are_within_half_a_step(dtype, bits, step, block):
    """Of the largest entry of a block for integers, of the entry itself for floats."""
    weight = torch.randn(101, 33, generator=torch.Generator().manual_seed(0))
    values, scales, size = quantise(weight, dtype, block, bits)
    found = QuantizedHead(values, scales, None, size).dequantize()
    b, c = size
    assert size == (block or (1, 33)) and scales.shape == (-(-101 // b), -(-33 // c))
    for i in range(0, 101, b):
        for j in range(0, 33, c):
            part, back = weight[i : i + b, j : j + c], found[i : i + b, j : j + c]
            most = part.abs().max()
            allowed = most * step if dtype == torch.int8 else part.abs() * step + most * 2.0**-18
            assert ((part - back).abs() <= allowed * (1 + 1e-5)).all()
