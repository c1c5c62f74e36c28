"""A micro-batch in verl's layouts, and dense float64 versions of verl 0.9.1's losses."""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from verl_source import nested

from opsd_kernels.testing import (
    Outcome,
    assert_no_worse,
)

ROOT = Path(__file__).resolve().parent.parent.parent
# Uneven lengths; the whole third response is masked.
PROMPTS, RESPONSES = (4, 2, 7, 3), (9, 5, 1, 6)
V, H, H_T, K = 61, 12, 16, 6
GLOBAL = [
    {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None},
    {"dp_size": 4, "batch_num_tokens": 77, "global_batch_size": 24},
]


def response_mask() -> Tensor:
    """Shape (4, 9): uneven lengths, masked tool output in the first two responses, an empty third."""
    mask = torch.arange(9) < torch.tensor(RESPONSES)[:, None]
    mask[0, 3:5] = mask[1, 3:] = mask[2] = False
    return mask


class Batch:
    """A micro-batch as verl packs it: sequences of prompt and response one after the other."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        gen = torch.Generator().manual_seed(11)
        tokens = sum(PROMPTS) + sum(RESPONSES)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=gen).to(dtype)

        self.hidden, self.weight, self.teacher_weight = 0.7 * draw(tokens, H), draw(V, H), draw(V, H_T)
        self.teacher_weight[:, :H] = self.weight
        far = torch.linspace(0.02, 1.2, tokens)[torch.randperm(tokens, generator=gen)][:, None].to(dtype)
        near = torch.cat(
            [0.85 * self.hidden, torch.zeros(tokens, H_T - H, dtype=dtype)], 1
        )  # and flatter: lists that hold less than the student's mass
        self.teacher_hidden = near + far * draw(tokens, H_T)
        self.teacher_logprobs, self.teacher_ids = (
            (self.teacher_hidden @ self.teacher_weight.T).float().log_softmax(-1).topk(K)
        )
        self.labels = torch.randint(V, (tokens,), generator=gen)
        self.mask = response_mask()

    def to(self, dtype: torch.dtype | None) -> "Batch":
        """Copy the batch, in `dtype` or, with None, in the same dtypes."""
        other = Batch.__new__(Batch)
        other.__dict__ = {
            k: x.to(dtype or x.dtype) if x.is_floating_point() else x for k, x in self.__dict__.items()
        }
        return other

    def data(self, layout: str = "nested", **counts: object) -> dict[str, object]:
        """Return verl's `data`; `padded` on the left of prompts and the right of responses."""
        whole = tuple(p + r for p, r in zip(PROMPTS, RESPONSES, strict=True))
        made = {
            "teacher_logprobs": self.teacher_logprobs,
            "teacher_ids": self.teacher_ids,
            "teacher_hidden_states": self.teacher_hidden,
        }
        made = {k: nested(x, whole) if layout == "nested" else x for k, x in made.items()}
        if layout == "nested":
            parts = {
                "prompts": nested(torch.zeros(sum(PROMPTS)), PROMPTS),
                "responses": nested(torch.zeros(sum(RESPONSES)), RESPONSES),
            }
            parts["response_mask"] = nested(
                self.mask[torch.arange(9) < torch.tensor(RESPONSES)[:, None]], RESPONSES
            )
        else:
            prompt = torch.arange(7) >= 7 - torch.tensor(PROMPTS)[:, None]
            attended = torch.cat([prompt, torch.arange(9) < torch.tensor(RESPONSES)[:, None]], 1)
            parts = {
                "prompts": torch.zeros(4, 7),
                "responses": torch.zeros(4, 9),
                "attention_mask": attended,
                "response_mask": self.mask,
            }
        return {**made, **parts, **GLOBAL[0], **counts}

    def outputs(self, layout: str = "nested") -> dict[str, Tensor]:
        whole = tuple(p + r for p, r in zip(PROMPTS, RESPONSES, strict=True))
        hidden = nested(self.hidden, whole) if layout == "nested" else self.hidden
        return {
            "hidden_states": hidden,
            "lm_head_weight": self.weight,
            "teacher_lm_head_weight": self.teacher_weight,
        }


