"""From a flat call to a loss: token weights, policies, reductions and the route through autograd. Below this file nobody knows what a reduction is."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from .._rows.contract import Column, stats_dtype
from ..spec import BACKWARDS, check_choice, expect
from ..weights.base import check_weighting, check_weights
from . import loop
from .autograd import PerRow, WeightedSum, weighted
from .checks import known_weights, row_scale
from .library import Call


@dataclass(frozen=True)
class TokenStats:
    """Detached fp32 statistics of each token, of the leading shape of the hidden states; 0 where a token is not valid. In nats."""

    divergence: Tensor  # unweighted, under the clips
    student_entropy: Tensor
    student_max_prob: Tensor
    teacher_entropy: Tensor | None = (
        None  # None, like all of the teacher's, where only its top-k entries are known
    )
    teacher_max_prob: Tensor | None = None
    top1_agreement: Tensor | None = None  # 1 where student and teacher have the same most likely token
    student_logprob: Tensor | None = None  # of the label, with labels
    teacher_logprob: Tensor | None = None
    clipped_fraction: Tensor | None = (
        None  # with a clip: share of the token's terms that entry_clip took; 1 where token_clip took the token
    )


def token_stats(
    D: Tensor,
    stats: Tensor,
    logprobs: Tensor | None,
    call: Call,
    leading: torch.Size,
    dtype: torch.dtype = torch.float32,
) -> TokenStats:
    def shaped(column: Tensor) -> Tensor:
        return column.detach().to(dtype).reshape(leading)

    labelled, teacher = call.labels is not None, call.teacher_hidden is not None
    agreement = stats[:, Column.STUDENT_ARGMAX] == stats[:, Column.TEACHER_ARGMAX]
    return TokenStats(
        divergence=shaped(D),
        student_entropy=shaped(stats[:, Column.STUDENT_ENTROPY]),
        student_max_prob=shaped(stats[:, Column.STUDENT_MAX_PROB]),
        teacher_entropy=shaped(stats[:, Column.TEACHER_ENTROPY]) if teacher else None,
        teacher_max_prob=shaped(stats[:, Column.TEACHER_MAX_PROB]) if teacher else None,
        top1_agreement=shaped(agreement if call.valid is None else agreement & call.valid)
        if teacher
        else None,
        student_logprob=shaped(logprobs[:, 0]) if labelled else None,
        teacher_logprob=shaped(logprobs[:, 1]) if labelled and teacher else None,
        clipped_fraction=shaped(stats[:, Column.CLIPPED]) if min(call.dialect[1:]) < torch.inf else None,
    )


@dataclass(frozen=True)
class Job:
    """A call with what its rows are weighted by. `policy` is a term of opsd_kernels.objectives, mixed in with `policy_weight`."""

    call: Call
    leading: torch.Size
    token_weights: object  # tensor, weighting or None
    scale: (
        Tensor | float | None
    )  # what a weighted row is multiplied by before the sum; None: the loss is per row
    policy: object = None
    policy_weight: float = 0.0

    @property
    def sequences(self) -> torch.Size:
        """(B, T): a leading shape of one dimension is one sequence."""
        return (
            torch.Size((self.leading[:-1].numel(), self.leading[-1])) if self.leading else torch.Size((1, 1))
        )

    @property
    def weighting(self) -> object | None:
        return (
            None
            if self.token_weights is None or isinstance(self.token_weights, Tensor)
            else self.token_weights
        )

    @property
    def scopes(self) -> set[str]:
        """What is to be known before the row factors are."""
        return {part.scope for part in (self.weighting, self.policy) if part is not None}

    @property
    def needs_metrics(self) -> bool:
        return any(
            part is not None and part.scope != "index" and getattr(part, "needs_metrics", True)
            for part in (self.weighting, self.policy)
        )

    def mask(self) -> Tensor:
        call = self.call
        valid = (
            torch.ones(self.leading.numel(), dtype=torch.bool, device=call.student_hidden.device)
            if call.valid is None
            else call.valid
        )
        return valid.reshape(self.sequences)

    def stats(self, D: Tensor, stats: Tensor, logprobs: Tensor | None) -> TokenStats:
        """As weightings and policies see them: by sequence, and not rounded to fp32 for fp64 inputs."""
        return token_stats(D, stats, logprobs, self.call, self.sequences, stats.dtype)

    def weights(self, stats: TokenStats | None) -> Tensor:
        """(N,) of the share that the divergence has, 0 where a token is not valid. `stats` None for a scope that needs none."""
        wide = stats_dtype(self.call.student_hidden.dtype)
        if self.weighting is None:
            weights = known_weights(
                self.token_weights, self.leading, self.call.student_hidden.device, wide, self.call.valid
            )
        else:
            mask = self.mask()
            given = check_weights(self.weighting(stats, mask), mask.shape).detach()
            weights = torch.where(mask, given, 0.0).to(wide).reshape(-1)
        return weights * (1 - self.policy_weight) if self.policy is not None else weights

    def policy_losses(self, stats: TokenStats | None) -> tuple[Tensor, Tensor]:
        """(N,) losses of the policy term, and their negative slopes in the student's log-prob of the label, both times its share."""
        mask = self.mask()
        wide = stats_dtype(self.call.student_hidden.dtype)
        with torch.enable_grad():
            start = (
                torch.zeros(mask.shape, dtype=wide, device=mask.device)
                if stats is None
                else stats.student_logprob.to(wide)
            )
            logprob = torch.where(mask, start, 0.0).detach().requires_grad_()
            losses = torch.where(mask, self.policy(logprob, stats, mask), 0.0)
            (slope,) = torch.autograd.grad(losses.sum(), logprob)
        return (self.policy_weight * losses.detach()).reshape(-1), (-self.policy_weight * slope).to(
            wide
        ).reshape(-1)


