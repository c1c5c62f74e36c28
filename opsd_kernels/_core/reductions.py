"""Turn token weights, policy terms and reductions into row factors; name the statistics for users."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .._rows.contract import Column
from ..spec import REDUCTIONS, SCOPES, check_choice, check_number, check_tensor, expect
from ..weights.base import check_weighting, check_weights
from .problem import Outputs, Problem, per_token

# For fp16 the row factors are scaled so that the largest is 64, and backward undoes it: the 1 / N of a mean
# would underflow (1e-4 / 8192), and 64 * |log p - log q| does not overflow.
FP16_ROW_FACTOR = 64.0


@dataclass(frozen=True)
class TokenStats:
    """Hold statistics of each token, detached, in fp32 and of the leading shape of the hidden states.

    Divergence, entropies and log-probs are in nats. Invalid tokens have 0. The teacher's fields are None
    where only its top-k entries are known.

    Of 16-bit logits (a shared head and `logits_dtype="auto"`, or "input") log-probs of sampled tokens are off
    by up to .02 nats at temperature 1, at temperature t by 1/t times that: good for a curve, not for the
    numerator of a ratio. Take those from `linear_logprobs`, or from a call with `logits_dtype=torch.float32`.
    A policy term and a weighting that reads log-probs bring fp32 logits along. Log-sum-exps are off by as
    much, and by up to .05 where labels are missing or unlikely. `top1_agreement` and `label_is_top1` are
    decided by fp32 dot products.
    """

    divergence: Tensor  # unweighted, under the clips
    student_entropy: Tensor
    student_max_prob: Tensor
    teacher_entropy: Tensor | None = None
    teacher_max_prob: Tensor | None = None
    top1_agreement: Tensor | None = None  # 1 where student and teacher have the same most likely token
    student_logprob: Tensor | None = None  # of the label; None without labels
    teacher_logprob: Tensor | None = None
    label_is_top1: Tensor | None = None  # 1 where the label is the student's most likely token
    # log sum exp of the logits, the transform and the teacher mix included
    student_logsumexp: Tensor | None = None
    teacher_logsumexp: Tensor | None = None
    # The share of the token's terms clamped by entry_clip, 1 where token_clip clamped the token; None without
    # a clip.
    clipped_fraction: Tensor | None = None
    # 0-dim: the largest share of a chunk's gradient (Frobenius norm) that `gradient_tolerance` left out; None
    # without one. With "recompute" the gradients are computed later, and this is the tolerance itself.
    gradient_dropped: Tensor | None = None


def token_stats(
    problem: Problem,
    D: Tensor,
    stats: Tensor,
    logprobs: Tensor | None,
    shape: torch.Size,
    dtype: torch.dtype = torch.float32,
    *,
    dropped: Tensor | None = None,
) -> TokenStats:
    """Return the columns of the sweeps' statistics by name, in `shape` and `dtype`."""

    def shaped(column: Tensor) -> Tensor:
        return column.detach().to(dtype).reshape(shape)

    teacher = problem.teacher is not None or problem.rows.target is not None
    valid = problem.rows.valid
    labels, levels = problem.rows.labels, None
    if logprobs is not None and logprobs.shape[1] > 2:
        levels = logprobs[:, 2], logprobs[:, 3]
    if labels is None:
        logprobs = None
    found = None if labels is None else stats[:, Column.STUDENT_ARGMAX] == labels
    agreement = stats[:, Column.STUDENT_ARGMAX] == stats[:, Column.TEACHER_ARGMAX]
    return TokenStats(
        divergence=shaped(D),
        student_entropy=shaped(stats[:, Column.STUDENT_ENTROPY]),
        student_max_prob=shaped(stats[:, Column.STUDENT_MAX_PROB]),
        teacher_entropy=shaped(stats[:, Column.TEACHER_ENTROPY]) if teacher else None,
        teacher_max_prob=shaped(stats[:, Column.TEACHER_MAX_PROB]) if teacher else None,
        top1_agreement=shaped(agreement if valid is None else agreement & valid) if teacher else None,
        student_logprob=None if logprobs is None else shaped(logprobs[:, 0]),
        teacher_logprob=shaped(logprobs[:, 1]) if logprobs is not None and teacher else None,
        label_is_top1=None if found is None else shaped(found if valid is None else found & valid),
        student_logsumexp=None if levels is None else shaped(levels[0]),
        teacher_logsumexp=shaped(levels[1]) if levels is not None and teacher else None,
        clipped_fraction=shaped(stats[:, Column.CLIPPED]) if problem.spec.clips else None,
        gradient_dropped=None if dropped is None else dropped.to(dtype),
    )


