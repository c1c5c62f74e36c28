"""Compare a model with what the fused loss takes it for, before training."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from .head import Head, at_least_float, output_embedding, without_adapter
from .states import hidden_states, scoring, without_cache

# Largest error of a log-prob in nats, on top of the roundings of the logits in the model's dtype.
AGREE = 1e-4
# The check also runs with hidden states scaled up until a logit reaches this: a softcap of 30 bends it.
LARGE = 60.0
# Largest change of log-probs, as a share of their range, that is rounding: rows of one product round
# differently where experts are grouped by token. All causal models of transformers stay below 1e-6 in fp32.
EXACT, ROUNDED = 1e-4, 0.05
# How many tokens of padding are tried, and what a model does with them.
PADDED = 3
IGNORED, POSITIONS, READ = "nothing", "position_ids", "read"
_PADDING: WeakKeyDictionary[Module, str] = WeakKeyDictionary()


@torch.no_grad()
def check_head(model: Module, name: str = "model") -> None:
    """Compare hidden states and head with the model's own log-probs on a small batch.

    Raises ValueError, with `name` as the argument's name, for a model whose log-probs are not those of its
    hidden states under its head to 1e-4 (and the roundings of its dtype): one that bends its logits in a way
    its config does not say. Raises it too for a model that reads later tokens, and for a head that `Head.of`
    refuses. The model's training mode is restored.
    """
    try:
        with scoring(model):
            _check(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).removeprefix("model: ")
        if not isinstance(error, ValueError) or reason == str(error):
            kind, reason = type(without_adapter(model)).__name__, f"{type(error).__name__}: {reason}"
            reason = f"expected a causal language model that runs on input_ids alone, got {kind}: {reason}"
        raise ValueError(f"{name}: {reason}") from error


def _check(model: Module) -> None:
    inner, head = without_adapter(model), Head.of(model)
    tokens = probe_tokens(model)
    hidden = hidden_states(model, input_ids=tokens)
    if hidden.shape[:-1] != tokens.shape:
        raise ValueError(
            f"model: expected hidden states (B, L, H) of {tuple(tokens.shape)} tokens, "
            f"got {tuple(hidden.shape)} from {type(inner).__name__}"
        )
    _compare(inner, "as they are", _own_logits(model, tokens, 1.0), hidden, head)
    weight = head.dense(hidden.dtype)
    largest = F.linear(hidden.to(weight.device, weight.dtype), weight).abs().max().item()
    if 0 < largest < LARGE:
        factor = LARGE / largest
        _compare(inner, "scaled up", _own_logits(model, tokens, factor), hidden * factor, head)
    _check_causal(inner, head.logprobs(hidden), _multiplied_in(hidden))


def probe_tokens(model: Module) -> Tensor:
    """Shape (2, 8): token ids without special ones. The two rows differ in the last token alone."""
    inner, rows = without_adapter(model), Head.of(model).weight.shape[0]
    config = inner.config
    special = {
        value
        for part in (config, config.get_text_config())
        for name, value in part.to_dict().items()
        if "token" in name and isinstance(value, int)
    }
    usual = [token for token in range(rows) if token not in special] or [0]
    usual = (usual[:: max(1, len(usual) // 9)] * 9)[:9]
    return torch.tensor([usual[:8], [*usual[:7], usual[8]]], device=_device(inner))


def _device(inner: Any) -> torch.device:
    """Return the device of the model's inputs; accelerate moves them where it offloaded weights."""
    device = inner.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


def _own_logits(model: Module, tokens: Tensor, factor: float) -> tuple[Tensor, float]:
    """Return the logits (B, L, V) of the model's own forward, with `factor` times the hidden states.

    The second value is the unit of their rounding; under autocast the head may round more than its output.
    """
    inner, units = without_adapter(model), [0.0]
    head = output_embedding(inner)
    hooks = [
        head.register_forward_pre_hook(lambda _, args: (args[0] * factor, *args[1:]), prepend=True),
        head.register_forward_hook(lambda _, args, logits: units.append(_unit(logits.dtype))),
    ]
    try:
        logits = getattr(model(**without_cache(inner, {"input_ids": tokens})), "logits", None)
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(logits, Tensor):
        raise ValueError(f"model: expected a forward that returns logits, got {type(inner).__name__}")
    return logits, max(*units, _unit(logits.dtype))


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.itemsize < 4 else 0.0