class ByStatistics:
    """Row factors that the statistics of the loop itself tell (autograd.Weighing)."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.scope = "sequence" if "sequence" in job.scopes else "row"
        self.has_policy = job.policy is not None
        self.exchanges = any(getattr(part, "exchanges", False) for part in (job.weighting, job.policy))
        scale = job.scale
        wide = stats_dtype(job.call.student_hidden.dtype)
        if not isinstance(scale, Tensor):
            scale = torch.full(
                (), scale, dtype=wide, device=job.call.student_hidden.device
            )  # torch.tensor would copy from the host, and wait
        largest = scale.amax() if scale.numel() else scale.new_ones(())
        self.unit = torch.where(largest > 0, largest, 1.0)
        self._share = scale / self.unit

    def lengths(self, valid: bool) -> list[int]:
        """Rows of each sequence, in order: those that count, for which the host reads the mask, or all."""
        B, T = self._job.sequences
        whole = list(
            getattr(self._job.weighting, "lengths", (T,) * B)
        )  # a packed row has sequences of its own lengths
        expect(
            sum(whole) == B * T,
            "lengths",
            f"lengths that add up to the {B * T} tokens of the packed row",
            sum(whole),
        )
        if not valid:
            return whole
        counts, flat = [], iter(self._job.mask().reshape(-1).tolist())
        for length in whole:
            counts.append(sum(itertools.islice(flat, length)))
        return counts

    def _stats(self, out: loop.Outputs) -> TokenStats:
        return self._job.stats(out.loss, out.stats, out.logprobs)

    def factor(self, out: loop.Outputs) -> Tensor:
        return self._job.weights(self._stats(out)) * self._share * self.unit

    def __call__(self, out: loop.Outputs, rows: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        stats = self._stats(out)
        share = self._share.expand(out.loss.shape[0])
        policy = (self._job.policy_losses(stats)[1] * share)[rows] if self.has_policy else None
        return (self._job.weights(stats) * share)[rows], policy


def _apply_weighing(job: Job, metrics: bool) -> tuple[Tensor, ...]:
    return WeightedSum.apply(*job.call, metrics, ByStatistics(job))


def _weighed_in_the_loop(job: Job, metrics: bool) -> tuple[Tensor, ...]:
    """Never compiled: a weighting is a Python object, which no operator's schema holds. Where the compiler is not loaded it is not loaded for this."""
    run = torch.compiler.disable(_apply_weighing) if "torch._dynamo" in sys.modules else _apply_weighing
    return run(job, metrics)


