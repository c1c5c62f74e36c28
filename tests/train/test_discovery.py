"""`opsd reproduce discovery --quick`, and the statistics behind its claims."""

import json

import numpy as np
import pytest

from opsd_kernels.train.studies import pages, study
from opsd_kernels.train.studies.discover import chance_within, solved_within
from opsd_kernels.train.studies.lab import Lab
from opsd_kernels.train.studies.papers import discovery, discovery_cells
from opsd_kernels.train.studies.papers.discovery import HALF, LAST, first_at, shares
from opsd_kernels.train.studies.papers.discovery_cells import BEST, SELF, UNTOLD, Design

BASES = np.arange(5)  # of five questions
GRID = 0.02  # between two of the attempts at which best-of-k is known


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("discovery")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPSD_CACHE", str(folder / "cache"))
        here = Lab(folder / "cells", workers=0, quick=True)
        result = discovery.study(here)
        cells = len(list(here.folder.glob("*.json")))
        # Nothing is computed again.
        assert discovery.study(here).tables == result.tables
        assert len(list(here.folder.glob("*.json"))) == cells
    result.facts = {
        "machine": "a machine",
        "versions": {},
        "commits": [],
        "command": "opsd reproduce discovery",
        "date": "",
        "cell_seconds": 1,
        "workers": 0,
    }
    return result


def test_the_quick_form_makes_a_page(found, tmp_path):
    pages.write(found, tmp_path)
    text = (tmp_path / "discovery.md").read_text()
    for part in (SELF, UNTOLD, f"{BEST}, exact", "multi-turn, last 2", "Costs of a question", "inconclusive"):
        assert part in text
    assert study.load(tmp_path / "discovery.json") == found
    assert (tmp_path / "discovery.png").stat().st_size > 10_000
    json.dumps(json.loads((tmp_path / "discovery.json").read_text()), allow_nan=False)


def test_every_claim_has_a_grade_and_every_method_a_cost(found):
    assert len(found.claims) == 6
    assert {claim.estimate.count for claim in found.claims} == {3}
    spent = {
        row[0]: dict(zip(found.tables[3].columns[1:], row[1:], strict=True)) for row in found.tables[3].rows
    }
    assert set(spent) == {SELF, UNTOLD, BEST, "multi-turn, last 2"}
    assert (
        float(spent[SELF]["updates"]) > 0
        and float(spent[SELF]["teacher tokens"]) > float(spent[SELF]["context tokens"]) > 0
    )
    assert (
        float(spent["multi-turn, last 2"]["updates"])
        == 0
        < float(spent["multi-turn, last 2"]["context tokens"])
    )


def test_no_question_comes_twice_on_a_base_model(monkeypatch):
    hard = {warm: [[100 * warm + i, 0.001] for i in range(100)] for warm in range(5)}

    class Questions:
        master = 0

        def run(self, title, cells):
            return [
                {
                    "questions": hard[cell.arguments.get("config", cell.arguments)["warm_seed"]][
                        : cell.arguments.get("count")
                    ]
                }
                for cell in cells
            ]

    design = Design(bases=5, questions=24, tuned=3, tuning=12)
    asked, spare = discovery_cells.ask(Questions(), discovery.TrainConfig(), design)
    problems = [problem for of in (asked, spare) for base in of for problem in of[base]]
    assert len(problems) == len(set(problems)) == 5 * 24 + 3 * 12
    for of in (asked, spare):
        assert all(problem // 100 == base for base in of for problem in of[base])
    assert list(spare) == [0, 1, 2]


def test_shares_of_attempts_at_a_level():
    """Mine solves a question in every 2 attempts, theirs one in every 6."""
    attempts = 30
    mine, theirs = solved_within([2, 4, 6, 8, 10], attempts), solved_within([6, 12, 18, 24, 30], attempts)
    counts = np.arange(1, attempts + 1)
    other, own, share = shares(mine, theirs, BASES, counts, LAST)
    assert (other, own) == (30, 10) and share.value == pytest.approx(1 / 3) and share.count == 5
    other, own, share = shares(mine, theirs, BASES, counts, HALF)
    assert (other, own) == (18, 6) and share.low <= share.value <= share.high
    assert shares(theirs, mine, BASES, counts, LAST)[2].value == pytest.approx(3)
    never = shares(solved_within([None] * 5, attempts), theirs, BASES, counts, HALF)
    assert np.isinf(never[1]) and never[2].value == 1  # at least


def test_best_of_k_is_read_beyond_the_budget():
    chances, attempts = [1e-4] * 4, 64
    counts = np.union1d(discovery.FAR, np.arange(1, attempts + 1))
    other, own, share = shares(
        solved_within([8, 8, 8, None], attempts), chance_within(chances, counts), BASES[:4], counts, HALF
    )
    assert other == pytest.approx(np.log(2) / 1e-4, rel=GRID) and own == 8 and share.value < 0.01
    assert (
        shares(
            solved_within([8, 8, 8, None], attempts), chance_within(chances, counts), BASES[:4], counts, LAST
        )[0]
        == attempts
    )


def test_the_first_attempt_at_a_level():
    curves = np.array([[0.0, 0.2, 0.2, 0.6], [0.5, 0.5, 0.5, 0.5]])
    assert first_at(curves, np.array([[0.2], [0.7]]), np.arange(1, 5), np.inf).tolist() == [2, np.inf]
