"""Route a call through autograd, by one of five Functions.

`WeightedSum` has its row factors in the forward pass and computes the gradients there (four GEMM passes,
three with a frozen head). `PerRow` returns a loss per row and accepts any upstream gradient per row: with a
frozen head it scales the rows of a dh computed in forward; with a trainable one it projects again in backward
(six passes). `LogProbs` does the same for log-probs of labels, and `LogProbsAt`, which always projects again,
for those of given ids. Each takes the problem, and at the end the leaves of its student: hidden states,
weight, bias, and A and B of an adapter. `CachedForwardKL` has a frozen head and a loss per row; its leaf, the
hidden states, comes first. Backward works out of place if the graph is retained, so that it may run twice.
There are no second derivatives: see `first_order`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from .._rows.contract import Column
from ..spec import BACKWARDS, check_choice, expect
from . import library, listed
from .forward_cache import Parts
from .loop import empty, on_host
from .problem import Problem
from .reductions import RowWeigher, TokenStats, fp16_units, token_stats


class Route(Enum):
    """Name a route through autograd."""

    VALUE = "no gradient"
    WEIGHTED_SUM = "gradient in the forward pass, row factors known before the loop"
    FACTORS_IN_LOOP = "gradient in the forward pass, row factors from the loop's own statistics"
    PER_ROW = "gradient of each row's loss, weights applied to the losses"


def choose_route(problem: Problem, weigher: RowWeigher, backward: str) -> Route:
    """Choose the route of a call. Raises ValueError if `backward` is impossible for this problem."""
    check_choice("backward", backward, BACKWARDS)
    per_token = weigher.per_token
    refused = backward == "in_forward" and per_token and problem.trainable
    expected = (
        "'auto' or 'recompute' for reduction='none' and a trainable head: forward lacks the upstream gradient"
    )
    expect(not refused, "backward", expected, repr(backward))
    if not any(problem.wants):
        return Route.VALUE
    known = weigher.scope == "index"
    if problem.student.hidden.is_meta and not known:
        # A weigher of the loop reads statistics, which meta tensors have in shape alone.
        return Route.PER_ROW
    # With a tolerance the row factors must be known when the share that is left out is measured.
    bounded = problem.gradient_tolerance is not None
    in_loop = known or bounded or problem.trainable or weigher.policy is not None
    if per_token or backward == "recompute" or not in_loop:
        return Route.PER_ROW
    return Route.WEIGHTED_SUM if known else Route.FACTORS_IN_LOOP


def evaluate(
    problem: Problem, weigher: RowWeigher, backward: str, return_stats: bool
) -> Tensor | tuple[Tensor, TokenStats]:
    """Return the loss, 0-dim or of the leading shape; with `return_stats` return (loss, TokenStats)."""
    if weigher.scheme is not None:
        labelled = problem.rows.labels is not None or not getattr(weigher.scheme, "needs_labels", False)
        scheme = type(weigher.scheme).__name__
        expect(labelled, "labels", f"the sampled tokens, whose log-probs {scheme} needs", None)
    route, scale = choose_route(problem, weigher, backward), weigher.scale
    metrics = return_stats or weigher.needs_metrics
    leaves = problem.student.leaves
    if route is Route.WEIGHTED_SUM:
        slope = weigher.policy_losses(None)[1] * scale if weigher.policy is not None else None
        weighted = problem.with_factors(weigher.weights(None) * scale, slope)
        loss, D, stats, logprobs, dropped, _ = WeightedSum.apply(weighted, metrics, None, *leaves)
    elif route is Route.FACTORS_IN_LOOP:
        loss, D, stats, logprobs, dropped, _ = library.eagerly(
            _apply_weighted_sum, problem, metrics, weigher, *leaves
        )
    else:
        if route is Route.PER_ROW:
            recompute = problem.trainable or backward == "recompute"
            reached = weigher.weights(None) != 0 if weigher.scope == "index" else weigher.mask().reshape(-1)
            reachable = problem.with_factors(reached.to(problem.stats_dtype))
            value, D, stats, logprobs, dropped, _ = PerRow.apply(reachable, metrics, recompute, *leaves)
            D = D if problem.spec.z_loss else value
        else:
            D, _, stats, logprobs, dropped, *_ = library.op(*library.pack(problem), metrics, False)
            value = _with_z_loss(problem, D, logprobs) if problem.spec.z_loss else D
        factor = weigher.weights(weigher.stats(D, stats, logprobs)) * scale
        losses = _times(factor, value)
        loss = losses if weigher.per_token else losses.sum()
    if weigher.policy is not None:
        loss = loss + (weigher.policy_losses(weigher.stats(D, stats, logprobs))[0] * scale).sum()
    loss = loss.reshape(weigher.leading) if weigher.per_token else loss
    if not return_stats:
        return loss
    share = None if problem.gradient_tolerance is None else dropped
    return loss, token_stats(problem, D, stats, logprobs, weigher.leading, dropped=share)


def _apply_weighted_sum(*args: Any) -> tuple[Tensor, ...]:
    """Apply `WeightedSum` with a weigher, which an operator's schema cannot hold."""
    return WeightedSum.apply(*args)


