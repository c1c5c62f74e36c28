"""The autograd Functions. Out of place where the graph is kept, so that backward may run twice.

`WeightedSum` knows its row factors in the forward pass and computes the gradients there (four GEMM passes, three with a frozen head). `PerRow` returns
a loss per row and accepts any upstream gradient per row: with a frozen head it only scales the rows of a dh computed in forward; with a trainable one
it projects again in backward (six passes). `LogProbs` does the same for log-probs of one side.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._rows.contract import Column
from . import loop
from .library import Call, weighted_forward
from .memory import empty

_op = torch.ops.opsd_kernels.linear_divergence
_op_backward = torch.ops.opsd_kernels.linear_divergence_backward

# Gradients of fp16 logits stay un-normalised, with their largest row factor at 64: 1e-4 / 8192 underflows, 64 * |log p - log q| does not overflow.
FP16_ROW_FACTOR = 64.0


def _row_factors(call: Call) -> tuple[Call, Tensor | None]:
    """(the call with row factors for the sweep, what is left to multiply the gradients by)."""
    if call.student_hidden.dtype != torch.float16:
        return call, None
    factors = [x for x in (call.factor, call.policy) if x is not None]
    largest = (
        torch.stack([x.abs().amax() for x in factors]).amax()
        if call.student_hidden.numel()
        else factors[0].new_ones(())
    )
    unit = torch.where(largest > 0, largest, torch.ones_like(largest)) / FP16_ROW_FACTOR
    return call._replace(
        factor=call.factor / unit, policy=None if call.policy is None else call.policy / unit
    ), unit


def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * scale in `dtype`. Where the graph is freed after this backward, over the saved memory: a fresh dW costs a CPU more than the product does."""
    wide = scale.to(torch.promote_types(grad.dtype, torch.float32))
    if not loop.on_host(grad.device) and not wide.dim():
        wide = wide.reshape((1,) * grad.dim())  # a GPU rounds a 0-dim factor to the other one's 16 bits
    if torch.compiler.is_compiling():
        return (grad * wide).to(dtype)
    kept = torch._C._autograd._get_current_graph_task_keep_graph()
    if not loop.on_host(grad.device):
        return torch.mul(
            grad, wide, out=torch.empty_like(grad, dtype=dtype) if kept or grad.dtype != dtype else grad
        )  # one pass, cast included
    if kept:
        return (grad * wide).to(dtype)
    unchanged = scale.numel() == 1 and scale.item() == 1
    scaled = grad if unchanged else grad.mul_(scale)
    return scaled if scaled.dtype == dtype else empty(tuple(scaled.shape), dtype, scaled.device).copy_(scaled)


def weighted(factor: Tensor, D: Tensor) -> Tensor:
    """factor * D; a row of factor zero may be infinite."""
    return torch.where(factor == 0, torch.zeros_like(factor), factor * D)


def _dtypes(call: Call) -> tuple[torch.dtype | None, ...]:
    return (
        call.student_hidden.dtype,
        call.student_weight.dtype,
        None if call.student_bias is None else call.student_bias.dtype,
    )


def _wanted(call: Call) -> tuple[bool, bool, bool]:
    return call.grad_hidden, call.grad_weight, call.grad_bias


class Weighing(loop.Weigh, Protocol):
    """Row factors that depend on statistics: `factor` * `unit` is what multiplies a row."""

    scope: str
    unit: Tensor | None

    def lengths(self, valid: bool) -> list[int]: ...

    def factor(self, out: loop.Outputs) -> Tensor: ...


class WeightedSum(torch.autograd.Function):
    """sum_i factor_i * D_i, with the per-row D and statistics beside it, detached. Its gradient has that of the policy in it, its value has not."""

    @staticmethod
    def forward(ctx, *args):
        *call, metrics, weighing = args
        call = Call(*call)
        if weighing is None:
            factor, (scaled, unit) = call.factor, _row_factors(call)
            loss, _, stats, logprobs, dh, dW, dbias = _op(*scaled, metrics, False)
        else:
            out = weighted_forward(call, weighing, weighing.scope, weighing.lengths)
            factor, unit = weighing.factor(out), weighing.unit
            loss, stats = out.loss, out.stats
            logprobs, dh, dW, dbias = (
                loss.new_empty(0) if x is None else x for x in (out.logprobs, out.dh, out.dW, out.dbias)
            )
        ctx.save_for_backward(dh, dW, dbias, unit)
        ctx.wanted, ctx.dtypes = _wanted(call), _dtypes(call)
        ctx.mark_non_differentiable(loss, stats, logprobs)
        ctx.set_materialize_grads(False)
        return weighted(factor, loss).sum(), loss, stats, logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        if upstream is None:
            return (None,) * (len(Call._fields) + 2)
        *grads, unit = ctx.saved_tensors
        scale = upstream if unit is None else upstream * unit
        dh, dW, dbias = (
            _scaled(grad, scale, dtype) if wanted else None
            for grad, dtype, wanted in zip(grads, ctx.dtypes, ctx.wanted, strict=True)
        )
        return dh, dW, dbias, *(None,) * (len(Call._fields) - 1)


