"""Define objectives of sampled tokens, alone or mixed with a divergence in one pass over the head.

A policy term is a callable `(logprob, stats, mask) -> (B, T) losses`:

* `logprob` (B, T): the student's log-probs of the sampled tokens, in nats. The gradient flows through them.
* `stats`: the detached TokenStats of the call.
* `mask` (B, T): True at valid tokens.

The `scope` of a term names the input of its slope d loss / d logprob, as with token weights: "index" for the
term alone, "row" for the statistics of the token, "sequence" for those of its sequence.

    term = PPOClip(advantages, old_logprobs)
    loss = linear_policy_divergence(h_s, W_s, h_t, W_t, labels=tokens, policy=term, policy_weight=0.3)
    loss = term(linear_logprobs(h_s, W_s, tokens), None, mask)[mask].mean()  # the same term without a teacher

Mixing costs no further GEMM: the term adds `policy_slope * (q - onehot)` to the row gradient of the
divergence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import Unpack

from .divergence import DivergenceOptions, TokenStats, evaluate, prepare, with_defaults
from .quantized import QuantizedHead
from .spec import SCOPES, check_number, check_tensor, expect
from .weights import TokenWeighting


class PolicyTerm(Protocol):
    """Map the log-probs of sampled tokens to losses; see the top of this module."""

    @property
    def scope(self) -> str: ...

    def __call__(self, logprob: Tensor, stats: TokenStats | None, mask: Tensor) -> Tensor: ...


def group_advantages(
    rewards: Tensor,  # (..., G), of the G rollouts of one prompt
    *,
    normalize_std: bool = False,
) -> Tensor:  # (..., G)
    """Return the advantages of GRPO: reward minus the group's mean (arXiv:2402.03300, section 4.1).

    With `normalize_std` they are divided by the group's standard deviation; without it this is the unbiased
    form of arXiv:2503.20783. A group of equal rewards has advantages of 0 in both forms. A reward that is not
    finite, such as NaN for one that is missing, has advantage 0 and does not enter the mean and the deviation
    of the others. Rewards of an integer or bool dtype give advantages of the default dtype.
    """
    if not rewards.is_floating_point():
        rewards = rewards.to(torch.get_default_dtype())
    if not rewards.numel():
        return rewards
    known = rewards.isfinite()
    low = torch.where(known, rewards, math.inf).amin(-1, keepdim=True)
    high = torch.where(known, rewards, -math.inf).amax(-1, keepdim=True)
    count = known.sum(-1, keepdim=True).clamp(min=1)
    mean = torch.where(known, rewards, 0.0).sum(-1, keepdim=True) / count
    # The mean of equal rewards may miss them by its rounding.
    centred = torch.where(known & (low < high), rewards - mean, 0.0)
    if not normalize_std:
        return centred
    std = (centred.square().sum(-1, keepdim=True) / count).sqrt()
    return torch.where(std > 0, centred / std, 0.0)


LARGEST_GAP = 20.0  # nats: a ratio of probabilities is exp of at most this, as in SDPO and verl


def _times(factor: Tensor | float, values: Tensor, mask: Tensor) -> Tensor:
    """Return factor * values; 0, without a gradient, for factor 0 and at invalid tokens.

    Either may hold inf and NaN there: 0 * inf would be NaN in the values or in the gradient.
    """
    if not isinstance(factor, Tensor):
        factor = torch.full_like(values, factor)
    counted = mask & (factor != 0)
    return torch.where(counted, torch.where(counted, factor, 0.0) * torch.where(counted, values, 0.0), 0.0)


def _gap(logprob: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """Return logprob - old, 0 at invalid tokens and where both are -inf, else finite."""
    counted = mask & ~((logprob == old) & logprob.isinf())
    # A mean over a sequence may meet both infinities.
    return (torch.where(counted, logprob, 0.0) - torch.where(counted, old, 0.0)).clamp(-1e6, 1e6)


@dataclass(frozen=True)
class PolicyGradient:
    """Apply REINFORCE: `-advantages * logprob`. `advantages` broadcasts to (B, T)."""

    advantages: Tensor
    scope = "index"
    needs_metrics = False

    def __post_init__(self) -> None:
        check_tensor("advantages", self.advantages)

    def __call__(self, logprob: Tensor, stats: TokenStats | None, mask: Tensor) -> Tensor:
        return -_times(self.advantages.detach(), logprob, mask)


@dataclass(frozen=True)
class PPOClip:
    """Apply the clipped loss of PPO and GRPO, `-min(r * A, clamp(r, 1 - low, 1 + high) * A)`, r = exp(logprob
    - old).

    The loss is arXiv:1707.06347, eq. 7; the two bounds are those of arXiv:2503.14476. Raises ValueError for a
    negative bound.

    * `advantages`: A, broadcasts to (B, T).
    * `old_logprobs`: (B, T) log-probs under the sampling policy, in nats. None: the student is the sampling
      policy, so r = 1 and nothing is clipped. Beyond +-20 nats log r is clamped, so that r cannot overflow;
      such a token has no gradient.
    * `per_sequence`: use one ratio for all tokens of a sequence, their geometric mean (GSPO,
      arXiv:2507.18071, eq. 7).
    * `dual_clip`: c > 1 bounds the loss of a negative advantage at -c * A, without a gradient beyond
      (arXiv:1912.09729, eq. 5). None: no bound.
    """

    advantages: Tensor
    old_logprobs: Tensor | None = None
    low: float = 0.2
    high: float = 0.2
    per_sequence: bool = False
    dual_clip: float | None = None
    needs_metrics = False

    def __post_init__(self) -> None:
        check_tensor("advantages", self.advantages)
        if self.old_logprobs is not None:
            check_tensor("old_logprobs", self.old_logprobs)
        for name in ("low", "high"):
            expect(check_number(name, getattr(self, name)) >= 0, name, "a number >= 0", getattr(self, name))
        if self.dual_clip is not None:
            above = check_number("dual_clip", self.dual_clip) > 1
            expect(above, "dual_clip", "a number above 1, or None", self.dual_clip)

    @property
    def scope(self) -> str:
        if self.old_logprobs is None:
            return "index"
        return "sequence" if self.per_sequence else "row"

    def __call__(self, logprob: Tensor, stats: TokenStats | None, mask: Tensor) -> Tensor:
        known = logprob if self.old_logprobs is None else self.old_logprobs.reshape(mask.shape)
        gap = _gap(logprob, known.detach(), mask)
        if self.per_sequence:
            gap = (gap.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)).expand_as(gap)
        ratio = gap.clamp(-LARGEST_GAP, LARGEST_GAP).exp()
        advantages = self.advantages.detach()
        bounded = ratio.clamp(1 - self.low, 1 + self.high)
        least = torch.minimum(_times(advantages, ratio, mask), _times(advantages, bounded, mask))
        if self.dual_clip is not None:
            most = _times(advantages, torch.full_like(ratio, self.dual_clip), mask)
            least = torch.where(advantages < 0, torch.maximum(least, most), least)
        return -least


@dataclass(frozen=True)
class Mix:
    """Sum policy terms, `((share, term), ...)`. A share is a number or a tensor that broadcasts to (B, T)."""

    parts: tuple[tuple[float | Tensor, PolicyTerm], ...]

    @property
    def scope(self) -> str:
        return max((term.scope for _, term in self.parts), key=SCOPES.index)

    @property
    def needs_metrics(self) -> bool:
        return any(getattr(term, "needs_metrics", True) for _, term in self.parts)

    @property
    def exchanges(self) -> bool:
        return any(getattr(term, "exchanges", False) for _, term in self.parts)

    def __call__(self, logprob: Tensor, stats: TokenStats | None, mask: Tensor) -> Tensor:
        losses = torch.zeros_like(logprob)
        for share, term in self.parts:
            losses = losses + _times(share, term(logprob, stats, mask), mask)
        return losses


REWARDS = ("log_ratio", "proximal", "power")


@dataclass(frozen=True)
class OnPolicyDistillation:
    """Distil on sampled tokens: `-stopgrad(w * R) * logprob`, with a reward R from log-probs.

    R is a function of the log-probs t and s of the token under teacher and student, in nats. Raises
    ValueError for an unknown reward, a strength outside its range, or a clip that is not positive.

    * `reward`: "log_ratio" is t - s, whose mean is -KL(student || teacher), the K1 form. "proximal" is
      log(strength * exp(t - s) + 1 - strength), the proximal teacher of TOP-D (arXiv:2607.04751), never below
      log(1 - strength). "power" is (exp(strength * t) - exp(strength * s)) / strength, PowerOPD
      (arXiv:2606.17199), within +-1/strength; for small strengths it tends to "log_ratio".
    * `strength`: above 0, and below 1 for "proximal".
    * `clip`: R is clamped to [-clip, clip].
    * `weights`: a scheme of `opsd_kernels.weights` for w; `PrefixDiscrepancy()` gives IW-OPD
      (arXiv:2606.22600). None: w = 1.
    * `old_logprobs`: (B, T) log-probs under the sampling policy. They replace s in R and the student's
      log-probs in w. None: the student's own.
    """

    reward: str = "log_ratio"
    strength: float = 0.5
    clip: float | None = None
    weights: TokenWeighting | None = None
    old_logprobs: Tensor | None = None

    def __post_init__(self) -> None:
        expect(self.reward in REWARDS, "reward", "one of " + ", ".join(map(repr, REWARDS)), repr(self.reward))
        below = 1.0 if self.reward == "proximal" else math.inf
        expect(
            0 < check_number("strength", self.strength) < below,
            "strength",
            "a number above 0" + ", below 1 for 'proximal'" * (below == 1),
            self.strength,
        )
        if self.clip is not None:
            check_number("clip", self.clip, positive=True)
        if self.old_logprobs is not None:
            check_tensor("old_logprobs", self.old_logprobs)

    @property
    def scope(self) -> str:
        return "sequence" if getattr(self.weights, "scope", "row") == "sequence" else "row"

    @property
    def needs_metrics(self) -> bool:
        return self.weights is not None and getattr(self.weights, "needs_metrics", True)

    @property
    def exchanges(self) -> bool:
        return getattr(self.weights, "exchanges", False)

    def rewards(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return R, (B, T), of log-probs (B, T) in nats, under the clip."""
        gap = torch.where(teacher == student, 0.0, teacher - student)  # both may be -inf
        if self.reward == "log_ratio":
            R = gap
        elif self.reward == "proximal":
            R = torch.logaddexp(
                gap + math.log(self.strength),
                torch.full_like(student, math.log1p(-self.strength)),
            )
        else:
            R = (torch.exp(self.strength * teacher) - torch.exp(self.strength * student)) / self.strength
        return R if self.clip is None else R.clamp(-self.clip, self.clip)

    def weighted_rewards(
        self, logprob: Tensor, stats: TokenStats | None, mask: Tensor
    ) -> tuple[Tensor, Tensor | float]:
        """Return (R, w): R is 0 at invalid tokens, and w is 1.0 or (B, T)."""
        if stats is None or stats.teacher_logprob is None:
            expected = "TokenStats with the teacher's log-probs of the labels"
            raise ValueError(f"stats: expected {expected}, got {stats}")
        teacher = stats.teacher_logprob
        if self.old_logprobs is not None:
            logprob = self.old_logprobs.reshape(mask.shape)
            stats = replace(stats, student_logprob=logprob.detach())
        R = torch.where(mask, self.rewards(logprob.detach(), teacher), 0.0)
        if self.weights is None:
            return R, 1.0
        return R, self.weights(None if self.weights.scope == "index" else stats, mask).detach()

    def __call__(self, logprob: Tensor, stats: TokenStats | None, mask: Tensor) -> Tensor:
        R, weights = self.weighted_rewards(logprob, stats, mask)
        slope = _times(weights, R, mask).detach()
        return -_times(slope, logprob, mask)


