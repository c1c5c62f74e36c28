"""`linear_divergence`: the options of the fused loss, checked, and the call they make."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._core import checks
from ._core.checks import Head
from ._core.reductions import TokenStats, evaluate, make_job
from .spec import Divergence, LogitTransform, RowSpec, Support, check_number, expect


@dataclass(frozen=True)
class Options:
    """The keyword arguments of `linear_divergence`."""

    divergence: str = "reverse_kl"
    beta: float = 0.5
    temperature: float = 1.0
    teacher_temperature: float | None = None
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None
    student_logit_scale: float = 1.0
    teacher_logit_scale: float = 1.0
    student_softcap: float | None = None
    teacher_softcap: float | None = None
    vocab_size: int | None = None
    labels: Tensor | None = None
    ignore_index: int = -100
    mask: Tensor | None = None
    token_weights: Tensor | object | None = None
    teacher_mix: float = 0.0
    entry_clip: float | None = None
    token_clip: float | None = None
    reduction: str = "mean"
    normalizer: float | Tensor | None = None
    return_stats: bool = False
    topk: int | None = None
    topk_support: str = "student"
    topk_tail: str = "bucket"
    backward: str = "auto"
    logits_dtype: str | torch.dtype = "auto"
    workspace_bytes: int | None = None
    backend: str | None = None
    group: object | None = None

    def spec(self) -> RowSpec:
        t_temperature = (
            ("temperature", self.temperature)
            if self.teacher_temperature is None
            else ("teacher_temperature", self.teacher_temperature)
        )
        return RowSpec(
            Divergence.parse(self.divergence, self.beta),
            LogitTransform.parse(
                "student", self.student_logit_scale, self.student_softcap, "temperature", self.temperature
            ),
            LogitTransform.parse("teacher", self.teacher_logit_scale, self.teacher_softcap, *t_temperature),
            teacher_mix=_mix(self.teacher_mix),
            entry_clip=clip("entry_clip", self.entry_clip),
            token_clip=clip("token_clip", self.token_clip),
        )

    def evaluate(self, student: Head, teacher: Head, **policy: object) -> Tensor | tuple[Tensor, TokenStats]:
        shard, sides = checks.of_rank(self.group, student=student, teacher=teacher)
        student, teacher = sides.values()
        support = Support.parse(self.topk, self.topk_support, self.topk_tail)
        spec = self.spec()
        flat, other, shared = checks.heads(**sides)
        valid, labels = checks.valid_tokens(student.hidden, self.labels, self.ignore_index, self.mask)
        rows = (head.weight.shape[0] if shard is None else shard.vocab_size for head in (student, teacher))
        vocab = checks.vocabulary(*rows, self.vocab_size)
        call = checks.make_call(
            spec,
            flat,
            other,
            shared,
            valid,
            labels,
            vocab,
            self.logits_dtype,
            self.workspace_bytes,
            self.backend,
            support,
            shard=shard,
        )
        job = make_job(call, student.hidden, self.token_weights, self.reduction, self.normalizer, **policy)
        return evaluate(job, self.backward, self.return_stats)


def clip(name: str, value: float | None) -> float:
    return math.inf if value is None else check_number(name, value, positive=True)


def _mix(value: float) -> float:
    value = check_number("teacher_mix", value)
    expect(0 <= value < 1, "teacher_mix", "a number in [0, 1); at 1 there is no teacher left", value)
    return value


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
    token_weights: Tensor | object | None = None,
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
    options = Options(
        divergence=divergence, beta=beta, temperature=temperature, teacher_temperature=teacher_temperature, student_bias=student_bias,
        teacher_bias=teacher_bias, student_logit_scale=student_logit_scale, teacher_logit_scale=teacher_logit_scale, student_softcap=student_softcap,
        teacher_softcap=teacher_softcap, vocab_size=vocab_size, labels=labels, ignore_index=ignore_index, mask=mask, token_weights=token_weights,
        teacher_mix=teacher_mix, entry_clip=entry_clip, token_clip=token_clip,
        reduction=reduction, normalizer=normalizer, return_stats=return_stats, topk=topk, topk_support=topk_support, topk_tail=topk_tail,
        backward=backward, logits_dtype=logits_dtype, workspace_bytes=workspace_bytes, backend=backend, group=group,
    )  # fmt: skip
    return options.evaluate(
        Head(student_hidden, student_weight, student_bias), Head(teacher_hidden, teacher_weight, teacher_bias)
    )
