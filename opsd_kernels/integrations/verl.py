"""verl's on-policy distillation losses from hidden states and heads: the same numbers without logits. verl is not imported.

Two functions that verl 0.9.1 calls have a counterpart here:

`topk_distill` is the op that its fused engine calls inside the model's forward pass (workers/engine/veomni/transformer_impl.py hands the tensors on to
VeOmni's `chunk_topk_distill_function`). What it returns fills `model_output`, and the rest of verl runs as it is. This is the one for sharded heads.

`distillation_loss` is the function of that name in trainer/distillation/losses.py, with hidden states in `model_output` instead of losses per token: clamps
and aggregation in the same call, in fewer passes over the head, and with whole teachers besides lists.

Different from verl, on purpose: log-probs come from fp32 logits (or a difference that 16 bits hold), where verl's default path takes the softmax in the logits'
dtype; a list entry of -inf is padding and counts for nothing, even under `log_prob_min_clamp`; a micro-batch without a valid token has loss 0. The metrics
`overlap_count` and `overlap_token_advantage`, of the student's own top-k, are not computed: verl does without them where an engine is fused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..divergence import linear_divergence
from ..logprobs import linear_logprobs
from ..spec import KIND_NAMES, check_choice, expect
from ..topk import linear_topk_divergence

AGG_MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
GATHERED = 2**24  # entries of the head that are gathered at a time


def agg_weights(
    loss_mask: Tensor, loss_agg_mode: str, dp_size: int = 1, batch_num_tokens: int | None = None, global_batch_size: int | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:  # fmt: skip
    """(B, T) float64: what each token's loss is multiplied by before the sum, in verl's `agg_loss` (trainer/ppo/core_algos.py).

    A sequence without a valid token does not count. Default counts are the mask's own (`dp_size` 1 alone), that of `seq-mean-token-sum-norm` its T.
    """
    check_choice("loss_agg_mode", loss_agg_mode, AGG_MODES)
    mask, by_sequence = loss_mask.bool(), loss_agg_mode.startswith("seq-mean")
    lengths = mask.sum(-1, keepdim=True)
    weights = mask.double() * dp_size
    if loss_agg_mode == "token-sum":
        return weights
    name, count = (
        ("global_batch_size", global_batch_size) if by_sequence else ("batch_num_tokens", batch_num_tokens)
    )
    expect(
        count is not None or dp_size == 1,
        name,
        f"the count of the global batch, since dp_size is {dp_size}",
        None,
    )
    weights = weights / (
        ((lengths if by_sequence else mask) > 0).sum().clamp(min=1) if count is None else count
    )
    if loss_agg_mode == "seq-mean-token-mean":
        return weights / lengths.clamp(min=1)
    return (
        weights / (mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
        if loss_agg_mode.endswith("norm")
        else weights
    )


def agg_loss(loss_mat: Tensor, loss_mask: Tensor, loss_agg_mode: str, **global_batch_info: Any) -> Tensor:
    """verl's `agg_loss`: losses of tokens (B, T) as one number. What stands at masked tokens does not matter."""
    weights = agg_weights(loss_mask, loss_agg_mode, **global_batch_info)
    return (weights.to(loss_mat.dtype) * torch.where(loss_mask.bool(), loss_mat, 0.0)).sum()


