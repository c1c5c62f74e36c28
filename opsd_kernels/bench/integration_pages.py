"""The measured tables of docs/integrations-*.md, from the reports of benchmarks/{trl,liger,verl}_steps.py. pages.py writes them between the marks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .results import where
from .tables import Table, mebibytes

LABELS = {"trl": "TRL", "liger": "Liger", "verl": "verl"}
PAGES = {side: Path(f"docs/integrations-{side}.md") for side in LABELS}
MARKS = dict.fromkeys(PAGES.values(), ("<!-- steps -->", "<!-- /steps -->"))


def _busy(report: dict[str, Any]) -> bool:
    """Whether the machine did other work: a load above what the measured threads make."""
    return max(load for row in report["rows"] for load in row["load"]) > report["threads"] + 0.5


def _about(report: dict[str, Any], clock: str) -> str:
    shape, loads = report["shape"], [load for row in report["rows"] for load in row["load"]]
    rounds = shape["rounds"]
    what = (
        f"V = {shape['V']}, H = {shape['H']}, {shape['sequences']} completions of up to {shape['completion']} tokens, prompts of {shape['prompt']}, "
        f"{report['threads']} threads; {f'medians of {rounds} rounds in turn' if rounds > 1 else 'one round'}. "
    )
    if clock == "cpu":
        what += f"The machine did other work (load {min(loads):.0f} to {max(loads):.0f} on {report['machine']['threads']} threads), so this is CPU time. "
    return what + "*Off* is the distance of the loss from the library's own in fp32 on the same weights."


def _table(side: str, report: dict[str, Any], clock: str) -> Table:
    label, rows = LABELS[side], []
    for row in report["rows"]:
        timed = [f"{row[f'{who}_{clock}_ms'] / 1e3:.2f}" for who in (side, "opsd")]
        peaks = [mebibytes(row[f"{who}_peak_bytes"]) for who in (side, "opsd")]
        off = [
            "" if row["dtype"] == "float32" and who == side else f"{row['loss_errors'][who]:.0e}"
            for who in (side, "opsd")
        ]
        rows.append(
            [
                row["name"],
                row["loss"],
                row["dtype"],
                *timed,
                f"{row[f'{clock}_ratio']:.2f}",
                *peaks,
                f"{row['peak_ratio']:.2f}",
                *off,
            ]
        )
    head = [
        f"{who} {what}"
        for what in ("CPU s" if clock == "cpu" else "s", "MiB", "off")
        for who in (label, "ours")
    ]
    return Table("", ["", "loss", "dtype", *head[:2], "ratio", *head[2:4], "ratio", *head[4:]], rows)


def block(results: Path, side: str) -> str:
    """What stands between the marks of a page: the table of every machine that has one."""
    out = []
    for path in sorted(results.glob(f"*/{side}_steps.json")):
        report = json.loads(path.read_text())
        clock = "cpu" if _busy(report) else "wall"
        out += [
            _about(report, clock),
            "",
            _table(side, report, clock).markdown(),
            "",
            f"{where(report)}. `{report['command']}`",
            "",
        ]
    return "\n".join(out).strip() or f"Not measured yet: `python benchmarks/{side}_steps.py` does it."


def blocks(results: Path) -> dict[Path, str]:
    return {page: block(results, side) for side, page in PAGES.items()}
