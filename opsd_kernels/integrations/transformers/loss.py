"""The fused divergence between two models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from opsd_kernels.divergence import linear_divergence
from opsd_kernels.spec import expect

from .checks import padded_inputs
from .head import Head, on_heads
from .states import forward_to_head, router_coefficient, router_loss, routes_by_config, scoring


def distillation_loss(
    student: Module,
    teacher: Module,
    student_inputs: Mapping[str, Any],  # input_ids (B, L_s), attention_mask (B, L_s), ...
    teacher_inputs: Mapping[str, Any],  # input_ids (B, L_t), ...
    labels: Tensor,  # (B, T) int64
    **options: Any,
) -> Any:
    """Return `linear_divergence` between two models at `labels`, in nats, without logits.

    `labels` are the tokens at the last T positions of both inputs, -100 where there is no loss: prompts of
    different lengths are padded on the left. A label's distribution is that of the row before it; with T the
    whole length of an input the first label has none and is left out. `options` are those of
    linear_divergence. The teacher runs in eval mode without a gradient; it may be the student itself.

    A student whose config has `output_router_logits` adds its router's auxiliary loss, times the coefficient
    of its config; `reduction` is not "none" then.

    Raises ValueError for labels that are not at the end of both inputs, for a student whose trainable weights
    are offloaded, for a model that reads the padding in
    spite of its mask (check_padding), and for a head that `Head.of` refuses. Call `check_head` on both models
    once before.
    """
    _check_trainable(student)
    lengths = [_check_labels(side, labels) for side in (student_inputs, teacher_inputs)]
    rows = min(labels.shape[1], *(length - 1 for length in lengths))
    with torch.no_grad(), scoring(teacher):
        inputs = padded_inputs(teacher, teacher_inputs, "teacher")
        theirs = forward_to_head(teacher, inputs)[0][:, -rows - 1 : -1], Head.of(teacher)
    hidden, output = forward_to_head(student, padded_inputs(student, student_inputs, "student"))
    sides = {"student": (hidden[:, -rows - 1 : -1], Head.of(student)), "teacher": theirs}
    shifted = labels[:, labels.shape[1] - rows :].to(hidden.device)
    result = on_heads(linear_divergence, sides, **{"labels": shifted, **options})
    router = router_loss(output) if routes_by_config(student) else None
    if router is None:
        return result
    expect(
        options.get("reduction") != "none",
        "reduction",
        "one that gives a single loss, as the config of the student adds the router's",
        "'none'",
    )
    loss = result[0] if isinstance(result, tuple) else result
    loss = loss + router_coefficient(student) * router
    return (loss, *result[1:]) if isinstance(result, tuple) else loss


def _check_trainable(student: Module) -> None:
    offloaded = any(weight.is_meta and weight.requires_grad for weight in student.parameters())
    if torch.is_grad_enabled() and offloaded:
        raise ValueError(
            "student: expected trainable weights on a device, got some that accelerate offloaded, whose "
            "gradients would be lost"
        )


def _check_labels(inputs: Mapping[str, Any], labels: Tensor) -> int:
    """Return the length of the inputs. Raises ValueError unless the labels are their last tokens."""
    given = inputs.get("input_ids")
    expect(labels.dim() == 2, "labels", "a tensor (B, T)", f"shape {tuple(labels.shape)}")
    if given is None:
        length = inputs["inputs_embeds"].shape[1]
        same = torch.ones((), dtype=torch.bool)
    else:
        length = given.shape[1]
        last = given[:, -labels.shape[1] :].to(labels.device)
        expect(
            len(given) == len(labels) and last.shape == labels.shape,
            "labels",
            f"the last tokens of input_ids {tuple(given.shape)}",
            f"shape {tuple(labels.shape)}",
        )
        same = ((labels == -100) | (labels == last)).all()
    message = (
        "labels: expected -100 or the tokens at the end of input_ids, in the student's and the teacher's"
    )
    if same.device.type == "cpu":
        expect(bool(same), "labels", message.partition("expected ")[2], "other tokens")
    else:
        # An asynchronous device-side assert on CUDA: no host sync.
        torch._assert_async(same, message)
    return length
