"""Arguments that the ops refuse, each with the name that its error begins with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from checked_call import FORMS, WITH_LOSS, Call

from opsd_kernels import weights


@dataclass(frozen=True)
class Flaw:
    """A change of a call that makes it bad: options, or arguments by position, from the call."""

    error: str  # what the message begins with
    change: Callable[[Call], dict[Any, Any]]
    forms: tuple[str, ...] = tuple(FORMS)
    when: Callable[[Call], bool] = lambda call: True

    def plant(self, call: Call) -> Call:
        change = self.change(call)
        arguments = [change.get(i, x) for i, x in enumerate(call.arguments)]
        named = {name: x for name, x in change.items() if isinstance(name, str) and name != "trainable"}
        options = {**call.options, "backward": "auto", **named}
        if "backward" not in call.options:
            options.pop("backward")
        return replace(
            call, arguments=arguments, options=options, trainable=change.get("trainable", call.trainable)
        )


def _shape(call: Call) -> tuple[int, ...]:
    return tuple(call.arguments[0].shape[:-1])


def _first_valid(call: Call) -> bool:
    """True if every token is valid, and there is one."""
    return "mask" not in call.options and "labels" not in call.options and math.prod(_shape(call)) > 0


HEADS_ALONE = ("heads", "several", "target")
FLAWS = {
    "temperature 0": Flaw("temperature", lambda c: {"temperature": 0.0}),
    "temperature of another shape": Flaw("temperature", lambda c: {"temperature": torch.ones(*_shape(c), 2)}),
    "temperature of text": Flaw("temperature", lambda c: {"temperature": "hot"}),
    "teacher temperature": Flaw(
        "teacher_temperature",
        lambda c: {"teacher_temperature": -1.0},
        ("heads", "several", "target", "cached"),
    ),
    "beta of a mixture": Flaw("beta", lambda c: {"divergence": "jsd", "beta": 1.0}, WITH_LOSS),
    "beta of a mixed KL": Flaw("beta", lambda c: {"divergence": "mixed_kl", "beta": 1.5}, WITH_LOSS),
    "divergence": Flaw("divergence", lambda c: {"divergence": "kl"}, WITH_LOSS),
    "z_loss": Flaw("z_loss", lambda c: {"z_loss": -0.1}, WITH_LOSS),
    "entry_clip": Flaw("entry_clip", lambda c: {"entry_clip": 0.0}, WITH_LOSS),
    "token_clip": Flaw("token_clip", lambda c: {"token_clip": -1.0}, WITH_LOSS),
    "reduction": Flaw("reduction", lambda c: {"reduction": "batchmean"}, (*WITH_LOSS, "cached")),
    "normalizer": Flaw(
        "normalizer", lambda c: {"reduction": "sum", "normalizer": 3.0}, (*WITH_LOSS, "cached")
    ),
    "sequences": Flaw(
        "student_hidden",
        lambda c: {"reduction": "sequence_mean", "normalizer": None},
        WITH_LOSS,
        lambda c: len(_shape(c)) != 2,
    ),
    "topk": Flaw("topk", lambda c: {"topk": 0}, HEADS_ALONE),
    "topk_tail": Flaw("topk_tail", lambda c: {"topk_tail": "drop"}, HEADS_ALONE),
    "tail": Flaw("tail", lambda c: {"tail": "drop"}, ("listed",)),
    "teacher_mix": Flaw("teacher_mix", lambda c: {"teacher_mix": 1.0}, HEADS_ALONE),
    "no index": Flaw("teacher_index", lambda c: {"teacher_index": None}, ("several",)),
    "index of another shape": Flaw(
        "teacher_index",
        lambda c: {"teacher_index": torch.zeros(*_shape(c), 1, dtype=torch.int64)},
        ("several",),
    ),
    "index beyond the teachers": Flaw(
        "teacher_index", lambda c: {"teacher_index": torch.full(_shape(c), 3)}, ("several",), _first_valid
    ),
    "one head too many": Flaw(
        "teacher_weight", lambda c: {3: [*c.arguments[3], c.arguments[3][0]]}, ("several",)
    ),
    "one adapter too many": Flaw(
        "teacher_lora", lambda c: {"teacher_lora": [None] * (len(c.arguments[2]) + 1)}, ("several",)
    ),
    "target's width": Flaw("target", lambda c: {2: c.arguments[2][..., 1:], "vocab_size": None}, ("target",)),
    "target's form": Flaw("target_is", lambda c: {"target_is": "odds"}, ("target",)),
    "target's dtype": Flaw(
        "target", lambda c: {2: torch.ones_like(c.arguments[2], dtype=torch.int64)}, ("target",)
    ),
    "ids' dtype": Flaw("ids", lambda c: {2: c.arguments[2].int()}, ("at ids",)),
    "an id beyond the vocabulary": Flaw(
        "ids", lambda c: {2: torch.full_like(c.arguments[2], 1000)}, ("at ids",), _first_valid
    ),
    "a listed id beyond the vocabulary": Flaw(
        "teacher_topk_ids", lambda c: {2: c.arguments[2] + 1000}, ("listed",), _first_valid
    ),
    "log-probs of another shape": Flaw(
        "teacher_topk_logprobs", lambda c: {3: c.arguments[3][..., 1:]}, ("listed",)
    ),
    "k of 0": Flaw("k", lambda c: {2: 0}, ("list",)),
    "k beyond the vocabulary": Flaw("k", lambda c: {2: 1000}, ("list",)),
    "a label beyond the vocabulary": Flaw(
        "labels", lambda c: {"labels": torch.full(_shape(c), 1000)}, WITH_LOSS, _first_valid
    ),
    "mask of another shape": Flaw("mask", lambda c: {"mask": torch.ones(*_shape(c), 1)}),
    "vocab_size of 0": Flaw("vocab_size", lambda c: {"vocab_size": 0}),
    "vocab_size too large": Flaw("vocab_size", lambda c: {"vocab_size": 1000}),
    "bias of another size": Flaw("{prefix}bias", lambda c: {f"{c.prefix}bias": torch.ones(3)}),
    "adapter of another width": Flaw(
        "{prefix}lora A",
        lambda c: {f"{c.prefix}lora": (torch.ones(2, 99), torch.ones(len(c.arguments[1]), 2), 1.0)},
        ("heads", "several", "listed", "log-probs"),
    ),
    "no room": Flaw(
        "workspace_bytes", lambda c: {"workspace_bytes": 16}, when=lambda c: math.prod(_shape(c)) > 0
    ),
    "backend": Flaw("backend", lambda c: {"backend": "blas"}),
    "logits_dtype": Flaw("logits_dtype", lambda c: {"logits_dtype": "fp8"}, (*WITH_LOSS, "log-probs")),
    "gradient_tolerance": Flaw("gradient_tolerance", lambda c: {"gradient_tolerance": 1.0}, WITH_LOSS),
    "backward": Flaw("backward", lambda c: {"backward": "twice"}, (*WITH_LOSS, "log-probs")),
    "softcap of a cache": Flaw("student_softcap", lambda c: {"student_softcap": 9.0}, ("cached",)),
    "trainable head of a cache": Flaw(
        "student_weight", lambda c: {"trainable": ("student_weight",)}, ("cached",)
    ),
    "weights from a cache's statistics": Flaw(
        "token_weights", lambda c: {"token_weights": weights.EntropyGate("student", above=1.0)}, ("cached",)
    ),
}