def settings(
    mode: str = "token-mean", factor: float | None = None, **loss: object
) -> tuple[SimpleNamespace, SimpleNamespace]:
    loss = {
        "loss_mode": "forward_kl_topk",
        "loss_max_clamp": 10.0,
        "log_prob_min_clamp": -10.0,
        "use_policy_gradient": False,
        **loss,
    }
    return SimpleNamespace(loss_agg_mode=mode, loss_scale_factor=factor), SimpleNamespace(
        distillation_loss=SimpleNamespace(**loss)
    )


# ---------------------------------------------------------------- the dense reference


def responses_of(packed: Tensor) -> Tensor:
    """Shape (4, 9, ...): the rows one before each response token, sliced sequence by sequence."""
    out, end = [], 0
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        end += prompt + response
        rows = packed[end - response - 1 : end - 1]
        out.append(torch.cat([rows, rows.new_zeros(9 - response, *rows.shape[1:])]))
    return torch.stack(out)


def dense_aggregate(
    losses: Tensor,
    mask: Tensor,
    mode: str,
    dp_size=1,
    batch_num_tokens=None,
    global_batch_size=None,
    loss_scale_factor=None,
) -> Tensor:
    """Aggregate losses sequence by sequence."""
    kept = [row[keep] for row, keep in zip(losses, mask, strict=True)]
    counted = [row for row in kept if row.numel()]
    sequences = global_batch_size or len(counted)
    if mode == "token-sum":
        return dp_size * torch.cat(kept).sum()
    if mode == "token-mean":
        return dp_size * torch.cat(kept).sum() / (batch_num_tokens or int(mask.sum()))
    if mode == "seq-mean-token-mean":
        return dp_size * sum(row.mean() for row in counted) / sequences
    divisor = (loss_scale_factor or mask.shape[1]) if mode.endswith("norm") else 1
    return dp_size * sum(row.sum() for row in counted) / sequences / divisor


def list_losses(log_q: Tensor, log_p: Tensor, floor: float | None) -> Tensor:
    if floor is not None:
        log_q, log_p = log_q.clamp_min(floor), log_p.clamp_min(floor)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def whole_losses(log_q: Tensor, log_p: Tensor, mode: str, beta: float) -> Tensor:
    if mode == "forward_kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if mode == "reverse_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * whole_losses(log_m, log_p, "forward_kl", beta) + (1 - beta) * whole_losses(
        log_m, log_q, "forward_kl", beta
    )


def dense_loss(batch: Batch, config, distillation, temperature: float = 1.0, **counts) -> Tensor:
    s = distillation.distillation_loss
    log_q = (batch.hidden @ batch.weight.T / temperature).log_softmax(-1)
    if s.loss_mode == "forward_kl_topk":
        losses = list_losses(
            log_q.gather(-1, batch.teacher_ids), batch.teacher_logprobs, s.log_prob_min_clamp
        ).clamp_min(0.0)
    else:
        log_p = (batch.teacher_hidden @ batch.teacher_weight.T / temperature).log_softmax(-1)
        losses = whole_losses(log_q, log_p, s.loss_mode, getattr(s, "jsd_beta", 0.5))
    losses = responses_of(losses)
    if s.loss_max_clamp is not None:
        losses = losses.clamp(-s.loss_max_clamp, s.loss_max_clamp)
    return dense_aggregate(
        losses, batch.mask, config.loss_agg_mode, loss_scale_factor=config.loss_scale_factor, **counts
    )


def outcome(loss_of, batch: Batch) -> Outcome:
    batch = batch.to(None)
    batch.hidden, batch.weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()
    loss = loss_of(batch)
    return Outcome(
        loss.detach(), *torch.autograd.grad(loss, (batch.hidden, batch.weight), torch.full_like(loss, 3.0))
    )


def check(ours, reference, batch: Batch | None = None) -> Outcome:
    batch = batch or Batch()
    truth, plain = outcome(reference, batch.to(torch.float64)), outcome(reference, batch)
    assert all(value.abs().max() > 0 for _, value in truth.named())
    got = outcome(ours, batch)
    assert_no_worse(got, plain, truth)
    return got
