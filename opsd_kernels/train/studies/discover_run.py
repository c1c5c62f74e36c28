"""`opsd discover`: run self-distillation, best-of-k and multi-turn on the same hard questions.

Writes a table, a JSON and a figure of discovery@k, the share of the questions solved within k attempts. Its
intervals are bootstraps over questions and do not cover other base models.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from opsd_kernels import report_json
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.records.durable import write_file
from opsd_kernels.train.records.log import Progress
from opsd_kernels.train.session import open_run_directory, reproducible
from opsd_kernels.train.studies import discover as search
from opsd_kernels.train.studies.discover import Base, Budget, Search
from opsd_kernels.train.studies.statistics import percentiles, resamples

RESAMPLES = 2000
COSTS = ("attempts", "generated_answers", "completion_tokens", "context_tokens", "teacher_tokens", "updates")


def discover(config: TrainConfig, out: Path, questions: int, below: float, budget: Budget) -> dict[str, Any]:
    """Run the searches and write config.json, discovery.json and discovery.png into the new directory `out`.

    Returns the contents of discovery.json. Raises RunDirectoryError if `out` is not empty, ConfigError if the
    model or device does not exist, and ValueError if there are too few questions.
    """
    began, progress, out = time.monotonic(), Progress(), Path(out)
    open_run_directory(config, out, resume=False)
    with reproducible(config):
        base = search.load_base(config, progress)
        asked = search.hard_questions(base, questions, below)
        mean = np.mean(list(asked.values()))
        progress.say(
            f"{len(asked)} held-out questions that the base model gets right with a chance below {below:g}, "
            f"on average {mean:.2%}"
        )
        methods, matrices = run_methods(base, asked, budget, progress)
    points = powers_of_two(budget.attempts)
    found = {
        "config": dataclasses.asdict(base.config),
        "budget": dataclasses.asdict(budget),
        "below": below,
        "questions": [
            {"problem": problem, "text": base.prompt(problem).text, "chance": chance}
            for problem, chance in asked.items()
        ],
        "methods": {
            name: {"discovery": described(matrices[name], points), **method}
            for name, method in methods.items()
        },
        "seconds": time.monotonic() - began,
    }
    write_file(out / "discovery.json", report_json.dumps(found))
    draw(matrices, out / "discovery.png")
    print_table(progress.console, found, points, out)
    return found


def run_methods(
    base: Base, asked: dict[int, float], budget: Budget, progress: Progress
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """Run every method; return its record, and its (questions, attempts) matrix of questions solved."""
    problems, searches = list(asked), []
    with progress.bar("self-distillation", len(problems)) as bar:
        for done, problem in enumerate(problems, 1):
            searches.append(search.self_distil(base, problem, budget))
            bar.update(done, solved=sum(found.first is not None for found in searches))
    methods: dict[str, dict[str, Any]] = {}
    matrices: dict[str, np.ndarray] = {}

    def add(name: str, searches: Sequence[Search]) -> None:
        methods[name] = {
            "sampled": True,
            "first": [found.first for found in searches],
            "costs": costs(searches),
        }
        matrices[name] = search.solved_within(methods[name]["first"], budget.attempts)

    add("self-distillation", searches)
    exact = search.success_probabilities(base, problems)
    if exact is None:
        progress.say("best-of-k: sampling")
        add("best-of-k", search.best_of_k(base, problems, budget))
    else:
        matrices["best-of-k"] = search.chance_within(exact, budget.attempts)
        methods["best-of-k"] = {"sampled": False, "costs": {"attempts": mean_attempts(matrices["best-of-k"])}}
    progress.say("multi-turn: sampling")
    add("multi-turn", search.multi_turn(base, problems, budget))
    return methods, matrices


def costs(searches: Sequence[Search]) -> dict[str, float]:
    """Return the mean costs per question."""
    return {name: float(np.mean([getattr(found, name) for found in searches])) for name in COSTS}


def mean_attempts(solved: np.ndarray) -> float:
    """Return the mean number of attempts until the first correct one or the end of the budget."""
    # Attempt k + 1 is made for questions not solved within k.
    return float((1 + (1 - solved[:, :-1]).sum(1)).mean())


def powers_of_two(attempts: int) -> list[int]:
    """Return 1, 2, 4, ... and the whole budget."""
    return sorted({attempts, *(2**i for i in range(attempts.bit_length()))})


def curve(solved: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return discovery@k and its interval over questions, each (K,), from `solved` of shape (Q, K)."""
    # Of one base model, whose questions are independent.
    return solved.mean(0), *percentiles(resamples(range(len(solved)), RESAMPLES) @ solved)


def described(solved: np.ndarray, points: Sequence[int]) -> dict[str, list[float]]:
    """Return [value, low, high] by k."""
    lines = curve(solved)
    return {str(k): [float(line[k - 1]) for line in lines] for k in points}


def print_table(console: Console, found: dict[str, Any], points: Sequence[int], out: Path) -> None:
    table = Table(
        title=f"discovery@k, {len(found['questions'])} questions, {found['seconds']:.0f} s",
        title_justify="left",
    )
    table.add_column("k", justify="right")
    for name, method in found["methods"].items():
        table.add_column(name + ("" if method["sampled"] else ", exact"), justify="right")
    for k in points:
        table.add_row(
            str(k),
            *(
                "{:.1%} [{:.0%}, {:.0%}]".format(*method["discovery"][str(k)])
                for method in found["methods"].values()
            ),
        )
    table.add_row("attempts", *(f"{method['costs']['attempts']:.1f}" for method in found["methods"].values()))
    console.print(table)
    for name in ("discovery.json", "discovery.png"):
        console.print(f"{out / name}", soft_wrap=True)


def draw(matrices: dict[str, np.ndarray], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, solved in matrices.items():
        value, low, high = curve(solved)
        attempts = range(1, len(value) + 1)
        axes.plot(attempts, value, linewidth=1.4, label=name)
        axes.fill_between(attempts, low, high, alpha=0.15)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("k, attempts")
    axes.set_ylabel("discovery@k: share of questions solved, 95 % interval")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
