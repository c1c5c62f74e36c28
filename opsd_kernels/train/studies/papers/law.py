"""Test on `secret_op` whether a context's gap predicts the improvement with it (arXiv:2605.30070)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.studies.compare import Arm, Design, Trained, compare
from opsd_kernels.train.studies.lab import Cell, Lab, Result
from opsd_kernels.train.studies.probe import (
    Law,
    Point,
    common_settings,
    coordinates,
    fit,
    line,
    measure_contexts,
)
from opsd_kernels.train.studies.statistics import Estimate, difference, estimate, graded_ahead, graded_equal
from opsd_kernels.train.studies.study import Claim, Panel, Series, Study, Table

BASE: dict[str, Any] = {
    "steps": 80, "prompts_per_step": 32, "group_size": 4, "rehearsal_prompts": 8, "eval_samples": 600,
    "eval_every": 10_000, "checkpoint_every": 10_000, "samples_kept": 0, "tensorboard": False,
}  # fmt: skip
QUICK: dict[str, Any] = {
    "steps": 3, "prompts_per_step": 4, "group_size": 3, "rehearsal_prompts": 2, "eval_samples": 24,
    "tiny_hidden": 16, "tiny_layers": 1, "tiny_heads": 2, "warm_accuracy": 2e-4, "warm_batch": 32,
    "warm_max_steps": 200,
}  # fmt: skip
# `other` misleads as `corrupted` does, and is left out for time.
FEEDBACK = ("answer", "first", "first_two", "last", "marks", "wrong", "corrupted")
CONTEXTS = (
    *(Arm(kind, {"feedback": kind, "siblings": False}) for kind in FEEDBACK),
    Arm("siblings", {"feedback": "none"}),
)
# tiny_hidden. With 128 the warm start was still on its plateau (4 %) after 1850 steps.
MAIN, SMALLER, SMALLEST = 96, 64, 48
RATES = (5e-4,)
DESIGNS = {MAIN: Design(5, 3, RATES), SMALLER: Design(1, 1, RATES), SMALLEST: Design(1, 1, RATES)}
# No run has this seed, so that the gap is independent of a run's first measurement.
PROBE_SEED, PROBE_SAMPLES = 2000, 1000
LEAST_R2, MARGIN = 0.9, 0.05
# An accuracy, one answer of those that measure it, and steps.
NEAR_FLOOR, LEAST_SHARE, WINDOW = 0.05, 1 / 600, 5


@dataclass(frozen=True)
class Measured:
    """One size of model: the runs by context, and each context's probe (JSON) per base model of a run."""

    hidden: int
    trained: dict[str, Trained]
    probes: dict[str, list[Result]]

    def points(self, gap: str = "gap") -> list[Point]:
        """Return a point per context, the mean over its runs."""
        return [
            Point(name, float(np.mean(self.probed(name, gap))), float(np.mean(runs.gains())), len(runs.runs))
            for name, runs in self.trained.items()
        ]

    def runs(self) -> list[Point]:
        return [
            Point(name, *pair)
            for name, runs in self.trained.items()
            for pair in zip(self.probed(name, "gap"), runs.gains(), strict=True)
        ]

    def probed(self, name: str, value: str) -> list[float]:
        return [probe[value]["value"] for probe in self.probes[name]]


def study(lab: Lab) -> Study:
    contexts = [
        context
        for context in CONTEXTS
        if not lab.quick or context.name in ("answer", "wrong", "corrupted", "siblings")
    ]
    measured = {
        hidden: measure(lab, config_of(hidden, lab.quick), contexts, design_of(hidden, lab.quick))
        for hidden in DESIGNS
    }
    laws = {
        hidden: fit(one.points(), common_settings(config_of(hidden, lab.quick)))
        for hidden, one in measured.items()
    }
    plain = {hidden: fit(one.points("plain_gap")) for hidden, one in measured.items()}
    laws[MAIN].save(lab.folder.parent / "fits" / "law.json")
    return Study(
        "law",
        "A predictive law: the gap before training and the improvement after",
        "A Predictive Law for On-Policy Self-Distillation From World Feedback, arXiv:2605.30070",
        "The self-teacher with its context is right more often than its student. Does that gap, measured "
        "before training, say what training with the context will bring, as a straight line over contexts, "
        "and for contexts and sizes of model that the line has not seen?",
        sentences(lab.quick),
        claims(measured, laws, plain),
        [
            contexts_table(measured[MAIN], laws[MAIN]),
            fits_table(measured, laws, plain),
            bent_table(measured[MAIN]),
            sizes_table(measured),
        ],
        [
            points_panel("gap", measured, laws),
            points_panel("plain_gap", measured, plain),
            left_out_panel(laws),
        ],
        [floor(measured[MAIN]), *NOTES],
    )


