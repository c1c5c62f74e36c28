"""Test IW-OPD (arXiv:2606.22600) on `chain` and `plan`: the value of a rollout's tokens by their position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.config.presets import PRESETS
from opsd_kernels.train.studies.compare import Arm, Design, Trained
from opsd_kernels.train.studies.exhibits import accuracies, after, costs, curves, outcomes
from opsd_kernels.train.studies.lab import Lab, warm_cell
from opsd_kernels.train.studies.statistics import Estimate, difference, graded_ahead, graded_equal
from opsd_kernels.train.studies.study import Claim, Study, Table

BASE = {
    "rehearsal_prompts": 0, "prompts_per_step": 32, "group_size": 4, "steps": 40, "eval_every": 20,
    "probe_samples": 64, "eval_samples": 400, "checkpoint_every": 10_000, "samples_kept": 0,
    "tensorboard": False, "tiny_hidden": 64,
}  # fmt: skip
QUICK = {
    "steps": 1, "prompts_per_step": 4, "group_size": 2, "eval_samples": 8,
    "tiny_hidden": 16, "tiny_layers": 1, "tiny_heads": 2, "warm_accuracy": 1e-30, "warm_batch": 32,
}  # fmt: skip
ENVS = {"chain": PRESETS["chain"], "plan": PRESETS["plan"]}
TEACHERS = {
    "chain": {"warm_share": 0.6, "warm_accuracy": 0.9},
    "plan": {"warm_share": 0.99, "warm_accuracy": 0.9},
}
ALL, FIRST, MIDDLE, LAST = "all", "first 30 %", "middle 30 %", "last 30 %"
IW, MEAN_ONE, DECAY, LATE = "IW-OPD", "IW-OPD, mean one", "linear decay", "late-weighted"
WEIGHTS = {
    ALL: None,
    FIRST: "FirstFraction(0.3)",
    MIDDLE: "FirstFraction(0.65) * LastFraction(0.65)",
    LAST: "LastFraction(0.3)",
    IW: "PrefixDiscrepancy(0.5)",
    MEAN_ONE: "MeanOne(PrefixDiscrepancy(0.5))",
    DECAY: "LinearDecay(0)",
    LATE: "Sigmoid(0.1, 0.5, 0.1)",
}
EXTERNAL, SELF = "external", "self"
SAMPLED, FULL = "sampled_token", "full"
MARGIN = 0.05
# Two base models chose an unstable rate in the study of SDPO. Each has a run of two arms.
DESIGN = Design(tuning=4)
TEACHER_WORDS = {EXTERNAL: "another model", SELF: "the privileged self"}
OBJECTIVE_WORDS = {SAMPLED: "sampled tokens", FULL: "full vocabulary"}


@dataclass(frozen=True)
class Block:
    """Arms that differ in their token weights alone."""

    env: str
    teacher: str
    objective: str
    weights: tuple[str, ...] = tuple(WEIGHTS)

    @property
    def name(self) -> str:
        return f"{self.env}, {TEACHER_WORDS[self.teacher]} as teacher, {OBJECTIVE_WORDS[self.objective]}"

    def arms(self) -> list[Arm]:
        return [Arm(name, {"token_weights": self._weights(name)}) for name in self.weights]

    def _weights(self, name: str) -> str | None:
        text = WEIGHTS[name]
        # With the full vocabulary the accumulated discrepancy is the divergence.
        if text and self.objective == FULL and "Prefix" in text:
            return text.replace("(0.5)", '(0.5, "divergence")')
        return text


BLOCKS = (
    *(Block(env, EXTERNAL, SAMPLED) for env in ENVS),
    *(Block(env, SELF, FULL) for env in ENVS),
    # To compare objectives: the same teacher, the other objective.
    *(Block(env, EXTERNAL, FULL, (ALL,)) for env in ENVS),
    *(Block(env, SELF, SAMPLED, (ALL,)) for env in ENVS),
)
Trials = dict[Block, dict[str, Trained]]


def study(lab: Lab) -> Study:
    design = DESIGN.quick() if lab.quick else DESIGN
    blocks = [block for block in BLOCKS if not lab.quick or block.env == "plan"]
    trials = trained_blocks(lab, blocks, external_teachers(lab, blocks, design), design)
    main = [block for block in blocks if len(block.weights) > 1]
    whole = {block.name: trials[block][ALL] for block in blocks}
    return Study(
        "iw_opd",
        "IW-OPD: the position of a token",
        "On the Position Bias of On-Policy Distillation, arXiv:2606.22600; the opposite for self-teachers: "
        "PW-OPSD, arXiv:2605.21606",
        "Late tokens of a rollout that has drifted are said to be taught badly: the first 30 % of the "
        "tokens train as well as all of them, the last 30 % hardly at all, and weights by the discrepancy "
        "accumulated before a token learn faster. Does that hold where position means nothing (`chain`), "
        "and where the first token decides (`plan`)?",
        sentences(config_of(lab, "chain"), design),
        [claim for block in main for claim in position_claims(trials[block], block)]
        + objective_claims(trials),
        [
            *(against_all(trials[block], block) for block in main),
            outcomes("All tokens, by teacher and objective", whole),
            costs(whole),
        ],
        [accuracies(trials[block], block.name) for block in main]
        + [curves(block.name, trials[block]) for block in main],
        NOTES,
    )


NOTES = [
    "AdamW divides out a constant factor of the loss, so a mean weight above 1 does not make its steps "
    "longer; only the clip of the gradient's norm sees it. `MeanOne` is kept as the control that the "
    "paper's plain gradient steps would need.",
    "The answers are 10 and 13 tokens long, the paper's thousands: accumulated discrepancy has little room "
    "to grow.",
]


def config_of(lab: Lab, env: str, **changes: Any) -> TrainConfig:
    return TrainConfig(**{"env": env, **ENVS[env], **BASE, **(QUICK if lab.quick else {}), **changes})


def external_teachers(lab: Lab, blocks: Sequence[Block], design: Design) -> dict[tuple[str, int], str]:
    """Return the directory of each environment's external teacher, by the warm seed of its student.

    Every base model has a teacher of its own, so that a rerun varies both. A teacher's warm start is longer
    than that of the student; that of `plan` has correct plans almost alone.
    """
    configs = {
        (env, seeds["warm_seed"]): teacher_config(lab, env, seeds["warm_seed"])
        for env in dict.fromkeys(block.env for block in blocks)
        for seeds in [*design.runs(lab.master), *design.tuning_runs(lab.master)]
    }
    made = lab.run("the other teachers", [warm_cell(config) for config in configs.values()])
    folders = {key: Path(result["folder"]) for key, result in zip(configs, made, strict=True)}
    for folder in folders.values():
        if not folder.exists():
            raise FileNotFoundError(
                f"{folder}: expected the teacher that a cell in {lab.folder} made; "
                "the cache has lost it, so start with another directory"
            )
    return {key: str(folder) for key, folder in folders.items()}


def teacher_config(lab: Lab, env: str, warm_seed: int) -> TrainConfig:
    changes = TEACHERS[env] if not lab.quick else {"warm_share": TEACHERS[env]["warm_share"]}
    return config_of(lab, env, warm_seed=warm_seed, **changes)


def settings_of(lab: Lab, block: Block, folder: str) -> TrainConfig:
    """Return the settings of the block's arms; `folder` holds the external teacher."""
    if block.teacher == SELF:
        return config_of(lab, block.env, objective=block.objective)
    return config_of(
        lab,
        block.env,
        objective=block.objective,
        teacher=EXTERNAL,
        teacher_model=folder,
        context="none",
        feedback="none",
    )


