"""Train SmolLM2-135M on `python`, by GRPO and by SDPO with eight contexts: the runs of two studies."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from opsd_kernels.train.config.presets import PRESETS
from opsd_kernels.train.studies.compare import MASTER_STEP, Arm, Design, Trained, compare
from opsd_kernels.train.studies.lab import Cell, Lab
from opsd_kernels.train.studies.papers.law_measured import PROBE_SEED
from opsd_kernels.train.studies.papers.law_settings import UNWATCHED, Setting, told, told_beside_siblings

SETTINGS: dict[str, Any] = {
    "env": "python", **PRESETS["python"], "threads": 1, "steps": 16, "prompts_per_step": 4, "group_size": 4,
    "eval_samples": 128, **UNWATCHED,
}  # fmt: skip
# At 1e-4 GRPO ended at an accuracy of .02, SDPO with siblings at .05.
DESIGN = Design(bases=3, seeds=1, tuning=1, rates=(1e-5, 2e-5, 5e-5))
# Of the base model, which is measured once.
ANSWERS_BEFORE = 512
PYTHON = Setting(
    SETTINGS,
    (*told("answer", "error", "test", "wrong"), *told_beside_siblings("answer", "error", "test")),
    DESIGN,
    256,
    {"steps": 1, "prompts_per_step": 1, "group_size": 2, "max_new_tokens": 4, "eval_samples": 2},
    ("answer", "error", "wrong", "siblings"),
)
MEASURES_BASE = "opsd_kernels.train.studies.language_cells:before"
# SDPO's rate is chosen with this context, since the law compares contexts at one rate.
SIBLINGS = "siblings"
GRPO = Arm("GRPO", {"policy_weight": 1.0})


def trained(lab: Lab) -> dict[str, Trained]:
    """Return the runs of all contexts and of GRPO, by name.

    Their seeds differ, the base model does not, which is measured once.
    """
    base, design = PYTHON.config(lab.quick), PYTHON.runs(lab.quick)
    contexts = PYTHON.arms(lab.quick)
    found = compare(lab, base, [*(arm for arm in contexts if arm.name == SIBLINGS), GRPO], design)
    others = [arm for arm in contexts if arm.name != SIBLINGS]
    found |= compare(lab, base, others, replace(design, rates=(found[SIBLINGS].rate,)))
    asked = base.eval_samples if lab.quick else ANSWERS_BEFORE
    once = replace(base, seed=PROBE_SEED + MASTER_STEP * lab.master, eval_samples=asked)
    before = lab.run("before training", [Cell(MEASURES_BASE, asdict(once))])[0]
    return {
        arm.name: replace(found[arm.name], runs=[{**before, **run} for run in found[arm.name].runs])
        for arm in (*contexts, GRPO)
    }


def sentences(runs: dict[str, Trained], quick: bool) -> list[str]:
    config, design = PYTHON.config(quick), PYTHON.runs(quick)
    return [
        "SmolLM2-135M-Instruct with 4-bit weights, dequantised, so not exactly the published model; fp32, "
        "all weights trained. Problems, their split and the sandbox: `env=python`.",
        f"{config.steps} steps of {config.prompts_per_step} prompts with {config.group_size} answers of at "
        f"most {config.max_new_tokens} tokens each, temperature {config.rollout_temperature:g}, a frozen "
        f"teacher, reverse KL over the whole vocabulary. {design.bases} runs of each arm, which differ in "
        "their seeds alone. Accuracies at that temperature, without context: after training of "
        f"{config.eval_samples} answers of each run to held-out problems, before of "
        f"{config.eval_samples if quick else ANSWERS_BEFORE} of the base model, once for all.",
        "Intervals: where the estimate of a rerun with other seeds of the same model falls in 95 % of cases, "
        "by a bootstrap over runs, widened for their number. They say nothing about another model.",
        f"Learning rate: the best of {', '.join(f'{rate:g}' for rate in design.rates)} in held-out accuracy "
        "of a run that is not reported, chosen for SDPO with siblings alone, which all contexts share "
        f"({runs[SIBLINGS].rate:g}), and for GRPO ({runs[GRPO.name].rate:g}).",
    ]
