"""Test the law with a language model, SmolLM2-135M, on `python` (arXiv:2605.30070).

Neither measure was chosen here. The runs are those of `sdpo_python`, and with the same `--out` are made once:
hours on two CPU cores.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from opsd_kernels.train.studies.lab import Lab
from opsd_kernels.train.studies.papers.law import LEAST_R2, claims_elsewhere
from opsd_kernels.train.studies.papers.law_exhibits import (
    ceilings_table,
    elsewhere_panel,
    left_out_panel,
    measures_table,
)
from opsd_kernels.train.studies.papers.law_measured import Measured, measure_gaps, over_contexts
from opsd_kernels.train.studies.papers.python_runs import GRPO, PYTHON, SIBLINGS, sentences, trained
from opsd_kernels.train.studies.probe import MEASURES, common_settings, fit, line, save_laws
from opsd_kernels.train.studies.statistics import graded_ahead
from opsd_kernels.train.studies.study import SEEDS, Claim, Study, Table


def study(lab: Lab) -> Study:
    base, runs = PYTHON.config(lab.quick), trained(lab)
    contexts = {name: arm for name, arm in runs.items() if name != GRPO.name}
    probes = measure_gaps(lab, base, PYTHON.arms(lab.quick), PYTHON.runs(lab.quick), PYTHON.samples)
    found = Measured(base.tiny_hidden, contexts, probes, base.env, base.model)
    settings = common_settings(replace(base, learning_rate=contexts[SIBLINGS].rate))
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
            *sentences(runs, lab.quick),
            f"Gaps: about {PYTHON.samples} attempts at held-out problems, with a seed that no run has, once "
            "for all runs of a context. Improvement: the mean over the runs.",
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
        [measures_table(found), ceilings_table(found), contexts_table(found)],
        [elsewhere_panel(found), left_out_panel(found)],
        ["The contexts are of one task and one model."],
        over=SEEDS,
    )


def contexts_table(found: Measured) -> Table:
    """Show what was measured before training, what each measure predicts from it, and what training did."""
    laws = [fit(found.points(measure)) for measure in MEASURES]
    rows = []
    for place in sorted(range(len(found.trained)), key=lambda place: -laws[-1].points[place].gap):
        name = laws[0].points[place].context
        runs, before = found.trained[name], ("student", "teacher", "second_try")
        skill = np.subtract(runs.values("untrained_skill_after"), runs.values("untrained_skill_before"))
        rows.append(
            [
                f"`{name}`",
                *(f"{np.mean(found.probed(name, accuracy)):.3f}" for accuracy in before),
                *(f"{number:.3f}" for law in laws for number in (law.points[place].gap, law.left_out[place])),
                str(runs.estimate(runs.gains())),
                f"{np.mean(skill):+.3f}",
            ]
        )
    columns = ["context", "student", "self-teacher", "second try"]
    for measure in MEASURES:
        columns += [measure.replace("_", " "), "the others predict"]
    return Table("Contexts", [*columns, "improvement", "untrained `+`"], rows)
