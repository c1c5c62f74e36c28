"""The configurations that the whole test suite has been run on.

The data are in tested_versions.json, which tests/record_versions.py writes.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from . import report_json

FILE = Path(__file__).with_name("tested_versions.json")
PAGE = Path("docs/tested-versions.md")
# The distributions whose versions a record holds; last the libraries that the tests compare with.
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "safetensors",
    "accelerate",
    "peft",
    "liger-kernel",
    "trl",
    "verl",
    "deepspeed",
)


@dataclass(frozen=True)
class Record:
    """One run of the tests: date, commit, versions, machine, and result."""

    date: str
    commit: str
    python: str
    platform: str
    cpu: str
    packages: dict[str, str | None]  # None: not installed
    command: str
    passed: int
    failed: int  # errors included
    skipped: int
    seconds: float
    files: int  # test files that took part

    @property
    def configuration(self) -> tuple[object, ...]:
        """The identity of the record: a later run with the same configuration replaces it."""
        return (
            self.python,
            self.platform,
            self.command,
            tuple(sorted((name, value or "") for name, value in self.packages.items())),
        )


def installed() -> dict[str, str | None]:
    """Return the version of each of PACKAGES, None where it is not installed."""
    return {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def load(path: Path = FILE) -> tuple[Record, ...]:
    """Return the records of a file. Raises ValueError for other content."""
    data = json.loads(path.read_text())
    try:
        return tuple(Record(**record) for record in data["records"])
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: expected records with {', '.join(field.name for field in fields(Record))}, got {error}"
        ) from None


def save(records: tuple[Record, ...], path: Path = FILE) -> None:
    """Write the records, sorted by Python and torch."""
    ordered = sorted(
        records,
        key=lambda record: (
            _numbers(record.python),
            _numbers(record.packages["torch"] or ""),
            record.configuration,
        ),
    )
    path.write_text(report_json.dumps({"records": [asdict(record) for record in ordered]}))


@cache
def tested(package: str) -> tuple[str, ...]:
    """Return the versions of `package`, or of `python`, in runs without a failure, oldest first."""
    good = [record for record in load() if not record.failed and record.passed]
    found = {
        record.python if package == "python" else public(record.packages.get(package) or "")
        for record in good
    }
    return tuple(sorted(found - {""}, key=_numbers))


def note(package: str, found: str) -> str:
    """Return a version as `opsd doctor` prints it: with the tested versions, if there are records."""
    known = tested(package)
    if not known or not re.match(r"\d", found):
        return found
    verdict = "tested" if _same(package, found) in {_same(package, one) for one in known} else "not tested"
    return f"{found} ({verdict}; tested: {', '.join(known)})"


def public(text: str) -> str:
    """Return a version without its local part: 2.13.0 for 2.13.0+cpu."""
    return text.partition("+")[0]


def _same(package: str, text: str) -> str:
    """Return the part of a version that is compared: major and minor of Python's, else the public version."""
    return ".".join(text.split(".")[:2]) if package == "python" else public(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", public(text))))


def markdown(records: tuple[Record, ...] | None = None) -> str:
    """Return docs/tested-versions.md."""
    records = load() if records is None else records
    head = ["# Tested versions", "", INTRO, ""]
    if not records:
        return "\n".join([*head, "No run has been recorded yet.", ""])
    packages = [package for package in PACKAGES if any(record.packages.get(package) for record in records)]
    columns = ["Python", *packages, "test files", "passed", "failed", "skipped", "run"]
    rows = [columns, ["---"] * len(columns)]
    for number, record in enumerate(records, 1):
        versions = [record.packages.get(package) or "-" for package in packages]
        counts = (record.files, record.passed, record.failed, record.skipped, number)
        rows.append([record.python, *versions, *map(str, counts)])
    table = [f"| {' | '.join(row)} |" for row in rows]
    runs = [
        f"{number}. {r.date}, commit {r.commit[:12]}, {r.cpu}, {r.platform}, {r.seconds:.0f} s: `{r.command}`"
        for number, r in enumerate(records, 1)
    ]
    return "\n".join([*head, *table, "", *runs, ""])


INTRO = """Generated by `make docs` from `opsd_kernels/tested_versions.json`. `opsd doctor` prints for each
installed package whether its version is one of these.

A record comes from a report of the tests: `make test PYTEST_ARGS="--junitxml=build/tests.xml"`, then
`.venv/bin/python tests/record_versions.py build/tests.xml`.
The versions that the package accepts are in `pyproject.toml`. A peer without a version was not installed, and
the tests that compare with it were skipped."""
