"""Row sweeps over heads that are spread over ranks: statistics of whole rows, merged from those of their slices.

A row's statistics merge like entries merge into a row: a shard with student mass exp(lse_s) and teacher mass exp(lse_t)
is one entry of a smaller row, and L_r = lse_t - lse_s is its d. So the merged normalisers keep the accuracy near the
teacher that the sweeps have (_rows/contract.py), and the sweeps themselves are given the merged statistics.

All ranks gather the same numbers and merge them in the same order in float64: statistics, weights and losses are equal
on them to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .._rows.contract import SPREAD_LIMIT, Column, RowBackend, clip_tokens, plain_kl
from ..spec import RowSpec
from .shard import VocabShard, gather_ranks


@dataclass(frozen=True)
class ShardedRows:
    """A row backend (contract.py) whose rows go on in other ranks. S, T, biases and G are slices; statistics, losses, factors and labels are of whole rows."""

    backend: RowBackend
    shard: VocabShard

    def row_stats(
        self, S: Tensor, T: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None, metrics: bool
    ) -> Tensor:
        own = self.backend.row_stats(S, T, spec, bias_s, bias_t, metrics)
        own[:, Column.STUDENT_ARGMAX : Column.CLIPPED] += self.shard.start
        sent = own[:, : Column.CLIPPED if metrics else Column.STUDENT_ENTROPY].contiguous()
        merged = merge(gather_ranks(sent, self.shard.group), spec.linear_difference(bias_s is bias_t))
        own.zero_()
        own[:, : merged.shape[1]] = merged
        return own

    def row_dot(
        self, S: Tensor, T: Tensor, stats: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if spec.one_sweep:
            return plain_kl(stats, spec)
        part = self.backend.row_dot(S, T, stats, replace(spec, token_clip=torch.inf), bias_s, bias_t)
        share = stats[:, Column.CLIPPED] * (S.shape[1] / self.shard.vocab_size)
        loss, A, clipped = (
            gather_ranks(torch.stack([*part, share]), self.shard.group).double().sum(0).to(stats.dtype)
        )
        stats[:, Column.CLIPPED] = clipped
        return clip_tokens(loss, stats, spec), A

    def row_grad_(
        self,
        S: Tensor,
        T: Tensor,
        stats: Tensor,
        A: Tensor,
        factor: Tensor,
        spec: RowSpec,
        bias_s: Tensor | None,
        bias_t: Tensor | None,
        G: Tensor,
        policy: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> None:
        own = None if labels is None else self.shard.local(labels)
        self.backend.row_grad_(S, T, stats, A, factor, spec, bias_s, bias_t, G, policy, own)

    def row_fused_(
        self,
        S: Tensor,
        T: Tensor,
        factor: Tensor,
        spec: RowSpec,
        bias_s: Tensor | None,
        bias_t: Tensor | None,
        metrics: bool,
        G: Tensor,
        policy: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Not fused: the other ranks' part of a row must come between the sweeps."""
        stats = self.row_stats(S, T, spec, bias_s, bias_t, metrics)
        loss, A = self.row_dot(S, T, stats, spec, bias_s, bias_t)
        self.row_grad_(S, T, stats, A, factor, spec, bias_s, bias_t, G, policy, labels)
        return stats, loss, A


class _Masses(NamedTuple):
    """Shards as entries of a row, (R, n) each, and the row's own (n,)."""

    q: Tensor  # share of the student's mass
    p: Tensor
    log_ratio: Tensor  # log q - log p
    references: tuple[Tensor, ...]  # STUDENT_MAX to SPREAD of the merged row
    peak: Tensor  # (n,) rank of the student's first maximum


