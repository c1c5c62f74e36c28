"""Restrict divergences to K entries per token: the top-k dialects of SDPO, OPSD and verl.

The support is small, so its computation is plain torch on (n, K) tensors. Two steps are dense, and both reuse
sweeps: the statistics, and the gradient outside the support, which is a multiple of q and so a policy term
without a label. The mass of a bucket comes from a third step, statistics of the row without its support: 1
minus the mass inside has no digits where that mass is nearly all.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._rows import torch_rows
from .._rows.contract import GAP_BOUNDS, SPREAD_LIMIT, Column, RowBackend, clip_tokens
from .._rows.torch_math import transform_slope
from ..spec import RowSpec, Support
from .late_gradients import pull

# The mass outside the support is taken for at least this: that of a support whose log-mass is -1e-7
LEAST_TAIL = -math.expm1(-1e-7)


class Rows(NamedTuple):
    """Hold a chunk's raw logits, (C, V), and biases, (V,), as the sweeps take them.

    16-bit logits are held relative to a constant of each row, which no softmax sees.
    """

    S: Tensor
    T: Tensor
    bias_s: Tensor | None
    bias_t: Tensor | None
    # (C, 1) fp32: S and T at the labels, without their rounding
    at_label: tuple[Tensor, Tensor] | None = None
    # (C,) fp32: what S and T are relative to; None for 0
    constants: tuple[Tensor | None, Tensor | None] = (None, None)

    def at(self, columns: Tensor) -> Rows:
        """Return logits and biases at (n, K) columns. A bias shared by both sides stays one object."""
        bias_s = None if self.bias_s is None else self.bias_s[columns]
        bias_t = bias_s
        if self.bias_t is not self.bias_s:
            bias_t = None if self.bias_t is None else self.bias_t[columns]
        return Rows(self.S.gather(1, columns), self.T.gather(1, columns), bias_s, bias_t)


class Entries(NamedTuple):
    """Hold the support of n rows: its columns, raw logits and probabilities under the whole vocabulary.

    q, p, delta and log_q are 0 where an entry is not live.
    """

    columns: Tensor  # (n, K) int64
    live: Tensor  # (n, K) bool
    raw: Rows
    whole_q: Tensor  # (n, K) q of the column, live or not
    q: Tensor  # (n, K) student
    p: Tensor  # (n, K) teacher
    delta: Tensor  # (n, K) log p - log q
    log_q: Tensor  # (n, K), which keeps its digits where q underflows


class Rest(NamedTuple):
    """Hold what n rows have outside the support, (n, 1) each, to its own relative accuracy."""

    q: Tensor  # mass of the student
    p: Tensor | None  # of the teacher; None where it is known by its entries alone
    log_ratio: Tensor | None  # log p - log q


class Restricted(NamedTuple):
    """Hold the divergence on a support, and its gradient over the raw logits at factor 1."""

    loss: Tensor  # (n,) nats
    A: Tensor  # (n,)
    inside: Tensor  # (n, K) gradient at the entries of the support
    outside: Tensor  # (n,) gradient elsewhere, as a multiple of q


def entries(
    rows: Rows, stats: Tensor, spec: RowSpec, support: Support, ids: Tensor | None, logprobs: Tensor | None
) -> Entries:
    """Return the entries of the support: those listed by `ids` and `logprobs` (n, K), else the K largest.

    A log-prob of -inf is padding with an arbitrary id.
    """
    if ids is None or logprobs is None:
        columns = _largest(rows, spec, support)
        live = torch.ones_like(columns, dtype=torch.bool)
    else:
        # Padding repeats the first live entry of its row, so that two writes to a column write the same
        # value.
        live = logprobs > -torch.inf
        first = ids.gather(1, live.to(torch.int8).argmax(1, keepdim=True))[:, 0]
        columns = torch.where(live, ids, torch.where(live.any(1), first, 0)[:, None])
    raw = rows.at(columns)
    logits = torch_rows.logits(raw.S, raw.T, spec, raw.bias_s, raw.bias_t)
    q, p, delta = torch_rows.distributions(logits, stats)
    log_q = torch_rows.student_logprobs(logits.s, stats)
    if logprobs is not None:
        p, delta = logprobs.to(q.dtype).exp(), logprobs.to(q.dtype) - log_q
    return Entries(columns, live, raw, q, *(torch.where(live, x, 0.0) for x in (q, p, delta, log_q)))


def _largest(rows: Rows, spec: RowSpec, support: Support) -> Tensor:
    """Return the (n, min(K, V)) columns of the largest transformed logits of a side."""
    n, V = rows.S.shape
    k = min(support.k, V)
    if support.side == "student" and rows.bias_s is None and spec.student.scale > 0:
        return rows.S.topk(k, dim=1, sorted=False).indices  # the transform keeps the order
    step = max(1, 2 * torch_rows.BLOCK_ENTRIES // V)
    # One tensor: each small result in a list would pin a block of the heap, 114 MiB at V = 152k.
    columns = rows.S.new_empty(n, k, dtype=torch.int64)
    for b in (slice(start, start + step) for start in range(0, n, step)):
        logits = torch_rows.logits(rows.S[b], rows.T[b], spec.at(b), rows.bias_s, rows.bias_t)
        side = logits.s if support.side == "student" else logits.t
        columns[b] = side.topk(k, dim=1, sorted=False).indices
    return columns


def _log_ratio(excess: Tensor, mass_p: Tensor, mass_q: Tensor) -> Tensor:
    """Return log(mass_p / mass_q), given excess = mass_p - mass_q to its own relative accuracy."""
    x = excess / mass_q
    close = (x > GAP_BOUNDS[0]) & (x < GAP_BOUNDS[1])
    return torch.where(close, torch.log1p(torch.where(close, x, 0.0)), mass_p.log() - mass_q.log())


def without_support(
    backend: RowBackend, rows: Rows, stats: Tensor, spec: RowSpec, at: Entries, listed: bool
) -> Rest | None:
    """Sweep the rows without their support, of which `at` holds this rank's columns. None under a softcap.

    The support's logits are -inf meanwhile; a softcap would make a number of that. `listed`: T is not the
    teacher's logits, or not ours to write.
    """
    if spec.student.softcap is not None or not (listed or spec.teacher.softcap is None):
        return None
    sides = [rows.S] if listed or spec.difference else [rows.S, rows.T]
    chosen = at.live.any(1, keepdim=True)  # else `columns` names one that is none of the support
    for side, raw in zip(sides, (at.raw.S, at.raw.T), strict=False):
        write_entries_(side, at.columns, torch.where(chosen, -torch.inf, raw))
    rest = backend.row_stats(rows.S, rows.T, spec, rows.bias_s, rows.bias_t, False)
    for side, raw in zip(sides, (at.raw.S, at.raw.T), strict=False):
        write_entries_(side, at.columns, raw)
    own, all_of = ({c: x[:, c, None].double() for c in Column} for x in (rest, stats))

    def mass(largest: Column, logsum: Column) -> Tensor:
        log = (own[largest] - all_of[largest]) + (own[logsum] - all_of[logsum])
        return torch.where(own[largest] == -torch.inf, 0.0, log.exp())

    q = mass(Column.STUDENT_MAX, Column.STUDENT_LOGSUM)
    if listed:
        return Rest(q.to(stats.dtype), None, None)
    # L of the rest minus L of the row: contract.py
    linear = spec.linear_difference(rows.bias_s is rows.bias_t)
    c, c_all = (
        (x[:, Column.TEACHER_MAX, None] - x[:, Column.STUDENT_MAX, None]).double()
        if linear
        else of[Column.TEACHER_MAX] - of[Column.STUDENT_MAX]
        for x, of in ((rest, own), (stats, all_of))
    )
    ratio = (c - c_all) + (own[Column.GAP] - all_of[Column.GAP])
    near = all_of[Column.SPREAD] <= SPREAD_LIMIT
    p = torch.where(near, q * ratio.exp(), mass(Column.TEACHER_MAX, Column.TEACHER_LOGSUM))
    return Rest(*(x.to(stats.dtype) for x in (q, p, ratio)))


def _bucket(mass_q: Tensor, mass_p: Tensor, excess: Tensor, rest: Rest | None) -> tuple[Tensor, ...]:
    """Return q, p and delta of the bucket, (n, 1) each, and whether the student's is at its bound."""
    tail_q, tail_p = 1 - mass_q, 1 - mass_p
    if rest is not None:
        # NaN where a side has nothing outside the support
        tail_q = torch.where(rest.q.isnan(), tail_q, rest.q)
        tail_p = tail_p if rest.p is None else torch.where(rest.p.isnan(), tail_p, rest.p)
    saturated, either = tail_q < LEAST_TAIL, (tail_q < LEAST_TAIL) | (tail_p < LEAST_TAIL)
    tail_q, tail_p = tail_q.clamp(min=LEAST_TAIL), tail_p.clamp(min=LEAST_TAIL)
    ratio = _log_ratio(torch.where(either, tail_p - tail_q, -excess), tail_p, tail_q)
    if rest is not None and rest.log_ratio is not None:
        ratio = torch.where(either | rest.log_ratio.isnan(), ratio, rest.log_ratio)
    return tail_q, tail_p, ratio, saturated


