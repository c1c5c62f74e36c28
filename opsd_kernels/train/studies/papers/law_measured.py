"""Measure gaps and improvements of contexts, and estimate statistics over them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.studies.compare import MASTER_STEP, Arm, Design, Trained, compare
from opsd_kernels.train.studies.lab import Cell, Lab, Result
from opsd_kernels.train.studies.papers.law_settings import Setting
from opsd_kernels.train.studies.probe import Point, coordinates, line, measure_contexts
from opsd_kernels.train.studies.statistics import Estimate, percentiles, replication_of, resamples

# No run has a seed beyond this one.
PROBE_SEED = 1_000_000
# Bootstrap samples of base models and contexts.
SAMPLES = 10_000


@dataclass(frozen=True)
class Measured:
    """One environment and size of model: runs by context, and a probe (JSON) of each run's base model."""

    hidden: int
    trained: dict[str, Trained]
    probes: dict[str, list[Result]]
    env: str = "secret_op"
    model: str = "tiny"

    @property
    def name(self) -> str:
        return f"`{self.env}`, " + (f"hidden {self.hidden}" if self.model == "tiny" else self.model)

    def points(self, gap: str = "gap") -> list[Point]:
        """Return a point per context, the mean over its runs."""
        return [
            Point(name, float(np.mean(self.probed(name, gap))), float(np.mean(runs.gains())), len(runs.runs))
            for name, runs in self.trained.items()
        ]

    @property
    def ceiling(self) -> float:
        """Return the R^2 that an exact measure of contexts could expect, given the scatter of their runs.

        One less the share of the runs' variance in that of the means (ANOVA), not below 0; NaN for one run.
        """
        gains_CR = np.array([runs.gains() for runs in self.trained.values()])
        within = gains_CR.var(1, ddof=1).mean() if gains_CR.shape[1] > 1 else np.nan
        between = gains_CR.shape[1] * gains_CR.mean(1).var(ddof=1)
        return float(np.maximum(0.0, 1 - within / between)) if between > 0 else 0.0

    def runs(self, gap: str = "gap") -> list[Point]:
        return [
            Point(name, *pair)
            for name, runs in self.trained.items()
            for pair in zip(self.probed(name, gap), runs.gains(), strict=True)
        ]

    def probed(self, name: str, value: str) -> list[float]:
        return [probe[value]["value"] for probe in self.probes[name]]

    @property
    def bases(self) -> list[int]:
        return next(iter(self.trained.values())).bases

    def drawn(self, count: int, gap: str = "gap") -> tuple[np.ndarray, np.ndarray]:
        """Return gaps and improvements by context, each (count, C), in bootstrap samples of base models."""
        weights = resamples(self.bases, count)
        gaps = np.transpose([self.probed(name, gap) for name in self.trained])
        gains = np.transpose([runs.gains() for runs in self.trained.values()])
        return weights @ gaps, weights @ gains


def measure_setting(lab: Lab, setting: Setting) -> Measured:
    """Measure an environment at one size of model."""
    quick = lab.quick
    return measure(lab, setting.config(quick), setting.arms(quick), setting.runs(quick), setting.samples)


def measure(lab: Lab, base: TrainConfig, contexts: Sequence[Arm], design: Design, samples: int) -> Measured:
    """Measure the runs and gaps of all contexts, the gaps on about `samples` attempts.

    The base models are made with the runs.
    """
    trained = compare(lab, base, contexts, design)
    probes = measure_gaps(lab, base, contexts, design, samples)
    return Measured(base.tiny_hidden, trained, probes, base.env, base.model)


def measure_gaps(
    lab: Lab, base: TrainConfig, contexts: Sequence[Arm], design: Design, samples: int
) -> dict[str, list[Result]]:
    """Return a probe of each context for each run: of its base model, of a language model once for all.

    A probe has another seed than any run, so that a gap is independent of the run's first measurement.
    """
    samples = base.eval_samples if lab.quick else samples
    seeds = [
        {**run, "seed": PROBE_SEED + run["seed"]}
        if base.model == "tiny"
        else {"seed": PROBE_SEED + MASTER_STEP * lab.master}
        for run in design.runs(lab.master)
    ]
    # Contexts of a cell share the student's answers. Two cells, so that two workers have something to do.
    halves = [
        half
        for shown in (False, True)
        if (half := [arm for arm in contexts if replace(base, **arm.settings).siblings is shown])
    ]
    cells = [
        Cell(
            f"{__name__}:probe_cell",
            {"configs": [asdict(replace(base, **run, **arm.settings)) for arm in half], "samples": samples},
        )
        for run in seeds
        for half in halves
    ]
    probes: dict[str, list[Result]] = {arm.name: [] for arm in contexts}
    results: list[Any] = lab.run("gaps", cells)
    for (_, half), found in zip(itertools.product(seeds, halves), results, strict=True):
        for arm, probe in zip(half, found, strict=True):
            probes[arm.name].append(probe)
    return probes


def probe_cell(arguments: dict[str, Any], folder: Path) -> list[Result]:
    """Measure the gaps of several contexts on one base model."""
    from opsd_kernels.train.records.log import Progress

    configs = [TrainConfig(**config) for config in arguments["configs"]]
    return [asdict(probe) for probe in measure_contexts(configs, arguments["samples"], Progress())]


def over_contexts(
    statistic: Callable[..., np.ndarray],
    *sizes: Measured,
    within: tuple[float, float] = (-np.inf, np.inf),
    of_drawn: bool = True,
    gap: str = "gap",
) -> Estimate:
    """Estimate a statistic of gaps and improvements over contexts.

    The interval spans that of a rerun with other base models, and the percentile interval of samples of
    contexts. `statistic` gets the gaps and improvements (R, C) of each size of model. With `of_drawn` it is
    evaluated on the drawn contexts and returns (R,); else it returns a value for each context, (R, C), whose
    mean is taken. `gap` names the measure.
    """
    count, bases = len(sizes[0].trained), min(len(set(one.bases)) for one in sizes)
    points = [array[None] for one in sizes for array in coordinates(one.points(gap))]
    rerun = statistic(*(array for one in sizes for array in one.drawn(SAMPLES, gap)))
    places = np.random.default_rng(1).integers(count, size=(SAMPLES, count))
    if of_drawn:
        value, drawn = statistic(*points), statistic(*(array[0][places] for array in points))
    else:
        each = statistic(*points)
        value, rerun, drawn = each.mean(1), rerun.mean(1), each[0][places].mean(1)
    found = replication_of(float(value[0]), rerun, count, bases, within)
    low, high = percentiles(drawn)
    return replace(found, low=min(found.low, float(low)), high=max(found.high, float(high)))


def error_saved(gaps_RC: np.ndarray, gains_RC: np.ndarray) -> np.ndarray:
    """Shape (R, C): the error on a context that was left out, of the others' mean less that of their line."""
    saved = np.empty_like(gains_RC)
    for place in range(gaps_RC.shape[1]):
        gaps, gains = np.delete(gaps_RC, place, 1), np.delete(gains_RC, place, 1)
        slope, start, _ = line(gaps, gains)
        there = gains_RC[:, place]
        saved[:, place] = abs(there - gains.mean(1)) - abs(there - slope * gaps_RC[:, place] - start)
    return saved
