"""Arms of one study at equal numbers of generated answers: a learning rate for each from the same list, then its seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.studies.lab import Lab, Result


@dataclass(frozen=True)
class Arm:
    """A way to train: the settings in which it differs from the study's others."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Design:
    """What all arms share. Seed i starts from base model i modulo `warm_seeds`. The rate is chosen on a seed that is not among the ones reported."""

    seeds: int = 5
    warm_seeds: int = 3
    rates: tuple[float, ...] = (2e-4, 5e-4, 1e-3)

    TUNING = 1000  # the seed of the choice, on the first base model

    def quick(self) -> Design:
        return dataclasses.replace(self, seeds=1, warm_seeds=1, rates=self.rates[len(self.rates) // 2 :][:1])


@dataclass(frozen=True)
class Trained:
    """The runs of one arm, in the order of their seeds."""

    arm: Arm
    rate: float
    runs: list[Result]
    tried: dict[float, float] = field(default_factory=dict)  # held-out accuracy of the choice's runs, by rate

    def values(self, name: str) -> list[float]:
        return [run[name] for run in self.runs]

    def gains(self) -> list[float]:
        return [run["held_out_accuracy_after"] - run["held_out_accuracy_before"] for run in self.runs]


def compare(lab: Lab, base: TrainConfig, arms: Sequence[Arm], design: Design) -> dict[str, Trained]:
    """Every arm by name, trained with the rate that served it best in held-out accuracy, or with its own where its settings have one."""

    def config(arm: Arm, rate: float, seed: int) -> TrainConfig:
        return dataclasses.replace(
            base,
            **{"learning_rate": rate, "seed": seed, "warm_seed": seed % design.warm_seeds, **arm.settings},
        )

    tried: dict[str, dict[float, float]] = {arm.name: {} for arm in arms}
    if len(design.rates) > 1:
        pairs = [(arm, rate) for arm in arms if "learning_rate" not in arm.settings for rate in design.rates]
        tuning = design.TUNING - design.TUNING % design.warm_seeds  # of the first base model
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
    """The step at which a curve first reaches `level`, between two measurements by a straight line; None if it never does."""
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
