"""CPU regression suite: `pytest benchmarks --benchmark-only`.

pytest-benchmark keeps the times; the test fails on the ratio to the bare GEMMs of the same run. The limit is
the target of suite ratios plus the noise of this run. `pytest benchmarks --benchmark-json=out.json` keeps the
ratios.
"""

from __future__ import annotations

import pytest
import torch

from opsd_kernels.bench.measure.gate import check
from opsd_kernels.bench.measure.timing import Variant, interleave, noise, ratio
from opsd_kernels.bench.providers import BASE, PROVIDERS, bare_gemms, stepper
from opsd_kernels.bench.shapes import SHAPES, Setting, make_case
from opsd_kernels.bench.suites.latency import target

SHAPE = SHAPES["cpu"]
ROUNDS, SECONDS = (5, 20), 30.0
CASES = [
    ("float32", "shared", "trainable"),
    ("float32", "shared", "frozen"),
    ("bfloat16", "shared", "trainable"),
    ("bfloat16", "two heads", "trainable"),
]


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("dtype, head, mode", CASES)
def test_time_against_the_bare_gemms(benchmark, dtype, head, mode, divergence):
    torch.set_num_threads(2)
    setting = Setting(SHAPE.N, SHAPE.H, SHAPE.V, dtype, head, mode, divergence)
    verdict = check(PROVIDERS["opsd"], setting)
    assert verdict.failure is None, verdict.failure
    case = make_case(setting)
    step = stepper(PROVIDERS["opsd"].make(setting), case, setting)
    variants = {BASE: Variant(bare_gemms(case, setting, setting.plan().rows)), "opsd": Variant(step)}
    interleave(variants, BASE, "cpu", rounds=ROUNDS, seconds=SECONDS)
    found, unsure = ratio(variants["opsd"], variants[BASE]), noise(variants["opsd"], variants[BASE])
    benchmark.extra_info.update(
        ratio=found.median, uncertainty=found.uncertainty, target=target(setting), noise=unsure
    )
    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
    if unsure:
        pytest.skip(unsure)
    assert found.median <= target(setting) * (1 + found.uncertainty), (
        f"{found.median:.2f} of the bare GEMMs, target {target(setting):.2f}"
    )
