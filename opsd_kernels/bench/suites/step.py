"""Where a training step goes: rollout, trunk, loss, optimiser.

The model is a randomly initialised Qwen3 that is its own teacher, as in `opsd train`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...integrations.transformers import hidden_states
from ..measure.context import Context, Effort, Task, blank, free
from ..measure.gate import check
from ..measure.rows import part_row
from ..measure.timing import Variant, interleave
from ..providers import PROVIDERS, Provider, installed
from ..report.results import Row
from ..shapes import Setting

STEP = "whole step"


@dataclass(frozen=True)
class Model:
    """Sizes of the model and of a step: B prompts of P tokens, with T sampled tokens each."""

    H: int
    V: int
    layers: int
    B: int
    P: int
    T: int


MODELS = {
    ("cpu", True): Model(128, 8000, 2, 8, 16, 16),
    ("cpu", False): Model(256, 32000, 4, 8, 32, 32),
    ("cuda", True): Model(1024, 151936, 8, 16, 128, 64),
    ("cuda", False): Model(1024, 151936, 28, 32, 256, 128),
}


class Step:
    """The parts of one step, each a call of its own, over the tensors that earlier parts left."""

    def __init__(self, model: Model, setting: Setting, provider: Provider) -> None:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=model.V,
            hidden_size=model.H,
            intermediate_size=3 * model.H,
            num_hidden_layers=model.layers,
            num_attention_heads=model.H // 64,
            num_key_value_heads=max(1, model.H // 128),
            head_dim=64,
            tie_word_embeddings=True,
        )
        self.size, self.setting = model, setting
        net: Any = Qwen3ForCausalLM(config)
        self.net = net.to(setting.torch_dtype).to(setting.device)
        self.optimiser = torch.optim.AdamW(self.net.parameters(), lr=1e-5)
        self.prompts = torch.randint(model.V, (model.B, model.P), device=setting.device)
        self.tokens = torch.randint(model.V, (model.B, model.P + model.T), device=setting.device)
        # The teacher's prompt also holds feedback.
        self.context = torch.randint(model.V, (model.B, 2 * model.P + model.T), device=setting.device)
        self.op = provider.make(setting)
        self.loss_value: Tensor | None = None
        self.trunk_forward()

    def rollout(self) -> None:
        """Sample T tokens for each prompt."""
        with torch.no_grad():
            self.tokens = self.net.generate(
                self.prompts,
                max_new_tokens=self.size.T,
                min_new_tokens=self.size.T,
                do_sample=True,
                pad_token_id=0,
            )

    def trunk_forward(self) -> None:
        """Compute the hidden states of the sampled tokens, for student and teacher."""
        T = self.size.T
        with torch.no_grad():
            self.teacher = hidden_states(self.net, input_ids=self.context)[:, -T - 1 : -1].flatten(0, 1)
        self.hidden = hidden_states(self.net, input_ids=self.tokens)[:, -T - 1 : -1].flatten(0, 1)

    def loss(self) -> None:
        """Run the loss head forward and backward, down to the gradient of the hidden states."""
        head = self.net.lm_head.weight
        self.cut = self.hidden.detach().requires_grad_()
        self.loss_value = self.op(self.cut, head, self.teacher.detach(), head.detach())
        self.loss_value.backward()

    def trunk_backward(self) -> None:
        """Backpropagate the gradient of the loss head through the trunk."""
        self.hidden.backward(self.cut.grad)

    def trunk(self) -> None:
        """Run the trunk forward and backward, for its time alone."""
        self.trunk_forward()
        self.hidden.backward(torch.ones_like(self.hidden))

    def optimise(self) -> None:
        """Clip gradients and update the weights."""
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimiser.step()

    def whole(self) -> None:
        """Run one training step."""
        self.optimiser.zero_grad()
        self.rollout()
        self.trunk_forward()
        self.loss()
        self.trunk_backward()
        self.optimise()

    def parts(self) -> dict[str, Callable[[], object]]:
        """Return the calls to time, by name."""
        return {
            STEP: self.whole,
            "rollout": self.rollout,
            "trunk": self.trunk,
            "loss": self.loss,
            "optimiser": self.optimise,
        }


def split(model: Model, setting: Setting, provider: Provider, effort: Effort) -> list[Row]:
    """Time the parts of a step with the loss of `provider`, as shares of the whole step."""
    row = blank("step", provider.name, setting)
    reason = provider.unsupported(setting) or check(provider, setting).failure
    if not installed("transformers"):
        reason = "transformers is not installed"
    if reason:
        return [replace(row, variant=STEP, reason=reason)]
    step = Step(model, setting, provider)
    variants = {name: Variant(part) for name, part in step.parts().items()}
    interleave(variants, STEP, setting.device, **effort)
    rows = [part_row(replace(row, variant=name), variants, name, STEP) for name in variants]
    del step, variants
    free()
    return rows


def step(context: Context) -> list[Task]:
    """Return a task with this package's loss, and one with plain PyTorch's."""
    model = MODELS[context.device, context.quick]
    dtype = context.chosen_dtypes("float32" if context.device == "cpu" else "bfloat16")[0]
    setting = Setting(model.B * model.T, model.H, model.V, dtype, device=context.device)
    providers = [p for p in context.only("torch") if p.name in ("opsd", "torch")] or [PROVIDERS["opsd"]]
    shown = f"{model.layers} layers, H={model.H}, V={model.V}, {model.B} x ({model.P} + {model.T}) tokens"
    return [
        Task(f"{p.label}, {shown}", partial(split, model, setting, p, context.effort(2.0))) for p in providers
    ]
