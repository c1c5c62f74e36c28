"""Test MOPD (arXiv:2605.12652) on `secret_op`: siblings in the context, and the teacher's scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from opsd_kernels.train import objective, seeds
from opsd_kernels.train.batch import make_batch, micro_batches
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.contexts import build_contexts
from opsd_kernels.train.envs import make_task
from opsd_kernels.train.models import pretrained, warmstart
from opsd_kernels.train.records.log import Progress
from opsd_kernels.train.sampling.prompts import PromptEncoder
from opsd_kernels.train.sampling.rollout import Sampler, requests
from opsd_kernels.train.session import reproducible
from opsd_kernels.train.studies.compare import Arm, Design, Trained, compare
from opsd_kernels.train.studies.exhibits import accuracies, after, bars, costs, curves, outcomes
from opsd_kernels.train.studies.lab import Cell, Lab, Result
from opsd_kernels.train.studies.statistics import (
    Estimate,
    auc,
    difference,
    graded_ahead,
    replication,
    spearman,
)
from opsd_kernels.train.studies.study import Claim, Panel, Study, Table
from opsd_kernels.train.types import Rollout

BASE: dict[str, Any] = {
    "env": "secret_op", "context": "positive", "feedback": "none", "rehearsal_prompts": 0,
    "steps": 120, "lr_warmup_steps": 5, "prompts_per_step": 16, "group_size": 8, "eval_every": 40,
    "probe_samples": 128, "eval_samples": 512, "checkpoint_every": 10_000, "samples_kept": 0,
    "tensorboard": False, "tiny_hidden": 64,
}  # fmt: skip
QUICK: dict[str, Any] = {
    "steps": 2, "prompts_per_step": 4, "eval_every": 1, "probe_samples": 8, "eval_samples": 16,
    "tiny_hidden": 16, "tiny_layers": 1, "tiny_heads": 2, "warm_accuracy": 2e-4, "warm_batch": 32,
}  # fmt: skip
ONE, TWO, CONTRASTIVE, FAILURE = "one success", "two successes", "two successes, one failure", "one failure"
SHUFFLED, UNRELATED, THREE = "two random siblings", "two unrelated answers", "three successes"
ARMS = (
    Arm(ONE, {"successes": 1}),
    Arm(TWO),
    Arm(CONTRASTIVE, {"context": "contrastive"}),
    Arm(FAILURE, {"context": "failure"}),
    Arm(SHUFFLED, {"control": "random_sibling"}),
    Arm(UNRELATED, {"control": "unrelated"}),
    Arm(THREE, {"context": "contrastive", "control": "successes_only"}),
)
ALONE = "no context"
VIEWS = {**{arm.name: arm.settings for arm in ARMS}, ALONE: {"context": "none"}}
SCORES = ("teacher", "teacher less student")
BOUNDS = {"spearman": (-1.0, 1.0), "auc": (0.0, 1.0), "auc_in_group": (0.0, 1.0)}
MEASURES = tuple(BOUNDS)
# Prompts, and the stream of random numbers.
RANKED_GROUPS, RANKED = 256, 15
MARGIN = 0.02
DESIGN = Design(rates=(2e-4, 5e-4))


def study(lab: Lab) -> Study:
    base = TrainConfig(**{**BASE, **(QUICK if lab.quick else {})})
    design = DESIGN.quick() if lab.quick else DESIGN
    trained = compare(lab, base, ARMS, design)
    ranked = rankings(lab, base, design)
    found = Study(
        "mopd",
        "MOPD: siblings in the teacher's view",
        "Multi-Rollout On-Policy Distillation via Peer Successes and Failures, arXiv:2605.12652",
        "The teacher reads other answers to the same prompt: right ones to imitate, and wrong ones to "
        "avoid. Do two successes and a failure teach best, do successes teach better than other answers in "
        "as many blocks, and does the teacher's score of a rollout agree with the verifier?",
        sentences(base, design),
        [*arm_claims(trained), *ranking_claims(ranked, design)],
        [outcomes("Accuracy and forgetting", trained), costs(trained), ranking_table(ranked, design)],
        [curves("held-out accuracy", trained), accuracies(trained), ranking_panel(ranked, design)],
        NOTES,
    )
    return found


NOTES = [
    "In `secret_op` a problem has one right answer, so that all successes of a group are the same string: a "
    "second one adds nothing but its repetition, and a score may rank rollouts by comparing them with the "
    "success it reads. The paper's tasks have many right answers.",
    "The warm start shows one or two right siblings, and a wrong one beside them in half of the examples; a "
    "failure alone and three successes it never shows.",
]


def sentences(base: TrainConfig, design: Design) -> list[str]:
    return [
        f"`{base.env}`, no feedback, no rehearsal: {base.steps} steps of {base.prompts_per_step} prompts "
        f"with {base.group_size} answers each in every arm, so that siblings that succeeded are there for "
        "most rollouts. A rollout without any stays out of the loss.",
        f"{design.sentence()} The base models were taught to read peers. Learning rate of each arm: the "
        f"best of {', '.join(f'{rate:g}' for rate in design.rates)} on average over {design.tuning} runs "
        "that are not reported, from as many base models.",
        f"Controls: `{SHUFFLED}` and `{UNRELATED}` fill the blocks of `{TWO}`, the first with any siblings, "
        f"right or wrong, the second with right answers to other prompts where there are any; `{THREE}` "
        f"fills the blocks of `{CONTRASTIVE}`. Blocks and tokens are the same up to a token or two per "
        "answer.",
        f"Scores: {base.group_size} answers of each base model to {RANKED_GROUPS} held-out prompts, the "
        "rollouts that all views have something to show for, the same ones for every view. A score is the "
        "mean of the teacher's log-probs over the answer's tokens, or of those less the student's. "
        f"`{ALONE}`: the student's own log-probs. `in group`: mean over the groups with a right and a wrong "
        "answer.",
    ]


def arm_claims(trained: dict[str, Trained]) -> list[Claim]:
    def ahead(text: str, mine: str, theirs: str, remark: str = "") -> Claim:
        gain = difference(after(trained[mine]), after(trained[theirs]), trained[mine].bases)
        return Claim(
            text, f"held-out accuracy after, `{mine}` less `{theirs}`", gain, graded_ahead(gain), remark
        )

    gap = difference(after(trained[CONTRASTIVE]), after(trained[TWO]), trained[TWO].bases)
    return [
        Claim(
            f"Contrastive is no worse than positive (margin {MARGIN:g})",
            f"held-out accuracy after, `{CONTRASTIVE}` less `{TWO}`",
            gap,
            graded_ahead(gap, -MARGIN),
        ),
        ahead("Contrastive is ahead of positive", CONTRASTIVE, TWO),
        ahead("What helps is the failure, not a third block", CONTRASTIVE, THREE),
        ahead("Two successes are ahead of one", TWO, ONE),
        ahead("Positive is ahead of random siblings", TWO, SHUFFLED),
        ahead("Positive is ahead of unrelated answers", TWO, UNRELATED),
        ahead("Positive is ahead of a failure alone", TWO, FAILURE),
    ]


def rankings(lab: Lab, base: TrainConfig, design: Design) -> list[Result]:
    """Return one ranking per run, of its base model."""
    groups = 8 if lab.quick else RANKED_GROUPS
    configs = [replace(base, **seeds) for seeds in design.runs(lab.master)]
    cells = [
        Cell("opsd_kernels.train.studies.papers.mopd:ranking", {"config": asdict(config), "groups": groups})
        for config in configs
    ]
    return lab.run("rankings", cells)


def ranking(arguments: dict[str, Any], folder: Path) -> Result:
    """Measure how scores of a base model's rollouts agree with their verdicts, by context and score.

    Null if all rollouts are correct, or none is.
    """
    config = TrainConfig(**arguments["config"])
    with reproducible(config):
        task = make_task(config)
        model, tokenizer = pretrained.load_pretrained(warmstart.base_model(config, task, Progress()), config)
        encoder, vocab = PromptEncoder(tokenizer, task.template), pretrained.vocabulary(tokenizer)
        sampler = Sampler(
            encoder, config.max_new_tokens, config.rollout_temperature, config.rollout_batch, vocab
        )
        problems = seeds.shuffled(task.held_out, config.seed, RANKED)[: arguments["groups"]]
        rollouts = sampler.sample(
            model,
            task,
            requests([task.env(problem, 0).prompt() for problem in problems], config.group_size),
            config.seed,
            RANKED,
        )
        contexts = {
            name: build_contexts(rollouts, replace(config, **settings), config.seed, RANKED)
            for name, settings in VIEWS.items()
        }
        kept = [i for i in range(len(rollouts)) if all(views[i] is not None for views in contexts.values())]
        chosen = [rollouts[i] for i in kept]
        prompts = [rollout.prompt for rollout in chosen]
        scores = {
            name: mean_logprobs(
                model, chosen, encoder.encode(prompts, [views[i] for i in kept]), config, vocab
            )
            for name, views in contexts.items()
        }
    right, groups = [rollout.verdict.success for rollout in chosen], [rollout.group for rollout in chosen]
    own = scores[ALONE]
    views = {
        name: {SCORES[0]: agreement(mine, right, groups)}
        | ({} if name == ALONE else {SCORES[1]: agreement(mine - own, right, groups)})
        for name, mine in scores.items()
    }
    return {"rollouts": len(chosen), "of": len(rollouts), "right": sum(right), "views": views}


@torch.no_grad()
def mean_logprobs(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    prompts: Sequence[tuple[int, ...]],
    config: TrainConfig,
    vocab: int,
) -> np.ndarray:
    """Return the mean log-prob, in nats, of each rollout's tokens after another prompt."""
    if not rollouts:
        return np.zeros(0)
    batch = make_batch(
        [replace(rollout, prompt_tokens=prompt) for rollout, prompt in zip(rollouts, prompts, strict=True)],
        [None] * len(rollouts),
        0,
    )
    parts = [
        objective.sampling_logprobs(model, micro, config, vocab)
        for micro in micro_batches(batch, config.micro_batch)
    ]
    return (torch.cat(parts).sum(1) / batch.mask_BT.sum(1)).double().numpy()


