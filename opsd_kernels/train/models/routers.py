"""The auxiliary loss of a mixture-of-experts student, which keeps its experts in use."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from opsd_kernels.integrations.transformers import (
    probe_tokens,
    router_coefficient,
    router_loss,
    scoring,
    without_adapter,
)
from opsd_kernels.train.batch import completion_hidden
from opsd_kernels.train.config import ConfigError, TrainConfig
from opsd_kernels.train.distributed.sharding import last_hidden
from opsd_kernels.train.types import Sequences

# What makes a mixture-of-experts model return its auxiliary loss.
ROUTED = {"output_router_logits": True, "return_dict": True}
_routed: WeakKeyDictionary[Module, bool] = WeakKeyDictionary()


def routed_hidden_states(model: PreTrainedModel, side: Sequences, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return `hidden_states`, and the routers' auxiliary loss (0-dim), without padding."""
    length = side.tokens_BL.shape[1]
    last_B1 = (side.rows_BT * mask_BT).amax(1, keepdim=True)
    attended_BL = (torch.arange(length, device=last_B1.device) <= last_B1).long()
    hidden, output = last_hidden(model, side.tokens_BL, attention_mask=attended_BL, **ROUTED)
    router = router_loss(output)
    assert router is not None
    return completion_hidden(hidden, side.rows_BT), router


def router_weight(model: PreTrainedModel, config: TrainConfig) -> float:
    """Return the factor of the student's auxiliary router loss, 0 if it has none.

    Raises ConfigError for a factor of the settings that the model has no loss for.
    """
    given = config.router_aux_loss_coef
    weight = router_coefficient(model) if given is None else given
    if weight == 0 or _has_router_loss(model):
        return weight
    if given is not None:
        raise ConfigError(
            f"router_aux_loss_coef: expected null or 0 for {type(without_adapter(model)).__name__}, whose "
            f"forward returns no auxiliary loss of its routers, got {given}"
        )
    return 0.0


@torch.no_grad()
def _has_router_loss(model: PreTrainedModel) -> bool:
    """Try it once per model, since configs name a factor that some models do not use."""
    inner = without_adapter(model)
    if inner not in _routed:
        with scoring(model):
            try:
                _routed[inner] = router_loss(last_hidden(model, probe_tokens(model), **ROUTED)[1]) is not None
            except TypeError:
                # A forward without the argument.
                _routed[inner] = False
    return _routed[inner]
