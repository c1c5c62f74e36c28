"""Rows of measurements, and the report that holds them with machine, versions, commit and command; JSON."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ... import report_json
from ...provenance import describe_machine, git_commit, package_version
from ..measure.timing import Sample

SCHEMA = 1
PACKAGES = (
    "torch",
    "triton",
    "trl",
    "liger-kernel",
    "unsloth_zoo",
    "cut-cross-entropy",
    "transformers",
    "opsd_kernels",
)


@dataclass(frozen=True)
class Row:
    """One measurement, or the reason why it is missing. Fields that do not apply are None."""

    suite: str
    provider: str
    N: int
    H: int
    V: int
    dtype: str
    head: str
    mode: str
    divergence: str
    # The suite's own variable beside these: KL, masked share, scheme, sweep, part of a step.
    variant: str = ""
    reason: str | None = None
    ms: Sample | None = None
    ratio: Sample | None = None  # to `base`, round by round
    base: str | None = None
    # Ratio to the GEMMs in chunks as large as pays, independent of the planner's chunks.
    whole: float | None = None
    noise: str | None = None  # why the ratio is not known within 10 %
    target: float | None = None  # for the ratio
    tflops: float | None = None  # of the unavoidable GEMM passes
    gbs: float | None = None  # of the unavoidable traffic
    ceiling: float | None = None  # share of the nearer ceiling, GEMM rate or copy bandwidth
    peak_bytes: int | None = None  # above the memory that was live before the call
    predicted_bytes: int | None = None
    predicted_ms: float | None = None  # of a sweep on a GPU, by the model of its machine code
    gradient_error: float | None = None  # relative, against float64
    loss_error: float | None = None
    # Of suite `sparse`: relative error of dW, share of the columns in the backward GEMMs, largest share of a
    # chunk's gradient that was left out, ratio to the exact call.
    head_error: float | None = None
    kept: float | None = None
    dropped: float | None = None
    exact: float | None = None
    rows: int | None = None  # per chunk, as planned

    @property
    def key(self) -> tuple[object, ...]:
        """Identity of the measurement: rows of two reports are compared if their keys agree."""
        return tuple(
            getattr(self, name)
            for name in ("suite", "provider", "N", "H", "V", "dtype", "head", "mode", "divergence", "variant")
        )

    @property
    def verdict(self) -> str | None:
        """Whether the ratio meets its target; None without one."""
        if self.target is None or self.ratio is None:
            return None
        if self.noise:
            return "unknown: too noisy"
        return "ok" if self.ratio.median <= self.target else "missed"


@dataclass
class Report:
    """The measurements of one run of `opsd bench`, with machine, versions, commit and command."""

    machine: dict[str, object]
    versions: dict[str, str | None]
    commit: str
    command: str
    date: str
    quick: bool
    suites: list[str]
    seconds: float = 0.0
    ceilings: dict[str, float] = field(default_factory=dict)  # FLOP/s by dtype, bytes/s of a copy
    rows: list[Row] = field(default_factory=list)
    schema: int = SCHEMA

    @property
    def where(self) -> str:
        """One line: machine, versions, commit, date."""
        return where(vars(self))

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        head = {key: value for key, value in asdict(self).items() if key != "rows"}
        path.write_text(report_json.dumps({**head, "rows": [row_dict(row) for row in self.rows]}))


def where(report: Mapping[str, Any]) -> str:
    """Return one line for a report of any kind: machine, versions, commit, date."""
    shown = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    return f"{report['machine']['name']}; {shown}; commit {report['commit'][:12]}; {report['date']}"


def script_report(kind: str, script: str) -> dict[str, Any]:
    """Return the head of a report by a script under benchmarks/: its kind, where and how it was made."""
    command = shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]])
    made = new_report("cpu", command, quick=False, suites=[])
    return {
        "kind": kind,
        **{name: getattr(made, name) for name in ("machine", "versions", "commit", "command", "date")},
    }


def rounded(value: Any) -> Any:
    """Return `value` with every float in it rounded to five digits."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def row_dict(row: Row) -> dict[str, object]:
    """Return the row as a JSON object, without the fields that do not apply."""
    return {name: rounded(value) for name, value in asdict(row).items() if value is not None and value != ""}


def parse_row(row: Mapping[str, Any]) -> Row:
    """Return the row of a JSON object made by `row_dict`. Unknown fields are dropped."""
    known = {f.name for f in fields(Row)}
    values = {name: value for name, value in row.items() if name in known}
    for name in ("ms", "ratio"):
        if name in values:
            values[name] = Sample(**values[name])
    return Row(**values)


def load(path: Path) -> Report:
    """Read a report. Raises ValueError for a file of another kind or schema."""
    data = json.loads(Path(path).read_text())
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        raise ValueError(f"{path}: expected a report of opsd bench with schema {SCHEMA}, got {found}")
    return Report(**{**data, "rows": [parse_row(row) for row in data["rows"]]})


def new_report(
    device: str, command: str, quick: bool, suites: list[str], commit: str | None = None
) -> Report:
    """Return a report without rows, of this machine and now."""
    versions = {package: package_version(package) for package in PACKAGES}
    return Report(
        describe_machine(device),
        versions,
        commit or git_commit(),
        command,
        time.strftime("%Y-%m-%d"),
        quick,
        suites,
    )
