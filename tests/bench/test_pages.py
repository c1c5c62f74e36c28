"""The generated pages are current, and name the source of their numbers."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from opsd_kernels import cli, plan
from opsd_kernels.bench.measure.timing import Sample
from opsd_kernels.bench.pages import integrations, performance, sizing, write
from opsd_kernels.bench.pages.scaling.page import page as scaling_page
from opsd_kernels.bench.report.results import Report, Row

ROOT = Path(__file__).resolve().parents[2]


def test_performance_page_is_current():
    assert (ROOT / write.PERFORMANCE).read_text() == performance.performance(ROOT / write.RESULTS), (
        "run `make docs`"
    )


def test_readme_is_current():
    text = (ROOT / write.README).read_text()
    assert text == write.with_block(text, performance.readme_block(ROOT / write.RESULTS)), "run `make docs`"


def test_scaling_page_is_current():
    assert (ROOT / write.SCALING).read_text() == scaling_page(ROOT / write.RESULTS), "run `make docs`"


@pytest.mark.parametrize("side, page", integrations.PAGES.items())
def test_integration_pages_are_current(side, page):
    text = (ROOT / page).read_text()
    assert text == write.with_block(text, integrations.block(ROOT / write.RESULTS, side), page), (
        "run `make docs`"
    )


@pytest.mark.parametrize(
    "load, heading, cells",
    [(2.1, "verl s | ours s", "3.00 | 1.50 | 2.00"), (9.0, "verl CPU s | ours CPU s", "2.40 | 0.80 | 3.00")],
)
def test_a_busy_machine_shows_cpu_time(tmp_path, load, heading, cells):
    row = {
        "name": "forward_kl_topk",
        "loss": "top-32",
        "dtype": "bfloat16",
        "load": [load, 2.0],
        "loss_errors": {"verl": 0.012, "opsd": 3e-6},
    }
    row |= {
        "verl_wall_ms": 3000.0,
        "opsd_wall_ms": 1500.0,
        "wall_ratio": 2.0,
        "verl_cpu_ms": 2400.0,
        "opsd_cpu_ms": 800.0,
        "cpu_ratio": 3.0,
    }
    row |= {"verl_peak_bytes": 400 << 20, "opsd_peak_bytes": 200 << 20, "peak_ratio": 2.0}
    report = {
        "kind": "verl_steps",
        "machine": {"name": "some machine", "threads": 2},
        "versions": {"verl": "0.9.1"},
        "commit": "c0ffee",
        "date": "2026-11-21",
    }
    report |= {"command": "python benchmarks/verl_steps.py", "threads": 2, "rows": [row]}
    report["shape"] = {"V": 151936, "H": 256, "sequences": 4, "prompt": 32, "completion": 64, "rounds": 3}
    (tmp_path / "some-cpu").mkdir()
    (tmp_path / "some-cpu" / "verl_steps.json").write_text(json.dumps(report))
    block = integrations.block(tmp_path, "verl")
    assert heading in block and f"| {cells} | 400 | 200 | 2.00 | 1e-02 | 3e-06 |" in block
    assert ("CPU time" in block) == (
        load > 5
    ) and "some machine; verl 0.9.1; commit c0ffee; 2026-11-21. `python benchmarks/verl_steps.py`" in block


def test_an_integration_that_was_not_measured_says_how():
    assert (
        integrations.block(ROOT / "nothing", "verl")
        == "Not measured yet: run `python benchmarks/verl_steps.py`."
    )


def test_sizing_page_is_current():
    text = (ROOT / write.SIZING).read_text()
    assert text == write.with_block(text, sizing.plans_block(), write.SIZING), "run `make docs`"


@pytest.mark.parametrize("example", sizing.EXAMPLES, ids=lambda example: example[0])
def test_the_command_of_an_example_says_the_same(example):
    _, options, arguments = example
    result = CliRunner().invoke(cli.app, ["plan", *options.split(), "--device", "cuda", "--json"])
    assert (
        result.exit_code == 0 and json.loads(result.output) == plan(**arguments, device_type="cuda").as_dict()
    )


SETTING = (8, 4, 9, "bfloat16", "shared", "trainable", "jsd")


@pytest.fixture
def results(tmp_path):
    """Return a folder of results with one report of one machine."""
    rows = [
        Row(
            "ratios",
            provider,
            *SETTING,
            ms=Sample(2, 2, 2, 5),
            ratio=Sample(value, value, value, 5),
            noise=noise,
        )
        for provider, value, noise in (
            ("gemms", 1.0, None),
            ("whole", 0.9, None),
            ("opsd", 1.05, None),
            ("torch", 3.21, "the machine was too noisy"),
        )
    ]
    rows.append(Row("ratios", "trl", *SETTING, reason="trl >= 1.16 is not installed"))
    rows += [
        Row("memory", name, *SETTING, reason="out of memory (limit 1 MiB)") for name in ("opsd", "torch")
    ]
    made = Report(
        {"name": "some machine"},
        {"torch": "2.13.0"},
        "c0ffee",
        "opsd bench --suite ratios",
        "2026-11-21",
        False,
        ["ratios", "memory"],
        rows=rows,
    )
    made.save(tmp_path / "some-cpu" / "ratios.json")
    return tmp_path


def test_every_table_carries_machine_versions_commit_and_command(results):
    page = performance.performance(results)
    assert (
        page.count("\n| --- |")
        == page.count("some machine; torch 2.13.0; commit c0ffee; 2026-11-21. `opsd bench --suite ratios`")
        == 2
    )
    assert "| N=8 H=4 V=9 | bfloat16 | shared | trainable | jsd | 2 | 1.05 | ~3.21 |" in page
    assert "out of memory" in page and "TRL" not in page
    block = performance.readme_block(results)
    assert "1.05" in block and "commit c0ffee" in block


def test_a_row_that_failed_its_gate_says_so():
    reason = "gradient of student_weight: relative error 2.467%, target 2.00%"
    row = Row(
        "memory", "opsd", 512, 64, 151936, "bfloat16", "shared", "trainable", "reverse_kl", reason=reason
    )
    assert performance.short(row, str) == "too inexact"


def test_a_gpu_without_results_says_so(results):
    assert performance.NOT_YET in performance.performance(
        results
    ) and "has run on a GPU" in performance.readme_block(results)
    (results / "h200").mkdir()
    (results / "some-cpu" / "ratios.json").rename(results / "h200" / "ratios.json")
    assert performance.NOT_YET not in performance.performance(
        results
    ) and "## h200" in performance.performance(results)


def test_readme_without_marks_is_refused():
    with pytest.raises(ValueError, match="expected the marks"):
        write.with_block("# Readme", "")
