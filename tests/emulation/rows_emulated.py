"""The row contract's tests (tests/unit/test_rows.py) over the emulated CUDA kernels. Collected in the subprocesses of test_emulated.py alone."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "unit"))
import test_rows
from emulated import *  # noqa: F403
from test_rows import *  # noqa: F403

from opsd_kernels.spec import Kind

test_rows.SHAPES = [(1, 1), (3, 7), (6, 1003), (1, 2065)]


@pytest.mark.parametrize("kind", [Kind.REVERSE_KL, Kind.JSD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_aligned_rows(rows_of, dtype, kind):
    """The other tests' views never begin on 16 bytes; these rows do, and are read in vectors."""
    rows, truth = test_rows.hard_rows(6, 2080, dtype, "pair", kind)
    aligned = dataclasses.replace(rows, S=rows.S.contiguous(), T=rows.T.contiguous())
    assert aligned.S.data_ptr() % 16 == aligned.T.data_ptr() % 16 == 0
    for route in ("apart", "fused"):
        work = dataclasses.replace(aligned, S=aligned.S.clone())
        _, loss, gradient = test_rows.run_rows(rows_of, work, route)
        test_rows.check_loss(rows, loss, truth)
        test_rows.check_gradient(rows, gradient, truth)


@pytest.mark.parametrize(
    "V, itemsize, architecture, expected",
    [
        (151936, 2, 90, "fused 8 of 256 with 18992 entries each in 74 KiB"),
        (32000, 2, 90, "fused 2 of 256 with 16000 entries each in 63 KiB"),
        (151936, 4, 90, "fused 8 of 256 with 18992 entries each in 149 KiB"),
        (256000, 4, 90, None),
        (151936, 2, 80, None),
    ],
)
def test_launches_are_as_documented(rows_of, V, itemsize, architecture, expected):
    text = torch.ops.opsd_emulated.cuda_launch(V, itemsize, architecture)
    assert text.startswith("each sweep one block of 256 threads per row")
    assert (expected in text) if expected else ("fused" not in text)