NOTES = [
    "A first run had half the steps at twice the rate, 40 at 0.001, on the same base models: R^2 .475, .752 "
    "without `corrupted`, error on a context that was left out .186 against .212 of the others' mean. This "
    "is the second, with the outcome of the first known.",
    "The line is one of equal steps, rollouts and learning rate: a budget of its own, not the end of "
    "training. With another budget it has another slope.",
    "Feedback is told to failures alone, so the second try is the same for all contexts without siblings, "
    "and subtracting it moves them without bending their line. It parts them from the contexts with "
    "siblings, where right answers are drawn again too and a second try gains less.",
    "`corrupted` is the right answer with one digit changed. The teacher repeats it and is as wrong as if "
    "it knew nothing; yet each digit is right in two attempts of three. The gap counts whole answers and "
    "misses that, while the student is taught token by token.",
    "The contexts are of one task, and several are parts of the same answer: they are fewer independent "
    "ones than they look.",
]


def config_of(hidden: int, quick: bool) -> TrainConfig:
    if not quick:
        return TrainConfig(**BASE, tiny_hidden=hidden)
    tiny = {MAIN: QUICK["tiny_hidden"], SMALLER: 12, SMALLEST: 8}
    return TrainConfig(**{**BASE, **QUICK, "tiny_hidden": tiny[hidden]})


def design_of(hidden: int, quick: bool) -> Design:
    return replace(DESIGNS[hidden], seeds=1, warm_seeds=1) if quick else DESIGNS[hidden]


def measure(lab: Lab, base: TrainConfig, contexts: Sequence[Arm], design: Design) -> Measured:
    """Measure the runs and gaps of all contexts. The base models are made with the runs."""
    samples = base.eval_samples if lab.quick else PROBE_SAMPLES
    configs = [
        [replace(base, seed=PROBE_SEED, warm_seed=warm, **context.settings) for context in contexts]
        for warm in range(design.warm_seeds)
    ]
    trained = compare(lab, base, contexts, design)
    cells = [
        Cell(f"{__name__}:probe_cell", {"configs": [asdict(config) for config in row], "samples": samples})
        for row in configs
    ]
    found: list[Any] = lab.run("gaps", cells)
    probes = {
        context.name: [found[seed % design.warm_seeds][place] for seed in range(design.seeds)]
        for place, context in enumerate(contexts)
    }
    return Measured(base.tiny_hidden, trained, probes)


def probe_cell(arguments: dict[str, Any], folder: Path) -> list[Result]:
    """Measure the gaps of several contexts on one base model."""
    from opsd_kernels.train.records.log import Progress

    configs = [TrainConfig(**config) for config in arguments["configs"]]
    return [asdict(probe) for probe in measure_contexts(configs, arguments["samples"], Progress())]


