"""The records of tested configurations: from a report of pytest to the file, the page and `opsd doctor`."""

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
RECORD = Record("2026-11-29", "c0ffee", "3.13.0", "Linux x86_64", "a processor", {"torch": "2.13.0+cpu", "trl": None}, "pytest", 1000, 0, 30, 300.0)
OLDER = replace(RECORD, python="3.10.13", packages={"torch": "2.10.0"})


@pytest.fixture
def records(monkeypatch):
    """Replaces the committed records."""

    def put(*chosen: Record):
        monkeypatch.setattr(tested_versions, "load", lambda: chosen)
        tested_versions.tested.cache_clear()

    yield put
    tested_versions.tested.cache_clear()


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


def report_of(path: Path, *arguments: str) -> Path:
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={path}", *arguments)
    assert done.returncode == 0, done.stdout
    return path


def record(*arguments: object) -> subprocess.CompletedProcess:
    return run(SCRIPT, *arguments, env={"PYTHONPATH": str(ROOT)})


def test_a_run_of_pytest_becomes_a_record(tmp_path):
    """Also of two calls, whose counts add up; a second run on the same configuration replaces the first."""
    report = report_of(tmp_path / "a.xml", "tests/unit/test_selection.py")
    out = tmp_path / "records.json"
    for reports in ([report], [report, report], [report]):
        done = record(*reports, "--to", out)
        assert done.returncode == 0, done.stderr
        (made,) = tested_versions.load(out)
        once = made if len(reports) == 1 else replace(made, passed=made.passed // 2)
        assert (made.failed, once.passed > 5) == (0, True) and f"{made.passed} passed" in done.stdout
    assert made.python == platform.python_version() and made.packages == tested_versions.installed()
    assert made.command.endswith("tests/unit/test_selection.py") and str(tmp_path) not in made.command


def test_a_selection_or_a_foreign_report_is_no_record(tmp_path):
    selection = report_of(tmp_path / "a.xml", "tests/unit/test_selection.py", "-k", "names or error or unknown")
    (tmp_path / "b.xml").write_text('<testsuites><testsuite tests="3" failures="0" errors="0" skipped="0" time="1"/></testsuites>')
    for path, says in ((selection, "got a selection of it: -k"), (tmp_path / "b.xml", "expected a report of this repository's tests")):
        done = record(path, "--to", tmp_path / "records.json")
        assert done.returncode == 1 and says in done.stderr
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
    records(RECORD, OLDER, replace(RECORD, packages={"torch": "2.11.0"}, failed=1), replace(RECORD, packages={"torch": "2.9.0"}, passed=0))
    assert tested_versions.note(package, found) == says


def test_doctor_prints_the_note(records):
    from typer.testing import CliRunner

    from opsd_kernels import cli

    records(replace(RECORD, packages={"torch": "2.9.9"}))
    words = " ".join(CliRunner().invoke(cli.app, ["doctor"]).stdout.split())
    assert "(not tested; tested: 2.9.9)" in words


def test_the_page_has_a_row_for_each_record_and_tells_the_command():
    page = tested_versions.markdown((OLDER, RECORD))
    assert "| 3.10.13 | 2.10.0 | 1000 | 0 | 30 | 1 |" in page and "| 3.13.0 | 2.13.0+cpu | 1000 | 0 | 30 | 2 |" in page
    assert "2. 2026-11-29, commit c0ffee, a processor, Linux x86_64, 300 s: `pytest`" in page
    assert "No run has been recorded yet." in tested_versions.markdown(())
