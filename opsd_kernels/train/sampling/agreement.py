"""Check that transformers' generate samples from the distribution that the loss scores.

The sampler pads prompts of different lengths on the left; the loss reads every row from its first token, with
padding on the right. A recurrent model that reads padding in spite of the mask, or one that counts positions
from the first column, then samples from another distribution.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module
from transformers import GenerationConfig, PreTrainedModel

from opsd_kernels.integrations.transformers import (
    Head,
    allowed_change,
    probe_tokens,
    range_change,
    without_adapter,
)
from opsd_kernels.train.config import ConfigError
from opsd_kernels.train.distributed.sharding import last_hidden

# Tokens of padding that are tried, and tokens sampled: the second comes from the cache.
PADDING, SAMPLED = 3, 2
_known: WeakKeyDictionary[Module, bool] = WeakKeyDictionary()


def allows_padding(model: PreTrainedModel, pad: int) -> bool:
    """True if prompts of different lengths may share a batch, tried once per model.

    Raises ConfigError for a model whose sampled distribution is not the scored one without padding either.
    """
    inner = without_adapter(model)
    if inner not in _known:
        _known[inner] = _agrees(model, pad, PADDING) is None
        if not _known[inner] and (why := _agrees(model, pad, 0)) is not None:
            raise ConfigError(
                "model: expected a model whose generate samples from the log-probs of its forward, "
                f"got {type(inner).__name__}: {why}"
            )
    return _known[inner]


@torch.no_grad()
def _agrees(model: PreTrainedModel, pad: int, padding: int) -> str | None:
    """Return None, or how the log-probs of generate differ from those of the forward."""
    row = probe_tokens(model)[:1]
    prompt = torch.cat([row.new_full((1, padding), pad), row], 1)
    present = torch.cat([row.new_zeros(1, padding), torch.ones_like(row)], 1)
    settings = GenerationConfig(
        max_new_tokens=SAMPLED,
        do_sample=False,
        pad_token_id=pad,
        output_logits=True,
        return_dict_in_generate=True,
    )
    generate: Any = model.generate
    try:
        with generating_as(model, settings):
            made = generate(prompt, attention_mask=present, generation_config=settings, synced_gpus=False)
        sampled: Tensor = torch.stack(made.logits, 1).float().log_softmax(-1)
        hidden = last_hidden(model, made.sequences[:, padding:-1])[0]
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return f"{type(error).__name__}: {error}"
    scored = Head.of(model).logprobs(hidden[:, -SAMPLED:]).float()
    change = range_change(scored, sampled.to(scored.device))
    return None if change <= allowed_change(hidden.dtype) else f"they differ by {change:.1%} of their range"


@contextmanager
def generating_as(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Replace the model's generation config for a while.

    generate fills in from it, and a penalty in it would change the sampled distribution.
    """
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own
