"""Test SDPO (arXiv:2601.20802) on `secret_op` and `expr`: against GRPO, other teachers and objectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.config.presets import PRESETS
from opsd_kernels.train.studies.compare import Arm, Design, Trained, compare, first_step_at
from opsd_kernels.train.studies.exhibits import accuracies, after, costs, curves, outcomes
from opsd_kernels.train.studies.lab import Lab
from opsd_kernels.train.studies.statistics import difference, graded_ahead, graded_equal
from opsd_kernels.train.studies.study import Claim, Study, Table

BASE = {
    "rehearsal_prompts": 0, "steps": 120, "prompts_per_step": 16, "group_size": 4, "eval_every": 20,
    "probe_samples": 200, "eval_samples": 500, "checkpoint_every": 10_000, "tensorboard": False,
    "tiny_hidden": 64,
}  # fmt: skip
QUICK = {
    "steps": 2, "prompts_per_step": 4, "eval_every": 1, "probe_samples": 8, "eval_samples": 16,
    "tiny_hidden": 16, "tiny_layers": 1, "tiny_heads": 2, "warm_accuracy": 1e-9, "warm_batch": 32,
}  # fmt: skip
SDPO, GRPO = "SDPO", "GRPO"
TOLD, MARKS, SIBLINGS = "SDPO, feedback alone", "SDPO, marks alone", "SDPO, siblings alone"
LIVE, FROZEN, TRUST = "live teacher", "frozen teacher", "trust-region teacher"
TOPK, SAMPLED = "top 4", "sampled token"
ARMS = {
    "secret_op": (
        Arm(SDPO),
        Arm(TOLD, {"siblings": False}),
        Arm(MARKS, {"siblings": False, "feedback": "marks"}),
        Arm(SIBLINGS, {"feedback": "none"}),
        Arm(GRPO, {"policy_weight": 1.0}),
        Arm("half GRPO", {"policy_weight": 0.5}),
        Arm(LIVE, {"teacher": "live"}),
        Arm(FROZEN, {"teacher": "frozen"}),
        Arm(TRUST, {"teacher": "trust_region"}),
        Arm(TOPK, {"topk": 4}),
        Arm(SAMPLED, {"objective": "sampled_token"}),
    ),
    "expr": (
        Arm(SDPO),
        Arm(SIBLINGS, {"feedback": "none"}),
        Arm(GRPO, {"policy_weight": 1.0}),
        # Why the first two do not beat the third: a teacher with more feedback, and a rate below the list.
        Arm(f"{SDPO}, told the answer", {"feedback": "answer"}),
        Arm(f"{SDPO} at 1e-4", {"learning_rate": 1e-4}),
        Arm(f"{GRPO} at 1e-4", {"policy_weight": 1.0, "learning_rate": 1e-4}),
    ),
}
HEADLINE = (SDPO, SIBLINGS, GRPO)
AFTER = "held-out accuracy after training"
# The arms of the claims, each at a rate of its own. The others have that of SDPO.
NEEDED = (*HEADLINE, LIVE, TOPK, SAMPLED)
# At 2e-3 and 128 answers per step SDPO lost accuracy in 40 steps: .27 to .17 with feedback, to .01 with
# siblings alone.
# Two runs chose a rate that was unstable on other base models: in a first pair of runs of this study .001 for
# siblings alone, .28 behind GRPO, where the other master seed had it .04 ahead. So all base models choose.
DESIGN = Design(tuning=6, rates=(2e-4, 5e-4, 1e-3))
# Teachers hardly differ while the student has hardly changed: a longer run at the highest rate, for the two
# extremes alone.
LONG, LONG_DESIGN = {"steps": 300, "eval_every": 50}, Design(bases=5, seeds=1, rates=DESIGN.rates[-1:])
MARGIN = 0.05


def study(lab: Lab) -> Study:
    design, few = (DESIGN.quick(), LONG_DESIGN.quick()) if lab.quick else (DESIGN, LONG_DESIGN)
    trained = {env: train(lab, env, design) for env in ARMS}
    told = trained["secret_op"]
    long = compare(lab, base("secret_op", lab.quick, LONG), [told[name].arm for name in (SDPO, LIVE)], few)
    return Study(
        "sdpo",
        "SDPO against GRPO on toys",
        "Reinforcement Learning via Self-Distillation, arXiv:2601.20802",
        "At equal numbers of generated answers: does a model that distils itself, with feedback or a "
        "sibling's right answer in the teacher's view, learn faster than by a policy gradient on its "
        "rewards? Which teacher, and how much of its distribution, does that take?",
        sentences(lab.quick),
        [
            *headlines("secret_op", told),
            *headlines("expr", trained["expr"]),
            *teachers(told, long),
            *logits(told),
        ],
        [
            *(
                table
                for env, found in trained.items()
                for table in (
                    outcomes(f"{env}: accuracies", found),
                    rates(env, found),
                    costs(found, f"{env}: costs"),
                )
            ),
            outcomes("secret_op, the longer runs: accuracies", long),
        ],
        [
            *(
                curves(f"{env}: held-out accuracy", {name: found[name] for name in HEADLINE})
                for env, found in trained.items()
            ),
            *(accuracies(found, f"{env}: {AFTER}") for env, found in trained.items()),
            curves("secret_op, the longer runs: self-teacher's accuracy", long, "self_teacher_accuracy"),
        ],
        NOTES,
    )


def base(env: str, quick: bool, changes: dict[str, int] | None = None) -> TrainConfig:
    return TrainConfig(**{"env": env, **PRESETS[env], **BASE, **(changes or {}), **(QUICK if quick else {})})


def arms(env: str, quick: bool) -> Sequence[Arm]:
    return [arm for arm in ARMS[env] if not quick or arm.name in NEEDED]


def train(lab: Lab, env: str, design: Design) -> dict[str, Trained]:
    """Train the arms of an environment; the rates of those in claims are chosen."""
    config, all_arms = base(env, lab.quick), arms(env, lab.quick)
    found = compare(lab, config, [arm for arm in all_arms if arm.name in NEEDED], design)
    others = [arm for arm in all_arms if arm.name not in NEEDED]
    found |= compare(lab, config, others, replace(design, rates=(found[SDPO].rate,)))
    return {arm.name: found[arm.name] for arm in all_arms}


def headlines(env: str, found: dict[str, Trained]) -> list[Claim]:
    """Compare SDPO, with and without feedback, with GRPO."""
    claims = []
    for name, words in (
        (SDPO, "feedback and siblings"),
        (SIBLINGS, "siblings alone, as where rewards are all there is"),
    ):
        ahead = difference(after(found[name]), after(found[GRPO]), found[name].bases)
        saved = found[name].estimate(savings(found[name], found[GRPO]))
        claims += [
            Claim(
                f"{env}: SDPO ({words}) beats GRPO at equal numbers of generated answers",
                f"{AFTER}, SDPO less GRPO",
                ahead,
                graded_ahead(ahead),
            ),
            Claim(
                f"{env}: SDPO ({words}) needs fewer generated answers to GRPO's final accuracy",
                "share of GRPO's generated answers that SDPO does not need",
                saved,
                graded_ahead(saved),
                reached(found[name], found[GRPO]),
            ),
        ]
    return claims


def savings(mine: Trained, theirs: Trained) -> list[float]:
    """Return the share of the other run's answers that mine saves to its final accuracy, by seed; else 0."""
    found = []
    for run, other in zip(mine.runs, theirs.runs, strict=True):
        at = first_step_at(run, other["held_out_accuracy_after"])
        found.append(0.0 if at is None else 1 - at / other["steps"])
    return found


