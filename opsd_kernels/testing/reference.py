"""Reference implementation: every divergence from its textbook definition, on dense logits, by autograd.

It imports no kernel and no formula of the kernels. In float64 it is the truth; in fp32, and for 16-bit inputs
with fp32 logits, it is careful plain PyTorch. It holds several (N, V) tensors: for tests, not for training.

A divergence is a sum of terms (reference_terms.py). Clipped terms and tokens of weight zero are cut out of
the graph at the log-probs: a term may be infinite, and 0 times its gradient would be NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec import REDUCTIONS, Divergence, LogitTransform, check_choice, check_number, expect
from .reference_terms import TAILS, LogProbs, largest_entries, listed_entries, ratio_terms
from .reference_terms import reference_divergence as reference_divergence
from .reference_terms import reference_terms as reference_terms

# Arguments that change how the op computes, not its value.
HOW = {"backend", "backward", "gradient_tolerance", "logits_dtype", "workspace_bytes"}
# Arguments that a reference takes as None alone, and what serves in their place.
_DENSE = "wrap it in opsd_kernels.testing.heads.with_dense_heads"
LACKING = {
    "group": "give it whole heads",
    **dict.fromkeys(("lora", "student_lora", "teacher_lora"), _DENSE),
    "student_vocab_ids": "wrap it in opsd_kernels.testing.heads.with_student_vocab",
    "teacher_index": "call opsd_kernels.testing.reference_rows.linear_divergence_by_index_reference",
}

# ---------------------------------------------------------------- the divergence under its clips


@dataclass(frozen=True)
class Clips:
    """min(f, entry) before the sum, min(D, token) after it, no gradient at a clip. inf clips nothing."""

    entry: float = math.inf
    token: float = math.inf

    @classmethod
    def parse(cls, entry: float | None, token: float | None) -> Clips:
        given = {"entry_clip": entry, "token_clip": token}
        return cls(
            *(
                math.inf if value is None else check_number(name, value, positive=True)
                for name, value in given.items()
            )
        )

    def __bool__(self) -> bool:
        return min(self.entry, self.token) < math.inf


class _Clipped(NamedTuple):
    """Values under the clips, without a gradient."""

    divergence: Tensor  # (n,)
    clipped_fraction: Tensor  # (n,) share of the clipped terms
    terms: Tensor  # (n, E) bool, True where the entry clip holds
    rows: Tensor  # (n,) bool, True where the token clip holds


@torch.no_grad()
def _under_clips(entries: LogProbs, divergence: Divergence, clips: Clips) -> _Clipped:
    f = reference_terms(entries.log_q, entries.log_p, divergence)
    terms = f > clips.entry
    D = torch.where(terms, clips.entry, f).sum(-1)
    rows = D > clips.token
    share = terms.sum(-1) / entries.size.clamp(min=1).to(D.dtype)
    return _Clipped(torch.where(rows, clips.token, D), torch.where(rows, 1.0, share), terms, rows)


def _differentiable(
    entries: LogProbs, divergence: Divergence, clips: Clips, clipped: _Clipped, unused: Tensor
) -> Tensor:
    """Compute D per row again, with its gradient. `unused` rows (n,) have none."""
    stopped = clipped.rows | unused
    log_q = torch.where(clipped.terms | stopped[:, None], 0.0, entries.log_q)
    f = torch.where(clipped.terms, clips.entry, reference_terms(log_q, entries.log_p, divergence))
    return torch.where(stopped, clipped.divergence, f.sum(-1))


# ---------------------------------------------------------------- logits and statistics


def reference_logits(raw: Tensor, transform: LogitTransform, bias: Tensor | None) -> Tensor:
    """Map raw logits (n, V) to softcap(scale * (raw + bias)) / temperature."""
    y = (raw if bias is None else raw + bias) * transform.scale
    if transform.softcap is not None:
        y = transform.softcap * torch.tanh(y / transform.softcap)
    return y / transform.temperature


def reference_mix(student: Tensor, teacher: Tensor, teacher_mix: float) -> Tensor:
    """Return the trust-region teacher's logits (1 - a) t + a s, a geometric mixture, with s held constant."""
    return teacher if teacher_mix == 0 else (1 - teacher_mix) * teacher + teacher_mix * student.detach()


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _packed_logits(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Tensor,
    vocab_size: int | None,
    transform: LogitTransform,
    wide: torch.dtype,
) -> Tensor:
    """Return the transformed logits of the valid rows, (n, vocab_size). The others never enter the graph.

    Without a weight `hidden` holds the logits.
    """
    packed = hidden.reshape(-1, hidden.shape[-1])[rows].to(wide)
    raw = packed[:, :vocab_size] if weight is None else packed @ weight[:vocab_size].to(wide).T
    transform = transform.of_tokens(hidden).at(rows)
    return reference_logits(raw, transform, None if bias is None else bias[:vocab_size].to(wide))


