"""verl's on-policy distillation losses from hidden states and heads: the same numbers without logits.

Two functions replace functions of verl 0.9.1, which is not imported:

`topk_distill` is the op that verl's fused engine calls inside the model's forward pass
(workers/engine/veomni/transformer_impl.py passes the tensors to VeOmni's `chunk_topk_distill_function`). Its
results fill `model_output`, and the rest of verl runs unchanged. Use it with sharded heads.

`distillation_loss` is the function of that name in trainer/distillation/losses.py, with hidden states in
`model_output` instead of losses per token. It clamps and aggregates in the same call, takes fewer passes over
the head, and accepts whole teachers besides lists.

Different from verl, on purpose: log-probs come from fp32 logits (or a difference that 16 bits hold), where
verl's default path takes the softmax in the logits' dtype; a list entry of -inf is padding and adds nothing,
even under `log_prob_min_clamp`; a micro-batch without a valid token has loss 0. The metrics of the overlap
with the student's own top-k are computed on demand (`overlap=True`): they cost a pass over the head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..divergence import linear_divergence, repeated
from ..logprobs import linear_logprobs, linear_logprobs_at, linear_topk
from ..spec import KIND_NAMES, check_choice, expect
from ..topk import linear_topk_divergence

AGG_MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
# Entries of the head that are gathered at a time.
GATHERED = 2**24


def agg_weights(
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:
    """Return each token's factor in verl's `agg_loss` (trainer/ppo/core_algos.py), (B, T) float64.

    A sequence without a valid token does not count. The counts default to the mask's own (with `dp_size` 1
    only), `loss_scale_factor` to T.
    """
    check_choice("loss_agg_mode", loss_agg_mode, AGG_MODES)
    mask, by_sequence = loss_mask.bool(), loss_agg_mode.startswith("seq-mean")
    lengths = mask.sum(-1, keepdim=True)
    weights = mask.double() * dp_size
    if loss_agg_mode == "token-sum":
        return weights
    name, count = "batch_num_tokens", batch_num_tokens
    if by_sequence:
        name, count = "global_batch_size", global_batch_size
    needed = f"the count of the global batch, since dp_size is {dp_size}"
    expect(count is not None or dp_size == 1, name, needed, None)
    own = ((lengths if by_sequence else mask) > 0).sum().clamp(min=1)
    weights = weights / (own if count is None else count)
    if loss_agg_mode == "seq-mean-token-mean":
        return weights / lengths.clamp(min=1)
    if loss_agg_mode.endswith("norm"):
        return weights / (mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    return weights


def agg_loss(loss_mat: Tensor, loss_mask: Tensor, loss_agg_mode: str, **global_batch_info: Any) -> Tensor:
    """Reduce losses (B, T) to one number, as verl's `agg_loss`. Masked entries may hold anything."""
    weights = agg_weights(loss_mask, loss_agg_mode, **global_batch_info)
    return (weights.to(loss_mat.dtype) * torch.where(loss_mask.bool(), loss_mat, 0.0)).sum()


