"""Two reports of the same suites: what got slower, larger or less exact, beyond the noise of both."""

from __future__ import annotations

from dataclasses import dataclass

from .providers import BASE, LABELS
from .results import Report, Row
from .suites.space import off_plan
from .tables import Table, size

LEAST = 0.05  # relative change that is never noise's
UNCUT_LEAST = 0.20  # of the ratio to uncut GEMMs, whose own noise no row holds: two reruns differed by 16 %
NOISE_FACTOR = 1.5  # of both rows' uncertainties together
MEMORY_LEAST, MEMORY_SLACK = 0.02, 4 << 20  # a child process's peak moves by a few MiB
ERROR_LEAST = 0.10
BAD = ("slower", "more memory", "above plan", "less exact", "failed", "missing", "smaller chunks")


@dataclass(frozen=True)
class Change:
    """`what` happened to a row; `before` and `after` are the values that show it, `bound` what noise explains."""

    row: Row
    what: str
    before: str
    after: str
    bound: str = ""

    @property
    def bad(self) -> bool:
        return self.what in BAD


def _noise(before: Row, after: Row) -> float:
    return max(LEAST, NOISE_FACTOR * (before.ratio.uncertainty**2 + after.ratio.uncertainty**2) ** 0.5)


def _time_changes(before: Row, after: Row) -> list[Change]:
    """By the ratio to the bare GEMMs of the same chunks and, since a planner that cuts smaller chunks slows those as well, of chunks as large as pays."""
    changes = []
    if not (before.ratio and after.ratio) or before.provider in (BASE, "whole"):
        return changes
    bound = _noise(before, after)
    pairs = [("", before.ratio.median, after.ratio.median, bound)]
    if before.whole and after.whole:
        pairs.append((" of uncut GEMMs", before.whole, after.whole, max(UNCUT_LEAST, 2 * bound)))
    for of, a, b, bound in pairs:
        moved = b / a - 1
        if abs(moved) > bound:
            noisy = after.noise or before.noise
            what = "too noisy to tell" if noisy else "slower" if moved > 0 else "faster"
            changes.append(Change(after, what, f"{a:.2f}{of}", f"{b:.2f}{of} ({moved:+.0%})", f"{bound:.0%}"))
            break
    return changes


def _other_changes(before: Row, after: Row) -> list[Change]:
    changes = []
    if before.peak_bytes and after.peak_bytes:
        moved, bound = after.peak_bytes - before.peak_bytes, MEMORY_LEAST * before.peak_bytes + MEMORY_SLACK
        if abs(moved) > bound:
            what = "more memory" if moved > 0 else "less memory"
            changes.append(
                Change(
                    after,
                    what,
                    f"{before.peak_bytes / 2**20:.0f} MiB",
                    f"{after.peak_bytes / 2**20:.0f} MiB",
                    f"{bound / 2**20:.0f} MiB",
                )
            )
    if before.gradient_error and after.gradient_error:
        moved = after.gradient_error / before.gradient_error - 1
        if abs(moved) > ERROR_LEAST:
            what = "less exact" if moved > 0 else "more exact"
            changes.append(
                Change(
                    after,
                    what,
                    f"{before.gradient_error:.2e}",
                    f"{after.gradient_error:.2e}",
                    f"{ERROR_LEAST:.0%}",
                )
            )
    if before.rows and after.rows and before.rows != after.rows and before.provider != BASE:
        what = "smaller chunks" if after.rows < before.rows else "larger chunks"
        changes.append(Change(after, what, str(before.rows), str(after.rows)))
    return changes


def changes_of(before: Report, after: Report) -> list[Change]:
    """Rows of the same key, and rows that only one of the two has a number for."""
    old, found = {row.key: row for row in before.rows}, []
    for row in after.rows:
        then = old.pop(row.key, None)
        if off_plan(row) and not (then and off_plan(then)):
            found.append(
                Change(
                    row,
                    "above plan",
                    f"planned {row.predicted_bytes / 2**20:.0f} MiB",
                    f"{row.peak_bytes / 2**20:.0f} MiB",
                )
            )
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
    """What differs between the two runs, so that a change need not be this package's."""
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