# ---------------------------------------------------------------- pieces of the Functions


class _Refusal(torch.autograd.Function):
    """Return gradients unchanged; raise where they are differentiated.

    `anchor`, an output of the op, puts this node on every path from the gradients to the leaves.
    """

    @staticmethod
    def forward(ctx, anchor, *gradients):
        return tuple(gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "opsd_kernels has no second derivatives: expected a gradient that is not differentiated, got one "
            "made with create_graph=True and used in a loss"
        )


def first_order(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Wrap a backward whose gradients cannot be differentiated again.

    Like torch's once_differentiable, which however returns constants under create_graph=True: a gradient
    penalty would be lost silently. The last saved tensor is an empty output, the anchor of `_Refusal`.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        # AOT autograd has its own error.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return gradients
        present = [gradient for gradient in gradients if gradient is not None]
        if not present:
            return gradients
        refusing = iter(_Refusal.apply(ctx.saved_tensors[-1], *present))
        return tuple(None if gradient is None else next(refusing) for gradient in gradients)

    return run


def _with_z_loss(problem: Problem, D: Tensor, logprobs: Tensor) -> Tensor:
    """Return the losses of the rows, (N,): D + c * logsumexp(student logits)**2."""
    return D + problem.spec.z_loss * logprobs[:, 2].square()


def _times(factor: Tensor, D: Tensor) -> Tensor:
    """Return factor * D, 0 for factor zero even if D is inf."""
    return torch.where(factor == 0, torch.zeros_like(factor), factor * D)


def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return grad * scale in `dtype`.

    If this backward frees the graph, the product overwrites the saved gradient: on a CPU allocating a fresh
    dW costs more than the product.
    """
    wide = scale.to(torch.promote_types(grad.dtype, torch.float32))
    if not on_host(grad.device) and not wide.dim():
        wide = wide.reshape((1,) * grad.dim())  # a GPU kernel rounds a 0-dim factor to the other's 16 bits
    if torch.compiler.is_compiling():
        return (grad * wide).to(dtype)
    kept = torch._C._autograd._get_current_graph_task_keep_graph()
    if not on_host(grad.device):
        # One pass, cast included.
        out = torch.empty_like(grad, dtype=dtype) if kept or grad.dtype != dtype else grad
        return torch.mul(grad, wide, out=out)
    if kept:
        return (grad * wide).to(dtype)
    unchanged = scale.numel() == 1 and scale.item() == 1
    scaled = grad if unchanged else grad.mul_(scale)
    return scaled if scaled.dtype == dtype else empty(tuple(scaled.shape), dtype, scaled.device).copy_(scaled)


def _scaled_rows(ctx: Any, upstream: Tensor) -> Tensor:
    """Return the dh of the forward pass times the upstream gradients of its rows, (N,).

    A row of upstream gradient 0 gets 0: its divergence may be infinite, or its hidden states NaN.
    """
    dh, unit, _ = ctx.saved_tensors
    scale = upstream if unit is None else upstream * unit
    return _scaled(dh, scale[:, None], ctx.dtype).masked_fill_((scale == 0)[:, None], 0.0)


def _save(ctx: Any, problem: Problem, *results: Tensor) -> None:
    """Save the flat form of a problem for backward, its tensors as saved tensors, followed by results.

    Autograd saves no tensors of inference mode. They need no gradient, and are kept like constants;
    torch.compile cannot tell them from others.
    """
    (*fixed, more), compiling = library.pack(problem), torch.compiler.is_compiling()
    flat = [*fixed, *more]  # no tensor inside a list
    saved = [x if isinstance(x, Tensor) and (compiling or not x.is_inference()) else None for x in flat]
    ctx.constants = [x if kept is None else None for x, kept in zip(flat, saved, strict=True)]
    ctx.save_for_backward(*saved, *results)
    ctx.wants = problem.wants
    ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in problem.student.leaves]


def _saved(ctx: Any) -> tuple[list[Any], list[Tensor]]:
    """Return the flat form of the problem and the results that `_save` stored."""
    tensors, count = ctx.saved_tensors, len(ctx.constants)
    pairs = zip(tensors[:count], ctx.constants, strict=True)
    flat = [constant if tensor is None else tensor for tensor, constant in pairs]
    return [*flat[: library.MORE], flat[library.MORE :]], list(tensors[count:])


def _to_leaves(ctx: Any, gradients: Iterable[Tensor], scale: Tensor) -> tuple[Tensor | None, ...]:
    """Return gradients times `scale`, in the dtype of their leaves, None where none is wanted."""
    return tuple(
        _scaled(grad, scale, dtype) if want else None
        for grad, dtype, want in zip(gradients, ctx.dtypes, ctx.wants, strict=False)
    )


def _project_again(ctx: Any, factor: Tensor, slope: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the leaves' gradients in recompute mode, with row factors from the upstream gradient."""
    flat, (stats, A, _) = _saved(ctx)
    factor, slope, unit = fp16_units(ctx.dtypes[0], factor, slope)
    grads = library.op_backward(*library.with_factors(flat, factor, slope), stats, A)
    scale = factor.new_ones(()) if unit is None else unit
    return _to_leaves(ctx, grads, scale)


# ---------------------------------------------------------------- the Functions


class WeightedSum(torch.autograd.Function):
    """Return the weighted sum of D_i and its z-loss; detached D_i, statistics, log-probs and dropped share.

    The gradient includes that of the policy term; the value does not.
    """

    @staticmethod
    def forward(ctx, problem, metrics, weigher, *leaves):
        problem = replace(problem, student=problem.student.with_leaves(*leaves))
        if weigher is None:
            factor = problem.rows.factor
            *scaled, unit = fp16_units(leaves[0].dtype, factor, problem.rows.policy_slope)
            problem = problem.with_factors(*scaled)
            loss, _, stats, logprobs, dropped, *gradients = library.op(*library.pack(problem), metrics, False)
        else:
            out, unit = library.run_weighted(problem, weigher)
            factor = weigher.factor(out)
            loss, stats, dropped = out.loss, out.stats, out.dropped
            gradients = out.dh, out.dW, out.dbias, out.dA, out.dB
            logprobs = loss.new_empty(0) if out.logprobs is None else out.logprobs
        anchor = loss.new_empty(0)
        ctx.save_for_backward(*gradients, unit, anchor)
        ctx.wants, ctx.dtypes = problem.wants, [None if leaf is None else leaf.dtype for leaf in leaves]
        ctx.mark_non_differentiable(loss, stats, logprobs, dropped)
        ctx.set_materialize_grads(False)
        value = _with_z_loss(problem, loss, logprobs) if problem.spec.z_loss else loss
        return _times(factor, value).sum(), loss, stats, logprobs, dropped, anchor

    @staticmethod
    @first_order
    def backward(ctx, upstream, *_):
        if upstream is None:
            return (None,) * (3 + len(ctx.wants))
        *grads, unit, _ = ctx.saved_tensors
        scale = upstream if unit is None else upstream * unit
        return None, None, None, *_to_leaves(ctx, grads, scale)


class PerRow(torch.autograd.Function):
    """Return D_i plus its z-loss, (N,) and differentiable, and detached statistics and log-probs.

    With a z-loss the detached D_i come second, else an empty tensor.
    With a frozen head `factor` is 1 for rows that a gradient can reach, else 0.
    """

    @staticmethod
    def forward(ctx, problem, metrics, recompute, *leaves):
        problem = replace(problem, student=problem.student.with_leaves(*leaves))
        factors, unit = [None], None
        if not recompute:
            *factors, unit = fp16_units(leaves[0].dtype, problem.rows.factor, problem.rows.policy_slope)
        problem = problem.with_factors(*factors)
        loss, A, stats, logprobs, dropped, dh, *_ = library.op(*library.pack(problem), metrics, recompute)
        if recompute and problem.gradient_tolerance is not None:
            # Backward is yet to come: the bound that it keeps to.
            dropped = torch.full_like(dropped, problem.gradient_tolerance)
        ctx.recompute, ctx.dtype, ctx.wants = recompute, leaves[0].dtype, problem.wants
        anchor = loss.new_empty(0)
        if recompute:
            _save(ctx, problem, stats, A, anchor)
        else:
            ctx.save_for_backward(dh, unit, anchor)
        value, D = loss, loss.new_empty(0)
        if problem.spec.z_loss:
            value, D = _with_z_loss(problem, loss, logprobs), loss
        ctx.mark_non_differentiable(D, stats, logprobs, dropped)
        ctx.set_materialize_grads(False)
        return value, D, stats, logprobs, dropped, anchor

    @staticmethod
    @first_order
    def backward(ctx, upstream, *_):
        if upstream is None:
            return (None,) * (3 + len(ctx.wants))
        if not ctx.recompute:
            return None, None, None, _scaled_rows(ctx, upstream), *(None,) * (len(ctx.wants) - 1)
        return None, None, None, *_project_again(ctx, upstream.contiguous(), None)


class LogProbs(torch.autograd.Function):
    """Return log q(label) and entropy of one side, (N,) each in nats, both differentiable.

    The problem has no teacher, so the teacher's logits are 0 and D = KL(student || uniform) = log V -
    entropy. An upstream gradient g of the entropy is a factor -g of D, and one of the log-prob is a policy
    slope -g. If `policy_slope` is set (frozen head), dh is computed in the forward pass and scaled in
    backward.
    """

    @staticmethod
    def forward(ctx, problem, metrics, *leaves):
        problem = replace(problem, student=problem.student.with_leaves(*leaves))
        ctx.in_forward, ctx.dtype = problem.rows.policy_slope is not None, leaves[0].dtype
        ctx.wants, unit = problem.wants, None
        if ctx.in_forward:
            *factors, unit = fp16_units(leaves[0].dtype, problem.rows.factor, problem.rows.policy_slope)
            problem = problem.with_factors(*factors)
        _, A, stats, logprobs, _, dh, *_ = library.op(*library.pack(problem), metrics, not ctx.in_forward)
        anchor = stats.new_empty(0)
        if ctx.in_forward:
            ctx.save_for_backward(dh, unit, anchor)
        else:
            _save(ctx, problem, stats, A, anchor)
        ctx.set_materialize_grads(False)
        return logprobs[:, 0].clone(), stats[:, Column.STUDENT_ENTROPY].clone(), anchor

    @staticmethod
    @first_order
    def backward(ctx, of_logprob, of_entropy, _):
        if ctx.in_forward:
            dh = None if of_logprob is None else _scaled_rows(ctx, -of_logprob)
            return None, None, dh, *(None,) * (len(ctx.wants) - 1)
        _, (_, A, _) = _saved(ctx)
        nothing = torch.zeros_like(A)
        factor, slope = (nothing if grad is None else -grad.contiguous() for grad in (of_entropy, of_logprob))
        return None, None, *_project_again(ctx, factor, slope)


class LogProbsAt(torch.autograd.Function):
    """Return log q at ids (N, K), in nats and differentiable. Backward projects again."""

    @staticmethod
    def forward(ctx, problem, ids, *leaves):
        problem = replace(problem, student=problem.student.with_leaves(*leaves))
        logprobs, stats = listed.op_at(*library.pack(problem), ids)
        anchor = logprobs.new_empty(0)
        _save(ctx, problem, ids, stats, anchor)
        ctx.set_materialize_grads(False)
        return logprobs, anchor

    @staticmethod
    @first_order
    def backward(ctx, upstream, _):
        if upstream is None:
            return (None,) * (2 + len(ctx.wants))
        flat, (ids, stats, _) = _saved(ctx)
        # A row of G is at most the sum of its upstream gradients.
        sums, _, unit = fp16_units(ctx.dtypes[0], upstream.abs().sum(1), None)
        scale = sums.new_ones(()) if unit is None else unit
        upstream = upstream.contiguous() if unit is None else upstream / unit
        return None, None, *_to_leaves(ctx, listed.op_at_backward(*flat, ids, upstream, stats), scale)


class CachedForwardKL(torch.autograd.Function):
    """Return the forward KL of each row, (N,) in nats, from a cached teacher (forward_cache.py).

    The labels of the problem are the cache's tokens y. With `policy_slope` set, dh is computed in the forward
    pass: that of -log q_y, minus factor * r, summed in fp32 before the one rounding.
    """

    @staticmethod
    def forward(ctx, hidden, problem, parts, factor):
        problem = replace(problem, student=replace(problem.student, hidden=hidden))
        ctx.dtype, unit = hidden.dtype, None
        if problem.rows.policy_slope is not None:
            *factors, unit = fp16_units(hidden.dtype, problem.rows.factor, problem.rows.policy_slope)
            problem = problem.with_factors(*factors)
        _, _, _, logprobs, _, dh, *_ = library.op(*library.pack(problem), False, False)
        product = torch.bmm(hidden.to(parts.mean.dtype)[:, None], parts.mean[:, :, None])[:, 0, 0]
        D = parts.negative_entropy - factor * (product + parts.bias) - logprobs[:, 0]
        # A student without probability at y, where the teacher has some.
        D = torch.where(logprobs[:, 0] == -torch.inf, torch.inf, D)
        if dh.numel():
            dh -= (factor if unit is None else factor / unit) * parts.mean
        anchor = D.new_empty(0)
        ctx.save_for_backward(dh, unit, anchor)
        ctx.set_materialize_grads(False)
        return D if problem.rows.valid is None else torch.where(problem.rows.valid, D, 0.0), anchor

    @staticmethod
    @first_order
    def backward(ctx, upstream, _):
        if upstream is None:
            return (None,) * 4
        return _scaled_rows(ctx, upstream), None, None, None


def cached_forward_kl(problem: Problem, parts: Parts, factor: float, weigher: RowWeigher) -> Tensor:
    """Return the reduced loss, 0-dim, or of the leading shape for a loss per token."""
    if problem.wants[0]:
        slope = weigher.mask().reshape(-1).to(problem.stats_dtype)
        problem = problem.with_factors(torch.zeros_like(slope), slope)
    D, _ = CachedForwardKL.apply(problem.student.hidden, problem, parts, factor)
    losses = _times(weigher.weights(None) * weigher.scale, D)
    return losses.reshape(weigher.leading) if weigher.per_token else losses.sum()


def log_probs(problem: Problem, in_forward: bool, entropy: bool) -> tuple[Tensor, Tensor]:
    """Return log-probs of the labels and entropies, (N,) each in nats, by the route that the gradient needs.

    Entropies are valid only with `entropy`.
    """
    if not any(problem.wants):
        _, _, stats, logprobs, *_ = library.op(*library.pack(problem), entropy, False)
        return logprobs[:, 0].clone(), stats[:, Column.STUDENT_ENTROPY].clone()
    if in_forward:
        valid, wide, hidden = problem.rows.valid, problem.stats_dtype, problem.student.hidden
        slope = hidden.new_ones(problem.tokens, dtype=wide) if valid is None else valid.to(wide)
        problem = problem.with_factors(torch.zeros_like(slope), slope)
    logprobs, entropies, _ = LogProbs.apply(problem, entropy, *problem.student.leaves)
    if problem.rows.valid is None:
        return logprobs, entropies
    # Zeros already: this stops the upstream gradients of invalid tokens, which may be NaN.
    invalid = ~problem.rows.valid
    return logprobs.masked_fill(invalid, 0.0), entropies.masked_fill(invalid, 0.0)


def log_probs_at(problem: Problem, ids: Tensor) -> Tensor:
    """Return log-probs of ids (N, K) in nats, 0 for an id of -1 and for invalid tokens."""
    if not any(problem.wants):
        return listed.op_at(*library.pack(problem), ids)[0]
    nowhere = ids < 0 if problem.rows.valid is None else (ids < 0) | ~problem.rows.valid[:, None]
    # As in `log_probs`.
    return LogProbsAt.apply(problem, ids, *problem.student.leaves)[0].masked_fill(nowhere, 0.0)
