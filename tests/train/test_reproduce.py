"""`opsd reproduce`: cells that resume, rates of arms, intervals and grades, pages, and SDPO's quick study."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from opsd_kernels.train import loop
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.studies import command, pages
from opsd_kernels.train.studies.compare import Arm, Design, Trained, compare, first_step_at
from opsd_kernels.train.studies.lab import LARGEST_FAILURES, Cell, Lab, warm_cell
from opsd_kernels.train.studies.papers import sdpo
from opsd_kernels.train.studies.statistics import (
    GRADES,
    INCONCLUSIVE,
    NOT_REPRODUCED,
    REPRODUCED,
    Estimate,
    auc,
    spearman,
)
from opsd_kernels.train.studies.study import Claim, Panel, Series, Study, Table, load

ROOT = Path(__file__).resolve().parents[2]
CELLS = """
import time
from pathlib import Path

def count(arguments, folder):
    log, name = Path(arguments["log"]), arguments["name"]
    with log.open("a") as file:
        file.write(name)
    print("said by", name)
    (folder / "scratch").write_text("its own")
    if name == "b" and not log.with_name("mended").exists():
        raise ValueError("b went wrong")
    time.sleep(arguments.get("seconds", 0))
    return {"name": name}
"""


@pytest.fixture
def cells(tmp_path, monkeypatch):
    """Make cells that log a letter when computed; b fails until the file `mended` exists."""
    (tmp_path / "letters.py").write_text(CELLS)
    monkeypatch.syspath_prepend(str(tmp_path))

    def cell(name, **more):
        return Cell("letters:count", {"log": str(tmp_path / "log"), "name": name, **more})

    return cell


# ---------------------------------------------------------------- the lab


def test_cells_that_exist_are_not_computed_again(tmp_path, cells):
    lab = Lab(tmp_path / "cells", workers=0)
    assert [r["name"] for r in lab.run("letters", [cells("c"), cells("a"), cells("c")])] == ["c", "a", "c"]
    again = Lab(tmp_path / "cells", workers=0)
    assert [r["name"] for r in again.run("letters", [cells("a"), cells("d"), cells("c")])] == ["a", "d", "c"]
    assert (tmp_path / "log").read_text() == "cad"
    again.run("letters", [cells("a")])
    # The folder holds no logs and no scratch.
    records = [json.loads(path.read_text()) for path in (tmp_path / "cells").iterdir()]
    assert {record["arguments"]["name"] for record in records} == set("acd")
    assert again.seconds == pytest.approx(sum(record["seconds"] for record in records)) and again.commits == {
        records[0]["commit"]
    }


def test_a_failing_cell_raises_and_leaves_the_others(tmp_path, cells):
    lab = Lab(tmp_path / "cells", workers=2)
    with pytest.raises(ValueError, match="b went wrong") as caught:
        lab.run(
            "letters", [cells("a", seconds=0.3), cells("b"), *(cells(name, seconds=0.3) for name in "cdefgh")]
        )
    logs = list((tmp_path / "cells").glob("*.log"))
    assert [log.read_text() for log in logs] == ["said by b\n"]
    if hasattr(caught.value, "__notes__"):  # Python 3.11
        assert str(logs[0]) in str(caught.value.__notes__)
    kept = {json.loads(path.read_text())["result"]["name"] for path in (tmp_path / "cells").glob("*.json")}
    begun = (tmp_path / "log").read_text()
    assert "a" in kept == set(begun) - {"b"} and "h" not in begun, (
        "what ran beside it is kept, what had not begun never does"
    )
    (tmp_path / "mended").touch()
    mended = Lab(tmp_path / "cells", workers=0)
    assert (
        len(
            mended.run(
                "letters",
                [cells("a", seconds=0.3), cells("b"), *(cells(name, seconds=0.3) for name in "cdefgh")],
            )
        )
        == 8
    )
    assert sorted((tmp_path / "log").read_text()) == sorted("abbcdefgh")


def test_a_training_cell_is_a_run_with_its_curves_and_costs(tmp_path, config, monkeypatch):
    lab = Lab(tmp_path / "cells", workers=0)
    runs = lab.train("runs", [config, dataclasses.replace(config, policy_weight=1.0)])
    assert [[step for step, _ in run["curves"]["held_out_accuracy"]] for run in runs] == [[4], [4]]
    assert len(runs[0]["curves"]["reward"]) == 8 and runs[1]["curves"]["divergence"] == []
    distilled, alone = (run["costs"] for run in runs)
    assert distilled["generated_answers"] == alone["generated_answers"] == 8 * 4 * 3
    assert (
        distilled["teacher_tokens"] > distilled["context_tokens"] > 0
        and alone["teacher_tokens"] == alone["context_tokens"] == 0
    )
    assert {"held_out_accuracy_before", "untrained_skill_after", "steps"} <= set(runs[0])
    monkeypatch.setattr(loop, "train", None)
    assert Lab(tmp_path / "cells", workers=0).train("runs", [config]) == runs[:1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_base_model_that_does_not_learn_gives_its_place_to_another(tmp_path, config, workers):
    never = dataclasses.replace(config, warm_max_steps=1, warm_accuracy=0.99)
    with pytest.raises(RuntimeError, match=r"warm start: expected held-out accuracy 0\.99"):
        Lab(tmp_path / "never", workers=workers).train("runs", [never])
    assert len(list((tmp_path / "never").glob("*.json"))) == LARGEST_FAILURES
    lab = Lab(tmp_path / "cells", workers=workers)
    failed = warm_cell(dataclasses.replace(config, warm_seed=7))
    record = {"result": {"not_learned": "warm start: expected more"}, "seconds": 2.5, "commit": "c"}
    lab.folder.mkdir()
    (lab.folder / f"{failed.key}.json").write_text(json.dumps(record))
    asked = [dataclasses.replace(config, warm_seed=seed, steps=1) for seed in (7, 107)]
    replaced, given = lab.train("runs", asked)
    assert replaced["held_out_accuracy_after"] == given["held_out_accuracy_after"]
    assert lab.not_learned == {failed.key: "warm start: expected more"} and lab.spent[failed.key] == 2.5
    lab.close()


# ---------------------------------------------------------------- arms


class MadeUp:
    """A lab whose runs end at the accuracy of a formula; it records the requests."""

    master = 0

    def __init__(self, accuracy):
        self.accuracy, self.asked = accuracy, []

    def train(self, title, configs):
        self.asked.append(configs)
        return [made_up(self.accuracy(config)) for config in configs]


def made_up(after, before=0.2, curve=(), steps=60):
    values = {
        "held_out_accuracy": (before, after),
        "self_teacher_accuracy": (0.9, 0.8),
        "untrained_skill": (0.8, 0.4),
    }
    ends = {
        f"{name}_{when}": value
        for name, pair in values.items()
        for when, value in zip(("before", "after"), pair, strict=True)
    }
    costs = {
        "generated_answers": steps * 128,
        "completion_tokens": 4,
        "teacher_tokens": 3,
        "context_tokens": 2,
    }
    return {
        **ends,
        "steps": steps,
        "curves": {"held_out_accuracy": [list(point) for point in curve]},
        "costs": costs,
    }


def test_arms_get_the_rate_that_serves_them_and_the_same_seeds():
    best = {0.0: 1e-3, 1.0: 2e-4}
    lab = MadeUp(
        lambda config: 0.5 - abs(config.learning_rate - best[config.policy_weight]) + config.seed / 1e5
    )
    arms = [Arm("distil"), Arm("gradient", {"policy_weight": 1.0})]
    found = compare(lab, TrainConfig(), arms, Design(bases=3, seeds=2, tuning=2))
    assert (found["distil"].rate, found["gradient"].rate) == (1e-3, 2e-4)
    assert found["gradient"].tried[1e-3] == pytest.approx([0.5 - 8e-4 + seed / 1e5 for seed in (200, 201)])
    tuning, reported = lab.asked
    assert len(tuning) == 2 * 3 * 2 and {(c.seed, c.warm_seed) for c in tuning} == {(200, 0), (201, 1)}
    pairs = [(0, 0), (100, 0), (1, 1), (101, 1), (2, 2), (102, 2)]
    assert [(c.seed, c.warm_seed) for c in reported] == pairs * 2
    assert [c.learning_rate for c in reported] == [1e-3] * 6 + [2e-4] * 6
    assert found["distil"].bases == [0, 0, 1, 1, 2, 2]
    assert found["distil"].gains() == pytest.approx([0.3 + seed / 1e5 for seed, _ in pairs])


def test_no_run_chooses_its_own_rate_and_masters_share_no_seed():
    design = Design(bases=2, seeds=3, tuning=5)
    asked = [
        tuple(seeds.values())
        for master in (0, 1, 2)
        for seeds in (*design.runs(master), *design.tuning_runs(master))
    ]
    assert len(set(asked)) == len(asked) == 3 * (6 + 5)
    assert {warm for warm, _ in asked} == {0, 1, 1000, 1001, 2000, 2001}


def test_a_rate_is_chosen_by_the_mean_of_several_runs():
    """Seed 200 alone prefers the high rate by .3; the other two prefer the low one by .2."""
    lab = MadeUp(lambda config: {2e-4: 0.4, 1e-3: 0.7 if config.seed == 200 else 0.2}[config.learning_rate])
    for tuning, rate in ((1, 1e-3), (3, 2e-4)):
        design = Design(bases=3, seeds=2, tuning=tuning, rates=(2e-4, 1e-3))
        assert compare(lab, TrainConfig(), [Arm("only")], design)["only"].rate == rate


def test_one_rate_is_not_tried():
    lab = MadeUp(lambda config: 0.5)
    found = compare(lab, TrainConfig(), [Arm("only")], Design().quick())
    assert (
        len(lab.asked) == 1
        and len(found["only"].runs) == 1
        and found["only"].rate == Design().rates[1]
        and found["only"].tried == {}
    )


@pytest.mark.parametrize(
    "level, step", [(0.1, 0), (0.2, 0), (0.3, 10), (0.4, 20), (0.45, 50), (0.6, 60), (0.61, None)]
)
def test_first_step_at_a_level(level, step):
    """From .2 to .4 in 20 steps, down to .3, and to .6 at the end: the first crossing counts."""
    found = first_step_at(made_up(0.6, curve=[(20, 0.4), (40, 0.3)], steps=60), level)
    assert found is None if step is None else found == pytest.approx(step)


# ---------------------------------------------------------------- statistics (more in test_statistics.py)


def test_rank_statistics():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 31]) == 1 and spearman([1, 2, 3], [3, 2, 1]) == -1
    assert auc([3, 2, 1, 0], [True, True, False, False]) == 1 and auc([0, 1], [True, False]) == 0
    assert auc([1, 1, 2], [True, False, False]) == 0.25  # half for the tie, none for the other


# ---------------------------------------------------------------- the study of SDPO


def trained(**accuracies):
    """Make arms by name whose runs end at the given accuracies."""
    arms = {arm.name: [0.5] * 5 for arm in sdpo.ARMS["secret_op"]} | accuracies
    return {
        name: Trained(
            Arm(name), 1e-3, [made_up(value) for value in values], list(range(5)), {5e-4: [0.4], 1e-3: [0.5]}
        )
        for name, values in arms.items()
    }


def test_claims_follow_the_runs():
    ahead = trained(
        **{
            sdpo.GRPO: [0.3, 0.31, 0.32, 0.33, 0.34],
            sdpo.SIBLINGS: [0.2, 0.22, 0.24, 0.26, 0.28],
            sdpo.LIVE: [0.1, 0.2, 0.3, 0.2, 0.1],
        }
    )
    beats, faster, alone, alone_faster = sdpo.headlines("secret_op", ahead)
    assert (beats.grade, beats.estimate.value) == (REPRODUCED, pytest.approx(0.18))
    # A line from .2 to .5 is at .32 after .4 of it.
    assert (faster.grade, faster.estimate.value) == (REPRODUCED, pytest.approx(1 - 0.4))
    assert (
        "GRPO went from 0.200 to 0.320; reached by 5 of 5 runs, with 2.5 times fewer answers" in faster.remark
    )
    assert (
        (alone.grade, alone_faster.grade) == (NOT_REPRODUCED, INCONCLUSIVE)
        and "0 of 5" in alone_faster.remark
        and "times" not in alone_faster.remark
    )
    behind = trained(
        **{sdpo.SAMPLED: [0.6, 0.61, 0.62, 0.63, 0.64], sdpo.TOPK: [0.4, 0.39, 0.38, 0.37, 0.36]}
    )
    assert [claim.grade for claim in sdpo.teachers(ahead, behind)] == [REPRODUCED, INCONCLUSIVE]
    assert [claim.grade for claim in sdpo.logits(ahead)] == [INCONCLUSIVE, REPRODUCED]
    assert [claim.grade for claim in sdpo.logits(behind)] == [NOT_REPRODUCED, NOT_REPRODUCED]


def test_a_level_that_is_never_reached_saves_nothing():
    mine, theirs = trained()[sdpo.SDPO], trained(**{sdpo.GRPO: [0.35, 0.5, 0.9, 0.2, 0.1]})[sdpo.GRPO]
    assert sdpo.savings(mine, theirs) == pytest.approx([0.5, 0, 0, 1, 1])


def test_arms_differ_from_sdpo_in_what_their_names_say():
    for env, arms in sdpo.ARMS.items():
        config = sdpo.base(env, False)
        assert (config.feedback, config.siblings, config.teacher, config.topk) == (
            "case" if env == "expr" else "answer",
            True,
            "ema",
            None,
        )
        for arm in arms:
            dataclasses.replace(config, **arm.settings)
        assert set(sdpo.HEADLINE) <= {arm.name for arm in arms}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Run `opsd reproduce sdpo --quick` in this process."""
    out = tmp_path_factory.mktemp("sdpo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPSD_CACHE", str(out / "cache"))
        return out, command.reproduce("sdpo", out, True, 0, ["reproduce", "sdpo", "--quick"])