def linear_policy_divergence(
    student_hidden: Tensor,  # (..., H_s)
    student_weight: Tensor | QuantizedHead,  # (V_s, H_s)
    teacher_hidden: Tensor,  # (..., H_t)
    teacher_weight: Tensor | QuantizedHead,  # (V_t, H_t)
    *,
    policy: PolicyTerm,
    policy_weight: float = 0.5,
    **options: Unpack[DivergenceOptions],
) -> Tensor | tuple[Tensor, TokenStats]:
    """Compute `(1 - policy_weight) * divergence + policy_weight * policy term` in one pass over the heads.

    Both parts are in nats, under the same mask and reduction. `labels` are the sampled tokens, (...) int64.
    The other options, shapes and returned values are those of `linear_divergence`; token weights apply to the
    divergence alone. The gradient is computed in the forward pass. Terms of scope "row" or "sequence" are
    evaluated on the op's own statistics, between the sweeps.

    Raises ValueError for a `policy_weight` outside [0, 1], for `reduction="none"` and for
    `backward="recompute"`, and TypeError for a policy without a scope, missing labels or an unknown option.
    """
    share = check_number("policy_weight", policy_weight)
    expect(0 <= share <= 1, "policy_weight", "a number in [0, 1]", share)
    expect(
        callable(policy) and hasattr(policy, "scope"),
        "policy",
        "a policy term, a callable with a scope",
        type(policy).__name__,
        TypeError,
    )
    check_tensor("labels", options.get("labels"), "a tensor, the sampled tokens")
    given = with_defaults(options)
    expected = "'mean', 'sum' or 'sequence_mean' with a policy term"
    expect(given["reduction"] != "none", "reduction", expected, repr(given["reduction"]))
    expected = "'auto' or 'in_forward' with a policy term"
    expect(given["backward"] != "recompute", "backward", expected, repr(given["backward"]))
    student, teacher = (student_hidden, student_weight), (teacher_hidden, teacher_weight)
    # Of a share of 0 nothing counts, infinite losses included.
    term = policy if share else None
    problem, weigher = prepare(student, teacher, given, policy=term, policy_weight=share)
    return evaluate(problem, weigher, given["backward"], given["return_stats"])
