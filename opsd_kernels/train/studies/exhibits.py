"""Make the tables and panels that studies of arms have in common."""

from __future__ import annotations

import numpy as np

from opsd_kernels.train.studies.compare import Trained
from opsd_kernels.train.studies.statistics import Estimate
from opsd_kernels.train.studies.study import Panel, Series, Table


def after(trained: Trained) -> list[float]:
    return trained.values("held_out_accuracy_after")


def bars(name: str, found: dict[str, Estimate]) -> Series:
    values = list(found.values())
    return Series(
        name, list(found), [e.value for e in values], [e.low for e in values], [e.high for e in values]
    )


def accuracies(trained: dict[str, Trained], title: str = "held-out accuracy after training") -> Panel:
    """Make a panel with a bar per arm."""
    return Panel(
        title,
        "bars",
        "arm",
        "held-out accuracy",
        [bars("after", {name: arm.estimate(after(arm)) for name, arm in trained.items()})],
    )


def curves(title: str, trained: dict[str, Trained], curve: str = "held_out_accuracy") -> Panel:
    """Make a panel of a curve's means over the seeds, with a line per arm."""
    series = []
    for name, arm in trained.items():
        inner = [[value for _, value in run["curves"][curve]] for run in arm.runs]
        whole = [
            [run[f"{curve}_before"], *values, run[f"{curve}_after"]]
            for run, values in zip(arm.runs, inner, strict=True)
        ]
        steps = [0, *(step for step, _ in arm.runs[0]["curves"][curve]), arm.runs[0]["steps"]]
        series.append(Series(name, steps, np.mean(whole, axis=0).tolist()))
    return Panel(title, "lines", "step", title, series)


def outcomes(title: str, trained: dict[str, Trained]) -> Table:
    """Make a table of accuracies by arm: means over the seeds, and an interval for the trained skill.

    Runs of a language model do not measure the self-teacher.
    """
    measured = next(iter(trained.values())).runs[0]
    beside = {
        name: key
        for name, key in (("self-teacher", "self_teacher_accuracy"), ("untrained", "untrained_skill"))
        if f"{key}_before" in measured
    }
    columns = ["arm", "learning rate", "held-out before", "held-out after"]
    columns += [column for name in beside for column in (f"{name} before", "after")]
    rows = []
    for name, arm in trained.items():
        means = [
            f"{np.mean(arm.values(f'{key}_{when}')):.3f}"
            for key in beside.values()
            for when in ("before", "after")
        ]
        rows.append(
            [
                name,
                f"{arm.rate:g}",
                f"{np.mean(arm.values('held_out_accuracy_before')):.3f}",
                str(arm.estimate(after(arm))),
                *means,
            ]
        )
    return Table(title, columns, rows)


def costs(trained: dict[str, Trained], title: str = "Costs of a run") -> Table:
    """Make a table of the numbers of answers and tokens of each arm, means over the seeds."""
    names = list(next(iter(trained.values())).runs[0]["costs"])
    rows = [
        [name, *(f"{np.mean([run['costs'][cost] for run in arm.runs]):,.0f}" for cost in names)]
        for name, arm in trained.items()
    ]
    return Table(title, ["arm", *(name.replace("_", " ") for name in names)], rows)