def _save(ctx, call: Call, *results: Tensor | None) -> None:
    """The call, tensors as saved tensors."""
    ctx.constants = [None if isinstance(x, Tensor) else x for x in call]
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in call), *results)


def _saved(ctx) -> tuple[Call, list[Tensor | None]]:
    tensors = ctx.saved_tensors
    count = len(ctx.constants)
    call = Call(
        *(
            constant if tensor is None else tensor
            for tensor, constant in zip(tensors[:count], ctx.constants, strict=True)
        )
    )
    return call, list(tensors[count:])


def _projected_again(call: Call, stats: Tensor, A: Tensor) -> tuple[Tensor | None, ...]:
    """dh, dW and dbias of recompute mode under the call's factors."""
    scaled, unit = _row_factors(call)
    grads = _op_backward(*scaled, stats, A)
    one = call.factor.new_ones(()) if unit is None else unit
    return tuple(
        _scaled(grad, one, dtype) if want else None
        for grad, dtype, want in zip(grads, _dtypes(call), _wanted(call), strict=True)
    )


class PerRow(torch.autograd.Function):
    """(N,) D_i, differentiable, with statistics beside it. A frozen head's `factor` is 0 or 1: rows that no gradient will reach."""

    @staticmethod
    def forward(ctx, *args):
        *call, metrics, recompute = args
        call = Call(*call)
        scaled, unit = (call._replace(factor=None), None) if recompute else _row_factors(call)
        loss, A, stats, logprobs, dh, _, _ = _op(*scaled, metrics, recompute)
        ctx.recompute, ctx.dtype = recompute, call.student_hidden.dtype
        if recompute:
            _save(ctx, call, stats, A)
        else:
            ctx.save_for_backward(dh, unit)
        ctx.mark_non_differentiable(stats, logprobs)
        ctx.set_materialize_grads(False)
        return loss, stats, logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        none = (None,) * (len(Call._fields) + 1)
        if upstream is None:
            return None, *none
        if not ctx.recompute:
            dh, unit = ctx.saved_tensors
            return _scaled(dh, (upstream if unit is None else upstream * unit)[:, None], ctx.dtype), *none
        call, (stats, A) = _saved(ctx)
        return *_projected_again(call._replace(factor=upstream.contiguous()), stats, A), *none[2:]


class LogProbs(torch.autograd.Function):
    """(N,) log q(label) and entropy of the student alone, both differentiable.

    The call has no teacher, so all its logits are 0 and D = KL(student || uniform) = log V - entropy: an upstream gradient g of the entropy is a factor -g
    of D, and one of the log-prob is a policy -g. A frozen head's dh is computed in the forward pass where `policy` says so, and scaled here.
    """

    @staticmethod
    def forward(ctx, *args):
        *call, metrics = args
        call = Call(*call)
        in_forward = call.policy is not None
        scaled, unit = _row_factors(call) if in_forward else (call, None)
        _, A, stats, logprobs, dh, _, _ = _op(*scaled, metrics, not in_forward)
        ctx.in_forward, ctx.dtype = in_forward, call.student_hidden.dtype
        if in_forward:
            ctx.save_for_backward(dh, unit)
        else:
            _save(ctx, call, stats, A)
        ctx.set_materialize_grads(False)
        return logprobs[:, 0].clone(), stats[:, Column.STUDENT_ENTROPY].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, of_logprob, of_entropy):
        none = (None,) * len(Call._fields)
        if ctx.in_forward:
            dh, unit = ctx.saved_tensors
            if of_logprob is None:
                return None, *none
            return _scaled(
                dh, -(of_logprob if unit is None else of_logprob * unit)[:, None], ctx.dtype
            ), *none
        call, (stats, A) = _saved(ctx)
        nothing = torch.zeros_like(A)
        factor, policy = (
            nothing if grad is None else -grad.contiguous() for grad in (of_entropy, of_logprob)
        )
        return *_projected_again(call._replace(factor=factor, policy=policy), stats, A), *none[2:]