def agreement(scores: np.ndarray, right: Sequence[bool], groups: Sequence[int]) -> dict[str, float | None]:
    """Return Spearman and AUC over all rollouts, and the mean AUC of the groups with both verdicts."""
    if len(set(right)) < 2:
        return dict.fromkeys(MEASURES)
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    mixed = [places for places in members.values() if len({right[i] for i in places}) == 2]
    within = [auc(scores[places], [right[i] for i in places]) for places in mixed]
    in_group = float(np.mean(within)) if within else None
    return dict(zip(MEASURES, (spearman(scores, right), auc(scores, right), in_group), strict=True))


def ranked_by(ranked: Sequence[Result], view: str, score: str, measure: str) -> list[float]:
    """Return a measure of every ranking, NaN if it is not known."""
    values = [result["views"][view][score][measure] for result in ranked]
    return [float("nan") if value is None else value for value in values]


def ranked_estimate(
    ranked: Sequence[Result], design: Design, view: str, score: str, measure: str
) -> Estimate:
    values = ranked_by(ranked, view, score, measure)
    return replication(values, design.bases_of_runs(), within=BOUNDS[measure])


def ranking_claims(ranked: Sequence[Result], design: Design) -> list[Claim]:
    def ahead(text: str, mine: str, theirs: str) -> Claim:
        sides = [ranked_by(ranked, view, SCORES[0], "auc_in_group") for view in (mine, theirs)]
        left, right = sides
        gain = difference(left, right, design.bases_of_runs())
        means = " and ".join(f"{np.mean(side):.3f}" for side in sides)
        return Claim(
            text,
            f"AUC in group of the teacher's score, `{mine}` less `{theirs}`",
            gain,
            graded_ahead(gain),
            f"{means}",
        )

    return [
        ahead(
            "The teacher's scores rank rollouts as the verifier does: better than the model without a "
            "context",
            CONTRASTIVE,
            ALONE,
        ),
        ahead("Contrastive scores rank better than positive ones", CONTRASTIVE, TWO),
        ahead("Positive scores rank better than those of random siblings", TWO, SHUFFLED),
        ahead("A failure alone ranks better than no context", FAILURE, ALONE),
    ]


def ranking_table(ranked: Sequence[Result], design: Design) -> Table:
    rows = [
        [view, score, *(str(ranked_estimate(ranked, design, view, score, measure)) for measure in MEASURES)]
        for view in VIEWS
        for score in (SCORES if view != ALONE else SCORES[:1])
    ]
    rollouts, right = (sum(result[name] for result in ranked) for name in ("rollouts", "right"))
    counts = f"{rollouts} rollouts, {right} of them right"
    return Table(
        f"Scores against verdicts: {counts}", ["view", "score", "Spearman", "AUC", "AUC in group"], rows
    )


def ranking_panel(ranked: Sequence[Result], design: Design) -> Panel:
    found = {view: ranked_estimate(ranked, design, view, SCORES[0], "auc_in_group") for view in VIEWS}
    return Panel(
        "the teacher's score of a rollout against its verdict",
        "bars",
        "view",
        "AUC in group",
        [bars("teacher", found)],
    )
