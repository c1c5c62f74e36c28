"""Print reports of `opsd bench` in short form: one line per measurement, the worst error per provider.

python benchmarks/gpu_summary.py benchmarks/results/h200/*.json
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from opsd_kernels.bench.report.results import Row, load


def numbers(row: Row) -> str:
    """Return the numbers of a row, or its reason."""
    parts = [row.reason[:60] if row.reason else "", f"{row.ms.median:.2f} ms" if row.ms else ""]
    parts.append(f"{row.ratio.median:.2f}x {row.base}" if row.ratio and row.base != row.provider else "")
    parts.append(f"{row.ceiling:.0%} of ceiling" if row.ceiling else "")
    parts.append(f"{row.peak_bytes / 2**30:.2f} GiB" if row.peak_bytes is not None else "")
    parts.append(f"planned {row.predicted_bytes / 2**30:.2f}" if row.predicted_bytes is not None else "")
    if row.predicted_ms is not None:
        over = f" ({row.ms.median / row.predicted_ms:.2f} of it measured)" if row.ms else ""
        parts.append(f"predicted {row.predicted_ms:.2f} ms{over}")
    parts.append(f"MISSED {row.target}" if row.verdict == "missed" else "")
    parts.append("noisy" if row.noise else "")
    return ", ".join(filter(None, parts))


def lines(rows: list[Row]) -> Iterator[str]:
    """Yield one line per measurement under its setting, then the worst gradient errors of suite accuracy."""
    heading = None
    for row in rows:
        if row.suite == "accuracy":
            continue
        setting = (
            f"{row.suite}: N={row.N} H={row.H} V={row.V} {row.dtype} {row.head} {row.mode} {row.divergence}"
        )
        if setting != heading:
            yield setting
            heading = setting
        yield f"  {' '.join(filter(None, (row.provider, row.variant)))}: {numbers(row)}"
    worst: dict[tuple[str, ...], float] = {}
    for row in rows:
        if row.suite == "accuracy" and row.gradient_error is not None:
            key = row.provider, row.dtype, row.head, row.variant.split(", ")[-1]
            worst[key] = max(worst.get(key, 0.0), row.gradient_error)
    yield from (
        f"accuracy, worst gradient at any KL: {', '.join(key)}: {error:.2%}" for key, error in worst.items()
    )


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        print("\n".join(lines(load(path).rows)))
