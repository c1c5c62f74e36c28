"""`linear_divergence`, and its options as a record for functions that pass them on."""

from __future__ import annotations

import inspect
import math
from typing import Any, TypedDict

import torch
from torch import Tensor

from ._core.autograd import evaluate
from ._core.problem import Problem, Side
from ._core.reductions import RowWeigher, TokenStats, reads_logprobs, row_scale
from .spec import Divergence, LogitTransform, RowSpec, Support, check_number, expect
from .weights import TokenWeighting


class DivergenceOptions(TypedDict, total=False):
    """The keyword arguments of `linear_divergence`, for `Unpack`."""

    divergence: str
    beta: float
    temperature: float
    teacher_temperature: float | None
    student_bias: Tensor | None
    teacher_bias: Tensor | None
    student_logit_scale: float
    teacher_logit_scale: float
    student_softcap: float | None
    teacher_softcap: float | None
    vocab_size: int | None
    labels: Tensor | None
    ignore_index: int
    mask: Tensor | None
    token_weights: Tensor | TokenWeighting | None
    teacher_mix: float
    entry_clip: float | None
    token_clip: float | None
    reduction: str
    normalizer: float | Tensor | None
    return_stats: bool
    topk: int | None
    topk_support: str
    topk_tail: str
    backward: str
    logits_dtype: str | torch.dtype
    workspace_bytes: int | None
    backend: str | None
    group: object | None


