"""Decompose what a rerun changes, on two arms of `mopd`: base models, runs from one, rates, arithmetic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.studies.compare import Design, run_seeds
from opsd_kernels.train.studies.lab import Cell, Lab, Result
from opsd_kernels.train.studies.papers import mopd
from opsd_kernels.train.studies.statistics import (
    graded_ahead,
    replication_of,
    resamples,
    widening,
)
from opsd_kernels.train.studies.study import Claim, Panel, Series, Study, Table

ARMS = tuple(arm for arm in mopd.ARMS if arm.name in (mopd.TWO, mopd.SHUFFLED))
GAIN = f"`{mopd.TWO}` less `{mopd.SHUFFLED}`"
DESIGN = replace(mopd.DESIGN, seeds=2)
# torch's kernels for narrower vectors add in another order. The first base models, made and trained so.
CAPABILITY, ELSEWHERE = "avx2", 2
# Base models and runs from each, of which the table gives the standard errors: the former design had 5 runs
# on 3 base models.
DESIGNS = ((3, 1), (3, 2), (3, 5), (5, 1), (6, 1), (8, 1), (12, 1))
CHOOSERS = (1, 3)
BOOTSTRAPS = 2000


@dataclass(frozen=True)
class Components:
    """Standard deviations of one quantity, by a one-way analysis of variance over base models."""

    mean: float
    between: float  # of base models
    within: float  # of runs from one base model
    measured: float  # of `within`, what the number of answers of an accuracy explains

    def error(self, bases: int, runs: int) -> float:
        """Return the standard error of a mean over `runs` from each of `bases` base models."""
        return float(np.sqrt((self.between**2 + self.within**2 / runs) / bases))


def components(values_BM: np.ndarray, sampling: float = 0.0) -> Components:
    """Decompose values of M runs from each of B base models; `sampling` is a known variance of each value.

    Unbiased in the variances but for the floor of zero under that between base models.
    """
    runs = values_BM.shape[1]
    within = float(values_BM.var(1, ddof=1).mean())
    between = float(values_BM.mean(1).var(ddof=1)) - within / runs
    return Components(
        float(values_BM.mean()), max(between, 0.0) ** 0.5, within**0.5, min(sampling, within) ** 0.5
    )


@dataclass(frozen=True)
class Grid:
    """The runs of two arms at all rates, and those of the same seeds in another arithmetic."""

    design: Design
    runs: dict[str, dict[float, list[list[Result]]]]  # by arm and rate; of each base model, its runs
    elsewhere: list[dict[str, list[Result]]]  # by base model: the arms; made anew, and trained anew alone

    def after(self, arm: str, rate: float) -> np.ndarray:
        """Shape (B, M): held-out accuracy after training."""
        return np.array([[run[AFTER] for run in runs] for runs in self.runs[arm][rate]])

    def best(self, arm: str) -> float:
        return max(self.design.rates, key=lambda rate: float(self.after(arm, rate).mean()))

    def quantities(self) -> dict[str, np.ndarray]:
        """Return accuracies (B, M) of the arms at their best rates on average, and their difference."""
        two, shuffled = (self.after(arm.name, self.best(arm.name)) for arm in ARMS)
        return {mopd.TWO: two, mopd.SHUFFLED: shuffled, GAIN: two - shuffled}


AFTER = "held_out_accuracy_after"


def study(lab: Lab) -> Study:
    design = replace(DESIGN.quick(), bases=2, seeds=2, rates=DESIGN.rates) if lab.quick else DESIGN
    base = TrainConfig(**{**mopd.BASE, **(mopd.QUICK if lab.quick else {})})
    grid = measure(lab, base, design)
    return Study(
        "variance",
        "What a rerun changes",
        "a study of these studies: `mopd`, whose rerun on another processor left 8 of 11 intervals of the "
        "page before it",
        "A study is run again: on another processor, or with other seeds. Its estimates move. By the base "
        "models, by the runs from one, by the rate that few runs choose, or by the arithmetic? And how many "
        "base models does an interval need?",
        sentences(base, design),
        [claim(grid, mopd.TWO), claim(grid, GAIN)],
        [
            components_table(grid, base),
            bases_table(grid),
            errors_table(grid),
            rates_table(grid),
            arithmetic_table(grid),
        ],
        [runs_panel(grid)],
        NOTES,
    )


NOTES = [
    "The warm start stops at an accuracy on a steep rise, so that base models differ in how well they read a "
    "context (their self-teacher's accuracy before) more than in what they know without one.",
    "A rounding error grows over the hundreds of steps of a warm start until the base model is another one: "
    "another processor counts as other base models.",
    "Not the code: at the commit of the first page of `mopd` (8f6b423) and at that of this page, eleven "
    "steps of the warm start from seed 0 (hidden size 96) give the same weights to the last bit, and four steps of "
    "a run from one base model the same rewards and divergences to six digits. With torch's kernels for AVX2 "
    "the weights differ after one step of the warm start. Measured aside.",
    "A standard deviation of six base models is itself known to a third either way.",
]


def sentences(base: TrainConfig, design: Design) -> list[str]:
    return [
        f"Two arms of `mopd`, `{mopd.TWO}` and `{mopd.SHUFFLED}`, with its settings: {base.steps} steps, "
        f"hidden size {base.tiny_hidden}. {design.bases} base models, {design.seeds} runs from each, at the "
        f"rates {' and '.join(f'{rate:g}' for rate in design.rates)}: a balanced design.",
        "Components: one-way analysis of variance with base models as a random effect, at each arm's best "
        f"rate on average. Of answers: the part of the runs' variance that {base.eval_samples} answers per "
        "accuracy explain.",
        f"Arithmetic: the first {ELSEWHERE} base models with the same seeds and torch's kernels for "
        f"{CAPABILITY} (`ATEN_CPU_CAPABILITY`), once from the warm start on, once in the run alone.",
    ]


def measure(lab: Lab, base: TrainConfig, design: Design) -> Grid:
    def config(settings: dict[str, Any], rate: float, place: int, run: int) -> TrainConfig:
        return replace(base, learning_rate=rate, **run_seeds(lab.master, place, run), **settings)

    cells = [
        (arm, rate, place, run)
        for place in range(design.bases)
        for run in range(design.seeds)
        for rate in design.rates
        for arm in ARMS
    ]
    results = lab.train("runs", [config(arm.settings, rate, place, run) for arm, rate, place, run in cells])
    runs: dict[str, dict[float, list[list[Result]]]] = {
        arm.name: {rate: [[] for _ in range(design.bases)] for rate in design.rates} for arm in ARMS
    }
    for (arm, rate, place, _), result in zip(cells, results, strict=True):
        runs[arm.name][rate][place].append(result)
    found = Grid(design, runs, [])
    rates = {arm.name: found.best(arm.name) for arm in ARMS}
    others = [
        Cell(
            f"{__name__}:elsewhere",
            {
                "configs": [asdict(config(arm.settings, rates[arm.name], place, 0)) for arm in ARMS],
                "capability": CAPABILITY,
                "warm_too": warm_too,
            },
        )
        for place in range(min(ELSEWHERE, design.bases))
        for warm_too in (True, False)
    ]
    moved = [result["runs"] for result in lab.run("other arithmetic", others)]
    pairs = zip(moved[::2], moved[1::2], strict=True)
    return replace(found, elsewhere=[{"made": made, "trained": trained} for made, trained in pairs])


CHILD = (
    "import json, sys; from pathlib import Path; from opsd_kernels.train.studies import cells; "
    "found = [cells.train(config, Path(folder)) for config, folder in json.loads(sys.stdin.read())]; "
    "Path(sys.argv[1]).write_text(json.dumps(found))"
)


def elsewhere(arguments: dict[str, Any], folder: Path) -> Result:
    """Train in a process that uses another set of torch's kernels; with `warm_too` from the warm start on."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": arguments["capability"]}
    if arguments["warm_too"]:
        environment["OPSD_CACHE"] = str(folder / "cache")
    jobs = []
    for place, config in enumerate(arguments["configs"]):
        (folder / str(place)).mkdir()
        jobs.append((config, str(folder / str(place))))
    out = folder / "found.json"
    subprocess.run(
        [sys.executable, "-c", CHILD, str(out)],
        input=json.dumps(jobs),
        text=True,
        env=environment,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return {"runs": json.loads(out.read_text())}


def claim(grid: Grid, name: str) -> Claim:
    values = grid.quantities()[name]

    def excess(values_BM: np.ndarray) -> float:
        found = components(values_BM)
        return found.between - found.within

    value = excess(values)
    found = replication_of(value, drawn(values, excess), values.size, len(values))
    return Claim(
        f"Base models differ more than the runs from one of them: {name}",
        "standard deviation between base models less that between runs from one",
        found,
        graded_ahead(found),
        f"{components(values).between:.3f} and {components(values).within:.3f}",
    )


def drawn(values_BM: np.ndarray, statistic: Callable[[np.ndarray], float]) -> np.ndarray:
    """Return a statistic of bootstrap samples of base models, each with its runs."""
    counts = np.rint(resamples(range(len(values_BM)), BOOTSTRAPS) * len(values_BM)).astype(int)
    return np.array([statistic(np.repeat(values_BM, count, axis=0)) for count in counts])


def sampling_variance(grid: Grid, base: TrainConfig, name: str) -> float:
    """Return the mean binomial variance of a quantity's accuracies."""
    arms = [arm.name for arm in ARMS] if name == GAIN else [name]
    values = [grid.after(arm, grid.best(arm)) for arm in arms]
    return sum(float(np.mean(value * (1 - value))) for value in values) / base.eval_samples


def components_table(grid: Grid, base: TrainConfig) -> Table:
    rows = []
    for name, values in grid.quantities().items():
        found = components(values, sampling_variance(grid, base, name))
        total = found.between**2 + found.within**2
        rows.append(
            [
                name,
                f"{found.mean:.3f}",
                f"{found.between:.3f}",
                f"{found.within:.3f}",
                f"{found.measured:.3f}",
                f"{found.between**2 / total:.0%}" if total else "-",
            ]
        )
    columns = ["held-out accuracy after", "mean", "between base models", "between runs from one"]
    columns += ["of these, of answers", "share of base models in the variance"]
    return Table("Components: standard deviations", columns, rows)


def bases_table(grid: Grid) -> Table:
    """Make a table of the base models: before training, and the mean after."""
    rows = []
    quantities = grid.quantities()
    rate = grid.best(mopd.TWO)
    for place, runs in enumerate(grid.runs[mopd.TWO][rate]):
        before = [
            f"{np.mean([run[f'{name}_before'] for run in runs]):.3f}"
            for name in ("held_out_accuracy", "self_teacher_accuracy", "untrained_skill")
        ]
        rows.append([str(place), *before, *(f"{values[place].mean():.3f}" for values in quantities.values())])
    columns = ["base model", "held-out before", "self-teacher before", "untrained skill before"]
    return Table(
        "Base models, means over their runs",
        [*columns, *(f"{name}, after" for name in quantities)],
        rows,
    )


def errors_table(grid: Grid) -> Table:
    rows = []
    for bases, runs in DESIGNS:
        row = [str(bases), str(runs), str(bases * runs)]
        for values in grid.quantities().values():
            error = components(values).error(bases, runs)
            row.append(f"{error:.3f}, {1.96 * error * widening(bases):.3f}")
        rows.append(row)
    columns = ["base models", "runs from each", "runs"]
    return Table(
        "Standard error of a mean, and half an interval for a rerun, by design",
        [*columns, *grid.quantities()],
        rows,
    )


def rates_table(grid: Grid) -> Table:
    """Make a table of how the choice of a rate by few runs moves an arm's mean."""
    rows = []
    for arm in ARMS:
        means = {rate: float(grid.after(arm.name, rate).mean()) for rate in grid.design.rates}
        row = [arm.name, *(f"{mean:.3f}" for mean in means.values())]
        for count in CHOOSERS:
            chosen = choices(grid, arm.name, count)
            spread = float(np.std([means[rate] for rate in chosen]))
            row.append(f"{np.mean([rate == grid.best(arm.name) for rate in chosen]):.0%}, {spread:.3f}")
        rows.append(row)
    columns = ["arm", *(f"mean at {rate:g}" for rate in grid.design.rates)]
    return Table(
        "Rates: how often one run or three choose the best, and the spread of the mean that this adds",
        [*columns, *(f"chosen by {count}" for count in CHOOSERS)],
        rows,
    )


def choices(grid: Grid, arm: str, count: int) -> list[float]:
    """Return the rates that all sets of `count` base models choose, each by its last run."""
    scores = {rate: grid.after(arm, rate)[:, -1] for rate in grid.design.rates}
    count = min(count, grid.design.bases)
    return [
        max(grid.design.rates, key=lambda rate: float(scores[rate][list(places)].mean()))
        for places in combinations(range(grid.design.bases), count)
    ]


def arithmetic_table(grid: Grid) -> Table:
    rows = []
    for place, moved in enumerate(grid.elsewhere):
        here = [grid.runs[arm.name][grid.best(arm.name)][place][0] for arm in ARMS]
        for name, runs in (("as run", here), ("the run alone", moved["trained"]), ("both", moved["made"])):
            before = [
                f"{runs[0][f'{what}_before']:.3f}" for what in ("held_out_accuracy", "self_teacher_accuracy")
            ]
            rows.append([str(place), name, *before, *(f"{run[AFTER]:.3f}" for run in runs)])
    columns = ["base model", f"in {CAPABILITY} arithmetic", "held-out before", "self-teacher before"]
    return Table(
        "The same seeds in another arithmetic", [*columns, *(f"{arm.name}, after" for arm in ARMS)], rows
    )


def runs_panel(grid: Grid) -> Panel:
    series = []
    for name, values in list(grid.quantities().items())[:2]:
        places = [float(place) for place in range(len(values)) for _ in values[place]]
        series.append(Series(name, places, values.ravel().tolist()))
    return Panel("runs by their base model", "points", "base model", "held-out accuracy after", series)
