"""The digest of a study: what changes it and what does not, cells of older code, and stale pages."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from opsd_kernels.train.studies import command, digest, pages
from opsd_kernels.train.studies.lab import Cell, Lab
from opsd_kernels.train.studies.study import load

ROOT = Path(__file__).resolve().parents[2]
SOURCE = '''"""A module."""

from opsd_kernels.train.records import log
from ..divergence import f


def half(x):
    """Return half."""
    # A comment.
    return x / 2
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Make a package of this name with a trainer of few modules; return a function that writes one."""

    def write(name, text):
        file = tmp_path / "opsd_kernels" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        forget()
        return file

    monkeypatch.setattr(digest, "ROOT", tmp_path / "opsd_kernels")
    write("train/__init__.py", "")
    write("train/envs/__init__.py", "from . import secret_op, plan\n")
    write("train/envs/secret_op.py", "A = 1\n")
    write("train/envs/plan.py", "A = 1\n")
    write("train/step.py", SOURCE)
    write("train/records/log.py", "A = 1\n")
    write("divergence.py", "A = 1\n")
    write(
        "train/loop.py", "def run():\n    from opsd_kernels.train.step import half\n    from . import envs\n"
    )
    write("train/apart.py", "A = 1\n")
    yield write
    forget()


def forget():
    digest.module_hash.cache_clear()
    digest._imports.cache_clear()


def found():
    return digest.modules(["opsd_kernels.train.loop"], ["opsd_kernels.train.envs.secret_op"])


def test_modules_are_those_that_decide_numbers(package):
    """Imports within functions count; records, the op, other environments and modules not imported do not."""
    assert list(found()) == [
        f"opsd_kernels.train{name}" for name in ("", ".envs", ".envs.secret_op", ".loop", ".step")
    ]


@pytest.mark.parametrize(
    "old, new, same",
    [
        ("# A comment.", "# Another one, and\n    # a second line.", True),
        ('"""Return half."""', '"""Return one half.\n\n    Of x.\n    """', True),
        ('"""A module."""\n', "", True),
        ("return x / 2", "return (\n        x / 2\n    )", True),
        ("x / 2", "x / 3", False),
        ("def half(x)", "def half(x, y=None)", False),
        ("    # A comment.\n", "    x = 'no docstring'\n", False),
    ],
)
def test_a_digest_is_of_the_code_alone(package, old, new, same):
    before = found()
    assert old in SOURCE
    package("train/step.py", SOURCE.replace(old, new))
    assert digest.changed(before) == ([] if same else ["opsd_kernels.train.step"])


def test_files_that_decide_nothing_make_no_study_old(package):
    before = found()
    for name in ("train/records/log.py", "divergence.py", "train/envs/plan.py", "train/apart.py"):
        package(name, "A = 2\n")
    assert found() == before and digest.changed(before) == []
    package("train/envs/secret_op.py", "A = 2\n")
    assert digest.changed(before) == ["opsd_kernels.train.envs.secret_op"]


def test_a_module_that_is_gone_is_a_change(package):
    before = found()
    package("train/step.py", "").unlink()
    assert digest.changed(before) == ["opsd_kernels.train.step"]


def test_a_new_setting_is_no_change_and_another_default_is():
    recorded = json.loads(json.dumps(digest.defaults()))
    assert digest.changed_defaults(recorded) == []
    recorded["learning_rate"] *= 2
    del recorded["ema_rate"]
    assert digest.changed_defaults(recorded | {"a_setting_that_is_gone": 1}) == ["learning_rate"]


