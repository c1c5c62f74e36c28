"""The model of the row sweeps' time on a GPU: by hand, and over the whole table."""

import pytest
import torch

from opsd_kernels._rows.sweep_times import GPUS, Cost, costs, kernels, predict
from opsd_kernels.spec import Divergence, Kind

H100, H200, B200 = GPUS
WIDE_V = 151936


def test_the_rates_of_an_h200():
    """132 multiprocessors at 1.98 GHz, 128 lanes and 16 special functions a clock; 4.3 TB/s for a copy."""
    assert H200.issue == pytest.approx(33.45408e12)
    assert H200.special == pytest.approx(4.18176e12)
    assert H200.copy == pytest.approx(4.32e12)


@pytest.mark.parametrize(
    "cost, limit, share",
    [
        (Cost("", 45, 3, 6), "memory", 1),
        (Cost("", 165, 3, 6), "instructions", 6 / 4.32 * 33.45408 / 165),
        (Cost("", 20, 8, 6), "special functions", 6 / 4.32 * 4.18176 / 8),
    ],
)
def test_the_longest_of_three_times_is_the_limit(cost, limit, share):
    made = cost.predicted(H200, 10**9)
    assert made.limit == limit and made.share == pytest.approx(share)
    assert made.seconds == pytest.approx(10**9 * max(cost.times(H200).values()))
    assert limit in str(made) and f"{made.share:.0%}" in str(made)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_every_fused_call_has_a_prediction(backend, kind, dtype, gpu):
    """Bytes of an entry pair: both logits once per sweep that reads device memory, the gradient once."""
    found = costs(backend, kind, dtype, WIDE_V, gpu.architecture)
    sweeps = 2 if Divergence(kind).one_sweep else 3
    assert sum(cost.bytes for cost in found) == dtype.itemsize * (3 if backend == "cuda" else 2 * sweeps + 1)
    assert sum(cost.bytes > 2 * dtype.itemsize or cost.bytes == dtype.itemsize for cost in found) == 1
    *parts, whole = predict(backend, kind, dtype, 8192, WIDE_V, gpu)
    assert len(parts) == len(found)
    assert max(part.seconds for part in parts) <= whole.seconds <= sum(part.seconds for part in parts) + 1e-12


def test_a_row_that_no_cluster_holds_is_read_by_every_sweep():
    for kind, sweeps in ((Kind.REVERSE_KL, 2), (Kind.JSD, 3)):
        found = costs("cuda", kind, torch.float32, 262144, "90")
        assert sum(cost.bytes for cost in found) == 4 * (2 * sweeps + 1)


def test_there_is_no_prediction_without_a_count():
    assert predict("cuda", Kind.JSD, torch.float64, 8192, WIDE_V, H200) == []


@pytest.mark.parametrize("kind, least", [(Kind.REVERSE_KL, 0.85), (Kind.FORWARD_KL, 0.85), (Kind.JSD, 0.4)])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_fused_sweeps_come_near_the_copy_bandwidth(backend, kind, least):
    """Shares that are the goals of both backends, in bf16 on an H200."""
    *_, whole = predict(backend, kind, torch.bfloat16, 8192, WIDE_V, H200)
    assert whole.share >= least


@pytest.mark.parametrize(
    "kernel, instructions, code",
    [
        ("stats reverse_kl", 26, 2900),
        ("grad reverse_kl", 19, 1000),
        ("fused reverse_kl", 45, 2625),
        ("fused forward_kl", 45, 2625),
        ("fused jsd", 110, 3300),
    ],
)
def test_cuda_kernels_stay_lean(kernel, instructions, code):
    """Goals of the CUDA kernels in bf16 on sm_90a: instructions per entry, and of the whole kernel."""
    lines = kernels()["cuda", f"{kernel} plain", "bf16", "90"]
    sweeps = [row for row in lines if not (kernel.startswith("stats") and row["sweep"] == "find_peaks")]
    assert 0 < sum(float(row["each"]) for row in sweeps) <= instructions
    assert all(int(row["code"]) <= code for row in lines)
