"""TRL's losses and trainers' methods as ops on hidden states and heads, and the batches that compare them."""

import functools
import importlib
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from opsd_kernels import linear_divergence, linear_logprobs, linear_topk_divergence
from opsd_kernels.testing import (
    Case,
    Outcome,
    assert_one_rounding,
    hard_case,
)
from opsd_kernels.testing.reference import (
    linear_divergence_reference,
    linear_logprobs_reference,
    linear_topk_divergence_reference,
)


class Ops(NamedTuple):
    divergence: Callable
    topk_divergence: Callable
    logprobs: Callable


OPS = {
    "reference": Ops(
        linear_divergence_reference, linear_topk_divergence_reference, linear_logprobs_reference
    ),
    "package": Ops(linear_divergence, linear_topk_divergence, linear_logprobs),
}
# TRL's `alpha` and `beta` of the two ends.
ALPHA = {"forward_kl": 0.0, "reverse_kl": 1.0}
BETAS = pytest.mark.parametrize(
    "divergence, beta", [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.2)]
)
TAILS = pytest.mark.parametrize("tail", ["bucket", "renormalize"])
B, T, V, H, K = 3, 10, 61, 12, 7


@functools.cache
def trl(path: str) -> Any:
    pytest.importorskip("trl", minversion="1.14.1", reason="trl >= 1.16 is not installed")
    return importlib.import_module(f"trl.{path}")


def iw_opd() -> Any:
    return trl("experimental.iw_opd.iw_opd_trainer").IWOPDTrainer


def sdpo() -> Any:
    return trl("experimental.sdpo.sdpo_trainer").SDPOTrainer


def on_logits(loss_of: Callable) -> Callable:
    """Turn a loss of student logits, teacher logits and labels into an op on hidden states and heads."""

    def op(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        *,
        student_bias,
        teacher_bias,
        temperature=1.0,
        labels=None,
        mask=None,
    ):
        s = student_hidden @ student_weight.T + student_bias
        with torch.no_grad():
            t = teacher_hidden @ teacher_weight.T + teacher_bias
        return loss_of(s / temperature, t / temperature, labels)

    return op


def batch(
    dtype: torch.dtype = torch.float64, ragged: bool = True, largest_logit: float = 12.0, **made: Any
) -> Case:
    """Make (B, T) tokens of finite numbers. With `ragged` labels end the first sequence early."""
    case = hard_case(
        B * T, V, H, dtype, masked_entry=None, views=False, batch=B, largest_logit=largest_logit, **made
    )
    labels = case.labels.clamp(min=0)
    if ragged:
        labels[0, -3:] = -100
    clean = {
        name: getattr(case, name).nan_to_num(0.3, 0.3, 0.3) for name in ("student_hidden", "teacher_hidden")
    }
    return replace(case, **clean, mask=None, labels=labels, token_weights=None)


def assert_same(ours: Outcome, theirs: Outcome) -> None:
    for (name, actual), (_, expected) in zip(ours.named(), theirs.named(), strict=True):
        assert actual.abs().max() > 0
        assert_one_rounding(
            actual, expected, torch.float64, magnitude=max(1.0, expected.abs().max().item()), name=name
        )


def logits_of(case: Case) -> tuple[Tensor, Tensor]:
    return (
        case.student_hidden @ case.student_weight.T + case.student_bias,
        case.teacher_hidden @ case.teacher_weight.T + case.teacher_bias,
    )


def at(log_probs: Tensor, ids: Tensor) -> Tensor:
    return log_probs.gather(-1, ids.clamp(min=0)[..., None])[..., 0]


def listed(ops: Ops, ids: Tensor, logprobs: Tensor) -> Callable:
    """Call our op for a listed teacher with the arguments of a local one, which it does not read."""

    def op(student_hidden, student_weight, teacher_hidden, teacher_weight, *, teacher_bias, **options):
        return ops.topk_divergence(student_hidden, student_weight, ids, logprobs, **options)

    return op


def short_list(case: Case) -> tuple[Tensor, Tensor]:
    """Return the teacher's K likeliest tokens with gaps: two at some positions, none after the end.

    A gap has id 0 and log-prob -inf.
    """
    logprobs, ids = logits_of(case)[1].log_softmax(-1).topk(K)
    logprobs[1, ::2, 2:], ids[1, ::2, 2:] = -math.inf, 0
    ended = (case.labels == -100)[..., None]
    return ids.masked_fill(ended, 0), logprobs.masked_fill(ended, -math.inf)


def sdpo_trainer(**args: Any) -> SimpleNamespace:
    settings = {
        "distillation_alpha": 0.5,
        "distillation_topk": K,
        "distillation_add_tail": True,
        "distillation_is_clip": 2.0,
        **args,
    }
    return SimpleNamespace(
        args=SimpleNamespace(**settings),
        accelerator=SimpleNamespace(gather=lambda x: x),
        state=SimpleNamespace(global_step=0),
        _last_loaded_step=0,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _log_self_distillation_metric=lambda mode, value: None,
    )


MODEL = SimpleNamespace(training=True)


def old_logprobs(case: Case) -> Tensor:
    """Return log-probs of an older policy, with ratios on both sides of 1 and of the clip."""
    now = at(logits_of(case)[0].log_softmax(-1), case.labels)
    return now + torch.linspace(-1.5, 1.5, now.numel(), dtype=now.dtype).view(now.shape)


def sdpo_loss(case: Case, mode: str, old: Tensor | None, **args: Any) -> Callable:
    trainer = sdpo_trainer(distillation_mode=mode, **args)
    mask = (case.labels != -100).to(case.student_hidden.dtype)

    def loss_of(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        made = SimpleNamespace(
            student_logits=s, teacher_logits=t, completion_ids=labels.clamp(min=0), loss_mask=mask
        )
        return sdpo()._compute_self_distillation_loss(trainer, MODEL, {"old_per_token_logps": old}, made)

    return on_logits(loss_of)