def merge(parts: Tensor, linear: bool) -> Tensor:
    """Statistics of whole rows, (n, k), from those of their shards, (R, n, k), whose largest entries are named by their columns in the whole.

    `linear`: the sweeps take d from the difference buffer (Logits.linear).
    """
    column = {c: parts[:, :, c].double() for c in Column if c < parts.shape[2]}
    masses = _masses(column, parts, linear)
    q, p, log_ratio, references, peak = masses
    columns = [
        *references,
        _mean(q, column[Column.REVERSE_KL], log_ratio, p == 0),
        _mean(p, column[Column.FORWARD_KL], -log_ratio, q == 0),
    ]
    if Column.STUDENT_ENTROPY in column:
        none = torch.zeros_like(p, dtype=torch.bool)
        top_s, top_t = (
            q * column[Column.STUDENT_MAX_PROB],
            torch.where(p > 0, p * column[Column.TEACHER_MAX_PROB], 0.0),
        )
        columns += [
            _mean(q, column[Column.STUDENT_ENTROPY], -q.log(), none),
            _mean(p, column[Column.TEACHER_ENTROPY], -p.log(), none),
            torch.where(q > 0, top_s, 0.0).amax(0),
            top_t.amax(0),
            _at(column[Column.STUDENT_ARGMAX], peak),
            _at(column[Column.TEACHER_ARGMAX], top_t.argmax(0)),
        ]
    invalid = torch.isnan(references[1]) | torch.isnan(references[3])  # a side without a distribution
    merged = torch.stack(columns, dim=1)
    merged[:, Column.SPREAD + 1 :] = torch.where(invalid[:, None], torch.nan, merged[:, Column.SPREAD + 1 :])
    return merged.to(parts.dtype)


def _masses(column: dict[Column, Tensor], parts: Tensor, linear: bool) -> _Masses:
    max_s, max_t = column[Column.STUDENT_MAX], column[Column.TEACHER_MAX]
    lse_s = torch.where(max_s == -torch.inf, -torch.inf, max_s + column[Column.STUDENT_LOGSUM])
    lse_t = torch.where(max_t == -torch.inf, -torch.inf, max_t + column[Column.TEACHER_LOGSUM])
    # What the sweeps take for c: they round the difference of the maxima where d is exact, else they subtract each side's own.
    c = (
        (parts[:, :, Column.TEACHER_MAX] - parts[:, :, Column.STUDENT_MAX]).double()
        if linear
        else max_t - max_s
    )
    peak = max_s.argmax(0)
    of_row = _at(c, peak)
    spread = torch.nan_to_num(
        column[Column.SPREAD] + (c - of_row).abs(), nan=torch.inf, posinf=torch.inf
    ).amax(0)  # at least the row's own
    near = spread <= SPREAD_LIMIT
    reference_s, reference_t = _at(max_s, peak), torch.where(near, _at(max_t, peak), max_t.amax(0))
    whole_s = torch.logsumexp(lse_s, 0)
    q = torch.exp(lse_s - whole_s)
    excess = c - of_row + column[Column.GAP]  # L_r - c
    gap = torch.log1p((q * torch.expm1(excess)).sum(0))
    logsum_s = whole_s - reference_s
    logsum_t = torch.where(near, logsum_s + gap, torch.logsumexp(lse_t, 0) - reference_t)
    gap = torch.where(near, gap, logsum_t - logsum_s)
    whole_t = reference_t + logsum_t
    log_ratio = torch.where(near, gap - excess, (lse_s - whole_s) - (lse_t - whole_t))
    p = torch.where(near, q * torch.exp(-log_ratio), torch.exp(lse_t - whole_t))
    return _Masses(q, p, log_ratio, (reference_s, logsum_s, reference_t, logsum_t, gap, spread), peak)


def _mean(mass: Tensor, within: Tensor, between: Tensor, infinite: Tensor) -> Tensor:
    """sum mass * (within + between) over the shards; one without mass counts nothing, one where the other side has none is infinite."""
    terms = torch.where(infinite, torch.inf, mass * (within + between))
    return torch.where(mass > 0, terms, 0.0).sum(0)


def _at(values: Tensor, rank: Tensor) -> Tensor:
    """(n,) of (R, n): each row's value in one rank."""
    return values.gather(0, rank[None])[0]
