"""What a study found: tables, panels of a figure, graded claims. JSON in and out."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from opsd_kernels import report_json
from opsd_kernels.train.records.durable import write_file
from opsd_kernels.train.studies.statistics import Estimate

SCHEMA = 1


@dataclass(frozen=True)
class Claim:
    """What the paper says, what was measured here, and whether it held."""

    text: str
    measured: str  # in words: what the estimate is the difference, or the value, of
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
    """Points, with intervals where there are any. In a panel of bars, x holds the labels."""

    name: str
    x: list[float] | list[str]
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
    """`design`: sentences on what was equal between arms and what varied. `notes`: what a reader must know to judge the result."""

    paper: str
    title: str
    source: str
    question: str
    design: list[str]
    claims: list[Claim]
    tables: list[Table]
    panels: list[Panel]
    notes: list[str] = field(default_factory=list)
    facts: dict[str, object] = field(
        default_factory=dict
    )  # machine, versions, commits, command, date, seconds, quick
    schema: int = SCHEMA

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, report_json.dumps(asdict(self)))


def load(path: Path) -> Study:
    """Raises ValueError for a file of another kind or schema."""
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
