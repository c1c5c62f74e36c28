"""Run the cells of `opsd reproduce discovery`.

They find hard questions of each base model, choose learning rates, search, and measure how the base model
reads feedback.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.contexts import build_contexts
from opsd_kernels.train.records.log import Progress
from opsd_kernels.train.sampling.rollout import requests
from opsd_kernels.train.session import reproducible
from opsd_kernels.train.studies import discover
from opsd_kernels.train.studies.compare import run_seeds
from opsd_kernels.train.studies.discover import Budget, chance_within, solved_within
from opsd_kernels.train.studies.discover_run import costs
from opsd_kernels.train.studies.lab import Cell, Lab, Result, warm_cell
from opsd_kernels.train.types import Context

ONE = "one failure, `counts`"
SELF, UNTOLD, BEST = "self-distillation", "self-distillation, told `wrong`", "best-of-k"
# Settings, batch.
VARIANTS: dict[str, tuple[dict[str, Any], int | None]] = {
    "frozen teacher": ({"teacher": "frozen"}, None),
    "batches of 4": ({}, 4),
}
# Attempts per question whose failures are shown to the base model, and the stream of random numbers.
TOLD_SAMPLES, TOLD_STREAM = 16, 26


@dataclass(frozen=True)
class Design:
    """The design: `questions` hard questions of each of `bases` base models.

    The rates are chosen on `tuning` other questions of each of the first `tuned` base models.
    """

    bases: int = 6
    questions: int = 16
    tuned: int = 3
    tuning: int = 4
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    below: float = 0.01
    attempts: int = 256
    batch: int = 8
    windows: tuple[int, ...] = (3, 1)
    # Numbers of the first base models on whose questions the control and the variants run.
    controls: int = 4
    varied: int = 2
    # warm_accuracy of one more base model, with a shorter warm start.
    other: float | None = 0.02

    def quick(self) -> Design:
        return dataclasses.replace(
            self,
            bases=1,
            questions=3,
            tuned=1,
            rates=self.rates[1:2],
            below=1.0,
            attempts=10,
            batch=4,
            windows=(2,),
            other=None,
            controls=1,
            varied=1,
        )

    def budget(self, window: int = 1, batch: int | None = None) -> Budget:
        return Budget(self.attempts, batch or self.batch, window)


@dataclass(frozen=True)
class Found:
    """All measurements.

    Rows are the questions of all base models, in their order; columns are numbers of attempts.
    """

    design: Design
    rates: dict[str, float]
    scores: dict[str, dict[float, float]]
    bases: np.ndarray  # (Q,) which base model
    chances: np.ndarray  # (Q,) of the base model, exact
    solved: dict[str, np.ndarray]  # (Q, K) by method; the control has the first questions only
    costs: dict[str, dict[str, float]]
    told: dict[str, np.ndarray]  # (Q,) by the context
    variants: dict[str, np.ndarray]  # (first questions, K) of self-distillation in other settings
    # The first base model after another warm start, at hard questions of its own: chances, solved, told.
    other: dict[str, np.ndarray] | None


def measure(lab: Lab, config: TrainConfig, design: Design) -> Found:
    asked, spare = ask(lab, config, design)
    configs = {base: seeded(config, lab, base) for base in asked}
    views: dict[str, dict[str, Any]] = {SELF: {}, UNTOLD: {"feedback": "wrong"}}
    rates, scores = choose(lab, configs, design, views, spare)

    def searched(
        title: str, method: str, bases: int, settings: dict[str, Any], budget: Budget
    ) -> list[discover.Search]:
        cells = [
            search_cell(dataclasses.replace(configs[base], **settings), method, list(asked[base]), budget)
            for base in range(bases)
        ]
        return [discover.Search(**found) for result in lab.run(title, cells) for found in result["searches"]]

    searches = {
        SELF: searched(SELF, "self_distil", design.bases, {"learning_rate": rates[SELF]}, design.budget())
    }
    told = [
        Cell(
            f"{__name__}:told",
            {"config": asdict(configs[base]), "problems": list(asked[base]), "lines": max(design.windows)},
        )
        for base in asked
    ]
    views_told = lab.run("chances with feedback in view", told)
    for window in design.windows:
        searches[turns(window)] = searched(
            turns(window), "multi_turn", design.bases, {}, design.budget(window)
        )
    searches[UNTOLD] = searched(
        "self-distillation, not told",
        "self_distil",
        design.controls,
        {**views[UNTOLD], "learning_rate": rates[UNTOLD]},
        design.budget(),
    )
    variants = {}
    for name, (settings, batch) in VARIANTS.items():
        found = searched(
            name,
            "self_distil",
            design.varied,
            {"learning_rate": rates[SELF], **settings},
            design.budget(batch=batch),
        )
        variants[name] = solved_within([search.first for search in found], design.attempts)
    chances = np.array([chance for base in asked for chance in asked[base].values()])
    solved = {
        name: solved_within([search.first for search in found], design.attempts)
        for name, found in searches.items()
    }
    other = None
    if design.other is not None:
        changed = dataclasses.replace(configs[0], warm_accuracy=design.other, learning_rate=rates[SELF])
        other = other_start(lab, changed, design)
    return Found(
        design,
        rates,
        scores,
        np.array([base for base in asked for _ in asked[base]]),
        chances,
        {BEST: chance_within(chances, design.attempts), **solved},
        {name: costs(found) for name, found in searches.items()},
        {
            name: np.array([value for result in views_told for value in result[name]])
            for name in views_told[0]
        },
        variants,
        other,
    )


def other_start(lab: Lab, config: TrainConfig, design: Design) -> dict[str, np.ndarray]:
    lab.run("another base", [warm_cell(config)])
    hard = lab.run(
        "another base: questions",
        [
            Cell(
                f"{__name__}:questions",
                {"config": asdict(config), "count": design.questions, "below": design.below},
            )
        ],
    )
    problems, chances = zip(*hard[0]["questions"], strict=True)
    told_cell = Cell(
        f"{__name__}:told",
        {"config": asdict(config), "problems": list(problems), "lines": max(design.windows)},
    )
    told_by_view, found = lab.run(
        "another base: searches",
        [told_cell, search_cell(config, "self_distil", list(problems), design.budget())],
    )
    solved = solved_within([search["first"] for search in found["searches"]], design.attempts)
    return {"chances": np.array(chances), "solved": solved, "told": np.array(told_by_view[ONE])}


def seeded(config: TrainConfig, lab: Lab, base: int) -> TrainConfig:
    return dataclasses.replace(config, **run_seeds(lab.master, base, 0))


def turns(window: int) -> str:
    return f"multi-turn, last {window}"


def ask(
    lab: Lab, config: TrainConfig, design: Design
) -> tuple[dict[int, dict[int, float]], dict[int, list[int]]]:
    """Return each base model's questions with their chances, and those on which rates are chosen."""
    bases = [seeded(config, lab, base) for base in range(design.bases)]
    lab.run("base models", [warm_cell(base) for base in bases])
    counts = [
        design.questions + (design.tuning if base < design.tuned else 0) for base in range(design.bases)
    ]
    cells = [
        Cell(f"{__name__}:questions", {"config": asdict(base), "count": n, "below": design.below})
        for base, n in zip(bases, counts, strict=True)
    ]
    hard = [result["questions"] for result in lab.run("questions", cells)]
    asked = {base: dict(found[: design.questions]) for base, found in enumerate(hard)}
    spare = {base: [problem for problem, _ in hard[base][design.questions :]] for base in range(design.tuned)}
    return asked, spare


