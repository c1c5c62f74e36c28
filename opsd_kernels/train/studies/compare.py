"""Train the arms of a study at equal numbers of generated answers.

Each arm gets its best learning rate of one list, then runs from all base models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.studies.lab import Lab, Result
from opsd_kernels.train.studies.statistics import Estimate, replication


@dataclass(frozen=True)
class Arm:
    """A way to train: the settings in which it differs from the other arms."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


# Seeds of one master seed: base model b, and its run j with seed 100 j + b.
MASTER_STEP, RUN_STEP = 1000, 100


@dataclass(frozen=True)
class Design:
    """The settings that all arms share: `seeds` runs from each of `bases` base models.

    Base models differ more than the runs from one of them (docs/reproduce/variance.md), so that more base
    models and not more seeds narrow an interval. The rate is the best on average over `tuning` more runs,
    from as many base models, which are not reported.
    """

    bases: int = 6
    seeds: int = 1
    tuning: int = 2
    rates: tuple[float, ...] = (2e-4, 5e-4, 1e-3)

    def quick(self) -> Design:
        return dataclasses.replace(
            self, bases=1, seeds=1, tuning=1, rates=self.rates[len(self.rates) // 2 :][:1]
        )

    def runs(self, master: int) -> list[dict[str, Any]]:
        """Return the seeds of the reported runs, as settings of the trainer."""
        return [run_seeds(master, base, run) for base in range(self.bases) for run in range(self.seeds)]

    def tuning_runs(self, master: int) -> list[dict[str, Any]]:
        """Return the seeds of the runs on which rates are chosen, each the next one of its base model."""
        return [run_seeds(master, i % self.bases, self.seeds + i // self.bases) for i in range(self.tuning)]

    def bases_of_runs(self) -> list[int]:
        return [base for base in range(self.bases) for _ in range(self.seeds)]

    def chosen(self, score: Callable[[float], Sequence[float]]) -> float:
        """Return the rate with the best mean of the tuning runs' scores; of equal ones the first."""
        return max(self.rates, key=lambda rate: float(np.mean(score(rate))))

    def sentence(self) -> str:
        runs = "1 run" if self.seeds == 1 else f"{self.seeds} runs"
        return (
            f"{self.bases} base models, {runs} from each. Intervals: where the estimate of a rerun with "
            "other base models and seeds falls in 95 % of cases, by a bootstrap over base models and the "
            "runs of each, widened for their number."
        )


def run_seeds(master: int, base: int, run: int) -> dict[str, Any]:
    """Return the settings that make run `run` of base model `base` of a master seed."""
    return {
        "warm_seed": MASTER_STEP * master + base,
        "seed": MASTER_STEP * master + RUN_STEP * run + base,
    }


@dataclass(frozen=True)
class Trained:
    """The runs of one arm, each with its base model, in the order of their seeds."""

    arm: Arm
    rate: float
    runs: list[Result]
    bases: list[int]
    # Held-out accuracies by rate, of the runs on which the rate was chosen.
    tried: dict[float, list[float]] = field(default_factory=dict)

    def values(self, name: str) -> list[float]:
        return [run[name] for run in self.runs]

    def gains(self) -> list[float]:
        return [run["held_out_accuracy_after"] - run["held_out_accuracy_before"] for run in self.runs]

    def estimate(self, values: Sequence[float]) -> Estimate:
        """Estimate the mean of a value of each run."""
        return replication(values, self.bases)


def compare(lab: Lab, base: TrainConfig, arms: Sequence[Arm], design: Design) -> dict[str, Trained]:
    """Train every arm with its best rate in held-out accuracy, or with the rate in its settings.

    Returns arms by name.
    """

    def config(arm: Arm, rate: float, seeds: dict[str, Any]) -> TrainConfig:
        return dataclasses.replace(base, **{"learning_rate": rate, **seeds, **arm.settings})

    tried: dict[str, dict[float, list[float]]] = {arm.name: {} for arm in arms}
    if len(design.rates) > 1:
        trials = [
            (arm, rate, seeds)
            for arm in arms
            if "learning_rate" not in arm.settings
            for rate in design.rates
            for seeds in design.tuning_runs(lab.master)
        ]
        results = lab.train(f"{base.env}, learning rates", [config(*trial) for trial in trials])
        for (arm, rate, _), result in zip(trials, results, strict=True):
            tried[arm.name].setdefault(rate, []).append(result["held_out_accuracy_after"])

    def rate_of(arm: Arm) -> float:
        given = arm.settings.get("learning_rate")
        return given or (design.chosen(tried[arm.name].__getitem__) if tried[arm.name] else design.rates[0])

    rates = {arm.name: rate_of(arm) for arm in arms}
    cells = [(arm, seeds) for arm in arms for seeds in design.runs(lab.master)]
    results = lab.train(f"{base.env}, seeds", [config(arm, rates[arm.name], seeds) for arm, seeds in cells])
    runs = {
        arm.name: [result for (other, _), result in zip(cells, results, strict=True) if other is arm]
        for arm in arms
    }
    bases = design.bases_of_runs()
    return {arm.name: Trained(arm, rates[arm.name], runs[arm.name], bases, tried[arm.name]) for arm in arms}


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
