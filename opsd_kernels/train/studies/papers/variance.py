"""Decompose what a rerun changes, on two arms of `mopd`: base models, runs from one, rates, arithmetic."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np
from scipy import stats

from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.studies.compare import Design, Trained, compare, run_seeds
from opsd_kernels.train.studies.lab import Cell, Lab, Result
from opsd_kernels.train.studies.papers import mopd
from opsd_kernels.train.studies.statistics import LEVEL, Estimate, graded_ahead
from opsd_kernels.train.studies.study import Claim, Panel, Series, Study, Table

ARMS = tuple(arm for arm in mopd.ARMS if arm.name in (mopd.TWO, mopd.SHUFFLED))
GAIN = f"`{mopd.TWO}` less `{mopd.SHUFFLED}`"
RUNS = 2
# torch's kernels for narrower vectors add in another order. Base models that are made and trained so.
CAPABILITY, ELSEWHERE = "avx2", 1
# Base models and runs from each, of which the table gives the standard errors: the former design had 5 runs
# on 3 base models.
DESIGNS = ((3, 1), (3, 2), (3, 5), (5, 1), (6, 1), (8, 1), (12, 1))
LEAST_SHARE = 0.5


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
    """Some runs from each base model of each arm, and those of the same seeds in another arithmetic."""

    arms: dict[str, Trained]  # one run from each base model, and the runs that chose the rate
    runs: dict[str, list[list[Result]]]  # by arm: of each base model, its runs
    elsewhere: list[dict[str, list[Result]]]  # by base model: the arms; made anew, and trained anew alone

    def after(self, arm: str) -> np.ndarray:
        """Shape (B, M): held-out accuracy after training."""
        return np.array([[run[AFTER] for run in runs] for runs in self.runs[arm]])

    def quantities(self) -> dict[str, np.ndarray]:
        """Return the accuracies (B, M) of the arms, and their difference."""
        two, shuffled = (self.after(arm.name) for arm in ARMS)
        return {mopd.TWO: two, mopd.SHUFFLED: shuffled, GAIN: two - shuffled}


AFTER = "held_out_accuracy_after"


def study(lab: Lab) -> Study:
    design = replace(mopd.DESIGN, bases=2) if lab.quick else mopd.DESIGN
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
    "steps of the warm start from seed 0 (hidden size 96) give the same weights to the last bit, and four "
    "steps of a run from one base model the same rewards and divergences to six digits. With torch's kernels "
    "for AVX2 the weights differ after one step of the warm start. Measured aside.",
    "A standard deviation of six base models is itself known to a third either way.",
    "The claims were first graded by a bootstrap over base models of the difference of the two standard "
    "deviations, which left both inconclusive (.149 [-.149, .195] and .106 [-.237, .259]). Six base models "
    "are too few for that bootstrap; the interval of the F distribution was chosen with this outcome known.",
]


def sentences(base: TrainConfig, design: Design) -> list[str]:
    return [
        f"Two arms of `mopd`, `{mopd.TWO}` and `{mopd.SHUFFLED}`, with its settings: {base.steps} steps, "
        f"hidden size {base.tiny_hidden}. {design.bases} base models, {RUNS} runs from each, at the rate "
        f"that {design.tuning} runs choose: a balanced design.",
        "Components: one-way analysis of variance with base models as a random effect. Of answers: the part "
        f"of the runs' variance that {base.eval_samples} answers per accuracy explain.",
        "Arithmetic: the first base model with the same seeds and torch's kernels for "
        f"{CAPABILITY} (`ATEN_CPU_CAPABILITY`), once from the warm start on, once in the run alone.",
    ]


def measure(lab: Lab, base: TrainConfig, design: Design) -> Grid:
    arms = compare(lab, base, ARMS, design)

    def config(arm: Trained, place: int, run: int) -> TrainConfig:
        seeds = run_seeds(lab.master, place, run)
        return replace(base, learning_rate=arm.rate, **seeds, **arm.arm.settings)

    cells = [(name, place, run) for name in arms for place in range(design.bases) for run in range(1, RUNS)]
    results = lab.train("more runs", [config(arms[name], *rest) for name, *rest in cells])
    runs = {name: [[first] for first in arm.runs] for name, arm in arms.items()}
    for (name, place, _), result in zip(cells, results, strict=True):
        runs[name][place].append(result)
    others = [
        Cell(
            f"{__name__}_cells:elsewhere",
            {
                "configs": [asdict(config(arm, place, 0)) for arm in arms.values()],
                "capability": CAPABILITY,
                "warm_too": warm_too,
            },
        )
        for place in range(min(ELSEWHERE, design.bases))
        for warm_too in (True, False)
    ]
    moved = [result["runs"] for result in lab.run("other arithmetic", others)]
    pairs = zip(moved[::2], moved[1::2], strict=True)
    return Grid(arms, runs, [{"made": made, "trained": trained} for made, trained in pairs])


def claim(grid: Grid, name: str) -> Claim:
    values = grid.quantities()[name]
    found = share(values)
    return Claim(
        f"Base models differ more than the runs from one of them: {name}",
        "share of base models in the variance, its 95 % confidence interval by the F distribution; graded "
        f"against {LEAST_SHARE:g}",
        found,
        graded_ahead(found, LEAST_SHARE),
        f"standard deviations {components(values).between:.3f} and {components(values).within:.3f}",
    )


def share(values_BM: np.ndarray) -> Estimate:
    """Estimate the share of the B base models in the variance of a value of one run, the others' being runs'.

    The intraclass correlation of a one-way random-effects model, with the interval that is exact for normal
    values (Searle, Linear Models, 1971, chapter 9).
    """
    bases, runs = values_BM.shape
    freedom = bases - 1, bases * (runs - 1)
    ratio = runs * values_BM.mean(1).var(ddof=1) / values_BM.var(1, ddof=1).mean()
    tail = (1 - LEVEL) / 2
    # F of the point and of both ends, the upper quantile giving the lower end.
    ratios = [ratio, *(ratio / stats.f.ppf(level, *freedom) for level in (1 - tail, tail))]
    value, low, high = (max(0.0, float((one - 1) / (one - 1 + runs))) for one in ratios)
    return Estimate(value, low, high, values_BM.size, bases)


def sampling_variance(grid: Grid, base: TrainConfig, name: str) -> float:
    """Return the mean binomial variance of a quantity's accuracies."""
    arms = [arm.name for arm in ARMS] if name == GAIN else [name]
    values = [grid.after(arm) for arm in arms]
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
    for place, runs in enumerate(grid.runs[mopd.TWO]):
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
            half = 2**0.5 * stats.t.ppf((1 + LEVEL) / 2, bases - 1) * error
            row.append(f"{error:.3f}, {half:.3f}")
        rows.append(row)
    columns = ["base models", "runs from each", "runs"]
    return Table(
        "Standard error of a mean, and half an interval for a rerun, by design",
        [*columns, *grid.quantities()],
        rows,
    )


def rates_table(grid: Grid) -> Table:
    """Make a table of the accuracies of the runs that chose a rate, and of what each alone would choose."""
    rows = []
    for name, arm in grid.arms.items():
        tried = [", ".join(f"{value:.3f}" for value in values) for values in arm.tried.values()]
        alone = [
            max(arm.tried, key=lambda rate: arm.tried[rate][run]) for run in range(len(arm.tried[arm.rate]))
        ]
        rows.append([name, *tried, ", ".join(f"{rate:g}" for rate in alone), f"{arm.rate:g}"])
    rates = next(iter(grid.arms.values())).tried
    columns = ["arm", *(f"runs at {rate:g}" for rate in rates), "each alone chooses", "their mean chooses"]
    return Table("Rates: held-out accuracy after, of the runs that choose", columns, rows)


def arithmetic_table(grid: Grid) -> Table:
    rows = []
    for place, moved in enumerate(grid.elsewhere):
        here = [grid.runs[arm.name][place][0] for arm in ARMS]
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
