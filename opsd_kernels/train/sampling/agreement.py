"""Check that transformers' generate samples from the distribution that the loss scores.

The sampler pads prompts of different lengths on the left; the loss reads every row from its first token, with
padding on the right. A recurrent model that reads padding in spite of the mask, or one that counts positions
from the first column, then samples from another distribution, and so does one that mixes the rows of a batch.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module
from transformers import GenerationConfig, PreTrainedModel

from opsd_kernels.integrations.transformers import (
    Head,
    allowed_change,
    at_least_float,
    probe_tokens,
    range_change,
    without_adapter,
)
from opsd_kernels.train.config import ConfigError
from opsd_kernels.train.distributed.sharding import last_hidden
from opsd_kernels.train.sampling.decoding import RowProcessor, decode, generating_as

# Prompts that may share a batch: any, those of one length, or none.
ANY, ONE_LENGTH, ALONE = "any", "one length", "alone"
# Tokens of padding that are tried, and tokens sampled: from the second on the cache is read.
PADDING, SAMPLED = 3, 3
_known: WeakKeyDictionary[Module, str] = WeakKeyDictionary()
_shares: WeakKeyDictionary[Module, bool] = WeakKeyDictionary()


def batches(model: PreTrainedModel, pad: int) -> str:
    """Return which prompts may share a batch, tried once per model: ANY, ONE_LENGTH or ALONE.

    Raises ConfigError for a model whose sampled distribution is not the scored one for a prompt alone either.
    """
    inner = without_adapter(model)
    if inner not in _known:
        one, other = probe_tokens(model)
        tries = {ANY: [one[PADDING:], other], ONE_LENGTH: [one, other], ALONE: [one]}
        for how, prompts in tries.items():
            why = _disagreement(model, pad, prompts)
            if why is None:
                _known[inner] = how
                break
        else:
            raise ConfigError(
                "model: expected a model whose generate samples from the log-probs of its forward, "
                f"got {type(inner).__name__}: {why}"
            )
    return _known[inner]


def can_share_cache(model: PreTrainedModel, pad: int) -> bool:
    """Return True if the model can `decode`, tried once per model."""
    inner = without_adapter(model)
    if inner not in _shares:
        one, _ = probe_tokens(model)
        _shares[inner] = _disagreement(model, pad, [one, one], shared=True) is None
    return _shares[inner]


class _Seen(RowProcessor):
    """Keeps the logits of each token."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits.append(scores)
        return scores


@torch.no_grad()
def _disagreement(
    model: PreTrainedModel, pad: int, prompts: list[Tensor], shared: bool = False
) -> str | None:
    """Return None, or how log-probs of generate on a batch differ from those of the forward on a row.

    With `shared` all rows have the first prompt, which is read once, and go on after a part of the tokens.
    """
    length = max(map(len, prompts))
    padding = [length - len(prompt) for prompt in prompts]
    rows = torch.stack([torch.cat([p.new_full((n,), pad), p]) for n, p in zip(padding, prompts, strict=True)])
    present = torch.stack([torch.arange(length, device=rows.device) >= n for n in padding]).long()
    settings = GenerationConfig(
        max_new_tokens=SAMPLED,
        do_sample=False,
        pad_token_id=pad,
        output_logits=not shared,
        return_dict_in_generate=not shared,
    )
    generate: Any = model.generate
    try:
        if shared:
            first, seen = torch.zeros(len(rows), dtype=torch.int64, device=rows.device), _Seen()
            tokens = decode(model, rows[:1], present[:1], first, settings, seen, SAMPLED - 1)
            sequences, logits = torch.cat([rows, tokens], 1), seen.logits
        else:
            with generating_as(model, settings):
                made = generate(rows, attention_mask=present, generation_config=settings, synced_gpus=False)
            sequences, logits = made.sequences, made.logits
        sampled = at_least_float(torch.stack(list(logits), 1)).log_softmax(-1)
        changes = []
        for row, n in enumerate(padding):
            hidden, _ = last_hidden(model, sequences[row : row + 1, n:-1])
            scored = Head.of(model).logprobs(hidden[0, -SAMPLED:])
            # A broken model, which the loss reports.
            if scored.isnan().any():
                return None
            changes.append(range_change(scored, sampled[row].to(scored.device)))
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return f"{type(error).__name__}: {error}"
    change = max(changes)
    return None if change <= allowed_change(hidden.dtype) else f"they differ by {change:.1%} of their range"
