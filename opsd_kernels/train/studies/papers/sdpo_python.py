"""Test SDPO (arXiv:2601.20802) with a language model, SmolLM2-135M, on `python`: contexts against GRPO.

The papers' feedback is errors and failing tests. Takes hours on two CPU cores.
"""

from __future__ import annotations

import numpy as np

from opsd_kernels.train.studies.compare import Trained
from opsd_kernels.train.studies.exhibits import accuracies, after, bars, costs, outcomes
from opsd_kernels.train.studies.lab import Lab
from opsd_kernels.train.studies.papers.python_runs import GRPO, SIBLINGS, sentences, trained
from opsd_kernels.train.studies.papers.sdpo import rates
from opsd_kernels.train.studies.statistics import difference, graded_ahead
from opsd_kernels.train.studies.study import SEEDS, Claim, Panel, Study

ANSWER, ERROR, TEST, WRONG = "answer", "error", "test", "wrong"
WORDS = {
    SIBLINGS: "a right sibling, and no feedback",
    ANSWER: "the right answer as feedback",
    ERROR: "the interpreter's error as feedback",
    TEST: "the first failing test as feedback",
}


def study(lab: Lab) -> Study:
    runs = trained(lab)
    return Study(
        "sdpo_python",
        "SDPO against GRPO with a language model",
        "Reinforcement Learning via Self-Distillation, arXiv:2601.20802",
        "At equal numbers of generated answers: does SmolLM2-135M learn to write small Python functions "
        "faster from itself, shown a right sibling, an answer, an error or a failing test, than by a policy "
        "gradient on its rewards? And do errors and tests teach a model of this size anything?",
        [
            *sentences(runs, lab.quick),
            "Context `error`: the interpreter's message and line, or that a test failed. `test`: the first "
            "failing test, with what was expected and what came. `wrong`: that the attempt was wrong, and no "
            "more, which is the control of both.",
            "GRPO: rewards less their group's mean, without division by the standard deviation, without a KL "
            "penalty.",
        ],
        [*against_grpo(runs), *beyond_control(runs), *beside_siblings(runs)],
        [
            outcomes("Accuracies", runs),
            rates("python", {name: arm for name, arm in runs.items() if arm.tried}),
            costs(runs),
        ],
        [accuracies(runs, "`python`: held-out accuracy after training"), forgotten(runs)],
        NOTES,
        over=SEEDS,
    )


NOTES = [
    "Where the feedback is the answer itself, self-distillation is close to imitation, which GRPO cannot do. "
    "Siblings come from the model's own answers, as GRPO's rewards do: that is the fair comparison.",
    "Equal numbers of generated answers leave out what the teacher reads, which the table of costs has.",
]


def against_grpo(runs: dict[str, Trained]) -> list[Claim]:
    claims = []
    for name, words in WORDS.items():
        if name not in runs:
            continue
        ahead = difference(after(runs[name]), after(runs[GRPO.name]), runs[name].bases)
        claims.append(
            Claim(
                f"SDPO with {words} beats GRPO at equal numbers of generated answers",
                "held-out accuracy after training, SDPO less GRPO",
                ahead,
                graded_ahead(ahead),
                f"gains: {np.mean(runs[name].gains()):+.3f} and {np.mean(runs[GRPO.name].gains()):+.3f}",
            )
        )
    return claims


def beyond_control(runs: dict[str, Trained]) -> list[Claim]:
    """Compare errors and tests with the verdict alone."""
    return [
        ahead_of(runs, name, WRONG, f"{WORDS[name][0].upper()}{WORDS[name][1:]} teaches more than a verdict")
        for name in (ERROR, TEST)
        if name in runs
    ]


def beside_siblings(runs: dict[str, Trained]) -> list[Claim]:
    """Compare siblings with and without feedback."""
    return [
        ahead_of(
            runs,
            f"{SIBLINGS} + {name}",
            SIBLINGS,
            f"Beside a right sibling, {WORDS[name].removesuffix(' as feedback')} teaches something",
        )
        for name in (ANSWER, ERROR, TEST)
        if f"{SIBLINGS} + {name}" in runs
    ]


def ahead_of(runs: dict[str, Trained], name: str, other: str, text: str) -> Claim:
    ahead = difference(after(runs[name]), after(runs[other]), runs[name].bases)
    return Claim(
        text, f"held-out accuracy after training, `{name}` less `{other}`", ahead, graded_ahead(ahead)
    )


def forgotten(runs: dict[str, Trained]) -> Panel:
    """Draw the change in a skill that is not trained: sums of single digits."""
    changes = {
        name: arm.estimate(
            np.subtract(arm.values("untrained_skill_after"), arm.values("untrained_skill_before")).tolist()
        )
        for name, arm in runs.items()
    }
    return Panel("untrained skill (sums): change", "bars", "arm", "change", [bars("change", changes)])
