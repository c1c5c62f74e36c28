"""Run a model up to its LM head."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import Module

from .head import output_embedding, without_adapter


def hidden_states(model: Module, **inputs: Any) -> Tensor:
    """Shape (B, L, H): the final hidden states of any causal language model, without logits.

    `inputs` are those of the model's forward, e.g. `input_ids` (B, L) and `attention_mask` (B, L). `Head.of`
    projects the result. Not for calls from several threads on one model. Raises ValueError if the model does
    not call its output embedding once.
    """
    return forward_to_head(model, inputs)[0]


def forward_to_head(
    model: Module, inputs: Mapping[str, Any], forward: Callable[..., Any] | None = None
) -> tuple[Tensor, Any]:
    """Run the model, and return what enters its output embedding (B, L, H), and the output of its forward.

    The output embedding is not called: the logits of the output are empty, the rest is as ever.
    `use_cache` is False unless `inputs` say otherwise. `forward` is what is called, by default the model;
    give `model.forward` where the model's own hooks run already.
    """
    inner = without_adapter(model)
    # In its place a module of its own, not a hook that raises: the hooks around the modules above it (FSDP,
    # DeepSpeed, accelerate) then find their usual end, and those of the head do not gather its weights.
    stand_in = _NoLogits(output_embedding(inner), inner)
    places = _places(inner, stand_in.head)
    for parent, name in places:
        parent._modules[name] = stand_in
    try:
        output = (forward or model)(**without_cache(inner, inputs))
    finally:
        for parent, name in places:
            parent._modules[name] = stand_in.head
    if len(stand_in.entered) != 1:
        raise ValueError(
            f"model: expected a forward that calls its output embedding once, "
            f"got {type(inner).__name__}, which calls it {len(stand_in.entered)} times"
        )
    return stand_in.entered[0], output


class _NoLogits(Module):
    """In place of a head: keeps what enters it, and returns logits of no rows."""

    def __init__(self, head: Module, model: Any) -> None:
        super().__init__()
        # Beside the registry of modules, so that a walk over the model's modules does not meet it.
        self.__dict__["head"] = head
        self.entered: list[Tensor] = []
        self.rows = int(getattr(model.config.get_text_config(), "vocab_size", 0) or 1)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.entered.append(hidden)
        return hidden.new_empty(*hidden.shape[:-2], 0, self.rows)

    def __getattr__(self, name: str) -> Any:
        """Read what a model looks up at its head, such as the dtype of the weight."""
        return getattr(self.__dict__["head"], name)


def _places(model: Module, head: Module) -> list[tuple[Module, str]]:
    """Return each parent of the head, with the name it has there; the model itself is asked first."""
    own = [(model, name) for name, child in model._modules.items() if child is head]
    return own or [
        (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is head
    ]


def without_cache(inner: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    accepted = inspect.signature(inner.forward).parameters
    extra = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    return {**({"use_cache": False} if extra or "use_cache" in accepted else {}), **inputs}


@contextmanager
def scoring(model: Module) -> Iterator[None]:
    """Put the model in eval mode, without dropout, and restore the mode of each of its modules."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def routes_by_config(model: Module) -> bool:
    """True if the model's config adds its router's auxiliary loss (`output_router_logits`)."""
    return bool(getattr(without_adapter(model).config.get_text_config(), "output_router_logits", False))


def router_coefficient(model: Module) -> float:
    """Return the factor of a mixture-of-experts model's auxiliary loss, or 0 if it has none."""
    inner = without_adapter(model)
    # JetMoe and Dbrx name it otherwise in their configs.
    for owner in (inner, inner.config.get_text_config()):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            value = getattr(owner, name, None)
            if value is not None:
                return float(value)
    return 0.0


def router_loss(output: Any) -> Tensor | None:
    """Return the auxiliary loss, 0-dim, in the output of a forward with `output_router_logits=True`.

    None for a model that computes none; its own loss has none either, whatever its config says.
    """
    loss = getattr(output, "aux_loss", None)
    return loss if isinstance(loss, Tensor) else None
