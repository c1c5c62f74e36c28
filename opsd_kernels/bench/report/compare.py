"""Compare two reports of the same suites: changes in time, memory and error beyond the noise of both."""

from __future__ import annotations

from dataclasses import dataclass

from ..providers import BASE, LABELS
from ..suites.space import off_plan
from .results import Report, Row
from .tables import Table, size

# Relative change of a ratio below which it counts as noise.
LEAST = 0.05
# The same for the ratio to uncut GEMMs, whose noise no row records: two reruns differed by 16 %.
UNCUT_LEAST = 0.20
# Of both rows' uncertainties together.
NOISE_FACTOR = 1.5
# The peak of a child process moves by a few MiB.
MEMORY_LEAST, MEMORY_SLACK = 0.02, 4 << 20
ERROR_LEAST = 0.10
BAD = ("slower", "more memory", "above plan", "less exact", "failed", "missing", "smaller chunks")


@dataclass(frozen=True)
class Change:
    """A change of one row: its kind, the two values, and the largest change that noise explains."""

    row: Row
    what: str
    before: str
    after: str
    bound: str = ""

    @property
    def bad(self) -> bool:
        """True for a regression."""
        return self.what in BAD


def _time_changes(before: Row, after: Row) -> list[Change]:
    """Compare the ratio to the bare GEMMs of the same chunks, and to those of chunks as large as pays.

    The second one finds a planner that cuts smaller chunks, which slow the bare GEMMs as well.
    """
    if not (before.ratio and after.ratio) or before.provider in (BASE, "whole"):
        return []
    bound = max(LEAST, NOISE_FACTOR * (before.ratio.uncertainty**2 + after.ratio.uncertainty**2) ** 0.5)
    pairs = [("", before.ratio.median, after.ratio.median, bound)]
    if before.whole and after.whole:
        pairs.append((" of uncut GEMMs", before.whole, after.whole, max(UNCUT_LEAST, 2 * bound)))
    for of, a, b, bound in pairs:
        moved = b / a - 1
        if abs(moved) > bound:
            noisy = after.noise or before.noise
            what = "too noisy to tell" if noisy else "slower" if moved > 0 else "faster"
            return [Change(after, what, f"{a:.2f}{of}", f"{b:.2f}{of} ({moved:+.0%})", f"{bound:.0%}")]
    return []


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.0f} MiB"


def _other_changes(before: Row, after: Row) -> list[Change]:
    """Compare peak memory, gradient error and chunk rows."""
    changes = []
    if before.peak_bytes and after.peak_bytes:
        grown, slack = after.peak_bytes - before.peak_bytes, MEMORY_LEAST * before.peak_bytes + MEMORY_SLACK
        if abs(grown) > slack:
            what = "more memory" if grown > 0 else "less memory"
            changes.append(Change(after, what, _mib(before.peak_bytes), _mib(after.peak_bytes), _mib(slack)))
    if before.gradient_error and after.gradient_error:
        moved = after.gradient_error / before.gradient_error - 1
        if abs(moved) > ERROR_LEAST:
            what = "less exact" if moved > 0 else "more exact"
            errors = f"{before.gradient_error:.2e}", f"{after.gradient_error:.2e}"
            changes.append(Change(after, what, *errors, f"{ERROR_LEAST:.0%}"))
    if before.rows and after.rows and before.rows != after.rows and before.provider != BASE:
        what = "smaller chunks" if after.rows < before.rows else "larger chunks"
        changes.append(Change(after, what, str(before.rows), str(after.rows)))
    return changes


def changes_of(before: Report, after: Report) -> list[Change]:
    """Compare rows of the same key, and list rows that one report lacks; regressions first."""
    old, found = {row.key: row for row in before.rows}, []
    for row in after.rows:
        then = old.pop(row.key, None)
        if off_plan(row) and not (then and off_plan(then)):
            planned = f"planned {_mib(row.predicted_bytes or 0)}"
            found.append(Change(row, "above plan", planned, _mib(row.peak_bytes or 0)))
        if then is None:
            continue
        if row.reason and not then.reason:
            found.append(Change(row, "failed", "measured", row.reason))
        elif not row.reason and not then.reason:
            found += _time_changes(then, row) + _other_changes(then, row)
    gone = [
        row
        for row in old.values()
        if not row.reason and row.suite in after.suites and before.quick == after.quick
    ]
    found += [Change(row, "missing", "measured", "no such row") for row in gone]
    return sorted(found, key=lambda change: not change.bad)


def comparable(before: Report, after: Report) -> list[str]:
    """Return the differences of the two runs that can explain a change: machine, versions, quick or full."""
    notes = (
        [f"machines differ: {before.machine['name']} | {after.machine['name']}"]
        if before.machine["name"] != after.machine["name"]
        else []
    )
    names = sorted(before.versions.keys() & after.versions.keys() - {"opsd_kernels"})
    notes += [
        f"{name} {before.versions[name]} | {after.versions[name]}"
        for name in names
        if before.versions[name] != after.versions[name]
    ]
    return notes + (
        [f"quick and full run: {before.quick} | {after.quick}"] if before.quick != after.quick else []
    )


def change_table(changes: list[Change]) -> Table:
    """Return the changes as a table."""

    def cells(c: Change) -> list[str]:
        r = c.row
        what = f"{size(r)} {r.dtype}, {r.head}, {r.mode}, {r.divergence}" + (
            f", {r.variant}" if r.variant else ""
        )
        return [c.what, r.suite, LABELS.get(r.provider, r.provider), what, c.before, c.after, c.bound]

    return Table(
        "What changed",
        ["change", "suite", "provider", "setting", "before", "after", "noise"],
        [cells(c) for c in changes],
    )
