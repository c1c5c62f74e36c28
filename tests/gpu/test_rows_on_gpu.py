"""The row contract (tests/unit/test_rows.py) on the device, and rows as long as real vocabularies."""

import placing
import pytest
import torch

from opsd_kernels._rows.triton_launch import aligned as begins_on_16_bytes
from opsd_kernels.spec import Kind

unit = placing.unit("test_rows")
globals().update(placing.adopt(unit, but="number_of_threads"))  # of a CPU
if placing.DRY_RUN:
    unit.SHAPES = [(1, 1), (3, 7), (4, 130)]

# Up to a row pair of one block, of clusters of several sizes, and beyond any; 50257 keeps no row but the first aligned.
VOCABULARIES = [1000, 4104] if placing.DRY_RUN else [8192, 32000, 50257, 128256, 151936, 262144, 1_000_003]


@pytest.fixture
def rows_of(backend, monkeypatch):
    monkeypatch.setattr(
        unit, "DTYPES", [dtype for dtype in unit.DTYPES if placing.unserved(backend, dtype) is None]
    )  # of tests that go through all
    if backend == "triton" and not placing.DRY_RUN:
        monkeypatch.setattr(
            unit, "SHAPES", [(3, 7), (11, 64), (2, 4099)]
        )  # each other size would be compiled anew
    return placing.PlacedRows(backend)


def contiguous(rows):
    """Rows one after the other from a storage's start, as in the op's own buffers."""
    return unit.replace(rows, S=rows.S.contiguous(), T=rows.T.contiguous())


@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.name.lower())
@pytest.mark.parametrize("form", ["pair", "difference, linear", "difference, softcap"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_real_vocabularies(rows_of, kind, form, dtype):
    for V in VOCABULARIES:
        rows, truth = unit.hard_rows.__wrapped__(
            6, V, dtype, form, kind
        )  # not kept: a truth of a million entries is 240 MB
        for make in (contiguous, unit.Rows.copy):
            for route in ("apart", "fused"):
                _, loss, gradient = unit.run_rows(rows_of, make(rows), route)
                unit.check_loss(rows, loss, truth)
                unit.check_gradient(rows, gradient, truth, f"gradient, {route}, V={V}, {make.__name__}")


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [Kind.REVERSE_KL, Kind.JSD], ids=str)
def test_narrowed_gradient_of_real_vocabularies(rows_of, kind, narrow):
    for V in VOCABULARIES:
        rows, truth = unit.hard_rows.__wrapped__(6, V, torch.float32, "pair", kind)
        for make in (contiguous, unit.Rows.copy):
            work = make(rows)
            G = unit.narrowed(work.S, narrow)
            unit.run_rows(rows_of, work, "fused", G)
            unit.check_gradient(rows, G, truth, f"narrowed gradient, V={V}, {make.__name__}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_rows_than_blocks_fit_at_once(rows_of, dtype):
    """Every row has the bits that it has alone, wherever in the grid it stands."""
    few = contiguous(unit.make_rows(6, 1003, dtype, "pair", Kind.JSD))
    times = 2 if placing.DRY_RUN else 700
    repeated = {
        name: getattr(few, name).repeat(times, *[1] * (getattr(few, name).dim() - 1))
        for name in ("S", "T", "factor")
    }
    many = unit.replace(few, **repeated)
    for got, expected in zip(
        unit.run_rows(rows_of, many, "fused"), unit.run_rows(rows_of, few, "fused"), strict=True
    ):
        unit.assert_same_bits(got, expected.repeat(times, *[1] * (expected.dim() - 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_give_the_same_bits(rows_of, dtype):
    for V in VOCABULARIES:
        rows = contiguous(unit.make_rows(6, V, dtype, "difference, linear", Kind.JSD))
        for one, two in zip(
            *(unit.run_rows(rows_of, unit.replace(rows, S=rows.S.clone()), "fused") for _ in range(2)),
            strict=True,
        ):
            unit.assert_same_bits(one, two)


def test_rows_of_the_op_are_aligned():
    """Both ways of making rows above are what they say."""
    for V in (8192, 151936):
        rows = unit.make_rows(3, V, torch.bfloat16, "pair", Kind.JSD)
        whole = contiguous(rows)
        assert begins_on_16_bytes(whole.S, whole.T) and not begins_on_16_bytes(rows.S, rows.T)
