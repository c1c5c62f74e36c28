"""Add a run of the tests to opsd_kernels/tested_versions.json, from the report that pytest writes.

`make docs` then shows it in docs/tested-versions.md.

    make test PYTEST_ARGS="--junitxml=build/tests.xml"
    .venv/bin/python tests/record_versions.py build/tests.xml [more.xml ...]

Several reports are one run in several calls of pytest. tests/conftest.py puts versions and machine into the
report, so a record cannot name an environment that did not run the tests.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from opsd_kernels import tested_versions
from opsd_kernels.tested_versions import Record

TESTS = Path(__file__).resolve().parent
SHARED = ("commit", "python", "platform", "cpu", "packages")
# The least share of the test files, in all reports together, that is a run of the suite. `make test` leaves
# out files whose tests are all slow.
LEAST_SHARE = 0.5
SELECTS = ("-k", "--lf", "--last-failed", "--sw", "--stepwise", "--deselect", "--ignore")


def read(path: Path) -> tuple[dict[str, object], dict[str, float], set[str]]:
    """Return the properties that conftest.py put into a report, its counts, and its test files.

    Raises ValueError for a report without these properties, and for a selection of tests.
    """
    suite = next(ET.parse(path).getroot().iter("testsuite"))
    properties = {
        p.get("name"): json.loads(p.get("value"))
        for p in suite.iterfind("properties/property")
        if p.get("name", "").startswith("opsd_")
    }
    facts = {name.removeprefix("opsd_"): value for name, value in properties.items()}
    missing = [name for name in (*SHARED, "arguments") if name not in facts]
    if missing:
        raise ValueError(
            f"{path}: expected a report of this repository's tests, which holds {', '.join(missing)}"
        )
    selecting = [
        argument for argument in facts["arguments"] if argument.startswith(SELECTS) or "::" in argument
    ]
    if selecting:
        raise ValueError(f"{path}: expected a run of the suite, got a selection of it: {' '.join(selecting)}")
    failed, skipped = int(suite.get("failures")) + int(suite.get("errors")), int(suite.get("skipped"))
    counts = {
        "passed": int(suite.get("tests")) - failed - skipped,
        "failed": failed,
        "skipped": skipped,
        "seconds": float(suite.get("time")),
    }
    return (
        {**facts, "date": suite.get("timestamp")[:10]},
        counts,
        {test_file(case) for case in suite.iterfind("testcase")},
    )


def test_file(case: ET.Element) -> str:
    """Return the file of a test as a dotted name. A file that is skipped as a whole has it in `name`."""
    parts = (case.get("classname") or case.get("name")).split(".")
    last = next((i for i, part in enumerate(parts) if part.startswith("test_")), len(parts))
    return ".".join(parts[: last + 1])


def whole_suite() -> set[str]:
    return {
        ".".join(path.relative_to(TESTS.parent).with_suffix("").parts) for path in TESTS.rglob("test_*.py")
    }


def make_record(paths: list[Path]) -> Record:
    """Return the record of one run.

    Raises ValueError for reports of different environments or commits, and of a small part of the suite.
    """
    runs = [read(path) for path in paths]
    first = runs[0][0]
    for path, (facts, *_) in zip(paths, runs, strict=True):
        differs = [name for name in SHARED if facts[name] != first[name]]
        if differs:
            raise ValueError(
                f"{path}: expected the {differs[0]} of {paths[0]}, {first[differs[0]]}, "
                f"got {facts[differs[0]]}"
            )
    files = whole_suite() & set().union(*(held for *_, held in runs))
    if len(files) < LEAST_SHARE * len(whole_suite()):
        raise ValueError(
            f"{paths[0]}: expected a run of the suite, "
            f"got tests of {len(files)} of its {len(whole_suite())} files"
        )
    counts = {name: round(sum(count[name] for _, count, _ in runs), 1) for name in runs[0][1]}
    command = "; ".join(dict.fromkeys(shlex.join(["pytest", *facts["arguments"]]) for facts, *_ in runs))
    return Record(
        **{name: first[name] for name in SHARED},
        date=max(facts["date"] for facts, *_ in runs),
        files=len(files),
        command=command,
        **counts,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("reports", nargs="+", type=Path, help="written by pytest --junitxml")
    parser.add_argument(
        "--to", type=Path, default=tested_versions.FILE, help="another file than the package's"
    )
    arguments = parser.parse_args()
    try:
        record = make_record(arguments.reports)
    except (ValueError, OSError, ET.ParseError) as error:
        sys.exit(f"record_versions.py: {error}")
    kept = (
        [old for old in tested_versions.load(arguments.to) if old.configuration != record.configuration]
        if arguments.to.exists()
        else []
    )
    tested_versions.save((*kept, record), arguments.to)
    print(
        f"{record.passed} passed, {record.failed} failed, {record.skipped} skipped; "
        f"python {record.python}, torch {record.packages['torch']}"
    )


if __name__ == "__main__":
    main()