def sentences(quick: bool) -> list[str]:
    base, main = config_of(MAIN, quick), design_of(MAIN, quick)
    others = [size for size in DESIGNS if size != MAIN]
    return [
        f"`{base.env}`: {base.steps} steps of {base.prompts_per_step} prompts with {base.group_size} "
        f"answers each for every context, learning rate {main.rates[0]:g} for all: the law compares "
        f"contexts, not rates. {base.rehearsal_prompts} prompts of `+` are rehearsed in each step.",
        "Contexts: seven kinds of feedback without siblings (`other` is left out for time), and a right "
        "sibling alone.",
        f"Hidden size {MAIN}: {main.seeds} seeds on {main.warm_seeds} base models. Hidden size "
        f"{' and '.join(map(str, others))}: {design_of(others[0], quick).seeds} seed each, so their points "
        f"scatter more. Every base model stops at {base.warm_accuracy:.0%} without a context.",
        "Gap: accuracy of the teacher with its context less that of a second try, in which the student "
        "answers again without a context exactly where the teacher answers; "
        f"{base.eval_samples if quick else PROBE_SAMPLES} answers to held-out problems before training, "
        "with a seed that no run has. Plain gap: teacher less student.",
        f"Improvement: held-out accuracy after less before, {base.eval_samples} answers each, the mean over "
        "the seeds. One point per context.",
        "Intervals of R^2, slopes, intercepts and rank correlations are bootstraps over contexts, those of "
        "a context's improvement over its runs.",
    ]


def over_contexts(statistic: Callable[..., np.ndarray], *sets: Sequence[Point]) -> Estimate:
    """Estimate a statistic of gaps and improvements, with its bootstrap interval over contexts.

    `sets` are one or more lists of points with the same contexts.
    """
    values = [array for points in sets for array in coordinates(points)]

    # All resamples at once, along the first axis.
    def of(places: np.ndarray, axis: int = -1) -> np.ndarray:
        return statistic(*(array[places.astype(int)] for array in values))

    return estimate(range(len(sets[0])), of)


