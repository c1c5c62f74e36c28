"""The tests of clips, teacher mix and policy term (tests/unit/test_rows_options.py) over the emulated CUDA kernels. Collected in the subprocesses of
test_emulated.py alone.
"""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "unit"))
import test_rows_options
from emulated import *  # noqa: F403
from test_rows_options import *  # noqa: F403

from opsd_kernels.spec import Kind
from opsd_kernels.testing import assert_same_bits

test_rows_options.SHAPES = [(1, 1), (4, 7), (5, 1003), (1, 2065)]


@pytest.mark.parametrize("kind", [Kind.FORWARD_KL, Kind.JSD])
def test_a_teacher_of_one_row_for_all_in_fp32(rows_of, kind):
    """Row stride 0."""
    rows = test_rows_options.make_rows(5, 1003, torch.float32, "pair", kind)
    one = dataclasses.replace(rows, T=rows.T[:1].expand(5, -1))
    many = dataclasses.replace(rows, T=one.T.contiguous(), S=rows.S.clone())
    for a, b in zip(
        *(rows_of.row_fused_(x.S, x.T, x.factor, x.spec, None, None, True, x.S) for x in (one, many)),
        strict=True,
    ):
        assert_same_bits(a, b)
    assert_same_bits(one.S, many.S)
