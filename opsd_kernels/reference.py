"""The judge: every divergence from its textbook definition, on dense logits, by autograd. It imports no kernel and no formula of the kernels.

In float64 it is the truth; in fp32, and for 16-bit inputs with fp32 logits, it is what a careful user writes in plain PyTorch.
It holds several (N, V) tensors: for tests, not for training.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .spec import REDUCTIONS, Divergence, Kind, LogitTransform, check_choice, expect


def _expectation(weight: Tensor, log_ratio_top: Tensor, log_ratio_bottom: Tensor) -> Tensor:
    """sum_v weight * (top - bottom), where an entry of weight 0 counts nothing in value and gradient, even if both logs are -inf."""
    counts = weight > 0
    top = torch.where(counts, log_ratio_top, 0.0)
    bottom = torch.where(counts, log_ratio_bottom, 0.0)
    return torch.where(counts, weight * (top - bottom), 0.0).sum(-1)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return _expectation(log_a.exp(), log_a, log_b)


def _log_mixture(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """log(beta p + (1 - beta) q), and 0 where both are 0: such an entry has weight 0 in every sum, and logaddexp has no gradient there."""
    dead = (log_q == -math.inf) & (log_p == -math.inf)
    log_q, log_p = torch.where(dead, 0.0, log_q), torch.where(dead, 0.0, log_p)
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))


def _jsd(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    log_m = _log_mixture(log_q, log_p, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


TEXTBOOK: dict[Kind, Callable[[Tensor, Tensor, float], Tensor]] = {
    Kind.REVERSE_KL: lambda log_q, log_p, beta: _kl(log_q, log_p),
    Kind.FORWARD_KL: lambda log_q, log_p, beta: _kl(log_p, log_q),
    Kind.JSD: _jsd,
    Kind.SKEW_REVERSE_KL: lambda log_q, log_p, beta: _kl(log_q, _log_mixture(log_q, log_p, beta)),
    Kind.SKEW_FORWARD_KL: lambda log_q, log_p, beta: _kl(log_p, _log_mixture(log_q, log_p, beta)),
    Kind.TVD: lambda log_q, log_p, beta: (log_p.exp() - log_q.exp()).abs().sum(-1) / 2,
}


def reference_logits(raw: Tensor, transform: LogitTransform, bias: Tensor | None) -> Tensor:
    """Raw logits (n, V) -> softcap(scale * (raw + bias)) / temperature."""
    y = (raw if bias is None else raw + bias) * transform.scale
    if transform.softcap is not None:
        y = transform.softcap * torch.tanh(y / transform.softcap)
    return y / transform.temperature


def reference_divergence(student: Tensor, teacher: Tensor, divergence: Divergence) -> Tensor:
    """D per row, (n,) in nats, from transformed logits (n, V). Differentiable in `student`."""
    return TEXTBOOK[divergence.kind](student.log_softmax(-1), teacher.log_softmax(-1), divergence.beta)


def reference_statistics(student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
    """The fields of TokenStats, beside `divergence`, from transformed logits (n, V): each (n,)."""
    log_q, log_p = student.detach().log_softmax(-1), teacher.detach().log_softmax(-1)
    zero = torch.zeros_like(log_q)
    stats = {
        "student_entropy": -_kl(log_q, zero),
        "teacher_entropy": -_kl(log_p, zero),
        "student_max_prob": log_q.exp().amax(-1),
        "teacher_max_prob": log_p.exp().amax(-1),
        "top1_agreement": (log_q.argmax(-1) == log_p.argmax(-1)).to(log_q.dtype),
    }
    if labels is not None:
        stats["student_logprob"] = log_q.gather(-1, labels[:, None])[:, 0]
        stats["teacher_logprob"] = log_p.gather(-1, labels[:, None])[:, 0]
    return stats


def _valid(shape: torch.Size, device: torch.device, mask: Tensor | None, labels: Tensor | None, ignore_index: int) -> Tensor:
    valid = torch.ones(shape, dtype=torch.bool, device=device)
    if mask is not None:
        valid &= mask != 0
    if labels is not None:
        valid &= labels != ignore_index
    return valid


def _reduce(values: Tensor, valid: Tensor, reduction: str, normalizer: float | Tensor | None) -> Tensor:
    """`values` (...) hold w * D, zeros where not valid."""
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    if reduction == "mean":
        return values.sum() / (valid.sum().clamp(min=1) if normalizer is None else normalizer)
    counts = valid.sum(-1)
    return (values.sum(-1) / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)


def _packed_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, vocab_size: int | None, transform: LogitTransform, wide: torch.dtype
) -> Tensor:
    """Transformed logits of the valid rows, (n, vocab_size): the others never enter the graph."""
    packed = hidden.reshape(-1, hidden.shape[-1])[rows].to(wide)
    raw = packed @ weight[:vocab_size].to(wide).T
    return reference_logits(raw, transform, None if bias is None else bias[:vocab_size].to(wide))


def linear_divergence_reference(
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
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    return_stats: bool = False,
    **how: object,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """`linear_divergence` by its definition. Same arguments; those that only say how to compute (`backend`, `backward`, ...) change nothing.

    Returns the reduced divergence in nats, float64 for float64 inputs and else float32, and with `return_stats` a dict of the fields of TokenStats.
    """
    unknown = set(how) - {"backend", "backward", "logits_dtype", "workspace_bytes"}
    expect(not unknown, ", ".join(sorted(unknown)), "an argument of linear_divergence", "an unknown name", TypeError)
    check_choice("reduction", reduction, REDUCTIONS)
    spec = Divergence.parse(divergence, beta)
    student = LogitTransform.parse("student", student_logit_scale, student_softcap, "temperature", temperature)
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    teacher = LogitTransform.parse("teacher", teacher_logit_scale, teacher_softcap, "teacher_temperature", teacher_temperature)
    wide = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32

    valid = _valid(student_hidden.shape[:-1], student_hidden.device, mask, labels, ignore_index)
    rows = valid.flatten().nonzero()[:, 0]
    s = _packed_logits(student_hidden, student_weight, student_bias, rows, vocab_size, student, wide)
    with torch.no_grad():
        t = _packed_logits(teacher_hidden, teacher_weight, teacher_bias, rows, vocab_size, teacher, wide)

    def unpack(values: Tensor) -> Tensor:
        return values.new_zeros(valid.numel()).index_put((rows,), values).view(valid.shape)

    per_token = reference_divergence(s, t, spec)
    weights = torch.ones_like(per_token) if token_weights is None else token_weights.detach().flatten()[rows].to(wide)
    weighted = torch.where(weights == 0, 0.0, per_token) * weights  # a token of weight zero may be infinitely far
    loss = _reduce(unpack(weighted), valid, reduction, normalizer)
    if not return_stats:
        return loss
    stats = {"divergence": per_token.detach(), **reference_statistics(s, t, None if labels is None else labels.flatten()[rows])}
    return loss, {name: unpack(value) for name, value in stats.items()}