def trained_blocks(
    lab: Lab, blocks: Sequence[Block], folders: dict[tuple[str, int], str], design: Design
) -> Trials:
    """Train every arm of every block, at its block's rate."""

    def seeded(block: Block, arm: Arm, rate: float, seeds: dict[str, Any]) -> TrainConfig:
        base = settings_of(lab, block, folders[block.env, seeds["warm_seed"]])
        return replace(base, learning_rate=rate, **seeds, **arm.settings)

    rates = best_rates(lab, blocks, seeded, design)
    cells = [
        (block, arm, seeds) for block in blocks for arm in block.arms() for seeds in design.runs(lab.master)
    ]
    results = lab.train("seeds", [seeded(block, arm, rates[block], seeds) for block, arm, seeds in cells])
    trials: Trials = {
        block: {arm.name: Trained(arm, rates[block], [], design.bases_of_runs()) for arm in block.arms()}
        for block in blocks
    }
    for (block, arm, _), result in zip(cells, results, strict=True):
        trials[block][arm.name].runs.append(result)
    return trials


def best_rates(
    lab: Lab, blocks: Sequence[Block], seeded: Callable[..., TrainConfig], design: Design
) -> dict[Block, float]:
    """Return each block's best rate in the average of `all` and IW-OPD."""
    if len(design.rates) == 1:
        return dict.fromkeys(blocks, design.rates[0])
    tried = [
        (block, arm, rate, seeds)
        for block in blocks
        for rate in design.rates
        for arm in block.arms()
        if arm.name in (ALL, IW)
        for seeds in design.tuning_runs(lab.master)
    ]
    results = lab.train("learning rates", [seeded(*trial) for trial in tried])
    scores: dict[Block, dict[float, list[float]]] = {block: {} for block in blocks}
    for (block, _, rate, _), result in zip(tried, results, strict=True):
        scores[block].setdefault(rate, []).append(result["held_out_accuracy_after"])
    return {block: design.chosen(scores[block].__getitem__) for block in blocks}


