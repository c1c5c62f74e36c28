"""Test the law with a language model, SmolLM2-135M, on `python` (arXiv:2605.30070).

Neither measure was chosen here. Eight contexts of three runs take hours on two CPU cores.
"""

from __future__ import annotations

from opsd_kernels.train.studies.lab import Lab
from opsd_kernels.train.studies.papers.law import LEAST_R2, claims_elsewhere
from opsd_kernels.train.studies.papers.law_exhibits import (
    elsewhere_panel,
    gaps_table,
    left_out_panel,
    measures_table,
)
from opsd_kernels.train.studies.papers.law_measured import measure_setting, over_contexts
from opsd_kernels.train.studies.papers.law_settings import PYTHON
from opsd_kernels.train.studies.probe import MEASURES, common_settings, fit, line, save_laws
from opsd_kernels.train.studies.statistics import graded_ahead
from opsd_kernels.train.studies.study import Claim, Study


def study(lab: Lab) -> Study:
    found, base = measure_setting(lab, PYTHON), PYTHON.config(lab.quick)
    settings = common_settings(base)
    save_laws(
        lab.folder.parent / "fits" / "law_python.json",
        [fit(found.points(measure), settings, measure) for measure in MEASURES],
    )
    r2 = over_contexts(lambda gaps, gains: line(gaps, gains)[2], found, within=(0.0, 1.0))
    return Study(
        "law_python",
        "A predictive law with a language model",
        "A Predictive Law for On-Policy Self-Distillation From World Feedback, arXiv:2605.30070",
        "Does the gap before training, or the consensus gap, say what training SmolLM2-135M on `python` "
        "with a context will bring?",
        [
            f"`python`: {base.steps} steps of {base.prompts_per_step} prompts with {base.group_size} answers "
            f"each, learning rate {base.learning_rate:g}, a frozen teacher. The runs of a context differ in "
            "their seeds; there is one base model, which `bases` counts as many.",
            f"Gaps: about {PYTHON.samples} attempts at held-out problems, with a seed that no run has. "
            f"Improvement: {base.eval_samples} answers before and after.",
        ],
        [
            Claim(
                "The gap before training predicts the improvement linearly (reported R^2 .95 to .99)",
                f"R^2 over {len(found.trained)} contexts; graded against {LEAST_R2:g}",
                r2,
                graded_ahead(r2, LEAST_R2),
            ),
            *claims_elsewhere(found),
        ],
        [measures_table([found], not_run=False), gaps_table(found)],
        [elsewhere_panel(found), left_out_panel(found)],
        ["The contexts are of one task and one model."],
    )
