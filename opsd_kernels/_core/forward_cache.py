"""Cache what a forward KL needs of its teacher, for a frozen student head.

With p the teacher and z = (h W^T + b) f the student's logits, f = logit scale / temperature, and any token y

    KL(p || q) = sum p log p - f (h . r + c) - log q_y,   r = sum_v p_v W_v - W_y,   c = sum_v p_v b_v - b_y,

because log q_v = log q_y + z_v - z_y. So N x (H + 3) numbers hold the teacher:
r, c, the negative entropy and y. With y the teacher's most likely token, r and c are small where the teacher
is sure, and the gradient over z, q - onehot(y), keeps its digits in 16 bits where the student is sure too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from .._rows import torch_math, torch_rows
from .._rows.contract import Column
from .._rows.torch_topk import rows_at_once
from ..spec import LogitTransform
from . import library, loop
from .loop import Positions, Walk
from .problem import Problem, Side
from .sizes import WIDENED_BYTES
from .sliced_head import SlicedHead, device_kind
from .topk_support import Rows


@dataclass(frozen=True)
class Parts:
    """Hold the teacher's part of the forward KL of N tokens, in the dtype of the statistics."""

    mean: Tensor  # (N, H_s): r
    bias: Tensor  # (N,): c
    negative_entropy: Tensor  # (N,)
    token: Tensor  # (N,) int64: y, -1 at invalid tokens


def forward_kl_parts(problem: Problem, head: Side) -> Parts:
    """Return `_parts`, outside torch.compile."""
    return library.eagerly(_parts, problem, head)


def _parts(problem: Problem, head: Side) -> Parts:
    """Walk the teacher, the problem's student, and multiply its probabilities by the student's head.

    `head` is the student's; with a shard, this rank's rows. The product is in fp32 (fp64) whatever the dtype
    of the head: a cache is made once, and its error would be that of every step. Zeros, and a token of -1, at
    invalid tokens. Of meta tensors the shapes.
    """
    problem = replace(problem, student=problem.student.detach(), wants=library.NO_GRADIENTS)
    N, wide, new = problem.tokens, problem.stats_dtype, problem.student.hidden.new_zeros
    parts = Parts(
        new((N, head.weight.shape[1]), dtype=wide),
        new(N, dtype=wide),
        new(N, dtype=wide),
        new(N, dtype=torch.int64),
    )
    if parts.mean.is_meta:
        return parts
    chunks, backend, rows, _ = library.arrange(problem)
    if head.quantised is not None or head.weight.dtype != wide or not head.weight.is_contiguous():
        # The student's GEMM rounds a quantised head to the dtype of its rows.
        dtype = wide if head.quantised is None else problem.student.hidden.dtype
        height, device = head.weight.shape[0], head.weight.device
        head = replace(head, weight=SlicedHead(head.weight, head.quantised, 0, height, dtype, device))

    def sweep(walk: Walk, chunk: Rows, at: Positions) -> None:
        transform = walk.problem.spec.at(at).student
        biases = chunk.bias_s, chunk.bias_t
        stats = walk.backend.row_stats(chunk.S, chunk.T, walk.problem.spec.at(at), *biases, True)
        token = stats[:, Column.STUDENT_ARGMAX].long()
        write_difference_(chunk, stats, transform, walk.columns(token))
        mean, offset = products(chunk.S, head)
        if walk.problem.shard is not None:
            dist.all_reduce(mean, group=walk.problem.shard.group)
            dist.all_reduce(offset, group=walk.problem.shard.group)
        found = mean, offset, -stats[:, Column.STUDENT_ENTROPY], token + 1
        for x, part in zip(vars(parts).values(), found, strict=True):
            x[at] = walk.zero_invalid(part, at)

    loop.run(problem, chunks, backend, rows, metrics=True, sweep=sweep)
    parts.token.sub_(1)  # -1 where no sweep has written
    return parts


def write_difference_(chunk: Rows, stats: Tensor, transform: LogitTransform, token: Tensor) -> None:
    """Write p - onehot(token) over the logits of a chunk, a few rows at a time."""
    n, V = chunk.S.shape
    step = rows_at_once(V, chunk.S.device)
    for b in (slice(start, start + step) for start in range(0, n, step)):
        logits = torch_math.transform(chunk.S[b], transform.at(b), chunk.bias_s)
        torch.exp(torch_rows.student_logprobs(logits, stats[b]), out=chunk.S[b])
    here = token >= 0
    rows = torch.arange(n, device=token.device)
    column = token.clamp(min=0)
    chunk.S[rows, column] -= here.to(chunk.S.dtype)


def products(P: Tensor, head: Side) -> tuple[Tensor, Tensor]:
    """Return P @ weight, (n, H), and P @ bias, (n,), in the dtype of P.

    The weight is a contiguous tensor of that dtype, or a SlicedHead, and includes the adapter. An entry of
    zero adds nothing, whatever the bias is.
    """
    weight, bias, lora = head.weight, head.bias, head.lora
    (n, V), H = P.shape, weight.shape[1]
    mean, offset = P.new_zeros(n, H), P.new_zeros(n)
    if isinstance(weight, Tensor):
        loop.project(P, weight[:V].t(), mean)
    else:
        step = max(64, WIDENED_BYTES[device_kind(P.device.type)] // (P.dtype.itemsize * H))
        for start in range(0, V, step):
            for part, rows in weight[start : min(start + step, V)].slices():
                mean.addmm_(P[:, start + part.start : start + part.stop], rows.to(P.dtype))
    if lora is not None:
        mean.addmm_(P @ lora.B[:V].to(P.dtype), lora.A.to(P.dtype), alpha=lora.scaling)
    if bias is not None:
        finite = bias[:V].to(P.dtype)
        offset = P @ torch.where(finite.isfinite(), finite, 0.0)
        removed = (~finite.isfinite()).nonzero()[:, 0]
        # p > 0 where the student has no probability makes the divergence infinite.
        offset = offset + torch.where(P[:, removed] == 0, 0.0, P[:, removed] * finite[removed]).sum(1)
    return mean, offset