def _in_forward(job: Job, metrics: bool) -> tuple[Tensor, ...]:
    """(loss without the policy's value, D, stats, logprobs), the gradient computed in the forward pass."""
    if job.scopes - {"index"}:
        return _weighed_in_the_loop(job, metrics)
    policy = None if job.policy is None else job.policy_losses(None)[1] * job.scale
    return WeightedSum.apply(
        *job.call._replace(factor=job.weights(None) * job.scale, policy=policy), metrics, None
    )


def _per_row(job: Job, backward: str, metrics: bool) -> tuple[Tensor, ...]:
    """(loss, D, stats, logprobs) with weights after the fact: without gradients, or for any upstream gradient per row."""
    call = job.call
    trainable = call.grad_weight or call.grad_bias
    if call.gradient():
        wide = stats_dtype(call.student_hidden.dtype)
        known = not job.scopes - {"index"}
        reached = (job.weights(None) != 0).to(wide) if known else job.mask().reshape(-1).to(wide)
        D, stats, logprobs = PerRow.apply(
            *call._replace(factor=reached), metrics, trainable or backward == "recompute"
        )
    else:
        D, _, stats, logprobs, *_ = torch.ops.opsd_kernels.linear_divergence(*call, metrics, False)
    factor = job.weights(job.stats(D, stats, logprobs)) * (1.0 if job.scale is None else job.scale)
    losses = weighted(factor, D)
    return (losses if job.scale is None else losses.sum()), D, stats, logprobs


def evaluate(job: Job, backward: str, return_stats: bool) -> Tensor | tuple[Tensor, TokenStats]:
    """The loss, 0-dim or of the leading shape, and with `return_stats` the statistics."""
    check_choice("backward", backward, BACKWARDS)
    call = job.call
    if job.weighting is not None:
        labelled = call.labels is not None or not getattr(job.weighting, "needs_labels", False)
        expect(
            labelled,
            "labels",
            f"the sampled tokens, whose log-probs {type(job.weighting).__name__} needs",
            None,
        )
    trainable = call.grad_weight or call.grad_bias
    refused = backward == "in_forward" and job.scale is None and trainable
    expect(
        not refused,
        "backward",
        "'recompute' or 'auto' for reduction='none' with a trainable head: the upstream gradient comes too late",
        repr(backward),
    )
    metrics = return_stats or job.needs_metrics
    known = not job.scopes - {"index"}
    in_forward = (
        job.scale is not None
        and backward != "recompute"
        and call.gradient()
        and (known or trainable or job.policy is not None)
    )
    loss, D, stats, logprobs = _in_forward(job, metrics) if in_forward else _per_row(job, backward, metrics)
    if job.policy is not None:
        loss = loss + (job.policy_losses(job.stats(D, stats, logprobs))[0] * job.scale).sum()
    loss = loss.reshape(job.leading) if job.scale is None else loss
    return (loss, token_stats(D, stats, logprobs, call, job.leading)) if return_stats else loss


def make_job(
    call: Call,
    hidden: Tensor,
    token_weights: object,
    reduction: str,
    normalizer: float | Tensor | None,
    **policy: object,
) -> Job:
    if token_weights is not None and not isinstance(token_weights, Tensor):
        expect(
            callable(token_weights),
            "token_weights",
            "a tensor, a weighting (see opsd_kernels.weights) or None",
            type(token_weights).__name__,
            TypeError,
        )
        check_weighting(token_weights)
    reads_logprobs = policy.get("policy") is not None or getattr(token_weights, "needs_labels", False)
    if (
        call.logits_dtype == "auto" and reads_logprobs
    ):  # logits of 16 in bf16 are off by 0.03, and so would be the logarithm of a ratio of probabilities
        call = Call(
            **{**call._asdict(), "logits_dtype": "float32"}
        )  # after `_replace` torch.compile of 2.10 and 2.11 has lost the class
    return Job(
        call, hidden.shape[:-1], token_weights, row_scale(reduction, normalizer, hidden, call.valid), **policy
    )
