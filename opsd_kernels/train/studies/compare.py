"""Train the arms of a study at equal numbers of generated answers.

Each arm gets its best learning rate of one list, then all seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.studies.lab import Lab, Result


@dataclass(frozen=True)
class Arm:
    """A way to train: the settings in which it differs from the other arms."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Design:
    """The settings that all arms share. Seed i starts from base model i modulo `warm_seeds`.

    The rate is chosen on a seed that is not reported.
    """

    seeds: int = 5
    warm_seeds: int = 3
    rates: tuple[float, ...] = (2e-4, 5e-4, 1e-3)

    # The seed on which the rate is chosen, with the first base model.
    TUNING = 1000

    def quick(self) -> Design:
        return dataclasses.replace(self, seeds=1, warm_seeds=1, rates=self.rates[len(self.rates) // 2 :][:1])


@dataclass(frozen=True)
class Trained:
    """The runs of one arm, in the order of their seeds."""

    arm: Arm
    rate: float
    runs: list[Result]
    # Held-out accuracy by rate, of the runs on which the rate was chosen.
    tried: dict[float, float] = field(default_factory=dict)

    def values(self, name: str) -> list[float]:
        return [run[name] for run in self.runs]

    def gains(self) -> list[float]:
        return [run["held_out_accuracy_after"] - run["held_out_accuracy_before"] for run in self.runs]


def compare(lab: Lab, base: TrainConfig, arms: Sequence[Arm], design: Design) -> dict[str, Trained]:
    """Train every arm with its best rate in held-out accuracy, or with the rate in its settings.

    Returns arms by name.
    """

    def config(arm: Arm, rate: float, seed: int) -> TrainConfig:
        return dataclasses.replace(
            base,
            **{"learning_rate": rate, "seed": seed, "warm_seed": seed % design.warm_seeds, **arm.settings},
        )

    tried: dict[str, dict[float, float]] = {arm.name: {} for arm in arms}
    if len(design.rates) > 1:
        pairs = [(arm, rate) for arm in arms if "learning_rate" not in arm.settings for rate in design.rates]
        # A seed of the first base model.
        tuning = design.TUNING - design.TUNING % design.warm_seeds
        results = lab.train(f"{base.env}, learning rates", [config(arm, rate, tuning) for arm, rate in pairs])
        for (arm, rate), result in zip(pairs, results, strict=True):
            tried[arm.name][rate] = result["held_out_accuracy_after"]
    rates = {
        arm.name: arm.settings.get("learning_rate")
        or max(tried[arm.name], key=tried[arm.name].__getitem__, default=design.rates[0])
        for arm in arms
    }
    cells = [(arm, seed) for arm in arms for seed in range(design.seeds)]
    results = lab.train(f"{base.env}, seeds", [config(arm, rates[arm.name], seed) for arm, seed in cells])
    runs = {
        arm.name: [result for (other, _), result in zip(cells, results, strict=True) if other is arm]
        for arm in arms
    }
    return {arm.name: Trained(arm, rates[arm.name], runs[arm.name], tried[arm.name]) for arm in arms}


def first_step_at(run: Result, level: float, curve: str = "held_out_accuracy") -> float | None:
    """Return the step at which a curve first reaches `level`, interpolated linearly; None if never."""
    points = [
        (0, run[f"{curve}_before"]),
        *map(tuple, run["curves"][curve]),
        (run["steps"], run[f"{curve}_after"]),
    ]
    if points[0][1] >= level:
        return 0.0
    for (step, value), (later, higher) in zip(points, points[1:], strict=False):
        if higher >= level:
            return step + (later - step) * (level - value) / (higher - value)
    return None