def position_claims(trained: dict[str, Trained], block: Block) -> list[Claim]:
    def less(mine: str, theirs: str) -> tuple[str, Estimate]:
        return f"held-out accuracy after, `{mine}` less `{theirs}`", difference(
            after(trained[mine]), after(trained[theirs]), trained[mine].bases
        )

    def ahead(text: str, mine: str, theirs: str) -> Claim:
        measured, gain = less(mine, theirs)
        return Claim(f"{block.name}: {text}", measured, gain, graded_ahead(gain))

    measured, gap = less(FIRST, ALL)
    claims = [
        Claim(
            f"{block.name}: the first 30 % teach as well as all tokens (within {MARGIN:g})",
            measured,
            gap,
            graded_equal(gap, MARGIN),
        ),
        ahead("the last 30 % teach worse than all tokens", ALL, LAST),
        ahead("the last 30 % teach worse than the first 30 %", FIRST, LAST),
        ahead("IW-OPD is ahead of equal weights", IW, ALL),
        ahead("with a mean weight of one it still is", MEAN_ONE, ALL),
    ]
    if block.teacher == SELF:
        claims.append(ahead("late tokens are the more reliable ones of a self-teacher (PW-OPSD)", LATE, ALL))
        claims.append(ahead("and more so than early ones (PW-OPSD)", LATE, DECAY))
    return claims


def objective_claims(trials: Trials) -> list[Claim]:
    whole = {(block.env, block.teacher, block.objective): trained[ALL] for block, trained in trials.items()}
    claims = []
    for env, teacher in dict.fromkeys((env, teacher) for env, teacher, _ in whole):
        full, sampled = (whole[env, teacher, objective] for objective in (FULL, SAMPLED))
        gain = difference(after(full), after(sampled), full.bases)
        text = (
            f"{env}, {TEACHER_WORDS[teacher]} as teacher: "
            "the full vocabulary teaches more than the sampled tokens"
        )
        claims.append(
            Claim(text, "held-out accuracy after, full less sampled, all tokens", gain, graded_ahead(gain))
        )
    return claims


def against_all(trained: dict[str, Trained], block: Block) -> Table:
    """Make a table of accuracy and forgetting, with each arm's paired difference from equal weights."""
    table = outcomes(f"Accuracy and forgetting: {block.name}", trained)
    gaps = [str(difference(after(arm), after(trained[ALL]), arm.bases)) for arm in trained.values()]
    return Table(
        table.title,
        [*table.columns, "after, less `all`"],
        [[*row, gap] for row, gap in zip(table.rows, gaps, strict=True)],
    )


def sentences(base: TrainConfig, design: Design) -> list[str]:
    weights = ", ".join(f"{name} `{text}`" for name, text in WEIGHTS.items() if text)
    return [
        f"{base.steps} steps of {base.prompts_per_step} prompts with {base.group_size} answers each in "
        f"every arm, no rehearsal. In each environment: {design.sentence()} "
        "`chain`: 12 running sums; `plan`: a plan, then 8 running sums that follow from it.",
        f"Weights: none (`{ALL}`), {weights}. With the full vocabulary the discrepancy is the token's "
        "divergence.",
        "Another model as teacher, without a privileged context, with sampled tokens as in IW-OPD: one for "
        f"each base model, warm-started to {TEACHERS['chain']['warm_accuracy']:g} accuracy; that of `plan` "
        "saw right plans almost alone. The self-teacher reads the environment's feedback and siblings that "
        "succeeded, with the full vocabulary as in SDPO.",
        f"Learning rate: one of {', '.join(f'{rate:g}' for rate in design.rates)} per environment, teacher "
        f"and objective, the one that serves `{ALL}` and `{IW}` best on average over {design.tuning} "
        "runs that are not reported; not one per weighting, which would cost three times the runs.",
    ]
