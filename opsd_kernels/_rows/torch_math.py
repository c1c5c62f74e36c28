"""(f, u) of one vocabulary entry for every divergence: the Python home of the formulas.

The others are csrc/divergence.h and triton_math.py. D = sum_v f_v and dD/ds_v = u_v - q_v * A with A = sum_v
u_v, where u_v = q_v * d f_v / d q_v at fixed p; for forward KL the row scalar is the constant A = -1.
Everything is written in delta = log p - log q, so that a teacher close to the student costs no digits, and
without an exponential that could overflow: with a = expm1(-|delta|),

    m/q = 1 + beta * a        where delta <= 0,        m/p = 1 + (1 - beta) * a        where delta > 0.

A term is guarded by its probability: 0 where q (or p) is 0, whatever delta is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..spec import Divergence, Kind, LogitTransform

Entry = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def _guard(probability: Tensor, term: Tensor) -> Tensor:
    return torch.where(probability > 0, term, torch.zeros_like(term))


def _mixture(delta: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return log(m/q), log(m/p) and p/m."""
    a = torch.expm1(-delta.abs())
    below = delta <= 0
    over_q, over_p = 1 + beta * a, 1 + (1 - beta) * a
    log = torch.log1p(torch.where(below, beta * a, (1 - beta) * a))
    log_m_q = torch.where(below, log, log + delta)
    log_m_p = torch.where(below, log - delta, log)
    return log_m_q, log_m_p, torch.where(below, (1 + a) / over_q, 1 / over_p)


def reverse_kl(q: Tensor, p: Tensor, delta: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    f = _guard(q, -q * delta)
    return f, f


def forward_kl(q: Tensor, p: Tensor, delta: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    return _guard(p, p * delta), -p


def jsd(q: Tensor, p: Tensor, delta: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    log_m_q, log_m_p, _ = _mixture(delta, beta)
    u = _guard(q, -(1 - beta) * q * log_m_q)
    return u - beta * _guard(p, p * log_m_p), u


def skew_reverse_kl(q: Tensor, p: Tensor, delta: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    log_m_q, _, p_over_m = _mixture(delta, beta)
    return _guard(q, -q * log_m_q), _guard(q, q * (beta * p_over_m - log_m_q))


def skew_forward_kl(q: Tensor, p: Tensor, delta: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    _, log_m_p, p_over_m = _mixture(delta, beta)
    return _guard(p, -p * log_m_p), _guard(q, -(1 - beta) * q * p_over_m)


def tvd(q: Tensor, p: Tensor, delta: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    half_gap = torch.where(
        torch.isnan(delta), torch.zeros_like(q), -0.5 * torch.expm1(-delta.abs()) * torch.maximum(p, q)
    )
    return half_gap, _guard(q, -0.5 * q * torch.sign(delta))


def mixed_kl(q: Tensor, p: Tensor, delta: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    of_q = (1 - beta) * _guard(q, -q * delta)
    return beta * _guard(p, p * delta) + of_q, beta * (q - p) + of_q


ENTRIES: dict[Kind, Entry] = {
    Kind.REVERSE_KL: reverse_kl,
    Kind.FORWARD_KL: forward_kl,
    Kind.JSD: jsd,
    Kind.SKEW_REVERSE_KL: skew_reverse_kl,
    Kind.SKEW_FORWARD_KL: skew_forward_kl,
    Kind.TVD: tvd,
    Kind.MIXED_KL: mixed_kl,
}


def entry(divergence: Divergence, q: Tensor, p: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return (f, u) of entries with probabilities q and p."""
    return ENTRIES[divergence.kind](q, p, delta, divergence.beta)


def clipped_u(divergence: Divergence, q: Tensor) -> Tensor:
    """Return u of a clipped term, whose derivative is 0.

    Where u leaves out a multiple of q, which cancels where nothing is clipped, the 0 is minus that multiple.
    """
    return -divergence.omitted * q


def transform(z: Tensor, transform: LogitTransform, bias: Tensor | None) -> Tensor:
    """Map raw logits to logits."""
    y = (z if bias is None else z + bias) * transform.scale
    if transform.softcap is not None:
        y = transform.softcap * torch.tanh(y / transform.softcap)
    return y / transform.temperature


def transform_slope(z: Tensor, transform: LogitTransform, bias: Tensor | None) -> Tensor | float:
    """Return d(logit)/d(raw logit), in a shape that broadcasts to z."""
    if transform.softcap is None:
        return transform.factor
    y = (z if bias is None else z + bias) * transform.scale
    return transform.factor * (1 - torch.tanh(y / transform.softcap) ** 2)
