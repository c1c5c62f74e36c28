"""docs/scaling.md: the measured half, then the projected half."""

from __future__ import annotations

from pathlib import Path

from .measured import measured_half
from .projected import projected_half
from .report import REPORT, Measured

NOT_YET = (
    "# Scaling\n\nNo report exists yet: `python benchmarks/parallel.py --json "
    "benchmarks/results/<machine>/parallel.json` writes it.\n"
)


def page(results: Path) -> str:
    """Return docs/scaling.md, from the first machine that has a report."""
    found = sorted(results.glob(f"*/{REPORT}"))
    if not found:
        return NOT_YET
    measured = Measured(found[0])
    return measured_half(measured) + "\n" + projected_half(measured)