def _renormalised(at: Entries, mass_q: Tensor, mass_p: Tensor, excess: Tensor) -> tuple[Tensor, ...]:
    """Return q, p and delta of the support alone."""
    # A side without mass on the support has q = 0 (p = 0) at all of it, and delta stays infinite.
    no_q, no_p = mass_q == 0, mass_p == 0
    ratio = torch.where(no_q | no_p, 0.0, _log_ratio(excess, mass_p, mass_q))
    plain = torch.where(no_q, 0.0, at.q / mass_q), torch.where(no_p, 0.0, at.p / mass_p), at.delta - ratio
    # A mass that underflows, or has lost digits by it, is taken from the log-probs.
    float_info = torch.finfo(mass_q.dtype)
    rare = torch.minimum(mass_q, mass_p) < float_info.tiny / float_info.eps
    log_q = torch.where(at.live, at.log_q, -torch.inf)
    log_p = torch.where(at.delta.isfinite(), log_q + at.delta, at.p.log())
    of_q, of_p = log_q.logsumexp(1, keepdim=True), log_p.logsumexp(1, keepdim=True)
    ratio = torch.where(of_q.isfinite() & of_p.isfinite(), of_p - of_q, 0.0)
    logs = _share(log_q, of_q), _share(log_p, of_p), at.delta - ratio
    return tuple(torch.where(rare, of_logs, found) for of_logs, found in zip(logs, plain, strict=True))