def reads_logprobs(token_weights: Any, policy: Any) -> bool:
    """Check token weights and a policy term; return True if either reads the label's log-prob."""
    if token_weights is not None and not isinstance(token_weights, Tensor):
        expected = "a tensor, a weighting (see opsd_kernels.weights) or None"
        expect(callable(token_weights), "token_weights", expected, type(token_weights).__name__, TypeError)
        check_weighting(token_weights)
    if policy is not None:
        check_choice("policy.scope", policy.scope, SCOPES)
    return policy is not None or getattr(token_weights, "needs_labels", False)


def row_scale(
    reduction: str, normalizer: float | Tensor | None, hidden: Tensor, valid: Tensor | None
) -> Tensor | float | None:
    """Return the scale of a weighted row before the sum: a number, 0-dim or (N,); None for "none"."""
    check_choice("reduction", reduction, REDUCTIONS)
    if normalizer is not None and reduction != "mean":
        came = f"{normalizer!r} with reduction={reduction!r}"
        expect(False, "normalizer", "None, unless reduction='mean'", came)
    if reduction == "mean":
        return _share(normalizer, hidden, valid)
    if reduction != "sequence_mean":
        return None if reduction == "none" else 1.0
    expect(
        hidden.dim() == 3,
        "student_hidden",
        "shape (B, T, H) for reduction='sequence_mean'",
        tuple(hidden.shape),
    )
    B, T, _ = hidden.shape
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if valid is None:
        counts = torch.full((B,), T, dtype=wide, device=hidden.device)
    else:
        counts = valid.reshape(B, T).sum(1).to(wide)
    per_row = 1.0 / (counts.clamp(min=1) * (counts > 0).sum().clamp(min=1))
    return per_row[:, None].expand(B, T).reshape(-1)


def _share(normalizer: float | Tensor | None, hidden: Tensor, valid: Tensor | None) -> Tensor | float:
    """Return 1 / normalizer of "mean", by default 1 / the number of valid tokens. 0 for a normalizer of 0."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if isinstance(normalizer, Tensor):
        check_tensor("normalizer", normalizer, "a number or a 0-dim tensor")
        if normalizer.dim():
            came = f"shape {tuple(normalizer.shape)}"
            expect(False, "normalizer", "a number or a 0-dim tensor", came)
        # A copy from the host needs no sync, unlike one from a GPU.
        from_host = normalizer.device.type == "cpu"
        count = normalizer.detach().to(hidden.device, wide, non_blocking=from_host)
        return torch.where(count == 0, 0.0, 1.0 / count)
    if normalizer is not None:
        number = check_number("normalizer", normalizer)
        if number < 0:
            expect(False, "normalizer", "a positive number or 0", normalizer)
        return 1.0 / number if number else 0.0
    if valid is None:
        return 1.0 / max(hidden.shape[:-1].numel(), 1)
    return 1.0 / valid.sum().clamp(min=1).to(wide)


def fp16_units(
    dtype: torch.dtype, factor: Tensor | None, slope: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scale row factors for fp16. Returns them and the unit that the caller must still apply, or None."""
    assert factor is not None, "a gradient needs row factors"
    if dtype != torch.float16:
        return factor, slope, None
    factors = [x for x in (factor, slope) if x is not None]
    if factor.numel():
        largest = torch.stack([x.abs().amax() for x in factors]).amax()
    else:
        largest = factor.new_ones(())
    unit = torch.where(largest > 0, largest, torch.ones_like(largest)) / FP16_ROW_FACTOR
    return factor / unit, None if slope is None else slope / unit, unit


