"""`opsd reproduce mopd`: scores against verdicts, the contents of the controls, and the whole quick study."""

import dataclasses

import numpy as np
import pytest
import torch

from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.contexts import build_contexts
from opsd_kernels.train.models import pretrained
from opsd_kernels.train.sampling.rollout import requests
from opsd_kernels.train.studies import pages
from opsd_kernels.train.studies.lab import Lab
from opsd_kernels.train.studies.papers import mopd
from opsd_kernels.train.studies.statistics import GRADES
from opsd_kernels.train.types import Verdict

WRITTEN = 1e-3  # digits of the value in this file
FP32 = 1e-5  # nats, of a sum over a vocabulary


def test_agreement_within_groups_ignores_how_hard_a_prompt_is():
    """Group 0 is easy and scored high, group 1 hard and scored low; the order inside each is reversed."""
    scores, right, groups = (
        np.array([9.0, 8.0, 7.0, 3.0, 2.0, 1.0]),
        [False, True, True, False, False, True],
        [0, 0, 0, 1, 1, 1],
    )
    found = mopd.agreement(scores, right, groups)
    assert found["auc_in_group"] == 0.0
    # Of nine pairs, both in group 0 against the two wrong ones of group 1.
    assert found["auc"] == pytest.approx(4 / 9)
    assert mopd.agreement(-scores, right, groups)["auc_in_group"] == 1.0
    assert mopd.agreement(scores, right, groups)["spearman"] == pytest.approx(
        -mopd.agreement(-scores, right, groups)["spearman"]
    )
    assert mopd.agreement(scores, [True, True, True, False, False, False], groups) == {
        "auc_in_group": None,
        "auc": 1.0,
        "spearman": pytest.approx(0.878, abs=WRITTEN),
    }
    assert set(mopd.agreement(scores, [True] * 6, groups).values()) == {None}


def test_a_score_is_the_mean_log_prob_of_the_answer_behind_the_other_prompt(
    model, encoder, sampler, task, config
):
    rollouts = sampler.sample(
        model, task, requests([task.env(problem, 0).prompt() for problem in task.train[:3]], 2), 0
    )
    rollouts = [
        dataclasses.replace(rollout, tokens=rollout.tokens[: 1 + i % 4]) for i, rollout in enumerate(rollouts)
    ]
    others = [rollout.prompt_tokens for rollout in rollouts[2:] + rollouts[:2]]
    found = mopd.mean_logprobs(model, rollouts, others, config, pretrained.vocabulary(encoder.tokenizer))
    for rollout, prompt, score in zip(rollouts, others, found, strict=True):
        logits = model(input_ids=torch.tensor([prompt + rollout.tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(rollout.tokens)[:, None]).mean().detach()
        assert score == pytest.approx(float(expected), abs=FP32)


def test_controls_fill_the_blocks_of_the_arm_they_belong_to(model, sampler, task):
    asked = requests([task.env(problem, 0).prompt() for problem in task.train[:6]], 8)
    rollouts = [
        dataclasses.replace(rollout, verdict=Verdict(float((3 * i + i // 8) % 5 < 2)))
        for i, rollout in enumerate(sampler.sample(model, task, asked, 0))
    ]
    base = TrainConfig(**mopd.BASE)
    views = {
        name: build_contexts(rollouts, dataclasses.replace(base, **settings), 0)
        for name, settings in mopd.VIEWS.items()
    }
    shapes = {
        name: [view and (len(view.demonstrations), len(view.failures)) for view in of]
        for name, of in views.items()
    }
    assert shapes[mopd.TWO] == shapes[mopd.SHUFFLED] == shapes[mopd.UNRELATED] and (2, 0) in shapes[mopd.TWO]
    assert [sum(shape) for shape in shapes[mopd.CONTRASTIVE]] == [sum(shape) for shape in shapes[mopd.THREE]]
    assert (
        set(shapes[mopd.ONE]) == {(1, 0)}
        and set(shapes[mopd.FAILURE]) == {(0, 1)}
        and (2, 1) in shapes[mopd.CONTRASTIVE]
    )


@pytest.mark.slow
def test_the_study_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("OPSD_CACHE", str(tmp_path))
    lab = Lab(tmp_path / "cells", workers=0, quick=True)
    study = mopd.study(lab)
    study.facts = {
        "command": "opsd reproduce mopd --quick",
        "versions": {},
        "commits": [],
        "machine": "m",
        "date": "d",
    }
    study.facts |= {"cell_seconds": 1.0, "workers": 1, "quick": True}
    pages.write(study, tmp_path)
    assert {claim.grade for claim in study.claims} <= set(GRADES)
    page = (tmp_path / "mopd.md").read_text()
    assert all(f"| {name} |" in page for name in mopd.VIEWS)
    generated = {row[1] for row in study.tables[1].rows}
    assert generated == {"64"}  # the same number of answers in every arm
