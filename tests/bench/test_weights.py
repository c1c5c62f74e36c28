"""Suite `weights`: every dialect passes its check, and a wrong result gets no number."""

from dataclasses import replace

import pytest
import torch

from opsd_kernels.bench.shapes import Setting
from opsd_kernels.bench.suites import weights

TINY = Setting(64, 32, 501, "float32")
DTYPES = ("float32", "bfloat16", "float16")
TOPK = [name for name, dialect in weights.dialects(TINY).items() if "topk" in dialect.options]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dialect_passes(dtype):
    assert len(TOPK) == 3 and not weights.failures(TINY.at(dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TOPK)
def test_top_k_of_another_support_gets_no_number(monkeypatch, name, dtype):
    made, other = weights.dialects(TINY), {"student": "teacher", "teacher": "student"}

    def wrong(*sides, topk_support="student", **options):
        return made[name].op(*sides, topk_support=other[topk_support], **options)

    planted = replace(made[name], op=wrong)
    monkeypatch.setattr(weights, "dialects", lambda setting: made | {name: planted})
    (row,) = (
        row
        for row in weights.compare_dialects(TINY.at(dtype=dtype), {"rounds": (1, 1), "seconds": 0.1})
        if row.variant == name
    )
    assert "wrong, so no number" in row.reason and row.ms is None


def test_top_k_is_timed_with_the_logits_of_the_setting():
    """Its check alone widens them: 16-bit logits tie at the k-th entry, where either is right."""
    seen = []

    def op(*sides, logits_dtype="auto", **options):
        seen.append(logits_dtype)
        raise RuntimeError("seen")

    dialect = weights.Dialect("top-k", op, {"topk": 20})
    for dtype in DTYPES:
        with pytest.raises(RuntimeError, match="seen"):
            weights.as_checked(dialect, TINY.at(dtype=dtype)).op()
        with pytest.raises(RuntimeError, match="seen"):
            weights.as_checked(replace(dialect, options={}), TINY.at(dtype=dtype)).op()
    assert seen == ["auto", "auto", torch.float32, "auto", torch.float32, "auto"]