def _compare(inner: Any, how: str, own: tuple[Tensor, float], hidden: Tensor, head: Head) -> None:
    logits, unit = at_least_float(own[0]), own[1]
    expected, actual = logits.log_softmax(-1), head.logprobs(hidden)
    if expected.shape == actual.shape:
        expected = expected.to(actual.device)
        # Infinities of a bias of -inf are equal.
        error = torch.where(actual == expected, 0.0, (actual - expected).abs()).max().item()
        largest = torch.where(logits.isfinite(), logits.abs(), 0.0).max().item()
        if error <= AGREE + 4 * unit * largest:
            return
        off = f"log-probs are off by {error:.2g} nats (hidden states {how})"
    else:
        off = f"logits have shape {tuple(expected.shape)}, not {tuple(actual.shape)}"
    raise ValueError(
        "model: expected logits that are a linear head over hidden states, scaled and softcapped as the "
        f"config says, got {type(inner).__name__}, whose {off}"
    )


def _check_causal(inner: Any, logprobs: Tensor, dtype: torch.dtype) -> None:
    change = range_change(logprobs[0, :-1], logprobs[1, :-1])
    if change > allowed_change(dtype):
        raise ValueError(
            "model: expected a causal language model, whose hidden states do not depend on later tokens "
            f"(is_decoder=True in some configs), got {type(inner).__name__}, whose log-probs change by "
            f"{change:.1%} of their range with a later token"
        )


def range_change(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of log-probs as a share of their range."""
    finite = one[one.isfinite()]
    difference = torch.where(one == other, 0.0, (one - other).abs()).max()
    return (difference / (finite.max() - finite.min()).clamp(min=1e-6)).item()


def allowed_change(dtype: torch.dtype) -> float:
    """Return the largest `range_change` of a model of this dtype that counts as rounding."""
    return EXACT if dtype.itemsize >= 4 else ROUNDED


def _multiplied_in(states: Tensor) -> torch.dtype:
    """Return the dtype of the products behind hidden states: autocast's, which a last norm in fp32 hides."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


def padded_inputs(model: Module, inputs: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return inputs under which padding on the left of `input_ids` changes no hidden state.

    Without such padding they are returned as they are. Models that count positions from the first column get
    `position_ids`. Raises ValueError, with `name` as the argument's name, for a model that reads the padding
    whatever the attention mask says, as recurrent ones do.
    """
    attended = inputs.get("attention_mask")
    if attended is None or attended.dim() != 2 or "position_ids" in inputs:
        return inputs
    known = _PADDING.get(without_adapter(model))
    if known == IGNORED or bool(attended[:, 0].all()):
        return inputs
    how = check_padding(model, name)
    return inputs if how == IGNORED else {**inputs, "position_ids": _positions(attended)}


@torch.no_grad()
def check_padding(model: Module, name: str = "model") -> str:
    """Return what a model needs for padding on the left: "nothing" or "position_ids".

    Tried once per model, on a row with and without padding. Raises ValueError, with `name` as the argument's
    name, if the hidden states differ with both: a recurrent model that reads padding in spite of the mask.
    """
    inner = without_adapter(model)
    if inner not in _PADDING:
        with scoring(model):
            _PADDING[inner] = _reading(model)
    if _PADDING[inner] == READ:
        raise ValueError(
            f"{name}: expected a model that leaves out masked tokens on the left, got "
            f"{type(inner).__name__}, whose hidden states depend on them; give it prompts of one length"
        )
    return _PADDING[inner]


def _reading(model: Module) -> str:
    inner, head = without_adapter(model), Head.of(model)
    row = probe_tokens(model)[:1]
    pad = getattr(inner.config.get_text_config(), "pad_token_id", None)
    filler = row[:, :1] if pad is None or pad >= head.weight.shape[0] else torch.full_like(row[:, :1], pad)
    padded = torch.cat([filler.expand(-1, PADDED), row], 1)
    attended = torch.cat([torch.zeros_like(filler).expand(-1, PADDED), torch.ones_like(row)], 1)
    alone = hidden_states(model, input_ids=row, attention_mask=torch.ones_like(row))
    for how, more in ((IGNORED, {}), (POSITIONS, {"position_ids": _positions(attended)})):
        if more and "position_ids" not in inspect.signature(inner.forward).parameters:
            continue
        states = hidden_states(model, input_ids=padded, attention_mask=attended, **more)[:, PADDED:]
        if range_change(head.logprobs(alone), head.logprobs(states)) <= allowed_change(_multiplied_in(alone)):
            return how
    return READ


def _positions(attended: Tensor) -> Tensor:
    return (attended.long().cumsum(-1) - 1).clamp(min=0)
