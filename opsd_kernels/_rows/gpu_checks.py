"""The GPU architectures on which the CUDA kernels passed the correctness steps of benchmarks/gpu_check.sh.

The records are in gpu_checks.json, which that script writes and which is committed with the kernels. A record
holds for one compute capability, which decides machine code and shared memory, and for one state of the
kernels' sources: setup.py compiles their digest into the library.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

from .. import report_json

FILE = Path(__file__).resolve().parents[1] / "gpu_checks.json"
SCRIPT = "benchmarks/gpu_check.sh"


@dataclass(frozen=True)
class Record:
    """A passed run: where, of which kernels, with which result per step."""

    architecture: str  # compute capability, "9.0"
    sources: str  # the digest of `extension.cuda_sources`
    device: str
    date: str
    commit: str
    packages: dict[str, str | None]
    steps: dict[str, str]  # a correctness step of the script -> its last line


def load(path: Path | None = None) -> tuple[Record, ...]:
    """Return the records of a file. Raises ValueError for other content."""
    path = path or FILE
    try:
        return tuple(Record(**record) for record in json.loads(path.read_text())["records"])
    except (TypeError, KeyError) as error:
        names = ", ".join(field.name for field in fields(Record))
        raise ValueError(f"{path}: expected records with {names}, got {error}") from None


def save(records: tuple[Record, ...], path: Path | None = None) -> None:
    """Write the records, sorted by architecture."""
    ordered = sorted(records, key=lambda record: tuple(map(int, record.architecture.split("."))))
    (path or FILE).write_text(report_json.dumps({"records": [asdict(record) for record in ordered]}))


def passed(records: tuple[Record, ...], new: Record) -> tuple[Record, ...]:
    """Return the records with `new` for its architecture; steps of an old one of the same sources stay."""
    steps: dict[str, str] = {}
    for old in records:
        if (old.architecture, old.sources) == (new.architecture, new.sources):
            steps |= old.steps
    others = [record for record in records if record.architecture != new.architecture]
    return (*others, Record(**{**vars(new), "steps": steps | new.steps}))


def failed(records: tuple[Record, ...], architecture: str, sources: str) -> tuple[Record, ...]:
    """Return the records without that of `architecture` if it is of the same sources."""
    return tuple(
        record for record in records if (record.architecture, record.sources) != (architecture, sources)
    )


@cache
def missing(architecture: str, sources: str) -> str | None:
    """Return None if kernels of these `sources` passed on `architecture`, else what is missing.

    A record of other sources does not count: one changed line may change any result.
    """
    where = f"compute capability {architecture}"
    if not sources:
        return "the library does not tell the sources it was compiled from: build it again"
    record = next((record for record in load() if record.architecture == architecture), None)
    if record is None:
        return f"they have not passed {SCRIPT} on {where}"
    if record.sources != sources:
        return (
            f"they have not passed {SCRIPT} on {where}: on {record.date} other sources did "
            f"({record.sources}, these are {sources})"
        )
    return None