def topk_distill(
    hidden_states: Tensor,  # (..., H), in verl (1, tokens, H): the packed micro-batch
    weights: Tensor,  # (V, H)
    labels: Tensor,  # (...) int64
    teacher_topk_ids: Tensor,  # (..., K)
    teacher_topk_log_probs: Tensor,  # (..., K)
    chunk_size: int = 1024, ignore_index: int = -100, shift_labels: Tensor | None = None, temperature: float = 1.0,
    log_prob_min_clamp: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(log_probs, entropy, distillation_losses, student_mass, teacher_mass), each (...) in fp32 and 0 where a label is `ignore_index`.

    The third is the forward KL on the teacher's list before verl's clamps at 0 and at `loss_max_clamp`: sum p * (log p - log q), both floored at
    `log_prob_min_clamp`, no gradient where the floor holds q. The masses are detached; the others take any upstream gradient. `labels` are shifted by one
    unless `shift_labels` says what they become. `chunk_size` does nothing: `OPSD_WORKSPACE_BYTES` bounds the logits. Passes over the head: two, and in backward
    three for the losses and three for log_probs and entropy, where a gradient reaches them.
    """
    labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index) if shift_labels is None else shift_labels
    valid = labels != ignore_index
    log_probs, entropy = linear_logprobs(
        hidden_states,
        weights,
        labels,
        temperature=temperature,
        ignore_index=ignore_index,
        return_entropy=True,
    )
    known = torch.where(valid, labels, 0), log_probs.detach()
    teacher = _listed(
        hidden_states,
        weights,
        teacher_topk_ids,
        teacher_topk_log_probs,
        valid,
        temperature,
        log_prob_min_clamp,
        known,
    )
    options = {
        "divergence": "forward_kl",
        "tail": "none",
        "temperature": temperature,
        "mask": valid,
        "reduction": "none",
    }
    losses = linear_topk_divergence(hidden_states, weights, teacher.ids, teacher.log_probs, **options)
    return log_probs, entropy, losses + teacher.base.to(losses.dtype), teacher.student_mass, teacher.mass


def distillation_loss(
    config: Any, distillation_config: Any, model_output: dict[str, Any], data: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics), the arguments as verl hands them over; what `distillation_loss` of verl gives on the same model, with `use_policy_gradient` False.

    model_output: `hidden_states`, nested (bsz, seqlen, H) or packed (tokens, H), and `lm_head_weight` (V, H); `teacher_lm_head_weight` for a whole teacher.
    data: `prompts`, `responses`, `response_mask`, `dp_size`, `batch_num_tokens`, `global_batch_size`, padded or nested as in verl; `teacher_logprobs` and
        `teacher_ids` (bsz, seqlen, K), or `teacher_hidden_states` (bsz, seqlen, H_t), nested or packed; `temperature`, a number (default 1).
    distillation_config.distillation_loss: `loss_mode` is `forward_kl_topk`, as in verl, or a divergence of `linear_divergence` between whole distributions
        (`jsd_beta` its beta). `loss_max_clamp` clamps a token's loss at both ends, `log_prob_min_clamp` those of a list; a whole teacher ignores it.

    Passes over the head or heads: three for a list (four with `log_prob_min_clamp`), four for a whole teacher. The metrics are detached 0-dim tensors under
    verl's names, before `loss_max_clamp`. Raises ValueError for a `loss_mode` that is neither, and for `use_policy_gradient`.
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
    options = {"temperature": temperature, "mask": mask, "reduction": "sum", "return_stats": True}
    most = math.inf if settings.loss_max_clamp is None else settings.loss_max_clamp
    if settings.loss_mode == "forward_kl_topk":
        ids, log_probs = responses(data["teacher_ids"]), responses(data["teacher_logprobs"])
        teacher = _listed(hidden, weight, ids, log_probs, mask, temperature, settings.log_prob_min_clamp)
        clamped = _Clamped(weights, teacher.base, 0.0, most)
        listed = {"divergence": "forward_kl", "tail": "none", "token_weights": clamped}
        loss, stats = linear_topk_divergence(
            hidden, weight, teacher.ids, teacher.log_probs, **listed, **options
        )
        masses = {"student": teacher.student_mass, "teacher": teacher.mass}
        metrics = {
            f"distillation/{side}_mass": x.sum() / mask.sum().clamp(min=1)
            for side, x in masses.items()
            if x is not None
        }
    else:
        clamped = _Clamped(weights, torch.zeros_like(weights), -most, most)
        chosen = {
            "divergence": settings.loss_mode,
            "beta": getattr(settings, "jsd_beta", 0.5),
            "token_weights": clamped,
        }
        teacher_hidden, metrics = responses(data["teacher_hidden_states"]), {}
        loss, stats = linear_divergence(
            hidden, weight, teacher_hidden, model_output["teacher_lm_head_weight"], **chosen, **options
        )
    losses = (stats.divergence + clamped.base).clamp(min=clamped.low)
    metrics |= {
        "distillation/loss_min": torch.where(mask, losses, math.inf).amin(),
        "distillation/loss_max": torch.where(mask, losses, -math.inf).amax(),
    }
    return loss + clamped.rest(stats).to(loss.dtype), metrics


@dataclass(frozen=True)
class _Clamped:
    """A weighting: `weights` where `low <= divergence + base <= high`, 0 where a clamp stops the gradient. `rest` is what the op's sum then lacks."""

    weights: Tensor  # (B, T)
    base: Tensor  # (B, T)
    low: float
    high: float
    scope, needs_metrics = "row", False

    def __call__(self, stats: Any, mask: Tensor) -> Tensor:
        total = stats.divergence.double() + self.base
        return torch.where((total >= self.low) & (total <= self.high), self.weights, 0.0)

    def rest(self, stats: Any) -> Tensor:
        total = (stats.divergence.double() + self.base).clamp(self.low, self.high)
        return (self.weights * torch.where(self(stats, None) == 0, total, self.base)).sum()


class _List(NamedTuple):
    ids: Tensor  # (..., K), 0 for padding
    log_probs: Tensor  # (..., K), -inf for padding and for entries that the floor stops
    base: Tensor  # (...), what the entries that the floor stops add to the loss
    mass: Tensor  # (...) of the teacher
    student_mass: Tensor | None  # (...), where it was asked for


@torch.no_grad()
def _listed(
    hidden: Tensor, weight: Tensor, ids: Tensor, log_probs: Tensor, valid: Tensor, temperature: float, floor: float | None,
    known: tuple[Tensor, Tensor] | None = None,
) -> _List:  # fmt: skip
    """The teacher's list under verl's floor. `known`: a label of each token and its log-prob; without it the student's log-probs cost a pass, if needed."""
    counts = valid[..., None] & (log_probs > -math.inf)
    ids, log_p = torch.where(counts, ids, 0).long(), torch.where(counts, log_probs, -math.inf)
    mass = log_p.exp().sum(-1)
    if known is None and floor is None:
        return _List(ids, log_p, torch.zeros_like(mass), mass, None)
    label, logprob = known or (
        ids[..., 0],
        linear_logprobs(hidden, weight, ids[..., 0], temperature=temperature, mask=valid),
    )
    log_q = torch.where(counts, _logprobs_at(hidden, weight, ids, label, logprob, temperature), -math.inf)
    student_mass = log_q.exp().sum(-1)
    if floor is None:
        return _List(ids, log_p, torch.zeros_like(mass), mass, student_mass)
    log_p = log_p.to(log_q.dtype).clamp(min=floor)
    stopped = counts & (log_q < floor)
    base = torch.where(stopped, log_p.exp() * (log_p - floor), 0.0).sum(-1)
    return _List(ids, torch.where(counts & ~stopped, log_p, -math.inf), base, mass, student_mass)


def _logprobs_at(
    hidden: Tensor, weight: Tensor, ids: Tensor, label: Tensor, logprob: Tensor, temperature: float
) -> Tensor:
    """Log-probs (..., K) of ids from that of one label: K + 1 rows of the head per token, not a pass over it."""
    columns = torch.cat([label[..., None], ids], -1).flatten(0, -2)
    step = max(1, GATHERED // (columns.shape[1] * weight.shape[1]))
    pieces = zip(hidden.reshape(-1, hidden.shape[-1]).split(step), columns.split(step), strict=True)
    logits = torch.cat(
        [torch.einsum("nkh,nh->nk", weight[at].to(logprob.dtype), h.to(logprob.dtype)) for h, at in pieces]
    )
    return ((logits[:, 1:] - logits[:, :1]) / temperature).reshape(ids.shape) + logprob[..., None]


def _responses(data: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(response mask (bsz, resp_len), what takes out of a nested (bsz, seqlen, ...) or packed (tokens, ...) the rows that predict it, one before each)."""
    prompts, responses, mask = data["prompts"], data["responses"], data["response_mask"]
    if mask.is_nested:  # one made of its values alone is padded to their number
        mask = mask.to_padded_tensor(0)[:, : int(mask.offsets().diff().max())]
    if responses.is_nested:
        before, length = prompts.offsets().diff(), responses.offsets().diff()
    else:
        before, length = (
            part.sum(1) for part in data["attention_mask"].tensor_split([prompts.shape[1]], dim=1)
        )
    first, at = (before + length).cumsum(0) - length - 1, torch.arange(mask.shape[1], device=mask.device)
    rows = torch.where(at < length[:, None], first[:, None] + at, 0)
    return mask.bool(), lambda packed: (packed.values() if packed.is_nested else packed.flatten(0, -2))[rows]