@pytest.mark.slow
def test_the_quick_study_goes_through(quick, monkeypatch):
    out, study = quick
    assert load(out / "sdpo.json") == study
    assert {claim.grade for claim in study.claims} == {INCONCLUSIVE} and {
        claim.estimate.count for claim in study.claims
    } == {1}
    assert len(study.claims) == 12 and study.facts["quick"] and study.facts["cell_seconds"] > 0
    assert (out / "sdpo.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setenv("OPSD_CACHE", str(out / "cache"))
    monkeypatch.setattr(loop, "train", None)
    assert command.reproduce("sdpo", out, True, 0, []).claims == study.claims, "its cells are there"


def test_an_unknown_paper():
    papers = "sdpo, discovery, mopd, iw_opd, law, variance, sdpo_python, law_python"
    with pytest.raises(ValueError, match=f"paper: expected one of {papers}, got 'sdop'"):
        command.reproduce("sdop", Path("unused"), True, 0, [])


def test_sdpos_rates_are_chosen_by_all_base_models(tmp_path, monkeypatch):
    """And for the arms of claims alone; the others have that of SDPO."""
    asked = []

    def train(lab, title, configs):
        asked.extend(configs)
        return [{"held_out_accuracy_after": -abs(config.learning_rate - 5e-4)} for config in configs]

    monkeypatch.setattr(Lab, "train", train)
    found = sdpo.train(Lab(tmp_path, workers=0), "secret_op", sdpo.DESIGN)
    assert list(found) == [arm.name for arm in sdpo.ARMS["secret_op"]]
    assert {arm.rate for arm in found.values()} == {5e-4}
    assert {name for name, arm in found.items() if arm.tried} == set(sdpo.NEEDED)
    tuning = {config.warm_seed for config in asked if config.learning_rate != 5e-4}
    reported = {config.warm_seed for config in asked if config.seed == config.warm_seed}
    assert tuning == reported == set(range(sdpo.DESIGN.bases))


# ---------------------------------------------------------------- pages


STUDY = Study(
    "made_up",
    "A study",
    "A paper, arXiv:0000.00000",
    "Is it so?",
    ["Two arms."],
    [
        Claim("It is|so", "a less b", Estimate(0.1, 0.05, 0.15, 10, 5), REPRODUCED, "By luck"),
        Claim("Or not", "c", Estimate(0.1, -0.2, 0.3, 10, 5), INCONCLUSIVE),
    ],
    [Table("Numbers", ["arm", "value"], [["a", "1"], ["b", "2"]])],
    [
        Panel("curves", "lines", "step", "accuracy", [
            Series("a", [0, 1], [0.1, 0.2], [0.0, 0.1], [0.2, 0.3]),
            Series("b", [0, 1], [0.1, 0.1]),
        ]),
        Panel("bars", "bars", "arm", "accuracy", [
            Series("after", ["a", "b"], [0.2, 0.1], [0.1, 0.0], [0.3, 0.2]),
        ]),
        Panel("points", "points", "gap", "gain", [Series("runs", [0.1, 0.2], [0.1, 0.3])]),
    ],
    ["It is a toy."],
    {
        "machine": "a computer", "versions": {"torch": "2.0"}, "commits": ["0123456789abcdef"],
        "command": "opsd reproduce made_up", "date": "2026-01-01",
        "cell_seconds": 600.0, "workers": 2, "quick": False,
    },
)  # fmt: skip


def test_a_page_says_what_held(tmp_path):
    pages.write(STUDY, tmp_path)
    assert load(tmp_path / "made_up.json") == STUDY
    page = (tmp_path / "made_up.md").read_text()
    assert page == pages.markdown(load(tmp_path / "made_up.json")), "a page follows from the JSON alone"
    rows = [line for line in page.splitlines() if line.startswith(("| It is", "| Or"))]
    assert (
        rows[0]
        == "| It is\\|so | a less b | 0.100 [0.050, 0.150] | 10 on 5 | **direction reproduced**. By luck |"
    )
    assert rows[1] == "| Or not | c | 0.100 [-0.200, 0.300] | 10 on 5 | **inconclusive** |"
    for part in (
        "# A study",
        "Is it so?",
        "| b | 2 |",
        "* Two arms.",
        "* It is a toy.",
        "a computer; torch 2.0; commit 0123456789ab; 2026-01-01; 10 minutes",
    ):
        assert part in page
    assert "proves nothing" not in page
    assert "proves nothing" in pages.markdown(
        dataclasses.replace(STUDY, facts={**STUDY.facts, "quick": True})
    )
    replaced = dataclasses.replace(STUDY, facts={**STUDY.facts, "not_learned": ["got 0.000"]})
    assert "* Base models that did not learn and gave their places to others: got 0.000." in pages.markdown(
        replaced
    )


def test_a_page_compares_a_rerun(tmp_path):
    moved = [
        dataclasses.replace(
            claim, estimate=dataclasses.replace(claim.estimate, value=0.2), grade=INCONCLUSIVE
        )
        for claim in STUDY.claims
    ]
    second = dataclasses.replace(STUDY, claims=moved, facts={**STUDY.facts, "machine": "another computer"})
    page = pages.markdown(STUDY, second)
    assert "1 of 2 estimates of the rerun lie inside the intervals, 1 of 2 grades flipped" in page
    assert (
        "| It is\\|so | 0.100 [0.050, 0.150] | 0.200 | **no** | direction reproduced -> **inconclusive** |"
        in page
    )
    assert "another computer; torch 2.0" in page and "## Rerun" not in pages.markdown(STUDY)
    folder = tmp_path / pages.FOLDER
    for where, study in ((folder, STUDY), (folder / pages.RERUNS, second)):
        study.save(where / "made_up.json")
    assert pages.committed(tmp_path) == {folder / "made_up.md": page}


def test_a_page_of_older_code_says_so(monkeypatch):
    monkeypatch.setattr(pages, "NOT_RERUN", ("made_up",))
    text = "**Made by older code (commit 0123456789ab, 2026-01-01); not rerun since.**"
    page = pages.markdown(STUDY)
    assert text in page and "over few seeds" not in page
    flat = [
        dataclasses.replace(claim, estimate=dataclasses.replace(claim.estimate, bases=0))
        for claim in STUDY.claims
    ]
    page = pages.markdown(dataclasses.replace(STUDY, claims=flat))
    assert text in page and "over few seeds" in page and "| value [95 % over runs] | runs |" in page


def test_a_figure_has_a_panel_for_each(tmp_path):
    sizes = []
    for count in (1, 2, 3):
        pages.draw(dataclasses.replace(STUDY, panels=STUDY.panels[:count]), tmp_path / "figure.png")
        data = (tmp_path / "figure.png").read_bytes()
        sizes.append((int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")))
    one, two, three = sizes
    assert two[0] > 1.6 * one[0] and three[1] > 1.6 * two[1] and abs(three[0] - two[0]) < 0.1 * two[0]


def test_a_study_of_another_schema_is_refused(tmp_path):
    for content in ({"schema": 99}, [1]):
        (tmp_path / "old.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="expected a study of opsd reproduce with schema 1, got"):
            load(tmp_path / "old.json")


def stale(root):
    return [
        path.name
        for path, text in pages.committed(root).items()
        if not path.exists() or path.read_text() != text
    ]


def test_committed_pages_are_those_of_their_studies(tmp_path):
    assert stale(ROOT) == []
    for path in pages.committed(ROOT):
        study = load(path.with_suffix(".json"))
        assert (
            path.with_suffix(".png").exists()
            and not study.facts["quick"]
            and {claim.grade for claim in study.claims} <= set(GRADES)
        )
    folder = tmp_path / pages.FOLDER
    folder.mkdir(parents=True)
    pages.write(STUDY, folder)
    assert stale(tmp_path) == []
    shutil.copy(folder / "made_up.json", folder / "other.json")
    page = folder / "made_up.md"
    page.write_text(page.read_text().replace("0.100", "0.200", 1))
    assert stale(tmp_path) == ["made_up.md", "other.md"]
