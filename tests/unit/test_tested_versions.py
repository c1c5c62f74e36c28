"""The records of tested configurations: from a report of pytest to the file, the page and `opsd doctor`."""

import importlib.util
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from opsd_kernels import tested_versions
from opsd_kernels.tested_versions import Record

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "record_versions.py"
RECORD = Record(
    "2026-11-29",
    "c0ffee",
    "3.13.0",
    "Linux x86_64",
    "a processor",
    {"torch": "2.13.0+cpu", "trl": None},
    "pytest",
    1000,
    0,
    30,
    300.0,
    80,
)
OLDER = replace(RECORD, python="3.10.13", packages={"torch": "2.10.0"})


@pytest.fixture
def records(monkeypatch):
    """Replaces the committed records."""

    def put(*chosen: Record):
        monkeypatch.setattr(tested_versions, "load", lambda: chosen)
        tested_versions.tested.cache_clear()

    yield put
    tested_versions.tested.cache_clear()


@pytest.fixture
def script(monkeypatch):
    """Return tests/record_versions.py as a function of its arguments.

    `share` is the least part of the suite's files.
    """
    spec = importlib.util.spec_from_file_location("record_versions", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments: object, share: float = 0.0):
        monkeypatch.setattr(module, "LEAST_SHARE", share)
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        module.main()

    return call


def report_of(path: Path, *arguments: str) -> Path:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={path}",
        *arguments,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return report_of(
        tmp_path_factory.mktemp("report") / "a.xml",
        "tests/unit/test_report_json.py",
        "tests/gpu/test_ranks_on_gpu.py",
    )


def test_a_run_of_pytest_becomes_a_record(script, report, tmp_path, capsys):
    """Also of two calls, whose counts add up; a second run on the same configuration replaces the first."""
    out = tmp_path / "records.json"
    for reports in ([report], [report, report], [report]):
        script(*reports, "--to", out)
        (made,) = tested_versions.load(out)
        once = made if len(reports) == 1 else replace(made, passed=made.passed // 2)
        assert (made.failed, once.passed > 5, made.skipped > 0, made.files) == (0, True, True, 2)
        assert f"{made.passed} passed" in capsys.readouterr().out
    assert made.python == platform.python_version() and made.packages == tested_versions.installed()
    assert made.command.startswith("pytest -q") and str(report.parent) not in made.command


def test_a_part_of_the_suite_or_a_foreign_report_is_no_record(script, report, tmp_path):
    foreign, selection = tmp_path / "foreign.xml", tmp_path / "selection.xml"
    foreign.write_text(
        '<testsuites><testsuite tests="3" failures="0" errors="0" skipped="0" time="1"/></testsuites>'
    )
    selection.write_text(
        report.read_text().replace("[&quot;-q&quot;", "[&quot;-k&quot;, &quot;chunk&quot;", 1)
    )
    for path, share, says in (
        (foreign, 0.0, "expected a report of this repository's tests"),
        (selection, 0.0, "got a selection of it: -k"),
        (report, 0.5, "got tests of 2 of its"),
    ):
        with pytest.raises(SystemExit, match=says):
            script(path, "--to", tmp_path / "records.json", share=share)
    assert not (tmp_path / "records.json").exists()


def test_records_are_read_back_in_the_order_of_their_versions(tmp_path):
    tested_versions.save((RECORD, OLDER), tmp_path / "a.json")
    assert tested_versions.load(tmp_path / "a.json") == (OLDER, RECORD)
    (tmp_path / "a.json").write_text('{"records": [{"torch": "2.10.0"}]}')
    with pytest.raises(ValueError, match="expected records with date"):
        tested_versions.load(tmp_path / "a.json")


@pytest.mark.parametrize(
    "package, found, says",
    [
        ("torch", "2.13.0+cu130", "2.13.0+cu130 (tested; tested: 2.10.0, 2.13.0)"),
        ("torch", "2.12.0", "2.12.0 (not tested; tested: 2.10.0, 2.13.0)"),
        ("python", "3.13.5", "3.13.5 (tested; tested: 3.10.13, 3.13.0)"),
        ("python", "3.12.0", "3.12.0 (not tested; tested: 3.10.13, 3.13.0)"),
        ("trl", "1.16.0", "1.16.0"),  # no record, no claim
        ("torch", "not installed", "not installed"),
    ],
)
def test_doctors_note(records, package, found, says):
    records(
        RECORD,
        OLDER,
        replace(RECORD, packages={"torch": "2.11.0"}, failed=1),
        replace(RECORD, packages={"torch": "2.9.0"}, passed=0),
    )
    assert tested_versions.note(package, found) == says


def test_doctor_prints_the_note(records):
    from typer.testing import CliRunner

    from opsd_kernels import cli

    records(replace(RECORD, packages={"torch": "2.9.9"}))
    words = " ".join(CliRunner().invoke(cli.app, ["doctor"]).stdout.split())
    assert "(not tested; tested: 2.9.9)" in words


def test_the_page_has_a_row_for_each_record_and_tells_the_command():
    page = tested_versions.markdown((OLDER, RECORD))
    assert (
        "| 3.10.13 | 2.10.0 | 80 | 1000 | 0 | 30 | 1 |" in page
        and "| 3.13.0 | 2.13.0+cpu | 80 | 1000 | 0 | 30 | 2 |" in page
    )
    assert "2. 2026-11-29, commit c0ffee, a processor, Linux x86_64, 300 s: `pytest`" in page
    assert "No run has been recorded yet." in tested_versions.markdown(())
