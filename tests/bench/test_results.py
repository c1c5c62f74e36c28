"""Reports on disk, and the changes between two of them."""

import json
from dataclasses import replace

import pytest

from opsd_kernels.bench.measure.timing import Sample
from opsd_kernels.bench.report.compare import changes_of, comparable
from opsd_kernels.bench.report.results import Report, Row, load
from opsd_kernels.bench.report.tables import times

ROW = Row("ratios", "opsd", 1024, 512, 32000, "bfloat16", "shared", "trainable", "jsd")
MEASURED = {
    "ms": Sample(110, 109, 111, 9),
    "ratio": Sample(1.1, 1.09, 1.11, 9),
    "base": "gemms",
    "whole": 1.2,
}
TIMED = replace(ROW, **MEASURED, peak_bytes=200 << 20, gradient_error=1e-2, rows=512)


def report(*rows, **changes):
    made = Report(
        {"name": "a machine"},
        {"torch": "2.13.0", "trl": None},
        "c0ffee",
        "opsd bench",
        "2026-11-21",
        False,
        ["ratios"],
        rows=list(rows),
    )
    return replace(made, **changes)


def test_round_trip(tmp_path):
    written = report(
        TIMED, replace(ROW, provider="trl", reason="trl >= 1.16 is not installed"), ceilings={"copy": 2e10}
    )
    written.save(tmp_path / "deep" / "a.json")
    assert load(tmp_path / "deep" / "a.json") == written
    assert len((tmp_path / "deep" / "a.json").read_text().splitlines()) > len(written.rows)


@pytest.mark.parametrize("text", ["[]", "{}", json.dumps({"schema": 0, "rows": []})])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="expected a report of opsd bench"):
        load(tmp_path / "a.json")


def test_where_names_machine_versions_and_commit():
    assert report().where == "a machine; torch 2.13.0; commit c0ffee; 2026-11-21"


def slower(factor, **changes):
    return replace(TIMED, ratio=Sample(1.1 * factor, 1.09 * factor, 1.11 * factor, 9), **changes)


@pytest.mark.parametrize(
    "after, says",
    [
        (TIMED, []),
        (slower(1.03), []),
        (slower(1.2), ["slower"]),
        (slower(0.8), ["faster"]),
        (slower(1.2, noise="the machine was too noisy"), ["too noisy to tell"]),
        (replace(TIMED, ratio=Sample(1.3, 0.9, 1.9, 9)), []),  # wide quartiles explain it
        (replace(TIMED, whole=1.8), ["slower"]),
        (replace(TIMED, peak_bytes=260 << 20), ["more memory"]),
        (replace(TIMED, peak_bytes=202 << 20), []),
        (replace(TIMED, gradient_error=2e-2), ["less exact"]),
        (replace(TIMED, rows=64), ["smaller chunks"]),
        (replace(TIMED, predicted_bytes=100 << 20), ["above plan"]),
        (replace(ROW, reason="wrong, so no number"), ["failed"]),
        (replace(TIMED, divergence="reverse_kl"), ["missing"]),
    ],
)
def test_changes(after, says):
    assert [change.what for change in changes_of(report(TIMED), report(after))] == says


def test_what_is_not_comparable_is_said():
    other = report(versions={"torch": "2.12.0", "trl": None}, machine={"name": "another"}, quick=True)
    assert [note.split()[0] for note in comparable(report(), other)] == ["machines", "torch", "quick"]


def test_a_noisy_ratio_has_no_verdict_and_a_wild_one_no_number():
    assert [slower(factor, target=1.2).verdict for factor in (1, 1.3)] == ["ok", "missed"]
    noisy, wild = (
        slower(1, target=1.2, noise="noise"),
        replace(TIMED, ratio=Sample(0.6, 0.4, 0.9, 3), noise="noise"),
    )
    assert noisy.verdict == "unknown: too noisy"
    assert [times(row) for row in (TIMED, noisy, wild)] == ["1.10", "~1.10", "too noisy"]
