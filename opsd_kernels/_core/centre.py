"""Choose the constant of each row that 16-bit logits are held relative to, and judge their argmax exactly.

No softmax sees a constant that is added to all logits of a row, but their rounding does: bf16 keeps eight
binary digits, and the logits of the likely tokens of a language model lie near 20. Relative to a logit near
the largest one, the likely entries are small numbers and keep their digits. Captured from SmolLM2-135M, the
gradient's error falls from 3.1 % to .4 % (docs/design/numerics.md).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._rows import extension, torch_rows
from .._rows.torch_topk import rows_at_once
from ..spec import RowSpec
from .problem import Problem, Side

PILOT_COLUMNS, PILOT_SHARE = 256, 64  # at least, and of the vocabulary: see pilot_columns
# Columns that may hold a row's largest logit, and the columns of a group, see likely_columns. Groups of 8 to
# 32 take 1.0 ns per logit on a CPU, groups of 128 take 2.8, torch.topk 3.9.
LIKELY, GROUP = 4, 32


class Centre(NamedTuple):
    """Hold the constants of a chunk's rows, (C,) fp32 each."""

    s: Tensor | None
    t: Tensor | None  # of the teacher's logits, or of the differences
    stacked: Tensor | None  # (2C,): s and t, of the rows of a stacked GEMM
    at_label: tuple[Tensor, Tensor] | None  # (C, 1) fp32: the entries at the labels, relative to s and t

    @classmethod
    def of(
        cls,
        problem: Problem,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor | None,
        likely: Tensor,
        rounded: bool,
    ) -> Centre:
        """Take the logits of a likely column, or of the label if the student's is larger.

        Hidden states are (C, H). `likely` (C,) are columns with a large logit, `labels` (C,) those of the
        labels, -1 where another rank holds it. With `rounded` the constants are numbers of the logits' dtype.
        All ranks of a shard get the same constants.
        """
        difference = problem.spec.difference

        def at(columns: Tensor) -> tuple[Tensor, Tensor]:
            s = logits_of(problem.student, student, columns)
            if teacher is None or problem.teacher is None:
                return s, torch.zeros_like(s)
            t = logits_of(problem.teacher, teacher, columns)
            return s, t - s if difference else t

        label = None
        if labels is None:
            s, t = (x[:, 0] for x in at(likely[:, None]))
        else:
            both_s, both_t = at(torch.stack([likely, labels.clamp(min=0)], 1))
            label = both_s[:, 1], both_t[:, 1]
            likelier = (labels >= 0) & (label[0] > both_s[:, 0])
            s, t = (torch.where(likelier, x[:, 1], x[:, 0]) for x in (both_s, both_t))
        if problem.shard is not None:
            s, t = problem.shard.of_largest(s, t)
        if rounded:
            s, t = (x.to(problem.logits_dtype).float() for x in (s, t))
        s, t = (torch.where(x.isfinite(), x, 0.0) for x in (s, t))
        # On a GPU a centre costs a pass over the buffer, which a difference is spared: it is small.
        spared = difference and student.device.type != "cpu"
        at_label = None
        if label is not None:
            at_label = (label[0] - s)[:, None], (label[1] - (0 if spared else t))[:, None]
        return cls(s, None if spared else t, None if spared else torch.cat([s, t]), at_label)

    def part(self, rows: slice) -> Centre:
        """Return the constants of some rows of a chunk, for GEMMs of one side each."""
        label = None if self.at_label is None else (self.at_label[0][rows], self.at_label[1][rows])
        s, t = (None if x is None else x[rows] for x in (self.s, self.t))
        return Centre(s, t, None, label)


NO_CENTRE = Centre(None, None, None, None)


