"""Accuracy of the default on hidden states captured from SmolLM2-135M (benchmarks/capture_rows.py).

The rows are in tests/captured; the head is that of the model that `make test-all` installs.
"""

import functools
from pathlib import Path

import pytest
import torch

from opsd_kernels import linear_divergence
from opsd_kernels.bench.measure.captured import WITHOUT_CAPTURE, head, missing
from opsd_kernels.spec import KIND_NAMES
from opsd_kernels.testing import LOGPROB_NATS, Case, assert_on_target, evaluate
from opsd_kernels.testing.reference import linear_divergence_reference

ROWS = Path(__file__).parent / "captured" / "smollm2-135m.safetensors"
MISSING = missing(WITHOUT_CAPTURE)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]


@functools.cache
def captured(labels: bool) -> Case:
    """Return the rows with the model's head, which is its embedding."""
    from safetensors.torch import load_file

    rows, weight = load_file(ROWS), head()
    return Case(
        student_hidden=rows["student_hidden"],
        student_weight=weight,
        teacher_hidden=rows["teacher_hidden"],
        teacher_weight=weight,
        labels=rows["labels"] if labels else None,
    )


@functools.cache
def truth(divergence: str):
    """Return the outcome with labels, which add statistics and change nothing else."""
    options = {"divergence": divergence, "return_stats": True}
    return evaluate(linear_divergence_reference, captured(True).double(), **options)


def test_the_rows_are_those_of_a_teacher_with_a_hint():
    stats = truth("reverse_kl").stats
    assert stats["divergence"].shape == (256,) and 0.04 < stats["divergence"].mean() < 0.1
    assert 0.5 < -stats["student_logprob"].mean() < 3, "the tokens are the student's own samples"
    largest = (captured(True).student_hidden.double() @ captured(True).student_weight.double().T).amax(1)
    assert largest.mean() > 10, "raw bf16 logits would be far from 0"


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize("divergence", KIND_NAMES)
def test_the_default_is_exact_on_rows_of_a_model(backend, divergence, labels):
    case, exact = captured(labels), truth(divergence)
    ours = evaluate(linear_divergence, case, divergence=divergence, return_stats=True, backend=backend)
    assert_on_target(ours, exact, "captured")
    assert torch.equal(ours.stats.top1_agreement.double(), exact.stats["top1_agreement"])
    if labels:
        for name in ("student_logprob", "teacher_logprob"):
            off = (getattr(ours.stats, name) - exact.stats[name]).abs().max()
            assert off <= LOGPROB_NATS, f"{name} is off by {off} nats"
