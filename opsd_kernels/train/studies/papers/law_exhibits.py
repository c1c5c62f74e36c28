"""Make the tables and panels of the study of the law. The largest model is the main one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from scipy.stats import rankdata

from opsd_kernels.train.studies.lab import Result
from opsd_kernels.train.studies.papers.law_measured import Measured
from opsd_kernels.train.studies.probe import Law, coordinates, fit, line
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
    everything, law = [point for one in measured.values() for point in one.points()], laws[max(laws)]
    odd, _ = max(
        zip(law.points, law.left_out, strict=True), key=lambda pair: abs(pair[0].improvement - pair[1])
    )
    rows.append(
        row(
            f"hidden {max(laws)} without `{odd.context}`, the farthest from the others' line",
            fit([point for point in law.points if point is not odd]),
        )
    )
    for name, points in (
        ("all sizes, one line", everything),
        (f"hidden {max(laws)}, single runs", measured[max(measured)].runs()),
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
    names = sorted(by_size[max(by_size)], key=lambda name: -by_size[max(by_size)][name].gap)
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
    points, spans = one.points(gap), [runs.estimate(runs.gains()) for runs in one.trained.values()]
    gaps, gains = (array.tolist() for array in coordinates(points))
    lows, highs = [span.low for span in spans], [span.high for span in spans]
    return Series(f"hidden {one.hidden}", gaps, gains, lows, highs)


def points_panel(gap: str, measured: dict[int, Measured], laws: dict[int, Law]) -> Panel:
    series = [*(scattered(measured[hidden], gap) for hidden in sorted(measured)), dotted(laws[max(laws)])]
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