def _exchanges(part: Any) -> bool:
    """Return True if calling a weighting or policy term, or one that it is made of, issues a collective."""
    if getattr(part, "exchanges", False):
        return True
    if isinstance(part, (list, tuple)):
        return any(map(_exchanges, part))
    inner = getattr(part, "__dict__", {}).values() if hasattr(part, "scope") else ()
    return any(_exchanges(one) for one in inner)


def _check_losses(losses: Any, mask: Tensor) -> Tensor:
    """Return the losses of a policy term, a floating-point tensor of the mask's shape."""
    came = type(losses).__name__
    expect(isinstance(losses, Tensor), "policy", "a policy term that returns a tensor", came, TypeError)
    expected = "a policy term that returns floating-point numbers"
    expect(losses.is_floating_point(), "policy", expected, losses.dtype, TypeError)
    expected = f"a policy term that returns shape {tuple(mask.shape)}"
    expect(losses.shape == mask.shape, "policy", expected, tuple(losses.shape))
    return losses


class RowWeigher:
    """Compute row factors from the token weights, the policy term and the reduction of a call.

    `scale` multiplies a weighted row before the sum; None makes the loss per row. The loop calls the weigher
    with the outputs so far and the positions of a chunk's rows, and it returns their factors and policy
    slopes, (n,) each, in units of `unit`.
    """

    def __init__(
        self,
        problem: Problem,
        leading: torch.Size,
        token_weights: Any,
        scale: Tensor | float | None,
        policy: Any,
        policy_weight: float,
    ) -> None:
        self.problem, self.leading = problem, leading
        self.token_weights, self.policy, self.policy_weight = token_weights, policy, policy_weight
        self.per_token = scale is None
        self.scale: Tensor | float = 1.0 if scale is None else scale
        self.scheme = None if isinstance(token_weights, Tensor) else token_weights
        parts = [part for part in (self.scheme, policy) if part is not None]
        scopes = {part.scope for part in parts}
        # The widest scope of weights and policy term.
        self.scope = "sequence" if "sequence" in scopes else "row" if "row" in scopes else "index"
        self.needs_metrics = any(
            part.scope != "index" and getattr(part, "needs_metrics", True) for part in parts
        )
        # It is then called once and not per chunk, because ranks may use different chunk boundaries.
        self.has_collectives = any(map(_exchanges, parts))
        # Of the sequences in a packed row, if all that read whole sequences agree on them.
        lengths = {tuple(getattr(part, "lengths", None) or ()) for part in parts if part.scope == self.scope}
        self.packed = next(iter(lengths)) if len(lengths) == 1 else ()
        # (B, T): a leading shape of one dimension is one sequence.
        self.shape = torch.Size((leading[:-1].numel(), leading[-1])) if leading else torch.Size((1, 1))

    def mask(self) -> Tensor:
        """Return the valid tokens, (B, T) bool."""
        valid = self.problem.rows.valid
        if valid is None:
            device = self.problem.student.hidden.device
            valid = torch.ones(self.leading.numel(), dtype=torch.bool, device=device)
        return valid.reshape(self.shape)

    def stats(self, D: Tensor, stats: Tensor, logprobs: Tensor | None) -> TokenStats:
        """Return (B, T) statistics for weightings and policy terms, in fp64 for fp64 inputs."""
        return token_stats(self.problem, D, stats, logprobs, self.shape, stats.dtype)

    def weights(self, stats: TokenStats | None) -> Tensor:
        """Return (N,) weights of the divergence, 0 at invalid tokens. `stats` is None for scope "index"."""
        wide = self.problem.stats_dtype
        if self.scheme is None:
            weights = self._given_weights(wide)
        else:
            mask = self.mask()
            given = check_weights(self.scheme(stats, mask), mask.shape).detach()
            weights = torch.where(mask, given, 0.0).to(wide).reshape(-1)
        return weights if self.policy is None else weights * (1 - self.policy_weight)

    def _given_weights(self, wide: torch.dtype) -> Tensor:
        valid, device = self.problem.rows.valid, self.problem.student.hidden.device
        if self.token_weights is None:
            if valid is not None:
                return valid.to(wide)
            return torch.ones(self.leading.numel(), dtype=wide, device=device)
        weights = per_token("token_weights", self.token_weights, self.leading, device)
        expect(
            weights.is_floating_point(), "token_weights", "a floating-point tensor", weights.dtype, TypeError
        )
        return weights.to(wide) if valid is None else torch.where(valid, weights.to(wide), 0.0)

    def policy_losses(self, stats: TokenStats | None) -> tuple[Tensor, Tensor]:
        """Return the policy term's losses and negative slopes in the label's log-prob, (N,) each.

        Both are multiplied by the share of the policy term. Slopes are 0 where no gradient is wanted.
        """
        mask, wide = self.mask(), self.problem.stats_dtype
        known = None if stats is None else stats.student_logprob
        if known is None:
            known = torch.zeros(mask.shape, dtype=wide, device=mask.device)
        logprob = torch.where(mask, known.to(wide), 0.0).detach()
        if any(self.problem.wants):
            with torch.enable_grad():
                given = _check_losses(self.policy(logprob.requires_grad_(), stats, mask), mask)
                expected = "a policy term whose losses depend on the log-probs, through autograd"
                expect(given.requires_grad, "policy", expected, "losses without a gradient")
                losses = torch.where(mask, given, 0.0)
                (slope,) = torch.autograd.grad(losses.sum(), logprob)
        else:
            losses = torch.where(mask, _check_losses(self.policy(logprob, stats, mask), mask), 0.0)
            slope = torch.zeros_like(logprob)
        shared, slope = self.policy_weight * losses.detach(), -self.policy_weight * slope
        return shared.to(wide).reshape(-1), slope.to(wide).reshape(-1)

    # For weights that depend on the loop's own statistics.

    @cached_property
    def _units(self) -> tuple[Tensor, Tensor]:
        """Return `scale` / its largest entry, and that entry: row factors near 1 suit 16-bit gradients."""
        scale = self.scale
        if not isinstance(scale, Tensor):
            # torch.tensor would copy from the host and sync.
            device = self.problem.student.hidden.device
            scale = torch.full((), scale, dtype=self.problem.stats_dtype, device=device)
        largest = scale.amax() if scale.numel() else scale.new_ones(())
        unit = torch.where(largest > 0, largest, 1.0)
        return scale / unit, unit

    @property
    def unit(self) -> Tensor:
        """Return the factor that `__call__` leaves to the caller."""
        return self._units[1]

    def lengths(self, valid: bool) -> list[int]:
        """Return the rows of each sequence; if `valid`, the valid ones alone, which syncs with a GPU."""
        B, T = self.shape
        whole = list(self.packed) or [T] * B
        expected = f"lengths that add up to the {B * T} tokens of the packed row"
        expect(sum(whole) == B * T, "lengths", expected, sum(whole))
        if not valid:
            return whole
        flat = iter(self.mask().reshape(-1).tolist())
        return [sum(itertools.islice(flat, length)) for length in whole]

    def factor(self, out: Outputs) -> Tensor:
        """Return the (N,) factors of all rows, the unit included."""
        return self.weights(self.stats(out.loss, out.stats, out.logprobs)) * self._units[0] * self.unit

    def __call__(self, out: Outputs, at: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the factors and policy slopes of the rows `at`, (n,) each, in units of `unit`."""
        stats = self.stats(out.loss, out.stats, out.logprobs)
        share = self._units[0].expand(out.loss.shape[0])
        slope = (self.policy_losses(stats)[1] * share)[at] if self.policy is not None else None
        return (self.weights(stats) * share)[at], slope