def test_cells_of_older_code_are_computed_again(tmp_path, monkeypatch):
    """A lab reuses a cell of equal code alone."""
    (tmp_path / "numbered.py").write_text("def one(arguments, folder):\n    return {'of': arguments['of']}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    files = []
    for value in ("aa", "aa", "bb"):
        monkeypatch.setattr(digest, "modules", lambda roots, envs, value=value: {"opsd_kernels.x": value})
        lab = Lab(tmp_path / "cells", workers=0)
        lab.run("one", [Cell("numbered:one", {"of": 1})])
        files.append(len(list((tmp_path / "cells").glob("*.json"))))
        assert lab.modules == {"opsd_kernels.x": value}
    assert files == [1, 1, 2]


def test_the_studies_count_their_own_environment_and_statistics():
    cell = Cell("opsd_kernels.train.studies.cells:train", {"env": "plan", "steps": 3})
    names = {name.removeprefix("opsd_kernels.train.") for name in cell.modules}
    assert {"loop", "step", "objective", "envs.plan", "envs.chain", "models.warmstart"} <= names
    assert not {"envs.secret_op", "envs.python", "records.log", "sampling.vllm_engine"} & names
    # In a process of its own, too.
    apart = Cell("opsd_kernels.train.studies.papers.variance_cells:elsewhere", {"configs": [{"env": "plan"}]})
    assert {f"opsd_kernels.train.{name}" for name in ("loop", "envs.plan")} <= set(apart.modules)
    paper = digest.modules(["opsd_kernels.train.studies.papers.law"], [])
    assert {f"opsd_kernels.train.studies.{name}" for name in ("statistics", "compare", "papers.law")} <= set(
        paper
    )
    assert not any(name.startswith("opsd_kernels._") for name in {**paper, **cell.modules})


# ---------------------------------------------------------------- committed studies


def committed():
    folder = ROOT / pages.FOLDER
    return sorted([*folder.glob("*.json"), *(folder / pages.RERUNS).glob("*.json")])


@pytest.mark.parametrize("path", committed(), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_committed_studies_are_of_this_code_or_say_so(path):
    """A study whose code has changed is run again; the pages of the studies that were not say so."""
    study = load(path)
    old = pages.stale(study)
    if study.paper in pages.NOT_RERUN:
        assert old, f"{study.paper} is of this code: take it off pages.NOT_RERUN"
        page = path.with_suffix(".md").read_text()
        assert "**Made by older code (commit " in page and "; not rerun since.**" in page
        return
    assert not old, (
        f"{path.name} was made by other code than today's: {', '.join(old)}\nto mend it: "
        f"{pages.mended_by(study.paper)}"
    )


def test_the_papers_are_all_committed():
    assert {path.stem for path in committed()} == set(command.PAPERS)
    assert set(pages.NOT_RERUN) <= set(command.PAPERS)


def test_remarks_have_the_numbers_of_the_results():
    """Else a rerun would leave them behind."""
    for paper, remarks in pages.REMARKS.items():
        results = "".join(path.read_text() for path in committed() if path.stem == paper)
        assert all(number in results for number in re.findall(r"\d*\.\d+", " ".join(remarks)))


def test_the_laws_of_three_environments_are_those_of_the_studies():
    """The table of docs/results/trainer.md, which is written by hand."""
    section = (
        (ROOT / "docs/results/trainer.md").read_text().split("## The predictive law\n")[1].split("\n## ")[0]
    )
    found = [
        [cell.strip() for cell in line.split("|")[2:-1]] for line in section.splitlines() if "| ." in line
    ]
    expected = []
    for paths in (["law", "reruns/law"], ["law_python"]):
        tables = [
            {table.title: table.rows for table in load(ROOT / pages.FOLDER / f"{path}.json").tables}
            for path in paths
        ]
        for place in range(len(tables[0]["Explanation: chance"])):
            for one in tables:
                gap, agreed = one["Two measures"][2 * place : 2 * place + 2]
                exact = one["Explanation: chance"][place][3]
                r2 = [f"{float(number):.2f}".removeprefix("0") for number in (gap[5], agreed[5], exact)]
                errors = [number.removeprefix("0") for number in (gap[6], agreed[6], gap[7])]
                expected.append([gap[2], *r2, *errors])
    assert found == expected


def test_a_stale_study_is_found(tmp_path):
    fresh = load(ROOT / pages.FOLDER / "variance.json")
    modules = dict(fresh.facts["modules"])
    before = set(pages.stale(fresh))
    name = next(name for name in modules if name not in before)
    modules[name] = "0" * 12
    for facts, expected in (
        ({"modules": modules}, [name]),
        ({"defaults": {**fresh.facts["defaults"], "seed": 17}}, ["default of seed"]),
    ):
        changed = dataclasses.replace(fresh, facts={**fresh.facts, **facts})
        assert set(pages.stale(changed)) - before == set(expected)
