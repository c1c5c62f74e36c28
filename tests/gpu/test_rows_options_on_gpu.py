"""The row contract's clips, teacher mix and policy term (tests/unit/test_rows_options.py) on the device."""

import placing
import pytest

from opsd_kernels.spec import Kind

unit = placing.unit("test_rows_options")
globals().update(placing.adopt(unit))
if placing.DRY_RUN:
    unit.SHAPES = [(1, 1), (4, 7)]

VOCABULARIES = [1500] if placing.DRY_RUN else [32000, 50257, 151936]


@pytest.fixture
def rows_of(backend, monkeypatch):
    monkeypatch.setattr(
        unit, "DTYPES", [dtype for dtype in unit.DTYPES if placing.unserved(backend, dtype) is None]
    )  # of tests that go through all
    if backend == "triton" and not placing.DRY_RUN:
        monkeypatch.setattr(unit, "SHAPES", [(4, 7), (2, 4099)])  # each other size would be compiled anew
    return placing.PlacedRows(backend)


@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.name.lower())
@pytest.mark.parametrize("route", ["apart", "fused"])
@pytest.mark.parametrize("dtype", unit.DTYPES[1:], ids=str)
def test_every_option_on_real_vocabularies(rows_of, kind, route, dtype):
    for V in VOCABULARIES:
        for form in unit.FORMS:
            unit.check(
                rows_of,
                unit.make_rows(
                    4, V, dtype, form, kind, policy=True, teacher_mix=0.25, entry_clip=0.05, token_clip=0.3
                ),
                route,
            )
