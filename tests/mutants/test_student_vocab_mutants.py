"""Plant bugs in the columns of a student's head by ids (see planting.py)."""

from dataclasses import replace

import pytest
import torch
from draft_cases import draft_case
from planting import Mutant, arguments, check, kill, result

from opsd_kernels import linear_divergence, linear_divergence_to, linear_topk_divergence
from opsd_kernels._core import library, problem, sliced_head, student_vocab, targets
from opsd_kernels.testing import assert_no_worse, evaluate
from opsd_kernels.testing.heads import with_student_vocab
from opsd_kernels.testing.reference import linear_divergence_reference, linear_topk_divergence_reference

N, V_S, V_T, H = 17, 41, 67, 8


def restricted(bias: bool = True, **options):
    """Check value, gradients and the label's log-probs against dense restricted heads."""
    draft = draft_case(N, V_S, V_T, H, torch.float64, bias=bias, largest_logit=8.0)
    told = {"student_vocab_ids": draft.ids, "return_stats": True, **options}
    truth = evaluate(with_student_vocab(linear_divergence_reference), draft.case, **told)
    ours = evaluate(linear_divergence, draft.case, backend="torch", **told)
    assert_no_worse(ours, truth, truth)
    for name in ("student_logprob", "teacher_logprob"):
        assert_no_worse(getattr(ours.stats, name), truth.stats[name], truth.stats[name])


def listed():
    """Check a teacher's list in which the student lacks some tokens."""
    draft = draft_case(N, V_S, V_T, H, torch.float64, largest_logit=8.0)
    gen = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(V_T, generator=gen)[:6] for _ in range(N)])
    logprobs = torch.linspace(-1.2, -4, 6, dtype=torch.float64).expand(N, 6)

    def run(op):
        return lambda h, W, t, Wt, teacher_bias=None, **rest: op(h, W, ids, logprobs, **rest)

    told = {"student_vocab_ids": draft.ids}
    truth = evaluate(run(with_student_vocab(linear_topk_divergence_reference)), draft.case, **told)
    assert_no_worse(evaluate(run(linear_topk_divergence), draft.case, **told), truth, truth)


def rows_given():
    """Check a target over the teacher's vocabulary against the same one cut by hand."""
    gen = torch.Generator().manual_seed(0)
    h, W, target = (torch.randn(size, generator=gen).double() for size in ((N, H), (V_S, H), (N, V_T)))
    ids = torch.randperm(V_T, generator=gen)[:V_S]
    truth = linear_divergence_to(h, W, target[:, ids])
    assert_no_worse(linear_divergence_to(h, W, target, student_vocab_ids=ids), truth, truth)


def outside(column: int, token: int):
    """Check that an id outside the teacher's vocabulary is refused by its name."""
    draft = draft_case(N, V_S, V_T, H, torch.float64, largest_logit=8.0)
    ids = draft.ids.clone()
    ids[column] = token
    try:
        evaluate(linear_divergence, draft.case, student_vocab_ids=ids, backend="torch")
    except (ValueError, IndexError, RuntimeError) as error:
        refused = str(error).startswith(f"student_vocab_ids: expected entries in [0, {V_T})")
        assert refused, f"an id of {token}: {error}"
    else:
        raise AssertionError(f"an id of {token} is taken")


def with_bounds(least: int, above: int):
    """Change the bounds of the ids alone."""

    def changed(name, otherwise, entries, valid, stop):
        if name != student_vocab.NAME:
            return name, otherwise, entries, valid, stop
        return name, otherwise, entries, valid, stop + above, least

    return arguments(changed)


def in_order(call, *rest):
    return (replace(call, vocab_ids=call.vocab_ids.sort().values), *rest)


def first_bias(side, call, own, scratch, student=None):
    """Give the teacher the biases of its first rows."""
    if student is None or own.bias is None:
        return side
    return replace(side, bias=own.bias[: len(side.bias)])


MUTANTS = {
    "each slice has the rows of the first": Mutant(
        sliced_head.SlicedHead,
        "write",
        arguments(
            lambda head, at, out: (
                head,
                slice(0, len(out)) if isinstance(at, slice) and at.start else at,
                out,
            )
        ),
        check(restricted),
    ),
    "the teacher's rows in rising order": Mutant(
        problem.Problem, "for_gemms", arguments(in_order), check(restricted, bias=False)
    ),
    "the biases of the first rows": Mutant(
        problem.Problem, "_operands", result(first_bias), check(restricted)
    ),
    "places among the sorted ids as columns": Mutant(
        student_vocab,
        "columns_of",
        result(
            lambda found, ids, tokens: torch.where(
                found < 0, found, torch.searchsorted(ids.sort().values, tokens.contiguous())
            )
        ),
        check(restricted),
    ),
    "a label that the student lacks is its nearest": Mutant(
        student_vocab,
        "columns_of",
        result(lambda found, *_: found.clamp(min=0)),
        check(restricted),
    ),
    "a listed token that the student lacks stays": Mutant(
        problem,
        "own_entries",
        result(lambda found, ids, listed, logprobs: (found[0], logprobs)),
        check(listed),
    ),
    "an id of -1 is the last row": Mutant(
        library, "check_entries", with_bounds(-1, 0), check(outside, 3, -1)
    ),
    "an id of V": Mutant(library, "check_entries", with_bounds(0, 1), check(outside, 3, V_T)),
    "the first columns of a target": Mutant(
        targets.Target,
        "rows",
        arguments(lambda *given: (*given[:-1], None)),
        check(rows_given),
    ),
}


@pytest.fixture(autouse=True)
def slices(monkeypatch):
    """Read the teacher's head in several slices."""
    monkeypatch.setitem(sliced_head.SLICED_BYTES, "cpu", 0)
    monkeypatch.setattr(sliced_head, "LEAST_ROWS", 16)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(name, monkeypatch):
    kill(MUTANTS[name], monkeypatch)