def _entropy(log_probs: Tensor) -> Tensor:
    return -ratio_terms(log_probs, torch.zeros_like(log_probs)).sum(-1)


def _of_labels(log_probs: Tensor, labels: Tensor) -> Tensor:
    return log_probs.gather(-1, labels[:, None])[:, 0]


def reference_statistics(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the student's fields of TokenStats, (n,) each; with a teacher also its own and the agreement."""
    log_q = student.detach().log_softmax(-1)
    stats = {"student_entropy": _entropy(log_q), "student_max_prob": log_q.exp().amax(-1)}
    stats["student_logsumexp"] = student.detach().logsumexp(-1)
    if labels is not None:
        stats["student_logprob"] = _of_labels(log_q, labels)
        stats["label_is_top1"] = (log_q.argmax(-1) == labels).to(log_q.dtype)
    if teacher is None:
        return stats
    log_p = teacher.detach().log_softmax(-1)
    stats |= {"teacher_entropy": _entropy(log_p), "teacher_max_prob": log_p.exp().amax(-1)}
    stats["teacher_logsumexp"] = teacher.detach().logsumexp(-1)
    stats["top1_agreement"] = (log_q.argmax(-1) == log_p.argmax(-1)).to(log_q.dtype)
    if labels is not None:
        stats["teacher_logprob"] = _of_labels(log_p, labels)
    return stats


# ---------------------------------------------------------------- tokens, weights, reductions

STATISTICS = (
    *("divergence", "student_entropy", "teacher_entropy", "student_max_prob", "teacher_max_prob"),
    *("top1_agreement", "student_logprob", "teacher_logprob", "clipped_fraction"),
    *("student_logsumexp", "teacher_logsumexp", "label_is_top1"),
)


class _Tokens:
    """The valid tokens of the leading shape, packed into rows (n,) and back."""

    def __init__(self, hidden: Tensor, mask: Tensor | None, labels: Tensor | None, ignore_index: int) -> None:
        self.valid = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
        if mask is not None:
            self.valid &= mask != 0
        if labels is not None:
            self.valid &= labels != ignore_index
        self.rows = self.valid.flatten().nonzero()[:, 0]

    def pack(self, values: Tensor) -> Tensor:
        """Map (..., *rest) to (n, *rest)."""
        return (
            values.flatten(end_dim=self.valid.dim() - 1)[self.rows]
            if self.valid.dim()
            else values[None][self.rows]
        )

    def unpack(self, values: Tensor) -> Tensor:
        """Map (n,) to (...), zeros at invalid tokens."""
        return values.new_zeros(self.valid.numel()).index_put((self.rows,), values).view(self.valid.shape)

    def weights(self, given: Any, stats: dict[str, Tensor]) -> Tensor:
        """Return weights (n,), without a gradient, from a tensor (...) or a weighting.

        A weighting is called with the statistics and the mask (B, T) of all sequences.
        """
        if given is None:
            return torch.ones_like(stats["divergence"])
        if not isinstance(given, Tensor):
            shape = (self.valid.shape[:-1].numel(), self.valid.shape[-1]) if self.valid.dim() else (1, 1)
            known: dict[str, Tensor | None] = dict.fromkeys(STATISTICS)
            known |= {name: self.unpack(values).view(shape) for name, values in stats.items()}
            seen = None if given.scope == "index" else SimpleNamespace(**known)
            given = given(seen, self.valid.view(shape)).view(self.valid.shape)
        return self.pack(given.detach()).to(stats["divergence"].dtype)


def _reduce(values: Tensor, valid: Tensor, reduction: str, normalizer: float | Tensor | None) -> Tensor:
    """Reduce weighted divergences (...), which are zero at invalid tokens."""
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    if reduction == "mean":
        count = valid.sum().clamp(min=1) if normalizer is None else torch.as_tensor(normalizer)
        return torch.where(count == 0, 0.0, values.sum() / torch.where(count == 0, 1, count))
    counts = valid.sum(-1)
    return (values.sum(-1) / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)


def _check_how(how: dict[str, object], op: str, *lacking: str) -> None:
    """Raise TypeError for no argument of `op`, ValueError for one of those `lacking` that is not None."""
    lacking = ("group", *lacking)
    unknown = set(how) - HOW - set(lacking)
    expect(not unknown, ", ".join(sorted(unknown)), f"an argument of {op}", "an unknown name", TypeError)
    for name in lacking:
        value, expected = how.get(name), f"None, since the reference lacks it: {LACKING[name]}"
        expect(value is None, name, expected, type(value).__name__)


@dataclass(frozen=True)
class _Loss:
    """The options of a loss, and its value from the entries' log-probs."""

    divergence: Divergence
    clips: Clips
    token_weights: Any
    reduction: str
    normalizer: float | Tensor | None
    return_stats: bool
    z_loss: float

    def of(
        self, entries: LogProbs, student: Tensor, statistics: dict[str, Tensor], tokens: _Tokens
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        check_choice("reduction", self.reduction, REDUCTIONS)
        clipped = _under_clips(entries, self.divergence, self.clips)
        stats = {"divergence": clipped.divergence, **statistics}
        if self.clips:
            stats["clipped_fraction"] = clipped.clipped_fraction
        weights = tokens.weights(self.token_weights, stats)
        per_token = _differentiable(entries, self.divergence, self.clips, clipped, weights == 0)
        per_token = (
            per_token + self.z_loss * torch.where((weights == 0)[:, None], 0.0, student).logsumexp(-1) ** 2
        )
        # a token of weight zero may have an infinite divergence
        weighted = torch.where(weights == 0, 0.0, per_token) * weights
        loss = _reduce(tokens.unpack(weighted), tokens.valid, self.reduction, self.normalizer)
        if not self.return_stats:
            return loss
        return loss, {name: tokens.unpack(values) for name, values in stats.items()}


# ---------------------------------------------------------------- the ops


def linear_divergence_reference(
    student_hidden: Tensor,  # (..., H_s)
    student_weight: Tensor,  # (V_s, H_s)
    teacher_hidden: Tensor,  # (..., H_t)
    teacher_weight: Tensor | None,  # (V_t, H_t); None: `teacher_hidden` holds logits (..., V)
    *,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    token_weights: Any = None,  # (...) tensor, or a weighting
    teacher_mix: float = 0.0,
    entry_clip: float | None = None,
    token_clip: float | None = None,
    z_loss: float | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    return_stats: bool = False,
    topk: int | None = None,
    topk_support: str = "student",
    topk_tail: str = "bucket",
    **how: object,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Compute `linear_divergence` by its definition.

    Takes the same arguments, with heads that are tensors. Those of execution (`HOW`) change nothing, and what
    the reference lacks (`LACKING`) must be None. Returns the reduced divergence in nats, float64 for float64
    inputs and else float32, and with `return_stats` a dict of the fields of TokenStats.
    """
    _check_how(how, "linear_divergence", "student_lora", "teacher_lora", "student_vocab_ids", "teacher_index")
    check_choice("topk_support", topk_support, ("student", "teacher"))
    check_choice("topk_tail", topk_tail, tuple(TAILS))
    expect(
        0 <= check_number("teacher_mix", teacher_mix) < 1, "teacher_mix", "a number in [0, 1)", teacher_mix
    )
    loss = _Loss(
        Divergence.parse(divergence, beta),
        Clips.parse(entry_clip, token_clip),
        token_weights,
        reduction,
        normalizer,
        return_stats,
        0.0 if z_loss is None else z_loss,
    )
    student = LogitTransform.parse(
        "student", student_logit_scale, student_softcap, "temperature", temperature
    )
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    teacher = LogitTransform.parse(
        "teacher", teacher_logit_scale, teacher_softcap, "teacher_temperature", teacher_temperature
    )

    tokens = _Tokens(student_hidden, mask, labels, ignore_index)
    wide = _wide(student_hidden)
    s = _packed_logits(student_hidden, student_weight, student_bias, tokens.rows, vocab_size, student, wide)
    with torch.no_grad():
        t = _packed_logits(
            teacher_hidden, teacher_weight, teacher_bias, tokens.rows, vocab_size, teacher, wide
        )
        t = reference_mix(s, t, teacher_mix)
    statistics = reference_statistics(s, t, None if labels is None else tokens.pack(labels))
    return loss.of(largest_entries(s, t, topk, topk_support, topk_tail), s, statistics, tokens)


def linear_topk_divergence_reference(
    student_hidden: Tensor,  # (..., H)
    student_weight: Tensor,  # (V, H)
    teacher_topk_ids: Tensor,  # (..., K) int64
    teacher_topk_logprobs: Tensor,  # (..., K), -inf is padding
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    tail: str = "bucket",
    temperature: float = 1.0,
    student_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    vocab_size: int | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    token_weights: Any = None,
    entry_clip: float | None = None,
    token_clip: float | None = None,
    z_loss: float | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    return_stats: bool = False,
    **how: object,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Compute `linear_topk_divergence` by its definition, as `linear_divergence_reference` its op.

    The statistics are those of the student.
    """
    _check_how(how, "linear_topk_divergence", "student_lora", "student_vocab_ids")
    check_choice("tail", tail, tuple(TAILS))
    loss = _Loss(
        Divergence.parse(divergence, beta),
        Clips.parse(entry_clip, token_clip),
        token_weights,
        reduction,
        normalizer,
        return_stats,
        0.0 if z_loss is None else z_loss,
    )
    student = LogitTransform.parse(
        "student", student_logit_scale, student_softcap, "temperature", temperature
    )

    tokens = _Tokens(student_hidden, mask, labels, ignore_index)
    s = _packed_logits(
        student_hidden, student_weight, student_bias, tokens.rows, vocab_size, student, _wide(student_hidden)
    )
    logprobs = tokens.pack(teacher_topk_logprobs.detach()).to(s.dtype)
    statistics = reference_statistics(s, None, None if labels is None else tokens.pack(labels))
    return loss.of(listed_entries(s, tokens.pack(teacher_topk_ids), logprobs, tail), s, statistics, tokens)


def linear_logprobs_reference(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (...) int64
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    **how: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `linear_logprobs` by its definition, as `linear_divergence_reference` its op.

    Returns log-probs (...) of the labels in nats, 0 at invalid tokens; with `return_entropy` the entropies
    too.
    """
    _check_how(how, "linear_logprobs", "lora")
    tokens = _Tokens(hidden, mask, labels, ignore_index)
    transform = LogitTransform.parse("", logit_scale, softcap, "temperature", temperature)
    log_q = _packed_logits(
        hidden, weight, bias, tokens.rows, vocab_size, transform, _wide(hidden)
    ).log_softmax(-1)
    logprobs = tokens.unpack(_of_labels(log_q, tokens.pack(labels)))
    return (logprobs, tokens.unpack(_entropy(log_q))) if return_entropy else logprobs