def choose(
    lab: Lab,
    configs: dict[int, TrainConfig],
    design: Design,
    views: dict[str, dict[str, Any]],
    spare: dict[int, list[int]],
) -> tuple[dict[str, float], dict[str, dict[float, float]]]:
    """Choose the learning rate of each feedback; return rates and scores."""
    if len(design.rates) == 1:
        return dict.fromkeys(views, design.rates[0]), {}
    tried = [(name, rate, base) for name in views for rate in design.rates for base in spare]
    cells = [
        search_cell(
            dataclasses.replace(configs[base], learning_rate=rate, **views[name]),
            "self_distil",
            spare[base],
            design.budget(),
        )
        for name, rate, base in tried
    ]
    results = lab.run("learning rates", cells)
    by_base: dict[str, dict[float, list[float]]] = {name: {} for name in views}
    for (name, rate, _), result in zip(tried, results, strict=True):
        solved = solved_within([search["first"] for search in result["searches"]], design.attempts)
        by_base[name].setdefault(rate, []).append(float(solved.mean()))
    scores = {
        name: {rate: float(np.mean(values)) for rate, values in of.items()} for name, of in by_base.items()
    }
    return {name: max(scores[name], key=scores[name].__getitem__) for name in views}, scores


def search_cell(config: TrainConfig, method: str, problems: Sequence[int], budget: Budget) -> Cell:
    return Cell(
        f"{__name__}:search",
        {"config": asdict(config), "method": method, "problems": list(problems), "budget": asdict(budget)},
    )


