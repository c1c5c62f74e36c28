"""The autograd Functions. Out of place where the graph is kept, so that backward may run twice.

`WeightedSum` knows its row factors in the forward pass and computes the gradients there (four GEMM passes, three with a frozen head). `PerRow` returns
a loss per row and accepts any upstream gradient per row: with a frozen head it only scales the rows of a dh computed in forward; with a trainable one
it projects again in backward (six passes).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ops import Call
from .projection import empty

_op = torch.ops.opsd_kernels.linear_divergence
_op_backward = torch.ops.opsd_kernels.linear_divergence_backward

# Gradients of fp16 logits stay un-normalised, with their largest row factor at 64: 1e-4 / 8192 underflows, 64 * |log p - log q| does not overflow.
FP16_ROW_FACTOR = 64.0


def _row_factor(call: Call) -> tuple[Tensor, Tensor | None]:
    """(row factors for the sweep, what is left to multiply the gradients by)."""
    if call.student_hidden.dtype != torch.float16:
        return call.factor, None
    largest = call.factor.abs().amax() if call.factor.numel() else call.factor.new_ones(())
    unit = torch.where(largest > 0, largest, torch.ones_like(largest)) / FP16_ROW_FACTOR
    return call.factor / unit, unit


def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * scale in `dtype`. Where the graph is freed after this backward, over the saved memory: a fresh dW costs a CPU more than the product does."""
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        return (grad * scale.to(torch.promote_types(grad.dtype, torch.float32))).to(dtype)
    unchanged = scale.numel() == 1 and scale.device.type == "cpu" and scale.item() == 1
    scaled = grad if unchanged else grad.mul_(scale)
    return scaled if scaled.dtype == dtype else empty(tuple(scaled.shape), dtype, scaled.device).copy_(scaled)


def weighted(factor: Tensor, D: Tensor) -> Tensor:
    """factor * D; a row of factor zero may be infinite."""
    return torch.where(factor == 0, torch.zeros_like(factor), factor * D)


class WeightedSum(torch.autograd.Function):
    """sum_i factor_i * D_i, with the per-row D and statistics beside it, detached."""

    @staticmethod
    def forward(ctx, *args):
        *call, metrics = args
        call = Call(*call)
        factor, unit = _row_factor(call)
        loss, _, stats, logprobs, dh, dW, dbias = _op(*call._replace(factor=factor), metrics, False)
        ctx.save_for_backward(dh, dW, dbias, unit)
        ctx.wanted = call.grad_hidden, call.grad_weight, call.grad_bias
        ctx.dtypes = call.student_hidden.dtype, call.student_weight.dtype, None if call.student_bias is None else call.student_bias.dtype
        ctx.mark_non_differentiable(loss, stats, logprobs)
        ctx.set_materialize_grads(False)
        return weighted(call.factor, loss).sum(), loss, stats, logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        if upstream is None:
            return (None,) * (len(Call._fields) + 1)
        *grads, unit = ctx.saved_tensors
        scale = upstream if unit is None else upstream * unit
        dh, dW, dbias = (_scaled(grad, scale, dtype) if wanted else None for grad, dtype, wanted in zip(grads, ctx.dtypes, ctx.wanted, strict=True))
        return dh, dW, dbias, *(None,) * (len(Call._fields) - 2)


class PerRow(torch.autograd.Function):
    """(N,) D_i, differentiable, with statistics beside it. A frozen head's `factor` is 0 or 1: rows that no gradient will reach."""

    @staticmethod
    def forward(ctx, *args):
        *call, metrics, recompute = args
        call = Call(*call)
        factor, unit = (None, None) if recompute else _row_factor(call)
        loss, A, stats, logprobs, dh, _, _ = _op(*call._replace(factor=factor), metrics, recompute)
        tensors = [x if isinstance(x, Tensor) else None for x in call]
        ctx.constants = [None if isinstance(x, Tensor) else x for x in call]
        ctx.recompute, ctx.dtype = recompute, call.student_hidden.dtype
        ctx.save_for_backward(*(tensors if recompute else [None] * len(tensors)), A, stats, dh, unit)
        ctx.mark_non_differentiable(stats, logprobs)
        ctx.set_materialize_grads(False)
        return loss, stats, logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        none = (None,) * (len(Call._fields) - 1)
        if upstream is None:
            return None, *none, None, None
        *tensors, A, stats, dh, unit = ctx.saved_tensors
        if not ctx.recompute:
            scale = upstream if unit is None else upstream * unit
            return _scaled(dh, scale[:, None], ctx.dtype), *none, None, None
        call = Call(*(constant if tensor is None else tensor for tensor, constant in zip(tensors, ctx.constants, strict=True)))
        factor, unit = _row_factor(call._replace(factor=upstream.contiguous()))
        grads = _op_backward(*call._replace(factor=factor), stats, A)
        wanted = call.grad_hidden, call.grad_weight, call.grad_bias
        dtypes = ctx.dtype, call.student_weight.dtype, None if call.student_bias is None else call.student_bias.dtype
        one = upstream.new_ones(()) if unit is None else unit
        dh, dW, dbias = (_scaled(grad, one, dtype) if want else None for grad, dtype, want in zip(grads, dtypes, wanted, strict=True))
        return dh, dW, dbias, *(None,) * (len(Call._fields) - 1)
