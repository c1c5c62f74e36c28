"""Sweep the rows of vocabulary-parallel heads: merge the statistics of a row from those of its slices.

Shards merge into a row like entries do: a shard with student mass exp(lse_s) and teacher mass exp(lse_t) is
one entry of a smaller row, and L_r = lse_t - lse_s is its d. So the merged normalisers keep the accuracy of
the sweeps near the teacher (_rows/contract.py), and the sweeps take the merged statistics.

All ranks gather the same numbers and merge them in the same order in float64: statistics, weights and losses
are bitwise equal on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .._rows.contract import SPREAD_LIMIT, Column, RowBackend, clip_tokens, plain_kl
from .._rows.torch_topk import ranked
from ..spec import LogitTransform, RowSpec
from .shard import VocabShard, gather_ranks


@dataclass(frozen=True)
class ShardedRows:
    """Implement the row contract (contract.py) for rows split over ranks.

    S, T, biases and G are slices of this rank; statistics, losses, factors and labels are those of whole
    rows.
    """

    backend: RowBackend
    shard: VocabShard

    def column_norms(self, G: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.backend.column_norms(G, scale)

    def gather_columns_(self, G: Tensor, columns: Tensor, out: Tensor, sums: Tensor) -> None:
        self.backend.gather_columns_(G, columns, out, sums)

    def row_topk_(
        self,
        S: Tensor,
        of_side: LogitTransform,
        bias: Tensor | None,
        ids: Tensor,
        values: Tensor,
        tail: Tensor,
    ) -> None:
        """List the columns of the whole vocabulary. k may be larger than a shard."""
        (n, k), own = ids.shape, min(ids.shape[1], S.shape[1])
        found, logits = ids.new_empty(n, own), values.new_empty(n, own)
        self.backend.row_topk_(S, of_side, bias, found, logits, tail)
        sent, columns = values.new_full((n, k + 1), -torch.inf), ids.new_full((n, k), -1)
        sent[:, :own], sent[:, k], columns[:, :own] = logits, tail, found + self.shard.start
        _merge_lists(
            gather_ranks(columns, self.shard.group), gather_ranks(sent, self.shard.group), ids, values, tail
        )

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
        policy_slope: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> None:
        own = None if labels is None else self.shard.local(labels)
        self.backend.row_grad_(S, T, stats, A, factor, spec, bias_s, bias_t, G, policy_slope, own)

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
        policy_slope: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the three sweeps in turn: collectives between them merge the parts of a row."""
        stats = self.row_stats(S, T, spec, bias_s, bias_t, metrics)
        loss, A = self.row_dot(S, T, stats, spec, bias_s, bias_t)
        self.row_grad_(S, T, stats, A, factor, spec, bias_s, bias_t, G, policy_slope, labels)
        return stats, loss, A


class _Masses(NamedTuple):
    """Hold shards as the entries of a row, (R, n) each, and values of the whole row, (n,)."""

    q: Tensor  # share of the student's mass
    p: Tensor
    log_ratio: Tensor  # log q - log p
    references: tuple[Tensor, ...]  # (n,) STUDENT_MAX to SPREAD of the merged row
    peak: Tensor  # (n,) rank of the student's first maximum


def merge(parts: Tensor, linear: bool) -> Tensor:
    """Merge the statistics of R shards, (R, n, k), into those of whole rows, (n, k).

    The argmax columns of the shards hold indices of the whole vocabulary. `linear`: the sweeps take d from
    the difference buffer (Logits.linear).
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
        top_s = q * column[Column.STUDENT_MAX_PROB]
        top_t = torch.where(p > 0, p * column[Column.TEACHER_MAX_PROB], 0.0)
        columns += [
            _mean(q, column[Column.STUDENT_ENTROPY], -q.log(), none),
            _mean(p, column[Column.TEACHER_ENTROPY], -p.log(), none),
            torch.where(q > 0, top_s, 0.0).amax(0),
            top_t.amax(0),
            _at(column[Column.STUDENT_ARGMAX], peak),
            _at(column[Column.TEACHER_ARGMAX], top_t.argmax(0)),
        ]
    invalid = torch.isnan(references[1]) | torch.isnan(references[3])  # one side has no distribution
    merged = torch.stack(columns, dim=1)
    merged[:, Column.SPREAD + 1 :] = torch.where(invalid[:, None], torch.nan, merged[:, Column.SPREAD + 1 :])
    return merged.to(parts.dtype)


def _merge_lists(columns: Tensor, sent: Tensor, ids: Tensor, values: Tensor, tail: Tensor) -> None:
    """Merge the lists of R shards, `columns` (R, n, k), -1 is padding, and `sent` (R, n, k + 1).

    `sent` holds the logits of the lists, and each shard's mass outside its list.
    """
    k = ids.shape[1]
    every, columns = (x.transpose(0, 1).flatten(1) for x in (sent[:, :, :k], columns))
    # In the order of the ids, so that the lower id is first among equals. An entry of -inf is no padding.
    order = torch.where(columns < 0, -torch.inf, every.clamp(min=torch.finfo(every.dtype).min))
    chosen = ranked(order, k)
    ids.copy_(columns.gather(1, chosen))
    values.copy_(every.gather(1, chosen))
    outside = torch.cat([every.scatter(1, chosen, -torch.inf), (sent[:, :, k] + sent[:, :, 0]).t()], 1)
    tail.copy_(torch.where(outside == -torch.inf, outside, outside - values[:, :1]).logsumexp(1))


def _masses(column: dict[Column, Tensor], parts: Tensor, linear: bool) -> _Masses:
    """Merge the normalisers of the shards, and return each shard's mass under both sides."""
    max_s, max_t = column[Column.STUDENT_MAX], column[Column.TEACHER_MAX]
    lse_s = torch.where(max_s == -torch.inf, -torch.inf, max_s + column[Column.STUDENT_LOGSUM])
    lse_t = torch.where(max_t == -torch.inf, -torch.inf, max_t + column[Column.TEACHER_LOGSUM])
    # c as the sweeps take it: the rounded difference of the maxima where d is exact, else the exact one.
    c = max_t - max_s
    if linear:
        c = (parts[:, :, Column.TEACHER_MAX] - parts[:, :, Column.STUDENT_MAX]).double()
    peak = max_s.argmax(0)
    of_row = _at(c, peak)
    # An upper bound of the spread of the whole row.
    spread = column[Column.SPREAD] + (c - of_row).abs()
    spread = torch.nan_to_num(spread, nan=torch.inf, posinf=torch.inf).amax(0)
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
    """Return sum mass * (within + between) over the shards, (n,).

    A shard without mass adds 0; one with mass where the other side has none (`infinite`) makes the sum
    infinite.
    """
    terms = torch.where(infinite, torch.inf, mass * (within + between))
    return torch.where(mass > 0, terms, 0.0).sum(0)


def _at(values: Tensor, rank: Tensor) -> Tensor:
    """Return each row's value in the given rank, (n,) of (R, n)."""
    return values.gather(0, rank[None])[0]
