"""Make the tables and panels of the study of the law. The largest model is the main one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from scipy.stats import rankdata

from opsd_kernels.train.studies.compare import Trained
from opsd_kernels.train.studies.lab import Result
from opsd_kernels.train.studies.papers.law_measured import Measured
from opsd_kernels.train.studies.probe import MEASURES, Law, coordinates, fit, line
from opsd_kernels.train.studies.study import Panel, Series, Table

# An accuracy, one answer of those that measure it, and steps.
NEAR_FLOOR, LEAST_SHARE, WINDOW = 0.05, 1 / 600, 5


def rank_correlation(gaps: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """Return Spearman's rank correlation."""
    slope, _, explained = line(rankdata(gaps, axis=-1), rankdata(gains, axis=-1))
    return np.sign(slope) * np.sqrt(explained)


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
                str(runs.estimate(runs.gains())),
                f"{left:.3f}",
                f"{kept:+.3f}",
            ]
        )
    return Table(f"Contexts, hidden {main.hidden}", columns, rows)


FITTED = ["points", "slope", "intercept", "R^2", "error, context left out", "error of the others' mean"]


def fitted(law: Law) -> list[str]:
    numbers = (law.slope, law.intercept, law.r2, law.error, law.spread)
    return [str(len(law.points)), *(f"{number:.3f}" for number in numbers)]


def measures_table(*found: Measured) -> Table:
    """Compare the measures by environment."""
    rows = [
        [one.name, measure.replace("_", " "), *fitted(fit(one.points(measure)))]
        for one in found
        for measure in MEASURES
    ]
    return Table("Two measures", ["environment", "measure", *FITTED], rows)


def prefixes_table(elsewhere: Measured, first: dict[str, Trained]) -> Table:
    """Compare training on all tokens of `plan` and on the first alone, which decides the plan."""
    points = {point.context: point for point in elsewhere.points("consensus_gap")}
    rows = []
    for name, runs in first.items():
        everything = elsewhere.trained[name]
        gain = everything.estimate(np.subtract(runs.gains(), everything.gains()).tolist())
        rows.append(
            [
                f"`{name}`",
                f"{points[name].gap:.3f}",
                str(everything.estimate(everything.gains())),
                str(runs.estimate(runs.gains())),
                str(gain),
            ]
        )
    columns = ["context", "consensus gap", "improvement, all tokens", "first token alone", "difference"]
    return Table(f"Explanation: wrong beginnings, {elsewhere.name}", columns, rows)


def ceilings_table(*found: Measured) -> Table:
    """Compare R^2 with the largest that the scatter of the runs allows."""
    rows = []
    for one in found:
        spread = [float(np.std(runs.gains(), ddof=1)) for runs in one.trained.values() if len(runs.runs) > 1]
        fits = [fit(one.points(measure)).r2 for measure in MEASURES]
        rows.append(
            [
                one.name,
                f"{np.sqrt(np.mean(np.square(spread))) if spread else np.nan:.3f}",
                f"{max(spread, default=np.nan):.3f}",
                f"{one.ceiling:.3f}",
                *(f"{r2:.3f}" for r2 in fits),
            ]
        )
    columns = ["environment", "scatter of a context's runs", "largest", "R^2 of an exact measure"]
    return Table(
        "Explanation: chance", [*columns, *(f"R^2 of the {m.replace('_', ' ')}" for m in MEASURES)], rows
    )


def gaps_table(one: Measured) -> Table:
    """Compare the measures' predictions for contexts that were left out."""
    laws = [fit(one.points(measure)) for measure in MEASURES]
    places = sorted(range(len(one.trained)), key=lambda place: -laws[1].points[place].gap)
    rows = []
    for place in places:
        name = laws[0].points[place].context
        runs = one.trained[name]
        cells = [f"{number:.3f}" for law in laws for number in (law.points[place].gap, law.left_out[place])]
        accuracies = [
            np.mean(runs.values(f"{whose}_accuracy_{when}"))
            for whose in ("held_out", "self_teacher")
            for when in ("before", "after")
        ]
        rows.append(
            [
                f"`{name}`",
                *cells,
                str(runs.estimate(runs.gains())),
                *(f"{accuracy:.3f}" for accuracy in accuracies),
            ]
        )
    columns = ["context"]
    for measure in MEASURES:
        columns += [measure.replace("_", " "), "the others predict"]
    accuracies_of = ["held-out before", "after", "self-teacher before", "after"]
    return Table(f"Both measures, {one.name}", [*columns, "improvement", *accuracies_of], rows)