def _share(log_probs: Tensor, log_mass: Tensor) -> Tensor:
    """Return probabilities (n, K) over the mass exp(log_mass), 0 where that is 0."""
    return torch.where(log_mass == -torch.inf, 0.0, torch.exp(log_probs - log_mass))


def restricted(at: Entries, stats: Tensor, spec: RowSpec, tail: str, rest: Rest | None) -> Restricted:
    """Compute value and gradient on the support. `rest` serves a bucket. Writes stats[CLIPPED]."""
    q, p, delta = at.q, at.p, at.delta
    mass_q, mass_p = q.sum(1, keepdim=True), p.sum(1, keepdim=True)
    excess = torch.where(q > 0, q * torch.expm1(delta), p).sum(1, keepdim=True)
    if tail == "renormalize":
        q, p, delta = _renormalised(at, mass_q, mass_p, excess)
    saturated = torch.zeros_like(mass_q, dtype=torch.bool)
    if tail == "bucket":
        *bucket, saturated = _bucket(mass_q, mass_p, excess, rest)
        q, p, delta = (torch.cat(pair, 1) for pair in zip((q, p, delta), bucket, strict=True))
    f, u, clipped = torch_rows.terms(q, p, delta, spec)
    live = at.live if tail != "bucket" else torch.cat([at.live, torch.ones_like(saturated)], 1)
    f, u, clipped = torch.where(live, f, 0.0), torch.where(live, u, 0.0), clipped & live
    if tail != "renormalize" and spec.divergence.omitted:
        # u omits a constant times q, which matters where the q that have a gradient do not sum to 1: without
        # a tail, or with one at its bound.
        short = live if tail == "none" else live & saturated
        u = torch.where(short, u + spec.divergence.omitted * q, u)
    if tail == "bucket":
        u[:, -1:] = torch.where(saturated, 0.0, u[:, -1:])
    missing = torch_rows.missing(stats)
    loss, A = f.sum(1) + missing, u.sum(1) + missing
    if tail == "bucket":
        # The q sum to 1 but for their rounding, which near a teacher is all that u and q * A differ by.
        A = A / torch.where(saturated, 1.0, q.sum(1, keepdim=True))[:, 0]
    stats[:, Column.CLIPPED] = clipped.sum(1) / live.sum(1).clamp(min=1)
    loss = clip_tokens(loss, stats, spec)
    K = at.q.shape[1]
    inside = u[:, :K] - q[:, :K] * A[:, None]
    if tail == "bucket":
        outside = u[:, -1] / q[:, -1] - A
    else:
        outside = -A if tail == "none" else torch.zeros_like(A)
    stopped = stats[:, Column.CLIPPED] == 1
    return Restricted(loss, A, torch.where(stopped[:, None], 0.0, inside), torch.where(stopped, 0.0, outside))


def _first(found: Tensor, values: Tensor, otherwise: Tensor) -> Tensor:
    """Return (n, 1): the value at each row's first True, or `otherwise` in a row without one."""
    first = values.gather(1, found.to(torch.int8).argmax(1, keepdim=True))
    return torch.where(found.any(1, keepdim=True), first, otherwise)