def rank_correlation(gaps: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """Return Spearman's rank correlation."""
    slope, _, explained = line(rankdata(gaps, axis=-1), rankdata(gains, axis=-1))
    return np.sign(slope) * np.sqrt(explained)


def claims(measured: dict[int, Measured], laws: dict[int, Law], plain: dict[int, Law]) -> list[Claim]:
    law, points = laws[MAIN], measured[MAIN].points()
    all_sizes = line(*coordinates([point for one in measured.values() for point in one.points()]))
    r2 = over_contexts(lambda gaps, gains: line(gaps, gains)[2], points)
    mean = float(np.mean([point.improvement for point in points]))
    without = [abs(point.improvement - mean) * len(points) / (len(points) - 1) for point in points]
    saved = difference(
        without, [abs(point.improvement - left) for point, left in zip(points, law.left_out, strict=True)]
    )
    order = over_contexts(rank_correlation, points)
    smallest = min(measured)
    ends = measured[MAIN].points(), measured[smallest].points()
    turned = over_contexts(
        lambda x, y, smaller_x, smaller_y: line(x, y)[0] - line(smaller_x, smaller_y)[0], *ends
    )
    start = over_contexts(lambda gaps, gains: line(gaps, gains)[1], points)
    return [
        Claim(
            "The gap before training predicts the improvement linearly (reported R^2 .95 to .99 over about "
            "six contexts)",
            f"R^2 over {len(points)} contexts, hidden {MAIN}; graded against {LEAST_R2:g}",
            r2,
            graded_ahead(
                replace(r2, value=r2.value - LEAST_R2, low=r2.low - LEAST_R2, high=r2.high - LEAST_R2)
            ),
            f"plain gap: {plain[MAIN].r2:.3f}",
        ),
        Claim(
            "The outcome of a configuration can be anticipated without training it",
            "mean absolute error on a context that was left out: of the others' mean, less that of the line",
            saved,
            graded_ahead(saved),
            f"root mean square error of the line {law.error:.3f}, of the mean {law.spread:.3f}",
        ),
        Claim(
            "A larger gap means a larger improvement",
            "rank correlation (Spearman) of gap and improvement",
            order,
            graded_ahead(order),
        ),
        Claim(
            "The line holds across sizes of model",
            f"slope at hidden {MAIN} less slope at {smallest}; "
            f"equal means within a quarter of the slope at {MAIN}, {abs(law.slope) / 4:.3f}",
            turned,
            graded_equal(turned, abs(law.slope) / 4),
            f"one line through all sizes: R^2 {all_sizes[2]:.3f}",
        ),
        harm(measured[MAIN], "wrong", "A context without information does harm (not the paper's)"),
        harm(measured[MAIN], "corrupted", "A context that misleads does harm (not the paper's)"),
        Claim(
            "A context worth no more than a second try brings nothing (of the control, not the paper's)",
            f"intercept of the line; equal means within {MARGIN:g}",
            start,
            graded_equal(start, MARGIN),
            f"plain gap: {plain[MAIN].intercept:.3f}",
        ),
    ]


def harm(main: Measured, name: str, text: str) -> Claim:
    lost = estimate([-gain for gain in main.trained[name].gains()])
    return Claim(
        text, f"held-out accuracy lost with `{name}`, hidden {main.hidden}", lost, graded_ahead(lost)
    )


def contexts_table(main: Measured, law: Law) -> Table:
    columns = [
        "context",
        "answered again",
        "student",
        "self-teacher",
        "second try",
        "plain gap",
        "gap",
        "improvement",
        "the others predict",
        "untrained `+`",
    ]
    rows = []
    for point, left in sorted(zip(law.points, law.left_out, strict=True), key=lambda pair: -pair[0].gap):
        runs = main.trained[point.context]
        shares = [probe["answered"] for probe in main.probes[point.context]]
        means = [
            f"{np.mean(main.probed(point.context, name)):.3f}"
            for name in ("student", "teacher", "second_try", "plain_gap", "gap")
        ]
        kept = np.mean([run["untrained_skill_after"] - run["untrained_skill_before"] for run in runs.runs])
        rows.append(
            [
                f"`{point.context}`",
                f"{np.mean(shares):.2f}",
                *means,
                str(estimate(runs.gains())),
                f"{left:.3f}",
                f"{kept:+.3f}",
            ]
        )
    return Table(f"Contexts, hidden {main.hidden}", columns, rows)


def fits_table(measured: dict[int, Measured], laws: dict[int, Law], plain: dict[int, Law]) -> Table:
    columns = [
        "fit",
        "points",
        "slope",
        "intercept",
        "R^2",
        "error, context left out",
        "error of the others' mean",
    ]

    def row(name: str, law: Law) -> list[str]:
        numbers = (law.slope, law.intercept, law.r2, law.error, law.spread)
        return [name, str(len(law.points)), *(f"{number:.3f}" for number in numbers)]

    rows = [row(f"hidden {hidden}", laws[hidden]) for hidden in sorted(laws)]
    rows += [row(f"hidden {hidden}, plain gap", plain[hidden]) for hidden in sorted(plain)]
    everything, law = [point for one in measured.values() for point in one.points()], laws[MAIN]
    odd, _ = max(
        zip(law.points, law.left_out, strict=True), key=lambda pair: abs(pair[0].improvement - pair[1])
    )
    rows.append(
        row(
            f"hidden {MAIN} without `{odd.context}`, the farthest from the others' line",
            fit([point for point in law.points if point is not odd]),
        )
    )
    for name, points in (
        ("all sizes, one line", everything),
        (f"hidden {MAIN}, single runs", measured[MAIN].runs()),
    ):
        rows.append(
            [name, str(len(points)), *(f"{number:.3f}" for number in line(*coordinates(points))), "", ""]
        )
    return Table("Lines", columns, rows)


def bent_table(main: Measured) -> Table:
    """Relate the gaps to the improvement at earlier steps, and on a scale without a floor."""
    gaps = np.array([np.mean(main.probed(name, "gap")) for name in main.trained])
    steps = main.trained["answer"].runs[0]["steps"]

    def row(name: str, improvement: Callable[[Result], float]) -> list[str]:
        gains = np.array([np.mean([improvement(run) for run in runs.runs]) for runs in main.trained.values()])
        return [name, *(f"{number:.3f}" for number in (*line(gaps, gains), rank_correlation(gaps, gains)))]

    rows = [
        row(
            f"reward of {WINDOW} training steps up to step {last}, less accuracy before",
            partial(rewarded, last=last),
        )
        for last in (max(1, steps * quarter // 4) for quarter in (1, 2, 3, 4))
    ]
    rows.append(
        row(
            "accuracy after less before, both as log-odds",
            lambda run: log_odds(run, "after") - log_odds(run, "before"),
        )
    )
    return Table(
        f"Improvement measured otherwise, hidden {main.hidden}",
        ["improvement", "slope", "intercept", "R^2", "rank correlation"],
        rows,
    )


def rewarded(run: Result, last: int) -> float:
    rewards = [reward for _, reward in run["curves"]["reward"]][max(0, last - WINDOW) : last]
    return float(np.mean(rewards)) - run["held_out_accuracy_before"]


def log_odds(run: Result, when: str) -> float:
    share = min(max(run[f"held_out_accuracy_{when}"], LEAST_SHARE), 1 - LEAST_SHARE)
    return float(np.log(share / (1 - share)))


def floor(main: Measured) -> str:
    """Describe how many contexts left the student near zero."""
    low = [
        f"`{name}`"
        for name, runs in main.trained.items()
        if np.mean(runs.values("held_out_accuracy_after")) < NEAR_FLOOR
    ]
    return (
        f"{len(low)} of {len(main.trained)} contexts left the student below {NEAR_FLOOR:.0%} "
        f"({', '.join(low) or 'none'}): nothing is left to lose there, and the line bends. Two attempts to "
        "mend it: *Improvement measured otherwise* has the same runs at earlier steps and in log-odds, "
        "*Lines* the fit without the context that is farthest from the line of the others."
    )


def sizes_table(measured: dict[int, Measured]) -> Table:
    by_size = {
        hidden: {point.context: point for point in measured[hidden].points()} for hidden in sorted(measured)
    }
    names = sorted(by_size[MAIN], key=lambda name: -by_size[MAIN][name].gap)
    rows = [
        [
            f"`{name}`",
            *(f"{points[name].gap:.3f}, {points[name].improvement:.3f}" for points in by_size.values()),
        ]
        for name in names
    ]
    return Table("Gap and improvement by size", ["context", *(f"hidden {size}" for size in by_size)], rows)


def dotted(law: Law) -> Series:
    """Return a line as points, for a panel of points."""
    gaps = [point.gap for point in law.points]
    along = np.linspace(min(gaps), max(gaps), 50)
    name = f"{law.slope:.2f} gap {law.intercept:+.2f}, R^2 {law.r2:.2f}"
    return Series(name, along.tolist(), (law.slope * along + law.intercept).tolist())


def scattered(one: Measured, gap: str = "gap") -> Series:
    points, spans = one.points(gap), [estimate(runs.gains()) for runs in one.trained.values()]
    gaps, gains = (array.tolist() for array in coordinates(points))
    lows, highs = [span.low for span in spans], [span.high for span in spans]
    return Series(f"hidden {one.hidden}", gaps, gains, lows, highs)


def points_panel(gap: str, measured: dict[int, Measured], laws: dict[int, Law]) -> Panel:
    series = [*(scattered(measured[hidden], gap) for hidden in sorted(measured)), dotted(laws[MAIN])]
    return Panel(
        f"improvement against {gap.replace('_', ' ')}",
        "points",
        f"{gap.replace('_', ' ')} before training",
        "improvement",
        series,
    )


def left_out_panel(laws: dict[int, Law]) -> Panel:
    series = [
        Series(
            f"hidden {hidden}",
            list(laws[hidden].left_out),
            [point.improvement for point in laws[hidden].points],
        )
        for hidden in sorted(laws)
    ]
    everywhere = [
        place
        for law in laws.values()
        for place in (*law.left_out, *(point.improvement for point in law.points))
    ]
    same = np.linspace(min(everywhere), max(everywhere), 50).tolist()
    series.append(Series("equal", same, same))
    return Panel(
        "contexts that the line has not seen",
        "points",
        "improvement predicted by the other contexts",
        "improvement measured",
        series,
    )