def fits_table(
    measured: dict[int, Measured], laws: dict[int, Law], plain: dict[int, Law], agreed: dict[int, Law]
) -> Table:
    def row(name: str, law: Law) -> list[str]:
        return [name, *fitted(law)]

    rows = [
        row(f"hidden {hidden}{suffix}", some[hidden])
        for some, suffix in ((laws, ""), (plain, ", plain gap"), (agreed, ", consensus gap"))
        for hidden in sorted(some)
    ]
    law = laws[max(laws)]
    odd, _ = max(
        zip(law.points, law.left_out, strict=True), key=lambda pair: abs(pair[0].improvement - pair[1])
    )
    rows.append(
        row(
            f"hidden {max(laws)} without `{odd.context}`, the farthest from the others' line",
            fit([point for point in law.points if point is not odd]),
        )
    )
    pooled = []
    for measure, suffix in zip(MEASURES, ("", ", consensus gap"), strict=True):
        points = [point for one in measured.values() for point in one.points(measure)]
        pooled.append((f"all sizes, one line{suffix}", points))
        pooled.append((f"hidden {max(laws)}, single runs{suffix}", measured[max(measured)].runs(measure)))
    for name, points in pooled:
        rows.append(
            [name, str(len(points)), *(f"{number:.3f}" for number in line(*coordinates(points))), "", ""]
        )
    return Table("Lines", ["fit", *FITTED], rows)


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
    names = sorted(by_size[max(by_size)], key=lambda name: -by_size[max(by_size)][name].gap)
    rows = [
        [
            f"`{name}`",
            *(f"{points[name].gap:.3f}, {points[name].improvement:.3f}" for points in by_size.values()),
        ]
        for name in names
    ]
    return Table("Gap and improvement by size", ["context", *(f"hidden {size}" for size in by_size)], rows)


def dotted(law: Law, of: str = "") -> Series:
    """Return a line as points, for a panel of points."""
    gaps = [point.gap for point in law.points]
    along = np.linspace(min(gaps), max(gaps), 50)
    name = f"{of}{law.slope:.2f} gap {law.intercept:+.2f}, R^2 {law.r2:.2f}"
    return Series(name, along.tolist(), (law.slope * along + law.intercept).tolist())


def scattered(one: Measured, gap: str, name: str) -> Series:
    points, spans = one.points(gap), [runs.estimate(runs.gains()) for runs in one.trained.values()]
    gaps, gains = (array.tolist() for array in coordinates(points))
    lows, highs = [span.low for span in spans], [span.high for span in spans]
    return Series(name, gaps, gains, lows, highs)


def points_panel(gap: str, measured: dict[int, Measured], laws: dict[int, Law]) -> Panel:
    series = [scattered(measured[hidden], gap, f"hidden {hidden}") for hidden in sorted(measured)]
    title, main = gap.replace("_", " "), measured[max(measured)]
    return Panel(
        f"`{main.env}`: improvement against the {title}",
        "points",
        f"{title} before training",
        "improvement",
        [*series, dotted(laws[max(laws)])],
    )


def elsewhere_panel(one: Measured) -> Panel:
    """Draw both measures of an environment into one panel."""
    series = []
    for measure in MEASURES:
        title = measure.replace("_", " ")
        series += [scattered(one, measure, title), dotted(fit(one.points(measure)), f"{title}: ")]
    return Panel(
        f"{one.name}: improvement against both gaps", "points", "before training", "improvement", series
    )


def left_out_panel(*found: Measured) -> Panel:
    series = []
    for one in found:
        for measure in MEASURES:
            law = fit(one.points(measure))
            gains = [point.improvement for point in law.points]
            series.append(Series(f"`{one.env}`, {measure.replace('_', ' ')}", list(law.left_out), gains))
    ends = [place for one in series for place in (*one.x, *one.y)]
    same = np.linspace(min(ends), max(ends), 50).tolist()
    series.append(Series("equal", same, same))
    return Panel(
        "contexts that the line has not seen",
        "points",
        "improvement predicted by the other contexts",
        "improvement measured",
        series,
    )
