"""The results of a study: tables, panels of a figure, graded claims. Read from and written to JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from opsd_kernels import report_json
from opsd_kernels.train.records.durable import write_file
from opsd_kernels.train.studies.statistics import Estimate

SCHEMA = 1
BASE_MODELS, SEEDS = "base models", "seeds"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, its measurement here, and its grade."""

    text: str
    measured: str  # the estimated quantity in words
    estimate: Estimate
    grade: str
    remark: str = ""


@dataclass(frozen=True)
class Table:
    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Series:
    """Points with optional intervals. In a panel of bars, x holds the labels."""

    name: str
    x: Sequence[float] | Sequence[str]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


@dataclass(frozen=True)
class Panel:
    """One set of axes. `kind`: lines, points or bars."""

    title: str
    kind: str
    x_label: str
    y_label: str
    series: list[Series]


@dataclass
class Study:
    """A study. `design`: sentences on equal and varied settings of the arms.

    `notes`: caveats to judge the result by.
    """

    paper: str
    title: str
    source: str
    question: str
    design: list[str]
    claims: list[Claim]
    tables: list[Table]
    panels: list[Panel]
    notes: list[str] = field(default_factory=list)
    # Machine, versions, commits, command, date, seconds, quick.
    facts: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA
    # What intervals are over: base models, or seeds of one.
    over: str = BASE_MODELS

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, report_json.dumps(asdict(self)))


def load(path: Path) -> Study:
    """Read a study. Raises ValueError for a file of another kind or schema."""
    data = json.loads(path.read_text())
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        raise ValueError(f"{path}: expected a study of opsd reproduce with schema {SCHEMA}, got {found}")
    data["claims"] = [
        Claim(**{**claim, "estimate": Estimate(**claim["estimate"])}) for claim in data["claims"]
    ]
    data["tables"] = [Table(**table) for table in data["tables"]]
    data["panels"] = [
        Panel(**{**panel, "series": [Series(**series) for series in panel["series"]]})
        for panel in data["panels"]
    ]
    return Study(**data)
