"""`opsd reproduce iw_opd`: the tokens of each weighting, the settings of blocks, and the quick study."""

import pytest
import torch

from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.config.weight_text import EXAMPLE, parse_weights
from opsd_kernels.train.studies import pages
from opsd_kernels.train.studies.lab import Lab
from opsd_kernels.train.studies.papers import iw_opd
from opsd_kernels.train.studies.statistics import GRADES


@pytest.mark.parametrize("length, counted", [(10, (3, 3, 3)), (13, (4, 3, 4))])
def test_the_thirds_are_where_they_say_and_do_not_overlap(length, counted):
    """10 tokens are an answer of `plan`, 13 one of `chain`, with their end tokens."""
    mask = torch.ones(1, length, dtype=torch.bool)
    first, middle, last = (
        parse_weights(iw_opd.WEIGHTS[name])(EXAMPLE).values(None, mask)[0].bool()
        for name in (iw_opd.FIRST, iw_opd.MIDDLE, iw_opd.LAST)
    )
    assert tuple(int(part.sum()) for part in (first, middle, last)) == counted
    assert first.int().argmax() == 0 and last.flip(0).int().argmax() == 0
    assert not (first & middle).any() and not (middle & last).any()
    middles = middle.nonzero().flatten()
    assert abs(middles[0] - (length - 1 - middles[-1])) <= 1


def test_late_weights_grow_and_decaying_ones_fall():
    mask = torch.ones(1, 13, dtype=torch.bool)
    late, decay = (
        parse_weights(iw_opd.WEIGHTS[name])(EXAMPLE).values(None, mask)[0]
        for name in (iw_opd.LATE, iw_opd.DECAY)
    )
    assert (late.diff() > 0).all() and late[0] < 0.15 and late[-1] > 0.95
    assert (decay.diff() < 0).all() and decay[0] == 1 and decay[-1] == 0


@pytest.mark.parametrize("block", iw_opd.BLOCKS, ids=lambda block: block.name)
def test_arms_of_a_block_differ_in_their_weights_alone(block, tmp_path):
    lab = Lab(tmp_path, quick=False)
    base = iw_opd.settings_of(lab, block, "somewhere")
    assert (base.env, base.objective) == (block.env, block.objective)
    assert (base.teacher == "external") == (base.context == "none") == (block.teacher == iw_opd.EXTERNAL)
    for arm in block.arms():
        assert set(arm.settings) == {"token_weights"}
        TrainConfig(**{**base.__dict__, **arm.settings})
        text = arm.settings["token_weights"] or ""
        assert ("divergence" in text) == ("Prefix" in text and block.objective == iw_opd.FULL)


@pytest.mark.slow
def test_the_study_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("OPSD_CACHE", str(tmp_path))
    lab = Lab(tmp_path / "cells", workers=0, quick=True)
    study = iw_opd.study(lab)
    study.facts = {
        "command": "opsd reproduce iw_opd --quick",
        "versions": {},
        "commits": [],
        "machine": "m",
        "date": "d",
    }
    study.facts |= {"cell_seconds": 1.0, "workers": 1, "quick": True}
    pages.write(study, tmp_path)
    assert {claim.grade for claim in study.claims} <= set(GRADES)
    page = (tmp_path / "iw_opd.md").read_text()
    assert all(page.count(f"| {name} |") >= 2 for name in iw_opd.WEIGHTS)