def reached(mine: Trained, theirs: Trained) -> str:
    """Describe the savings: GRPO's gain, and how many runs reached it."""
    levels = theirs.values("held_out_accuracy_after")
    there = [first_step_at(run, level) is not None for run, level in zip(mine.runs, levels, strict=True)]
    began = np.mean(theirs.values("held_out_accuracy_before"))
    text = (
        f"GRPO went from {began:.3f} to {np.mean(levels):.3f}; reached by {sum(there)} of {len(there)} runs"
    )
    left = 1 - float(np.mean(savings(mine, theirs)))
    if all(there) and 0 < left < 1:
        return f"{text}, with {1 / left:.1f} times fewer answers on average"
    return text


def teachers(found: dict[str, Trained], long: dict[str, Trained]) -> list[Claim]:
    """Compare the EMA teacher with the live student."""
    claims = []
    for runs, words in (
        (found, "at its best rate"),
        (long, f"over {long[SDPO].runs[0]['steps']} steps at rate {long[SDPO].rate:g}"),
    ):
        ahead = difference(after(runs[SDPO]), after(runs[LIVE]), runs[SDPO].bases)
        ended = {name: np.mean(runs[name].values("self_teacher_accuracy_after")) for name in (SDPO, LIVE)}
        claims.append(
            Claim(
                f"A live teacher diverges, a slow copy does not, {words}",
                f"{AFTER}, EMA teacher less live teacher",
                ahead,
                graded_ahead(ahead),
                f"The self-teacher's own accuracy ended at {ended[LIVE]:.3f} live "
                f"and {ended[SDPO]:.3f} as a slow copy",
            )
        )
    return claims


