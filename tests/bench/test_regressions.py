"""Planted regressions that the suites find: a copy of the logits, a doubled sweep, chunks of 64 rows."""

import pytest
import torch

from opsd_kernels._core import planner
from opsd_kernels._rows import backends, extension
from opsd_kernels.bench.measure import memory
from opsd_kernels.bench.measure.context import blank
from opsd_kernels.bench.measure.rows import compare_providers
from opsd_kernels.bench.providers import PROVIDERS
from opsd_kernels.bench.report.compare import changes_of
from opsd_kernels.bench.report.results import Report
from opsd_kernels.bench.shapes import Setting

# On a shared machine a comparison may be too noisy to tell, and one without a noise mark may miss.
ATTEMPTS, MISSES = 8, 3


def report(rows):
    return Report({"name": "here"}, {}, "", "", "", True, sorted({row.suite for row in rows}), rows=rows)


def measured(setting):
    return report(compare_providers("latency", setting, [PROVIDERS["opsd"]], rounds=(9, 40), seconds=4.0))


def what_changed(before, after):
    return {
        change.what for change in changes_of(before, after) if change.row.provider == "opsd" and change.bad
    }


def check_found_by_time(setting, plant, what):
    """Assert that a comparison of runs before and after the change finds `what`.

    Skipped where nearly every run is marked as too noisy to tell.
    """
    quiet = 0
    for _ in range(ATTEMPTS):
        with pytest.MonkeyPatch.context() as patch:
            before = measured(setting)
            plant(patch)
            after = measured(setting)
        if what in what_changed(before, after):
            return
        quiet += not any(row.noise for report in (before, after) for row in report.rows)
    if quiet < MISSES:
        pytest.skip(f"{ATTEMPTS - quiet} of {ATTEMPTS} comparisons marked as too noisy to tell")
    pytest.fail(f"{quiet} comparisons without a mark of noise did not say {what!r}")


COPY = """
def make(setting, provider, limit):
    from opsd_kernels._core import loop
    from opsd_kernels.bench.measure.memory import prepare

    project, kept = loop.project, []

    def with_copy(hidden, weight, out, *rest):
        project(hidden, weight, out, *rest)
        if out.shape[1] == weight.shape[0]:
            kept[:] = [out.clone()]

    loop.project = with_copy
    return prepare(setting, provider, limit)
"""


@pytest.mark.usefixtures("forked_peaks")
@pytest.mark.slow
def test_an_added_copy_of_the_logits_is_found():
    """Found by the planner's prediction and by the earlier report."""
    setting = Setting(512, 64, 32000, "float32")
    planned = {"predicted_bytes": setting.plan().peak_bytes, "rows": setting.plan().rows}
    before, after = (
        report(
            [
                blank(
                    "memory",
                    "opsd",
                    setting,
                    peak_bytes=memory.peak_of(setting, "opsd", make=make),
                    **planned,
                )
            ]
        )
        for make in (memory.prepare, COPY)
    )
    assert changes_of(before, before) == []
    assert what_changed(before, after) == {"above plan", "more memory"}


# Without units for bf16 plain PyTorch takes minutes.
FAST = "bfloat16" if extension.mm_has_units(torch.bfloat16) else "float32"


@pytest.mark.slow
@pytest.mark.alone
def test_a_doubled_sweep_is_found():
    rows = backends.select(None, torch.device("cpu"))
    fused = rows.row_fused_

    def twice(S, T, factor, spec, bias_s, bias_t, metrics, *rest):
        rows.row_dot(S, T, rows.row_stats(S, T, spec, bias_s, bias_t, metrics), spec, bias_s, bias_t)
        return fused(S, T, factor, spec, bias_s, bias_t, metrics, *rest)

    check_found_by_time(
        Setting(256, 16, 32000, FAST, divergence="jsd"),
        lambda patch: patch.setattr(rows, "row_fused_", twice),
        "slower",
    )


@pytest.mark.slow
@pytest.mark.alone
def test_chunks_cut_to_64_rows_are_found(monkeypatch):
    """Found by the plan of each row; on some CPUs 64 rows cost less time than two runs can tell apart."""
    setting = Setting(1024, 128, 8000, FAST)
    before = measured(setting)
    assert what_changed(before, before) == set()
    monkeypatch.setattr(planner, "ROW_LIMITS", dict.fromkeys(planner.ROW_LIMITS, 64))
    monkeypatch.setattr(planner, "WIDE_CPU_ROWS", 64)
    assert "smaller chunks" in what_changed(before, measured(setting))


@pytest.mark.slow
def test_a_limit_ends_plain_pytorch_and_not_the_op():
    setting, limit = Setting(2048, 32, 16000, "float32"), 192 << 20
    variants = memory.time_under_limit(setting, "torch", limit, (2, 2), 2.0)
    assert variants["torch"].failure == "out of memory" and not variants["torch"].times
    variants = memory.time_under_limit(setting, "opsd", limit, (2, 2), 2.0)
    assert variants["opsd"].failure is None and len(variants["opsd"].times) == 2
    with pytest.raises(memory.OutOfMemory, match="limit 192 MiB"):
        memory.peak_of(setting, "torch", limit)
