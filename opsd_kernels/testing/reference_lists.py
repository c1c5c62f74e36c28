"""Reference implementation of the ops that list tokens, on dense logits, by definition (reference.py)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..spec import LogitTransform
from .reference import _check_how, _packed_logits, _Tokens, _wide


def linear_topk_reference(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    k: int,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    **how: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `linear_topk` by its definition, with a whole stable sort of the logits."""
    _check_how(how, "linear_topk", "lora")
    tokens = _Tokens(hidden, mask, None, -100)
    transform = LogitTransform.parse("", logit_scale, softcap, "temperature", temperature)
    side = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    logits = _packed_logits(*side, tokens.rows, vocab_size, transform, _wide(hidden))
    log_q = logits.log_softmax(-1)
    ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    rest = log_q.scatter(1, ids, -math.inf)
    shape = (*hidden.shape[:-1], k)
    found = torch.full(shape, -1, device=ids.device).view(-1, k).index_put((tokens.rows,), ids).view(shape)
    logprobs = log_q.new_zeros(shape).view(-1, k).index_put((tokens.rows,), log_q.gather(1, ids)).view(shape)
    return found, logprobs, tokens.unpack(rest.logsumexp(-1))


def linear_logprobs_at_reference(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    ids: Tensor,  # (..., K) int64
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    **how: object,
) -> Tensor:
    """Compute `linear_logprobs_at` by its definition: (..., K) log-probs in nats, 0 for an id of -1."""
    _check_how(how, "linear_logprobs_at", "lora")
    tokens = _Tokens(hidden, mask, None, -100)
    transform = LogitTransform.parse("", logit_scale, softcap, "temperature", temperature)
    logits = _packed_logits(hidden, weight, bias, tokens.rows, vocab_size, transform, _wide(hidden))
    log_q = logits.log_softmax(-1)
    packed = tokens.pack(ids)
    found = torch.where(packed < 0, 0.0, log_q.gather(-1, packed.clamp(min=0)))
    every = found.new_zeros(tokens.valid.numel(), ids.shape[-1])
    return every.index_put((tokens.rows,), found).view(ids.shape)
