"""The writer of committed reports: plain JSON, a line per record; all committed reports have its format."""

import json
from pathlib import Path

import pytest

from opsd_kernels import report_json

ROOT = Path(__file__).resolve().parents[2]
REPORTS = sorted(
    [*(ROOT / "benchmarks" / "results").rglob("*.json"), *(ROOT / "docs" / "reproduce").rglob("*.json")]
)
LONG_TABLE = {"title": "wide", "rows": [["x" * 100, str(i)] for i in range(9)]}


@pytest.mark.parametrize(
    "report",
    [
        {},
        [],
        None,
        {"empty": {}, "none": None, "rows": []},
        {"text": 'a "quoted"\nline, ü', "nan": [1e-300, -0.0, 12345678901234567890]},
        {"settings": {f"a long name of a setting {i}": {"nested": [i]} for i in range(9)}},
        {
            "sentences": ["a sentence of some length"] * 20,
            "numbers": list(range(200)),
            "mixed": [1, "x" * 200, None],
        },
        {
            "rows": [{"ms": {"median": 1.5}, "points": list(range(200))}, {"ms": None}],
            "tables": [LONG_TABLE],
            "pairs": [[1, 2], [3, 4]],
        },
    ],
)
def test_a_report_is_read_back_equal(report):
    text = report_json.dumps(report)
    assert text.endswith("\n") and json.dumps(json.loads(text)) == json.dumps(report)


def test_a_record_takes_one_line():
    rows = [
        {"suite": "ratios", "ms": {"median": float(i), "n": 9}, "curve": list(range(100))} for i in range(3)
    ]
    lines = report_json.dumps({"kind": "suites", "commit": "c0ffee", "rows": rows}).splitlines()
    assert lines[:4] == ["{", ' "kind": "suites",', ' "commit": "c0ffee",', ' "rows": ['] and lines[-2:] == [
        " ]",
        "}",
    ]
    assert [line.strip(" ,") for line in lines[4:-2]] == [json.dumps(row) for row in rows]


def test_a_long_record_of_records_takes_one_line_for_each_of_them():
    lines = report_json.dumps({"tables": [LONG_TABLE, {"title": "small", "rows": [["1", "2"]]}]}).splitlines()
    assert all(f"    {json.dumps(row)}" in (line.rstrip(",") for line in lines) for row in LONG_TABLE["rows"])
    assert '  {"title": "small", "rows": [["1", "2"]]}' in lines


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_committed_reports_are_as_written(path):
    text = path.read_text()
    assert text == report_json.dumps(json.loads(text))