def _values(
    rows: Rows,
    stats: Tensor,
    spec: RowSpec,
    at: Entries,
    result: Restricted,
    factor: Tensor,
    policy_slope: Tensor | None,
    labels: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return columns and raw-logit gradients of the support and, with a policy term, of the label.

    A column that occurs twice has the same value at both places.
    """
    ignored = (factor == 0)[:, None]
    factor = factor[:, None]
    inside = torch.where(ignored, 0.0, factor * result.inside)
    outside = torch.where(ignored, 0.0, factor * result.outside[:, None])
    columns, raw, q = at.columns, at.raw, at.whole_q
    values = torch.where(at.live, inside, outside * q)
    values = torch.where(at.live, values, _first(at.live, values, values[:, :1]))
    if policy_slope is not None and labels is not None:
        label = labels.clamp(min=0)[:, None]
        beside = rows.at(label)
        logits = torch_rows.logits(beside.S, beside.T, spec, beside.bias_s, beside.bias_t)
        q_label = torch_rows.distributions(logits, stats)[0]
        of_label = _first((columns == label) & at.live, values, outside * q_label)
        pairs = (columns, label), (q, q_label), (values, of_label)
        columns, q, values = (torch.cat(pair, 1) for pair in pairs)
        raw = rows.at(columns)
        values = values + policy_slope[:, None] * (q - (columns == labels[:, None]).to(q.dtype))
    return columns, values * transform_slope(raw.S.to(values.dtype), spec.student, raw.bias_s)


def write_gradient_(
    backend: RowBackend,
    rows: Rows,
    stats: Tensor,
    spec: RowSpec,
    at: Entries,
    result: Restricted,
    factor: Tensor,  # (n,)
    policy_slope: Tensor | None,  # (n,)
    labels: Tensor | None,  # (n,)
    G: Tensor,
) -> None:
    """Write factor * dD/d(raw student logit) + policy_slope * (q - onehot(label)) into G, which may be S."""
    columns, values = _values(rows, stats, spec, at, result, factor, policy_slope, labels)
    multiple_of_q = torch.where(factor == 0, 0.0, factor * result.outside)
    multiple_of_q = multiple_of_q + (0 if policy_slope is None else policy_slope)
    nothing = torch.zeros_like(factor)
    nowhere = torch.full_like(columns[:, 0], -1)
    backend.row_grad_(
        rows.S, rows.T, stats, nothing, nothing, spec, rows.bias_s, rows.bias_t, G, multiple_of_q, nowhere
    )
    write_entries_(G, columns, values)


def top_k(walk: Any, chunk: Rows, at: slice | Tensor) -> None:
    """Sweep a chunk on a support: the sweep of a loop.Walk. With saved statistics, only the gradient."""
    problem, spec, support = walk.problem, walk.problem.spec.at(at), walk.problem.support
    exact = walk.exact(chunk, at)
    if walk.saved:
        stats = walk.out.stats[at]
    else:
        stats = walk.backend.row_stats(chunk.S, chunk.T, spec, chunk.bias_s, chunk.bias_t, walk.metrics)
    ids, logprobs = (
        None if x is None else x[at] for x in (problem.rows.topk_ids, problem.rows.topk_logprobs)
    )
    if problem.shard is None:
        every = own = entries(chunk, stats, spec, support, ids, logprobs)
    else:
        every, own = problem.shard.entries(chunk, stats, spec, support, ids, logprobs)
    rest = None
    if support.tail == "bucket":
        listed = ids is not None or problem.rows.target is not None
        rest = without_support(walk.backend, chunk, stats, spec, own, listed)
    result = restricted(every, stats, spec, support.tail, rest)
    if not walk.saved:
        walk.keep(at, stats, result.loss, result.A, exact)
    if walk.wants_gradient:
        factor, slope, labels = pull(walk, chunk, at, stats)
        if labels is not None and problem.shard is not None:
            labels = problem.shard.local(labels)
        G = walk.gradient(chunk.S)
        write_gradient_(walk.backend, chunk, stats, spec, own, result, factor, slope, labels, G)


def write_entries_(G: Tensor, columns: Tensor, values: Tensor) -> None:
    """Write values to columns (n, K) of each row of G. A column that occurs twice has equal values.

    Not by `scatter_`: on a CPU that copies all of a narrowed view, 149 MiB for 256 bf16 rows of 152k.
    """
    rows = torch.arange(G.shape[0], device=G.device)[:, None]
    G[rows, columns] = values.to(G.dtype)
