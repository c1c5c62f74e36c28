"""A chunk that is projected and swept in parts is as exact as a whole one.

The planner takes parts on CUDA alone. Here they are forced on the CPU.
"""

from dataclasses import replace

import pytest
import torch

from opsd_kernels import linear_divergence, plan, weights
from opsd_kernels._core import library, loop
from opsd_kernels.objectives import PolicyGradient, linear_policy_divergence
from opsd_kernels.testing import (
    assert_no_worse,
    assert_on_target,
    assert_same_bits,
    evaluate,
    hard_case,
    plain_outcomes,
)
from opsd_kernels.testing.reference import linear_divergence_reference

N, V, H, ROWS, PART = 67, 1003, 48, 24, 10


@pytest.fixture
def force(monkeypatch):
    """Return a function that forces chunks of ROWS in parts of PART, and returns each part: (start, rows)."""
    planned, fill = library.plan, loop.Buffers.fill

    def start():
        noted = []

        def forced(tokens, *sizes, **options):
            made = planned(tokens, *sizes, **options)
            rows = min(ROWS, max(tokens, 1))
            return replace(made, rows=rows, chunks=-(-tokens // rows), part_rows=min(PART, rows))

        def noting(self, problem, student, teacher, centre, start):
            noted.append((start, len(student)))
            return fill(self, problem, student, teacher, centre, start)

        monkeypatch.setattr(library, "plan", forced)
        monkeypatch.setattr(loop.Buffers, "fill", noting)
        return noted

    return start


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "made, options",
    [
        ({"shared_head": True}, {}),
        ({}, {}),
        ({"shared_head": True, "frozen_head": True}, {}),
        ({"shared_head": True}, {"backward": "recompute"}),
        ({"shared_head": True}, {"logits_dtype": torch.float32}),
    ],
    ids=["shared", "two heads", "frozen", "recompute", "fp32 logits"],
)
def test_parts_are_as_exact_as_a_whole_chunk(force, made, options, dtype, divergence):
    case = hard_case(N, V, H, dtype, largest_logit=8.0, **made)
    truth = evaluate(linear_divergence_reference, case.double(), divergence=divergence)
    noted = force()
    found = evaluate(linear_divergence, case, divergence=divergence, **options)
    assert {start for start, _ in noted} == {0, PART, 2 * PART}
    assert max(rows for _, rows in noted) == PART
    if dtype == torch.float32:
        assert_no_worse(found, plain_outcomes(case, divergence=divergence), truth)
    else:
        wide = "logits_dtype" in options or "shared_head" not in made
        assert_on_target(found, truth, "fp32_logits" if wide else "default")


@pytest.mark.parametrize(
    "op, options",
    [
        # row factors of parts are joined for dh and dW
        (linear_divergence, {"token_weights": weights.TrustGate(0.2)}),
        (linear_divergence, {"topk": 5, "topk_support": "teacher"}),
        (linear_divergence, {"gradient_tolerance": 0.0}),
        (linear_policy_divergence, {"policy": PolicyGradient(torch.linspace(-1, 1, N))}),
    ],
    ids=["weights of statistics", "top-k", "tolerance", "policy term"],
)
def test_options_in_parts(force, op, options):
    case = replace(hard_case(N, V, H, torch.float32, largest_logit=8.0, shared_head=True), token_weights=None)
    truth = evaluate(op, case.double(), **options)
    whole = evaluate(op, case, **options)
    noted = force()
    assert_no_worse(evaluate(op, case, **options), whole, truth)
    assert max(rows for _, rows in noted) == PART


def test_a_sequence_is_not_cut_into_parts(force):
    case = replace(hard_case(N, V, H, torch.float32, shared_head=True), token_weights=None)
    force()
    with pytest.raises(AssertionError, match="a sequence need it whole"):
        evaluate(linear_divergence, case, token_weights=weights.PrefixDiscrepancy())


def test_two_calls_in_parts_give_the_same_bits(force):
    case = hard_case(N, V, H, torch.bfloat16, shared_head=True)
    force()
    assert_same_bits(*(evaluate(linear_divergence, case) for _ in range(2)))


def test_parts_are_planned_where_they_save_traffic_of_dW():
    head = {"N": 8192, "V": 151936, "H_student": 4096, "device_type": "cuda"}
    for H, chunks, parts in ((4096, 4, 2), (1024, 5, 3)):
        made = plan(**{**head, "H_student": H})
        assert (made.chunks, -(-made.rows // made.part_rows)) == (chunks, parts)
        assert made.part_rows % 128 == 0 and made.part_rows >= 512
    for options in (
        {"trainable_head": False},
        {"weights_scope": "sequence", "longest_sequence": 512},
        {"H_teacher": 0, "shared_head": False},
        {"device_type": "cpu"},
        {"workspace_bytes": 4 << 30},  # the limit of rows that pay
        {"workspace_bytes": 256 << 20},  # parts would be too short
    ):
        made = plan(**{**head, **options})
        assert made.part_rows == made.rows, options
        assert made.chunks > 1


def test_buffers_take_the_planned_bytes():
    made = plan(8192, 151936, 1024, device_type="cuda", workspace_bytes=1 << 30)
    rows, hidden = made.rows + made.part_rows, 2 * 2 * 1024 + 2 * 1024  # packed rows of both sides, dh
    assert made.workspace_bytes == rows * 2 * 151936 + made.rows * hidden


def test_a_longer_part_stays_inside_the_budget():
    """Of a head that takes most of the budget the logits get the bytes, a longer part its own of those."""
    head = {"V": 32000, "H_student": 8192, "shared_head": False, "gradient_tolerance": 1e-3}
    made = plan(50000, **head, device_type="cuda", workspace_bytes=700 << 20)
    assert made.part_rows < made.rows and 700 << 20 < made.accumulator_bytes
    assert made.workspace_bytes <= made.accumulator_bytes // 2
