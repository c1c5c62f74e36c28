"""The textbook terms of every divergence and the entries that they are summed over, for the reference.

A divergence is a sum of terms f over the entries of the vocabulary, or of a support of K entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import Divergence, Kind

# Minus the largest log of the mass that a support may have beside its bucket (SDPO's clamp).
SMALLEST_TAIL = 1e-7

# ---------------------------------------------------------------- the terms


def ratio_terms(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return a * (log a - log b) per entry; value and gradient are 0 at a = 0, even if both logs are -inf."""
    a = log_a.exp()
    counts = a > 0
    top = torch.where(counts, log_a, 0.0)
    bottom = torch.where(counts, log_b, 0.0)
    return torch.where(counts, a * (top - bottom), 0.0)


def _log_mixture(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """Return log(beta p + (1 - beta) q), and 0 where both are 0.

    Such an entry has weight 0 in every sum, and logaddexp has no gradient there.
    """
    dead = (log_q == -math.inf) & (log_p == -math.inf)
    log_q, log_p = torch.where(dead, 0.0, log_q), torch.where(dead, 0.0, log_p)
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))


def _jsd_terms(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    log_m = _log_mixture(log_q, log_p, beta)
    return beta * ratio_terms(log_p, log_m) + (1 - beta) * ratio_terms(log_q, log_m)


def _mixed_kl_terms(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    return beta * ratio_terms(log_p, log_q) + (1 - beta) * ratio_terms(log_q, log_p)


TEXTBOOK: dict[Kind, Callable[[Tensor, Tensor, float], Tensor]] = {
    Kind.REVERSE_KL: lambda log_q, log_p, beta: ratio_terms(log_q, log_p),
    Kind.FORWARD_KL: lambda log_q, log_p, beta: ratio_terms(log_p, log_q),
    Kind.JSD: _jsd_terms,
    Kind.SKEW_REVERSE_KL: lambda log_q, log_p, beta: ratio_terms(log_q, _log_mixture(log_q, log_p, beta)),
    Kind.SKEW_FORWARD_KL: lambda log_q, log_p, beta: ratio_terms(log_p, _log_mixture(log_q, log_p, beta)),
    Kind.TVD: lambda log_q, log_p, beta: (log_p.exp() - log_q.exp()).abs() / 2,
    Kind.MIXED_KL: _mixed_kl_terms,
}


def reference_terms(log_q: Tensor, log_p: Tensor, divergence: Divergence) -> Tensor:
    """Return f per entry, (n, E) in nats, from log-probs; D is its sum. Differentiable in `log_q`."""
    return TEXTBOOK[divergence.kind](log_q, log_p, divergence.beta)


def reference_divergence(student: Tensor, teacher: Tensor, divergence: Divergence) -> Tensor:
    """Return D per row, (n,) in nats, from transformed logits (n, V). Differentiable in `student`."""
    return reference_terms(student.log_softmax(-1), teacher.log_softmax(-1), divergence).sum(-1)


# ---------------------------------------------------------------- the entries that the sum runs over


class LogProbs(NamedTuple):
    """Log-probs of both sides at the entries of the sum, (n, E) each; padding is -inf on both sides."""

    log_q: Tensor
    log_p: Tensor
    size: Tensor  # (n,) number of entries that are no padding


def _log_mass(log_probs: Tensor) -> Tensor:
    """Return the log of the sum of probabilities, (n, 1); -inf, without a gradient, where all are 0."""
    empty = (log_probs == -math.inf).all(-1, keepdim=True)
    return torch.where(empty, -math.inf, torch.where(empty, 0.0, log_probs).logsumexp(-1, keepdim=True))


def _with_bucket(log_probs: Tensor) -> Tensor:
    """Append an entry that holds the remaining mass."""
    mass = _log_mass(log_probs).clamp(max=-SMALLEST_TAIL)
    return torch.cat([log_probs, torch.log(-torch.expm1(mass))], -1)


def _renormalized(log_probs: Tensor) -> Tensor:
    """Renormalise to a sum of 1. A side without mass on the support stays at probability 0."""
    mass = _log_mass(log_probs)
    return log_probs - torch.where(mass == -math.inf, 0.0, mass)


TAILS: dict[str, Callable[[Tensor], Tensor]] = {
    "bucket": _with_bucket,
    "renormalize": _renormalized,
    "none": lambda log_probs: log_probs,
}


def _on_support(log_q: Tensor, log_p: Tensor, tail: str, count: Tensor) -> LogProbs:
    return LogProbs(TAILS[tail](log_q), TAILS[tail](log_p), count + (tail == "bucket"))


def largest_entries(student: Tensor, teacher: Tensor, topk: int | None, side: str, tail: str) -> LogProbs:
    """Return the whole vocabulary or, with `topk`, the entries of one side's largest transformed logits.

    The choice of the entries is a constant for the gradient.
    """
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    n, V = student.shape
    if topk is None:
        return LogProbs(log_q, log_p, torch.full((n,), V, device=student.device))
    k = min(topk, V)
    support = (student if side == "student" else teacher).detach().topk(k, -1).indices
    return _on_support(
        log_q.gather(-1, support), log_p.gather(-1, support), tail, torch.full((n,), k, device=student.device)
    )


def listed_entries(student: Tensor, ids: Tensor, logprobs: Tensor, tail: str) -> LogProbs:
    """Return the entries (n, K) of a teacher's list.

    A log-prob of -inf means padding, of any id. An id that comes again is padding too.
    """
    listed = logprobs > -math.inf
    same = (ids[:, :, None] == ids[:, None, :]) & listed[:, None, :]
    listed = listed & ~same.tril(-1).any(-1)
    log_q = student.log_softmax(-1).gather(-1, torch.where(listed, ids, 0))
    log_q, log_p = (torch.where(listed, x, -math.inf) for x in (log_q, logprobs))
    return _on_support(log_q, log_p, tail, listed.sum(-1))