def linear_divergence(
    student_hidden: Tensor,  # (..., H_s)
    student_weight: Tensor,  # (V_s, H_s)
    teacher_hidden: Tensor,  # (..., H_t)
    teacher_weight: Tensor,  # (V_t, H_t)
    *,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    token_weights: Tensor | TokenWeighting | None = None,
    teacher_mix: float = 0.0,
    entry_clip: float | None = None,
    token_clip: float | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    return_stats: bool = False,
    topk: int | None = None,
    topk_support: str = "student",
    topk_tail: str = "bucket",
    backward: str = "auto",
    logits_dtype: str | torch.dtype = "auto",
    workspace_bytes: int | None = None,
    backend: str | None = None,
    group: object | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Divergence in nats between a teacher's and a student's next-token distributions, straight from hidden states and LM heads.

    Equals projecting both sides (`hidden @ weight.T`, `+ bias`, `* logit_scale`, softcap `c * tanh(z / c)`, `/ temperature`), two softmaxes and a comparison
    token by token, but never holds more than `workspace_bytes` of logits. Gradients flow to `student_hidden`, `student_weight` and `student_bias`, never to the
    teacher. No temperature**2 factor. Every option in full: docs/api.md. With teacher p, student q, m = beta * p + (1 - beta) * q:

    divergence: `forward_kl` KL(p || q), `reverse_kl` KL(q || p), `jsd` beta * KL(p || m) + (1 - beta) * KL(q || m) (arXiv:2306.13649, eq. 1),
        `skew_forward_kl` KL(p || m), `skew_reverse_kl` KL(q || m) (arXiv:2402.03898, eq. 2-3), `tvd` sum |p - q| / 2. SDPO is arXiv:2601.20802, eq. 1.
    token_weights: a tensor, or a scheme of `opsd_kernels.weights`, which the op evaluates on its own statistics. Detached.
    teacher_mix: a in [0, 1): teacher logits become (1 - a) * t + a * s, s held constant (the trust-region teacher of SDPO).
    entry_clip, token_clip: each vocabulary entry's term counts at most this much; so does a token's sum. No gradient where clipped.
    topk, topk_support, topk_tail: restrict the sum to the `topk` largest entries of `student` or `teacher`; the rest is one more entry (`bucket`), left out
        after renormalising both sides (`renormalize`), or left out (`none`). The support is a constant for the gradient.
    vocab_size: columns from here on have probability zero on both sides; required where the heads differ in rows.
    labels, mask: a token with `labels == ignore_index` or `mask == 0` is not valid: it costs nothing, influences nothing, may hold inf or NaN.
    reduction: `none` weighted divergence per token; `sum`; `mean` = sum / `normalizer` (default: number of valid tokens); `sequence_mean` for (B, T, H).
    backward: `in_forward` (four GEMM passes, three with a frozen head), `recompute` (six; any upstream gradient per token), `auto`.
    group: a process group or a `VocabShard`: both heads are slices of dimension 0, one per rank, `hidden` is the same on all; losses and gradients are those
        of the whole heads, `student_hidden.grad` summed over the group. A DTensor sharded on dimension 0 may stand for a slice.
    logits_dtype: `auto` (the inputs' for a shared head, by the difference GEMM; fp32 for two heads, tvd, an entry clip, weights that read log-probs),
        `torch.float32`, `"input"`.

    Returns the loss, 0-dim or (...) for `none`, in fp32 (fp64 for fp64 inputs); with `return_stats` also TokenStats. Raises ValueError or TypeError naming
    argument, expected and got.
    """
    options = dict(  # noqa: C408 - a literal would name each option twice
        divergence=divergence, beta=beta, temperature=temperature, teacher_temperature=teacher_temperature,
        student_bias=student_bias, teacher_bias=teacher_bias, student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale, student_softcap=student_softcap,
        teacher_softcap=teacher_softcap, vocab_size=vocab_size, labels=labels, ignore_index=ignore_index,
        mask=mask, token_weights=token_weights, teacher_mix=teacher_mix, entry_clip=entry_clip,
        token_clip=token_clip, reduction=reduction, normalizer=normalizer, topk=topk,
        topk_support=topk_support, topk_tail=topk_tail, logits_dtype=logits_dtype,
        workspace_bytes=workspace_bytes, backend=backend, group=group,
    )  # fmt: skip
    problem, weigher = prepare(
        Side(student_hidden, student_weight, student_bias),
        Side(teacher_hidden, teacher_weight, teacher_bias),
        options,
    )
    return evaluate(problem, weigher, backward, return_stats)


DEFAULTS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(linear_divergence).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
}


def prepare(
    student: Side, teacher: Side, options: dict[str, Any], policy: Any = None, policy_weight: float = 0.0
) -> tuple[Problem, RowWeigher]:
    """Check all options of `linear_divergence`, and a policy term that is mixed in."""
    problem = Problem.of(
        row_spec(options),
        student,
        teacher,
        labels=options["labels"],
        ignore_index=options["ignore_index"],
        mask=options["mask"],
        vocab_size=options["vocab_size"],
        logits_dtype=options["logits_dtype"],
        workspace_bytes=options["workspace_bytes"],
        backend=options["backend"],
        group=options["group"],
        support=Support.parse(options["topk"], options["topk_support"], options["topk_tail"]),
        exact_logprobs=reads_logprobs(options["token_weights"], policy),
    )
    scale = row_scale(options["reduction"], options["normalizer"], student.hidden, problem.rows.valid)
    leading = student.hidden.shape[:-1]
    return problem, RowWeigher(problem, leading, options["token_weights"], scale, policy, policy_weight)


def row_spec(options: dict[str, Any]) -> RowSpec:
    """Check the options that the row sweeps see."""
    name = "temperature" if options["teacher_temperature"] is None else "teacher_temperature"
    mix = check_number("teacher_mix", options["teacher_mix"])
    expect(0 <= mix < 1, "teacher_mix", "a number in [0, 1); at 1 there is no teacher left", mix)
    student = options["student_logit_scale"], options["student_softcap"]
    teacher = options["teacher_logit_scale"], options["teacher_softcap"]
    return RowSpec(
        Divergence.parse(options["divergence"], options["beta"]),
        LogitTransform.parse("student", *student, "temperature", options["temperature"]),
        LogitTransform.parse("teacher", *teacher, name, options[name]),
        teacher_mix=mix,
        entry_clip=clip("entry_clip", options["entry_clip"]),
        token_clip=clip("token_clip", options["token_clip"]),
    )


def clip(name: str, value: float | None) -> float:
    """Return a clip's value; infinity where it is off."""
    return math.inf if value is None else check_number(name, value, positive=True)