def pilot_columns(V: int) -> int:
    """Return how many of the first columns of a head a likely one is taken from.

    Vocabularies made by byte-pair encoding begin with their frequent tokens.
    """
    return min(V, max(PILOT_COLUMNS, V // PILOT_SHARE))


def likely_columns(S: Tensor, bias: Tensor | None) -> Tensor:
    """Return the columns of the LIKELY largest entries of S + bias, (C, V) -> (C, min(LIKELY, V)).

    The maximum of every group, of columns V / GROUP apart, is one pass over S. The largest entries lie in the
    groups of the largest maxima, or in the few columns after the last group.
    """
    (C, V), device = S.shape, S.device
    groups = V // GROUP
    step = rows_at_once(V if bias is not None else max(groups, 1), device)
    rest, members = (
        torch.arange(groups * GROUP, V, device=device),
        groups * torch.arange(GROUP, device=device),
    )
    parts = []
    for i in range(0, C, step):
        rows = S[i : i + step] if bias is None else S[i : i + step] + bias
        columns = rest.expand(rows.shape[0], -1)
        if groups:
            group = rows[:, : groups * GROUP].unflatten(1, (GROUP, groups)).amax(1)
            group = group.topk(min(LIKELY, groups)).indices
            columns = torch.cat([(group[:, :, None] + members).flatten(1), columns], 1)
        parts.append(columns.gather(1, rows.gather(1, columns).topk(min(LIKELY, V)).indices))
    return torch.cat(parts)


def exact_argmax(
    problem: Problem, spec: RowSpec, student: Tensor, teacher: Tensor | None, likely: Tensor, found: Tensor
) -> Tensor:
    """Return the columns of the largest logits of student and teacher, (C, 2), by fp32 dot products.

    `spec` is that of the C rows. Candidates are `likely` (C, K), columns of these heads, and `found` (C, 2),
    the argmax of both sides in the 16-bit buffers, columns of the whole vocabulary. With bf16 logits near 25
    that argmax is another one in .4 % of the tokens. All ranks of a shard get the same columns. Without a
    teacher the second column is the first.
    """
    shard, other = problem.shard, problem.teacher or problem.student
    known = found.long() if shard is None else shard.local(found.long())
    columns = torch.cat([likely, known], 1)
    at = columns.clamp(min=0)

    biases = (None if side.bias is None else side.bias[at] for side in (problem.student, other))
    s = logits_of(problem.student, student, at)
    t = s if teacher is None else logits_of(other, teacher, at)
    values = torch.stack(torch_rows.logits(s, t, replace(spec, difference=False), *biases)[:2])
    values = torch.where(columns < 0, -torch.inf, values)  # of another rank
    largest = values.amax(2)
    # The first of equal ones, as the sweeps take it
    column = torch.where(values == largest[:, :, None], at, problem.vocab).amin(2)
    if shard is not None:
        largest, beside = shard.of_largest(largest, -(column + shard.start).to(largest.dtype))
        column = -beside
    return torch.where(largest.isfinite(), column, found.t()).t()


def logits_of(side: Side, hidden: Tensor, columns: Tensor) -> Tensor:
    """Return `logits_at` under the head of a side, its adapter included."""
    logits, lora = logits_at(hidden, side.weight, columns), side.lora
    if lora is None:
        return logits
    entries = lora.B[columns].to(logits.dtype)  # (C, K, r)
    return logits + torch.matmul(entries, lora.coefficients(hidden)[:, :, None])[:, :, 0]


def logits_at(hidden: Tensor, weight: Any, columns: Tensor) -> Tensor:
    """Return hidden[i] . weight[columns[i, k]] in fp32, (C, H), (V, H), (C, K) -> (C, K), of 16-bit inputs.

    `weight` is a tensor of contiguous rows, or a SlicedHead.
    """
    on_cpu, dense = hidden.device.type == "cpu", isinstance(weight, Tensor)
    if on_cpu and dense and hidden.dtype == torch.bfloat16 and extension.gemm_unavailable() is None:
        out = torch.empty(columns.shape, dtype=torch.float32, device=hidden.device)
        torch.ops.opsd_kernels.dots_bf16_(hidden.contiguous(), weight, columns.contiguous(), out)
        return out
    (C, H), K = hidden.shape, columns.shape[1]
    out = torch.empty((C, K), dtype=torch.float32, device=hidden.device)
    if not on_cpu:
        return _products_at(hidden, weight, columns, out)
    step = rows_at_once(H, hidden.device)
    for i in range(0, C, step):
        rows = hidden[i : i + step].float()
        for k in range(K):
            out[i : i + step, k] = (rows * weight[columns[i : i + step, k]].float()).sum(1)
    return out


def _products_at(hidden: Tensor, weight: Any, columns: Tensor, out: Tensor) -> Tensor:
    """Write `logits_at` into `out` by a gather and a batched product for each slice of rows.

    A launch for each step of a sum in fp32, over slices of 4 MiB, took 168 of the 190 launches of a chunk of
    1664 rows with labels (H = 4096): 4 % of its GEMMs' time at 3 us each. These take 30.
    """
    step = rows_at_once(columns.shape[1] * hidden.shape[1], hidden.device)
    for i in range(0, hidden.shape[0], step):
        rows = weight[columns[i : i + step]].mT  # (n, H, K)
        torch.bmm(hidden[i : i + step, None], rows, out_dtype=out.dtype, out=out[i : i + step, None])
    return out
