"""Set up the environments of the study of the law: contexts, steps, and runs of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.config.presets import PRESETS
from opsd_kernels.train.studies.compare import Arm, Design

RATES = (5e-4,)


@dataclass(frozen=True)
class Setting:
    """An environment of the law: its base settings, its contexts, and the runs of each."""

    settings: dict[str, Any]
    contexts: tuple[Arm, ...]
    design: Design
    # Attempts of a probe.
    samples: int
    # For `--quick`: changes of the settings, and contexts.
    quick: dict[str, Any]
    quick_contexts: tuple[str, ...]

    def config(self, quick: bool) -> TrainConfig:
        return TrainConfig(**{**self.settings, **(self.quick if quick else {})})

    def arms(self, quick: bool) -> list[Arm]:
        return [arm for arm in self.contexts if not quick or arm.name in self.quick_contexts]

    def runs(self, quick: bool) -> Design:
        return self.design.quick() if quick else self.design


def told(*kinds: str) -> tuple[Arm, ...]:
    """Return the contexts that tell a failure one kind of feedback."""
    return tuple(Arm(kind, {"feedback": kind, "siblings": False}) for kind in kinds)


def told_beside_siblings(*kinds: str) -> tuple[Arm, ...]:
    """Return the context of a right sibling alone, and those that have feedback as well."""
    alone = Arm("siblings", {"feedback": "none"})
    return (alone, *(Arm(f"siblings + {kind}", {"feedback": kind}) for kind in kinds))


# No evaluation or checkpoint within a run.
UNWATCHED: dict[str, Any] = {
    "eval_every": 10_000, "checkpoint_every": 10_000, "samples_kept": 0, "tensorboard": False,
}  # fmt: skip
BASE: dict[str, Any] = {
    "steps": 80, "prompts_per_step": 32, "group_size": 4, "rehearsal_prompts": 8, "eval_samples": 600,
    **UNWATCHED,
}  # fmt: skip
QUICK: dict[str, Any] = {
    "steps": 3, "prompts_per_step": 4, "group_size": 3, "rehearsal_prompts": 2, "eval_samples": 24,
    "tiny_hidden": 16, "tiny_layers": 1, "tiny_heads": 2, "warm_accuracy": 2e-4, "warm_batch": 32,
    "warm_max_steps": 200,
}  # fmt: skip

# `other` misleads as `corrupted` does, and is left out for time.
SECRET_OP = Setting(
    BASE,
    (
        *told("answer", "first", "first_two", "last", "marks", "wrong", "corrupted"),
        *told_beside_siblings(),
    ),
    Design(6, 1, 0, RATES),
    1000,
    QUICK,
    ("answer", "wrong", "corrupted", "siblings"),
)
# The environment that no measure was chosen on. Half the prompts, since its answers are three times as long.
PLAN = Setting(
    {"env": "plan", **PRESETS["plan"], **BASE, "prompts_per_step": 16},
    (
        *told("where", "plan", "answer", "wrong"),
        *told_beside_siblings("where", "plan", "answer", "wrong"),
    ),
    Design(3, 1, 0, RATES),
    512,
    {**QUICK, "max_new_tokens": 10, "warm_accuracy": 1e-30},
    ("where", "plan", "answer", "siblings"),
)
# To test whether wrong beginnings do the harm: the first of ten tokens alone is taught, which names the plan.
FIRST_TOKEN = tuple(
    Arm(arm.name, {**arm.settings, "token_weights": "FirstFraction(0.1)"})
    for arm in PLAN.contexts
    if arm.name in ("answer", "siblings")
)
