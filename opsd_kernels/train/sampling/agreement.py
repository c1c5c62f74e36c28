"""Check that transformers' generate samples from the distribution that the loss scores.

The sampler pads prompts of different lengths on the left; the loss reads every row from its first token, with
padding on the right. A recurrent model that reads padding in spite of the mask, or one that counts positions
from the first column, then samples from another distribution, and so does one that mixes the rows of a batch.
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
    at_least_float,
    probe_tokens,
    range_change,
    without_adapter,
)
from opsd_kernels.train.config import ConfigError
from opsd_kernels.train.distributed.sharding import last_hidden

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
    """Return True if a prompt's cache may serve several answers (`prefill`), tried once per model."""
    inner = without_adapter(model)
    if inner not in _shares:
        one, _ = probe_tokens(model)
        _shares[inner] = _disagreement(model, pad, [one, one], shared=True) is None
    return _shares[inner]


@torch.no_grad()
def prefill(model: PreTrainedModel, rows: Tensor, attended: Tensor, places_B: Tensor) -> dict[str, Any]:
    """Return an argument of generate on rows[places_B]: the cache of all but their last token.

    Each of the `rows` (D, L) is read once. `attended` (D, L) is 0 at padding.
    """
    settings = GenerationConfig(max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
    generate: Any = model.generate
    with generating_as(model, settings):
        made = generate(rows, attention_mask=attended, generation_config=settings, synced_gpus=False)
    # Its name until transformers 5.23.
    name = "cache" if "cache" in made else "past_key_values"
    cache = made[name]
    # generate feeds at least one token. transformers 5.24 takes a number to remove alone.
    cache.crop(rows.shape[1] - 1 - cache.get_seq_length())
    cache.batch_select_indices(places_B)
    return {name: cache}


@torch.no_grad()
def _disagreement(
    model: PreTrainedModel, pad: int, prompts: list[Tensor], shared: bool = False
) -> str | None:
    """Return None, or how log-probs of generate on a batch differ from those of the forward on a row.

    With `shared` the cache of the first prompt, which all have, serves every row.
    """
    length = max(map(len, prompts))
    padding = [length - len(prompt) for prompt in prompts]
    rows = torch.stack([torch.cat([p.new_full((n,), pad), p]) for n, p in zip(padding, prompts, strict=True)])
    present = torch.stack([torch.arange(length, device=rows.device) >= n for n in padding]).long()
    settings = GenerationConfig(
        max_new_tokens=SAMPLED,
        do_sample=False,
        pad_token_id=pad,
        output_logits=True,
        return_dict_in_generate=True,
    )
    generate: Any = model.generate
    try:
        cache = {}
        if shared:
            first = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
            cache = prefill(model, rows[:1], present[:1], first)
        with generating_as(model, settings):
            made = generate(
                rows, attention_mask=present, generation_config=settings, synced_gpus=False, **cache
            )
        sampled = at_least_float(torch.stack(made.logits, 1)).log_softmax(-1)
        changes = []
        for row, n in enumerate(padding):
            hidden, _ = last_hidden(model, made.sequences[row : row + 1, n:-1])
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