def topk_distill(
    hidden_states: Tensor,  # (..., H), in verl (1, tokens, H): the packed micro-batch
    weights: Tensor,  # (V, H)
    labels: Tensor,  # (...) int64
    teacher_topk_ids: Tensor,  # (..., K)
    teacher_topk_log_probs: Tensor,  # (..., K)
    chunk_size: int = 1024,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    temperature: float = 1.0,
    log_prob_min_clamp: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (log_probs, entropy, distillation_losses, student_mass, teacher_mass), each (...) in fp32.

    All are 0 where a label is `ignore_index`. The losses are the forward KL on the teacher's list before
    verl's clamps at 0 and at `loss_max_clamp`: sum p * (log p - log q), both floored at `log_prob_min_clamp`,
    without a gradient where the floor holds q. The masses are detached; the others take any upstream
    gradient.

    `labels` are shifted by one unless `shift_labels` gives the shifted ones. `chunk_size` has no effect:
    `OPSD_WORKSPACE_BYTES` bounds the logits. Passes over the head: two, and in backward three for the losses
    and three for log_probs and entropy, where a gradient reaches them.
    """
    labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index) if shift_labels is None else shift_labels
    valid = labels != ignore_index
    known_logprobs: dict[str, Any] = {"temperature": temperature, "ignore_index": ignore_index}
    scores: Any = linear_logprobs(hidden_states, weights, labels, **known_logprobs, return_entropy=True)
    log_probs, entropy = scores
    known = torch.where(valid, labels, 0), log_probs.detach()
    listed = teacher_topk_ids, teacher_topk_log_probs, valid
    teacher = _listed(hidden_states, weights, *listed, temperature, log_prob_min_clamp, known)
    options: dict[str, Any] = {"divergence": "forward_kl", "tail": "none", "reduction": "none"}
    options |= {"temperature": temperature, "mask": valid}
    losses: Any = linear_topk_divergence(hidden_states, weights, teacher.ids, teacher.log_probs, **options)
    assert teacher.student_mass is not None
    return log_probs, entropy, losses + teacher.base.to(losses.dtype), teacher.student_mass, teacher.mass


def distillation_loss(
    config: Any,
    distillation_config: Any,
    model_output: dict[str, Any],
    data: Any,
    *,
    overlap: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (loss, metrics) of verl's `distillation_loss` with `use_policy_gradient` False.

    model_output: `hidden_states`, nested (bsz, seqlen, H) or packed (tokens, H), and `lm_head_weight` (V, H);
        for a whole teacher also `teacher_lm_head_weight`.
    data: `prompts`, `responses`, `response_mask`, `dp_size`, `batch_num_tokens`, `global_batch_size`, padded
        or nested as in verl; `teacher_logprobs` and `teacher_ids` (bsz, seqlen, K), or
        `teacher_hidden_states` (bsz, seqlen, H_t), nested or packed; `temperature`, a number (default 1).
    distillation_config.distillation_loss: `loss_mode` is `forward_kl_topk`, as in verl, or a divergence of
        `linear_divergence` between whole distributions (`jsd_beta` is its beta). `loss_max_clamp` clamps a
        token's loss at both ends, `log_prob_min_clamp` the log-probs of a list; a whole teacher ignores the
        latter.

    overlap: also return `overlap_ratio` and `overlap_token_advantage` of a list and the student's own K
        likeliest tokens (arXiv:2604.13016), as verl's engines with logits do.

    Passes over the head or heads: three for a list (four with `log_prob_min_clamp` or `overlap`), four for a
    whole teacher. The metrics are detached 0-dim tensors under verl's names, before `loss_max_clamp`. Raises
    ValueError for another `loss_mode`, and for `use_policy_gradient`.
    """
    settings = distillation_config.distillation_loss
    expect(
        not settings.use_policy_gradient,
        "use_policy_gradient",
        "False: a loss as a reward needs no gradient, so no fused loss",
        True,
    )
    check_choice("loss_mode", settings.loss_mode, ("forward_kl_topk", *KIND_NAMES))
    mask, responses = _responses(data)
    hidden, weight = responses(model_output["hidden_states"]), model_output["lm_head_weight"]
    counts = {name: data[name] for name in ("dp_size", "batch_num_tokens", "global_batch_size")}
    weights = agg_weights(mask, config.loss_agg_mode, **counts, loss_scale_factor=config.loss_scale_factor)
    temperature = data["temperature"] if "temperature" in data.keys() else 1.0
    options: dict[str, Any] = {"temperature": temperature, "mask": mask, "reduction": "sum"}
    result: Any
    most = math.inf if settings.loss_max_clamp is None else settings.loss_max_clamp
    if settings.loss_mode == "forward_kl_topk":
        ids, log_probs = responses(data["teacher_ids"]), responses(data["teacher_logprobs"])
        floor, known, own = settings.log_prob_min_clamp, None, None
        if overlap:
            own = linear_topk(hidden, weight, ids.shape[-1], temperature=temperature, mask=mask)
            known = own.ids[..., 0].clamp(min=0), own.logprobs[..., 0]
        teacher = _listed(hidden, weight, ids, log_probs, mask, temperature, floor, known)
        clamped = _Clamped(weights, teacher.base, 0.0, most)
        options |= {"divergence": "forward_kl", "tail": "none", "token_weights": clamped}
        listed = teacher.ids, teacher.log_probs
        result = linear_topk_divergence(hidden, weight, *listed, **options, return_stats=True)
        masses = {"student": teacher.student_mass, "teacher": teacher.mass}
        metrics = {
            f"distillation/{side}_mass": x.sum() / mask.sum().clamp(min=1)
            for side, x in masses.items()
            if x is not None
        }
        if own is not None:
            metrics |= _overlap(own.ids, ids, log_probs, teacher.student_log_probs, floor, mask)
    else:
        clamped = _Clamped(weights, torch.zeros_like(weights), -most, most)
        options |= {"divergence": settings.loss_mode, "beta": getattr(settings, "jsd_beta", 0.5)}
        options["token_weights"] = clamped
        heads = (
            hidden,
            weight,
            responses(data["teacher_hidden_states"]),
            model_output["teacher_lm_head_weight"],
        )
        result, metrics = linear_divergence(*heads, **options, return_stats=True), {}
    loss, stats = result
    losses = (stats.divergence + clamped.base).clamp(min=clamped.low)
    metrics |= {
        "distillation/loss_min": torch.where(mask, losses, math.inf).amin(),
        "distillation/loss_max": torch.where(mask, losses, -math.inf).amax(),
    }
    return loss + clamped.rest(stats).to(loss.dtype), metrics


@dataclass(frozen=True)
class _Clamped:
    """A weighting: `weights` where `low <= divergence + base <= high`, else 0 as a clamp stops the gradient.

    `rest` is the clamped part of the loss, which the op's sum then lacks.
    """

    weights: Tensor  # (B, T)
    base: Tensor  # (B, T)
    low: float
    high: float
    scope, needs_metrics = "row", False

    def __call__(self, stats: Any, mask: Tensor) -> Tensor:
        return self._inside(stats)

    def _inside(self, stats: Any) -> Tensor:
        total = stats.divergence.double() + self.base
        return torch.where((total >= self.low) & (total <= self.high), self.weights, 0.0)

    def rest(self, stats: Any) -> Tensor:
        total = (stats.divergence.double() + self.base).clamp(self.low, self.high)
        return (self.weights * torch.where(self._inside(stats) == 0, total, self.base)).sum()


class _List(NamedTuple):
    """A teacher's list under verl's floor, which stops the gradient of the entries below it."""

    ids: Tensor  # (..., K), 0 for padding
    log_probs: Tensor  # (..., K), -inf for padding and for stopped entries
    base: Tensor  # (...), the stopped entries' part of the loss
    mass: Tensor  # (...) of the teacher
    student_mass: Tensor | None  # (...), None where it would cost a pass
    student_log_probs: Tensor | None  # (..., K) before the floor, -inf for padding; None likewise


@torch.no_grad()
def _listed(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    valid: Tensor,
    temperature: float,
    floor: float | None,
    known: tuple[Tensor, Tensor] | None = None,
) -> _List:
    """Apply verl's floor to the teacher's list.

    `known` is a label of each token and its log-prob. Without it a floor costs a pass over the head.
    """
    counts = valid[..., None] & (log_probs > -math.inf)
    # An id that comes again counts once, in the masses as in the loss.
    again = repeated(torch.where(counts, ids, -1).flatten(0, -2)).reshape(ids.shape)
    counts &= ~again
    ids, log_p = torch.where(counts, ids, 0).long(), torch.where(counts, log_probs, -math.inf)
    mass = log_p.exp().sum(-1)
    if known is None and floor is None:
        return _List(ids, log_p, torch.zeros_like(mass), mass, None, None)
    if known is None:
        log_q = linear_logprobs_at(hidden, weight, ids, temperature=temperature, mask=valid)
    else:
        log_q = _from_one_logprob(hidden, weight, ids, *known, temperature)
    log_q = torch.where(counts, log_q, -math.inf)
    student_mass = log_q.exp().sum(-1)
    if floor is None:
        return _List(ids, log_p, torch.zeros_like(mass), mass, student_mass, log_q)
    log_p = log_p.to(log_q.dtype).clamp(min=floor)
    stopped = counts & (log_q < floor)
    base = torch.where(stopped, log_p.exp() * (log_p - floor), 0.0).sum(-1)
    kept = torch.where(counts & ~stopped, log_p, -math.inf)
    return _List(ids, kept, base, mass, student_mass, log_q)


def _overlap(
    own: Tensor,
    ids: Tensor,
    log_p: Tensor,
    log_q: Tensor | None,
    floor: float | None,
    valid: Tensor,
) -> dict[str, Tensor]:
    """Return verl's metrics of the overlap of two lists (..., K): its share, and mean -p (log p - log q)."""
    assert log_q is not None
    shared = (ids[..., None] == own[..., None, :]).any(-1) & (log_q > -math.inf)
    count = shared.sum(-1)
    log_p = log_p.to(log_q.dtype)
    if floor is not None:
        log_p, log_q = log_p.clamp(min=floor), log_q.clamp(min=floor)
    terms = torch.where(shared, log_p.exp() * (log_q - log_p), 0.0).sum(-1) / count.clamp(min=1)
    some = valid & (count > 0)
    return {
        "distillation/overlap_ratio": (count * valid).sum() / (valid.sum().clamp(min=1) * ids.shape[-1]),
        "distillation/overlap_token_advantage": torch.where(some, terms, 0.0).sum() / some.sum().clamp(min=1),
    }


def _from_one_logprob(
    hidden: Tensor, weight: Tensor, ids: Tensor, label: Tensor, logprob: Tensor, temperature: float
) -> Tensor:
    """Return log-probs (..., K) of ids, given that of one label: K + 1 rows of the head per token."""
    columns = torch.cat([label[..., None], ids], -1).flatten(0, -2)
    step = max(1, GATHERED // (columns.shape[1] * weight.shape[1]))
    pieces = zip(hidden.reshape(-1, hidden.shape[-1]).split(step), columns.split(step), strict=True)
    logits = torch.cat(
        [torch.einsum("nkh,nh->nk", weight[at].to(logprob.dtype), h.to(logprob.dtype)) for h, at in pieces]
    )
    return ((logits[:, 1:] - logits[:, :1]) / temperature).reshape(ids.shape) + logprob[..., None]


def _responses(data: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the response mask (bsz, resp_len) and a function that selects the rows which predict responses.

    The rows, one before each response token, come from nested (bsz, seqlen, ...) or packed (tokens, ...)
    tensors.
    """
    prompts, responses, mask = data["prompts"], data["responses"], data["response_mask"]
    # A nested mask that is made of values alone is padded to their number.
    if mask.is_nested:
        mask = mask.to_padded_tensor(0)[:, : int(mask.offsets().diff().max())]
    if responses.is_nested:
        before, length = prompts.offsets().diff(), responses.offsets().diff()
    else:
        parts = data["attention_mask"].tensor_split([prompts.shape[1]], dim=1)
        before, length = (part.sum(1) for part in parts)
    first, at = (before + length).cumsum(0) - length - 1, torch.arange(mask.shape[1], device=mask.device)
    rows = torch.where(at < length[:, None], first[:, None] + at, 0)
    return mask.bool(), lambda packed: (packed.values() if packed.is_nested else packed.flatten(0, -2))[rows]
