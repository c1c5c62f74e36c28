"""The studies with a language model, on made-up runs: which they make, what they share, and their grades."""

import dataclasses

import numpy as np
import pytest

from opsd_kernels.train import loop
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.envs import make_task
from opsd_kernels.train.envs.base import Env
from opsd_kernels.train.models import warmstart
from opsd_kernels.train.records.log import Progress
from opsd_kernels.train.studies import language_cells, pages
from opsd_kernels.train.studies.lab import Lab, train_cell
from opsd_kernels.train.studies.papers import law_python, sdpo_python
from opsd_kernels.train.studies.papers.python_runs import ANSWERS_BEFORE, DESIGN, MEASURES_BASE, PYTHON
from opsd_kernels.train.studies.statistics import INCONCLUSIVE, REPRODUCED
from opsd_kernels.train.studies.study import load
from opsd_kernels.train.types import Verdict

# Accuracy gained with each kind of feedback at the best rate, and with a sibling, in a run without noise.
GAINS = {"answer": 0.3, "error": 0.0, "test": 0.01, "wrong": 0.0, "none": 0.0}
SIBLING = 0.1
NOISE = 0.003


class MadeUp(Lab):
    """A lab that makes runs and probes up, and lists what was asked of it."""

    def __init__(self, folder, master=0):
        super().__init__(folder / "cells", workers=0, master=master)
        self.trained, self.probed, self.before = [], [], []

    def train(self, title, configs):
        self.trained += configs
        return [made_up(config) for config in configs]

    def run(self, title, cells):
        if cells[0].function == MEASURES_BASE:
            self.before += cells
            return [{"held_out_accuracy_before": 0.2, "untrained_skill_before": 0.5}]
        self.probed += [cell.key for cell in cells]
        return [[probed(TrainConfig(**config)) for config in cell.arguments["configs"]] for cell in cells]


def made_up(config):
    gain = 0.05 if config.policy_weight else taught(config)
    # The rate of policy gradients is the lowest, that of SDPO the middle one.
    best = DESIGN.rates[0 if config.policy_weight else 1]
    gain -= 0.02 * abs(np.log(config.learning_rate / best))
    return {
        "steps": config.steps,
        "held_out_accuracy_after": 0.2 + gain + NOISE * noise(config),
        "untrained_skill_after": 0.5,
        "costs": {"generated_answers": 384, "teacher_tokens": 9},
    }


def taught(config):
    return GAINS[config.feedback] + (SIBLING if config.siblings else 0.0)


def noise(config):
    return np.random.default_rng([config.seed, *config.feedback.encode(), config.siblings]).standard_normal()


def probed(config):
    gap = taught(config)
    return {
        "gap": {"value": gap**2},
        "consensus_gap": {"value": gap},
        **{name: {"value": 0.2} for name in ("student", "teacher", "second_try")},
    }


def test_the_arms_and_their_rates(tmp_path):
    lab = MadeUp(tmp_path)
    study = sdpo_python.study(lab)
    # One more run for each rate of two arms; then all seeds of nine arms.
    assert len(lab.trained) == 2 * 3 + 9 * DESIGN.bases
    assert {(config.model, config.env, config.steps) for config in lab.trained} == {("smollm2", "python", 16)}
    reported = [config for config in lab.trained if config.seed < DESIGN.bases]
    rates = {bool(config.policy_weight): config.learning_rate for config in reported}
    assert [config.learning_rate for config in reported if config.policy_weight] == [
        DESIGN.rates[0]
    ] * DESIGN.bases
    assert rates[False] == DESIGN.rates[1]
    grades = {claim.text: claim.grade for claim in study.claims}
    assert [grades[text] for text in grades if "beats GRPO" in text][:2] == [REPRODUCED, REPRODUCED]
    # A difference of .01, which the interval of three runs does not tell from none, and one of nothing.
    assert {grades[text] for text in grades if "more than a verdict" in text} == {INCONCLUSIVE}
    assert {claim.estimate.count for claim in study.claims} == {DESIGN.bases}


def test_both_studies_share_their_runs(tmp_path):
    law, sdpo = MadeUp(tmp_path / "law"), MadeUp(tmp_path / "sdpo")
    study = law_python.study(law)
    sdpo_python.study(sdpo)
    assert law.trained == sdpo.trained
    # A language model has one base, measured once, as are its gaps: without siblings, and with them.
    assert [cell.arguments["eval_samples"] for cell in law.before] == [ANSWERS_BEFORE]
    assert [cell.key for cell in law.before] == [cell.key for cell in sdpo.before]
    assert len(law.probed) == 2 * DESIGN.bases and len(set(law.probed)) == 2
    papers, better, closer = study.claims
    assert better.estimate.value > 0.98 > 0.95 > papers.estimate.value and closer.grade == REPRODUCED
    assert (tmp_path / "law" / "fits" / "law_python.json").is_file()


def test_a_rerun_has_other_seeds_and_other_probes(tmp_path):
    first, second = MadeUp(tmp_path), MadeUp(tmp_path, master=1)
    law_python.study(first)
    law_python.study(second)
    assert not {config.seed for config in first.trained} & {config.seed for config in second.trained}
    assert not set(first.probed) & set(second.probed)
    assert first.before[0].key != second.before[0].key


@pytest.mark.parametrize("module", [sdpo_python, law_python])
def test_the_page_says_that_intervals_are_over_seeds(module, tmp_path):
    study = module.study(MadeUp(tmp_path))
    study.facts = {
        "machine": "one", "versions": {}, "commits": ["abc"], "command": "opsd", "date": "2026-12-01",
        "cell_seconds": 60.0,
    }  # fmt: skip
    pages.write(study, tmp_path)
    assert load(tmp_path / f"{study.paper}.json").over == "seeds"
    page = (tmp_path / f"{study.paper}.md").read_text()
    assert "| claim | measured here | value [95 % of reruns] | runs | grade |" in page
    assert "base models" not in page and "other seeds of the same model" in page


def test_settings_of_the_contexts():
    arms = PYTHON.arms(False)
    assert len(arms) == 8 and len({str(arm.settings) for arm in arms}) == 8
    assert len(PYTHON.arms(True)) == 4


def test_a_run_of_a_language_model_has_the_accuracies_that_the_trainer_measures(
    config, tmp_path, monkeypatch
):
    # A base model this small is never right; of its answers about half have an odd sum.
    monkeypatch.setattr(Env, "verify", lambda _, answer: Verdict(sum(answer.encode()) % 2, "another"))
    base = warmstart.base_model(config, make_task(config), Progress())
    named = dataclasses.replace(config, model=str(base), steps=3, eval_samples=100)
    cell = train_cell(named)
    assert cell.function == f"{language_cells.__name__}:train" != train_cell(config).function
    summary = loop.train(named, tmp_path / "trainer")
    run = language_cells.train(cell.arguments, tmp_path)
    before = language_cells.before(cell.arguments, tmp_path)
    for name in language_cells.SKILLS:
        for when, found in (("before", before), ("after", run)):
            assert 0 < found[f"{name}_{when}"] == summary[f"{name}_{when}"]
    assert run["steps"] == 3 == len(run["curves"]["reward"])