def logits(found: dict[str, Trained]) -> list[Claim]:
    """Compare the whole distribution with its top entries and with the sampled token."""
    whole, sampled, top = (after(found[name]) for name in (SDPO, SAMPLED, TOPK))
    bases = found[SDPO].bases
    denser, gap = difference(whole, sampled, bases), difference(top, whole, bases)
    return [
        Claim(
            "Distilling the whole distribution beats the sampled token",
            f"{AFTER}, full vocabulary less sampled token",
            denser,
            graded_ahead(denser),
        ),
        Claim(
            "The top of the distribution is as good as all",
            f"{AFTER}, top 4 less full vocabulary; equal within {MARGIN}",
            gap,
            graded_equal(gap, MARGIN),
        ),
    ]


def rates(env: str, found: dict[str, Trained]) -> Table:
    """Make a table of held-out accuracies in the runs on which the rates were chosen."""
    listed = sorted({rate for arm in found.values() for rate in arm.tried})
    rows = [
        [name, *(f"{np.mean(arm.tried[rate]):.3f}" for rate in listed), f"{arm.rate:g}"]
        for name, arm in found.items()
        if arm.tried or not listed
    ]
    return Table(
        f"{env}: held-out accuracy by learning rate, mean of the runs that choose it",
        ["arm", *(f"{rate:g}" for rate in listed), "chosen"],
        rows,
    )


def sentences(quick: bool) -> list[str]:
    config, design = base("secret_op", quick), DESIGN.quick() if quick else DESIGN
    answers = config.steps * config.prompts_per_step * config.group_size
    return [
        f"Every run generates {answers:,} answers: {config.steps} steps of {config.prompts_per_step} "
        f"prompts and {config.group_size} answers each, one update a step. What the teacher reads beside "
        f"that is in the table of costs. {design.sentence()} Differences are taken between runs of the same "
        "seed and base model.",
        "Learning rate: for each arm of a claim the best of "
        f"{', '.join(f'{rate:g}' for rate in design.rates)} in held-out accuracy, on average over "
        f"{design.tuning} runs that are not reported, from as many base models; for the others that of SDPO, "
        "unless the name says another.",
        f"Longer runs of two teachers: {base('secret_op', quick, LONG).steps} steps at rate "
        f"{LONG_DESIGN.rates[0]:g}, from {LONG_DESIGN.bases} base models.",
        "SDPO: reverse KL over the whole vocabulary to an EMA teacher (rate .003) that sees a right "
        "sibling's answer, if there is one, and the feedback on a failure. Every other arm differs from it "
        "in what its name says.",
        "`secret_op` tells a failure the right answer; `marks` tells which digits of the attempt were "
        "right, and no more. `expr` tells the evaluator's error, or the first hidden input at which the "
        "attempt is wrong, with what was expected there.",
        "GRPO: rewards less their group's mean, without division by the standard deviation "
        "(`advantage_std=false`), without a KL penalty.",
        f"Held-out accuracy: {config.eval_samples} answers at temperature 1 before and after, "
        f"{config.probe_samples} every {config.eval_every} steps. Nothing is rehearsed, so that the "
        "untrained skill shows what a method forgets.",
    ]


NOTES = [
    "The models have about a hundred thousand parameters and answers of four to eight tokens. That an "
    "order holds here says that nothing else is needed for it; that it does not hold says nothing about "
    "large models.",
    "Where the feedback is the answer itself, self-distillation is close to imitation, which GRPO cannot "
    "do. `marks` and `expr` are the fairer comparisons.",
    "GRPO's rate lies at the lower end of the list where it chooses 2e-4. Measured aside, one run each on "
    "`secret_op` with the seed of the choice: .348 at 1e-4, .366 at 2e-4, and .372 there with advantages "
    "divided by their standard deviation.",
    "`expr`, why SDPO is not ahead there, first attempt: the teacher. One that is told the answer, and "
    "right far more often, teaches no more: what is missing is not a better teacher. Second attempt: the "
    "rate. Half the lowest one of the list does nothing for SDPO and a little for GRPO. No arm moved far "
    "from where it began: the skill itself, a line through two pairs for pairs that were not seen, takes "
    "the warm start 650 steps of 38 worked examples each to get that far, three times the answers that a "
    "run generates.",
    "The step at which a curve first reaches a level is read off noisy measurements on the way. That "
    "favours the arm whose curve is read, which is SDPO.",
]