def search(arguments: dict[str, Any], folder: Path) -> Result:
    """Run one method at some questions."""
    config, budget = TrainConfig(**arguments["config"]), Budget(**arguments["budget"])
    with reproducible(config):
        base = discover.load_base(config, Progress())
        if arguments["method"] == "self_distil":
            found = [discover.self_distil(base, problem, budget) for problem in arguments["problems"]]
        else:
            found = discover.multi_turn(base, arguments["problems"], budget)
    return {"searches": [asdict(one) for one in found]}


def questions(arguments: dict[str, Any], folder: Path) -> Result:
    """Find hard questions of a base model, each with its chance."""
    config = TrainConfig(**arguments["config"])
    with reproducible(config):
        hard = discover.hard_questions(
            discover.load_base(config, Progress()), arguments["count"], arguments["below"]
        )
    return {"questions": list(hard.items())}


def told(arguments: dict[str, Any], folder: Path) -> Result:
    """Return the base model's chance at each question, without context and with feedback on its failures."""
    config, problems, lines = TrainConfig(**arguments["config"]), arguments["problems"], arguments["lines"]
    with reproducible(config):
        base = discover.load_base(config, Progress())
        asked = requests([base.prompt(problem) for problem in problems], TOLD_SAMPLES)
        rollouts = [
            r
            for r in base.sampler.sample(base.model, base.task, asked, config.seed, TOLD_STREAM)
            if not r.verdict.success
        ]
        contexts = build_contexts(
            rollouts, dataclasses.replace(base.config, siblings=False), config.seed, TOLD_STREAM
        )

        def mean(views: Sequence[tuple[int, Context | None]]) -> list[float]:
            chances = discover.success_probabilities(
                base, [problems[group] for group, _ in views], [view for _, view in views]
            )
            places = np.array([group for group, _ in views])
            return [float(np.mean(np.array(chances)[places == group])) for group in range(len(problems))]

        last = [
            (group, [str(r.verdict.feedback) for r in rollouts if r.group == group][-lines:])
            for group in range(len(problems))
        ]
        return {
            "nothing": mean([(group, Context()) for group in range(len(problems))]),
            "`wrong`": mean([(group, Context((), "wrong")) for group in range(len(problems))]),
            ONE: mean([(r.group, context) for r, context in zip(rollouts, contexts, strict=True)]),
            f"{lines} failures, `counts`": mean(
                [(group, Context((), "\n".join(texts))) for group, texts in last]
            ),
        }
