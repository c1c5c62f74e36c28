"""A transformers model as arguments of the op: its final hidden states, and its LM head.

    check_head(model)                                  # once, before training
    loss = distillation_loss(student, teacher, student_inputs, teacher_inputs, labels, divergence="jsd")

or in two steps, where the rows of a loss are chosen in between:

    hidden, head = hidden_states(model, input_ids=tokens), Head.of(model)
    sides = {"student": (hidden, head), "teacher": (teacher_hidden, Head.of(teacher))}
    loss = on_heads(linear_divergence, sides, labels=labels)

`hidden_states` is the input of the model's output embedding, so it needs no name of a trunk. No logits are
computed. `check_head` compares both with the model's own log-probs and raises ValueError for a model that
this module does not read right. transformers itself is not imported.
"""

from __future__ import annotations

from .checks import allowed_change, check_head, check_padding, padded_inputs, probe_tokens, range_change
from .head import Head, at_least_float, on_heads, output_embedding, without_adapter
from .loss import distillation_loss
from .states import forward_to_head, hidden_states, router_coefficient, router_loss, routes_by_config, scoring

__all__ = [
    "Head",
    "allowed_change",
    "at_least_float",
    "check_head",
    "check_padding",
    "distillation_loss",
    "forward_to_head",
    "hidden_states",
    "on_heads",
    "output_embedding",
    "padded_inputs",
    "probe_tokens",
    "range_change",
    "router_coefficient",
    "router_loss",
    "routes_by_config",
    "scoring",
    "without_adapter",
]
