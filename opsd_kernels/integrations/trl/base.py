"""The base of TRL's trainers with the fused loss: hidden states inside the model's wrapper, and the call."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import maybe_gather_lm_head_ctx as whole_head

from opsd_kernels.integrations.transformers import (
    Head,
    check_head,
    forward_to_head,
    on_heads,
    padded_inputs,
    routes_by_config,
)
from opsd_kernels.spec import expect

TAILS = {True: "bucket", False: "renormalize"}
# Hidden states (B, T, H) of the rows that predict the completion, and the head that projects them.
Side = tuple[Tensor, Head]


class FusedLoss:
    """Base of the trainers.

    `loss_options` are further arguments of linear_divergence, e.g. {"workspace_bytes": 2**28}; they override
    those of TRL's config. Raises ValueError for `return_stats` among them, which each trainer sets.
    """

    loss_options: ClassVar[dict[str, Any]] = {}
    # False for the trainers whose teacher is a server's.
    local_teacher: ClassVar[bool] = True

    # attributes of TRL's trainers
    accelerator: Any
    model: Any
    teacher_model: Any
    temperature: float
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    current_gradient_accumulation_steps: int
    args: Any
    _metrics: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # checked first: TRL's constructor waits for the server
        server = any(getattr(x, "use_teacher_server", None) is True for x in (*args, *kwargs.values()))
        expect(not server, "use_teacher_server", "False: the loss reads the teacher's hidden states", server)
        told = ", ".join(self.loss_options)
        expected = "options without return_stats, which the trainer sets"
        expect("return_stats" not in self.loss_options, "loss_options", expected, told)
        super().__init__(*args, **kwargs)
        self._redirect = _ForwardRedirection()
        teacher = self.teacher_model if self.local_teacher else None
        expect(
            teacher is not None or not self.local_teacher,
            "teacher_model",
            "a local model: the loss reads its hidden states",
            None,
        )
        self._check_settings()
        # DeepSpeed and FSDP may have partitioned the weights already.
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            check_head(self.model)
            if teacher is not None:
                check_head(self.accelerator.unwrap_model(teacher), "teacher_model")
        expect(
            not routes_by_config(self.model),
            "model",
            "output_router_logits=False in its config, as this loss leaves out the routers' auxiliary loss",
            True,
        )

    def _check_settings(self) -> None:
        """Raise ValueError for settings of the trainer that the fused loss does not support."""

    def _states(
        self, model: nn.Module, tokens: Tensor, attended: Tensor, length: int, **images: Any
    ) -> Tensor:
        """Return hidden states (B, length, H) of the rows that predict the last `length` tokens."""
        inputs: Mapping[str, Any] = {"input_ids": tokens, "attention_mask": attended, **images}
        # Sharded weights cannot be tried from inside the forward of their wrapper.
        if not (images or self.is_deepspeed_enabled or self.is_fsdp_enabled):
            inputs = padded_inputs(model, inputs, "model")
        # Not model(...): the hooks of its wrapper run already.
        return forward_to_head(model, inputs, model.forward)[0][:, -length - 1 : -1]

    def _side(self, model: nn.Module, *rows: Any, **images: Any) -> Side:
        """Run inside the forward of `model`'s wrapper.

        The redirection replaced the forward in which accelerate enters autocast, hence autocast here.
        """
        head = Head.of(model)
        with self.accelerator.autocast():
            return self._states(model, *rows, **images).to(head.weight.device), head

    def _wrapped(self, model: nn.Module, method: Any, *args: Any, **kwargs: Any) -> Any:
        """Run `method` as the forward of the model's wrapper, so that the hooks of DDP and FSDP fire."""
        inner = self.accelerator.unwrap_model(model)
        return self._redirect(model, inner, method, inner, *args, **kwargs)

    def _teacher_side(self, *rows: Any, **images: Any) -> Side:
        """Return the side of a teacher that is another model than the student."""
        self.teacher_model.eval()
        with torch.no_grad():
            return self._wrapped(self.teacher_model, self._side, *rows, **images)

    def _call(self, op: Any, sides: dict[str, Side], *tensors: Tensor, **options: Any) -> Any:
        options = {"temperature": self.temperature, **options}
        options |= {
            name: value
            for name, value in self.loss_options.items()
            if "" not in sides or name in signature(op).parameters
        }
        with (
            whole_head(*(part for _, head in sides.values() for part in head.parameters())),
            self.accelerator.autocast(),
        ):
            return on_heads(op, sides, *tensors, **options)

    def _log(self, name: str, value: Tensor) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics[name].append(value.detach().float().mean().item())


def completion(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Return tokens (B, L), their mask and the width of the completions."""
    tokens, attended = (
        torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], dim=1) for x in ("ids", "mask")
    )
    return tokens, attended, inputs["completion_ids"].shape[1]
