"""Train SmolLM2-135M on `python`, by GRPO and by SDPO with eight contexts: the runs of two studies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from opsd_kernels.train.config.presets import PRESETS
from opsd_kernels.train.studies.compare import Arm, Design, Trained, compare
from opsd_kernels.train.studies.lab import Lab
from opsd_kernels.train.studies.papers.law_settings import UNWATCHED, Setting, told, told_beside_siblings

SETTINGS: dict[str, Any] = {
    "env": "python", **PRESETS["python"], "threads": 1, "steps": 24, "prompts_per_step": 4, "group_size": 4,
    "eval_samples": 64, **UNWATCHED,
}  # fmt: skip
# At 1.5e-4 the divergence doubled in eight steps.
DESIGN = Design(bases=5, seeds=1, tuning=1, rates=(2e-5, 5e-5, 1e-4))
PYTHON = Setting(
    SETTINGS,
    (*told("answer", "error", "test", "wrong"), *told_beside_siblings("answer", "error", "test")),
    DESIGN,
    256,
    {"steps": 1, "prompts_per_step": 1, "group_size": 2, "max_new_tokens": 4, "eval_samples": 2},
    ("answer", "error", "wrong", "siblings"),
)
# SDPO's rate is chosen with this context, since the law compares contexts at one rate.
SIBLINGS = "siblings"
GRPO = Arm("GRPO", {"policy_weight": 1.0})


def trained(lab: Lab) -> dict[str, Trained]:
    """Return the runs of all contexts and of GRPO, by name. Their seeds differ, the base model does not."""
    base, design = PYTHON.config(lab.quick), PYTHON.runs(lab.quick)
    contexts = PYTHON.arms(lab.quick)
    found = compare(lab, base, [*(arm for arm in contexts if arm.name == SIBLINGS), GRPO], design)
    others = [arm for arm in contexts if arm.name != SIBLINGS]
    found |= compare(lab, base, others, replace(design, rates=(found[SIBLINGS].rate,)))
    return {arm.name: found[arm.name] for arm in (*contexts, GRPO)}


def sentences(runs: dict[str, Trained], quick: bool) -> list[str]:
    config, design = PYTHON.config(quick), PYTHON.runs(quick)
    return [
        "SmolLM2-135M-Instruct with 4-bit weights, dequantised, so not exactly the published model; fp32, "
        "all weights trained. Problems, their split and the sandbox: `env=python`.",
        f"{config.steps} steps of {config.prompts_per_step} prompts with {config.group_size} answers of at "
        f"most {config.max_new_tokens} tokens each, temperature {config.rollout_temperature:g}, a frozen "
        f"teacher, reverse KL over the whole vocabulary. {design.bases} runs of each arm, which differ in "
        "their seeds alone.",
        "Intervals: where the estimate of a rerun with other seeds of the same model falls in 95 % of cases, "
        "by a bootstrap over runs, widened for their number. They say nothing about another model.",
        f"Learning rate: the best of {', '.join(f'{rate:g}' for rate in design.rates)} in held-out accuracy "
        "of a run that is not reported, chosen for SDPO with siblings alone, which all contexts share "
        f"({runs[SIBLINGS].rate:g}), and for GRPO ({runs[GRPO.name].rate:g}).",
    ]
