"""The measured tables of docs/integrations-*.md, from the reports of benchmarks/{trl,liger,verl}_steps.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..report.results import where
from ..report.tables import Table, mebibytes

LABELS = {"trl": "TRL", "liger": "Liger", "verl": "verl"}
PAGES = {side: Path(f"docs/integrations-{side}.md") for side in LABELS}
MARKS = dict.fromkeys(PAGES.values(), ("<!-- steps -->", "<!-- /steps -->"))


def _busy(report: dict[str, Any]) -> bool:
    """Return whether the machine did other work: a load above that of the measured threads."""
    return max(load for row in report["rows"] for load in row["load"]) > report["threads"] + 0.5


def _about(report: dict[str, Any], clock: str) -> str:
    """Return the sentences above a table: sizes, rounds, and CPU time if the machine was busy."""
    shape, loads = report["shape"], [load for row in report["rows"] for load in row["load"]]
    rounds = shape["rounds"]
    what = (
        f"V = {shape['V']}, H = {shape['H']}, {shape['sequences']} completions of up to "
        f"{shape['completion']} tokens, prompts of {shape['prompt']}, {report['threads']} threads; "
        f"{f'medians of {rounds} rounds in turn' if rounds > 1 else 'one round'}. "
    )
    if clock == "cpu":
        what += (
            f"The machine did other work (load {min(loads):.0f} to {max(loads):.0f} on "
            f"{report['machine']['threads']} threads), so these are CPU times. "
        )
    return what + "*Off*: distance of the loss from the library's own in fp32 on the same weights."


def _table(side: str, report: dict[str, Any], clock: str) -> Table:
    label, rows = LABELS[side], []
    for row in report["rows"]:
        timed = [f"{row[f'{who}_{clock}_ms'] / 1e3:.2f}" for who in (side, "opsd")]
        peaks = [mebibytes(row[f"{who}_peak_bytes"]) for who in (side, "opsd")]
        off = [
            "" if row["dtype"] == "float32" and who == side else f"{row['loss_errors'][who]:.0e}"
            for who in (side, "opsd")
        ]
        ratios = f"{row[f'{clock}_ratio']:.2f}", f"{row['peak_ratio']:.2f}"
        rows.append([row["name"], row["loss"], row["dtype"], *timed, ratios[0], *peaks, ratios[1], *off])
    head = [
        f"{who} {what}"
        for what in ("CPU s" if clock == "cpu" else "s", "MiB", "off")
        for who in (label, "ours")
    ]
    return Table("", ["", "loss", "dtype", *head[:2], "ratio", *head[2:4], "ratio", *head[4:]], rows)


def block(results: Path, side: str) -> str:
    """Return the block between the marks of a page: the table of every machine that has a report."""
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
    return "\n".join(out).strip() or f"Not measured yet: run `python benchmarks/{side}_steps.py`."


def blocks(results: Path) -> dict[Path, str]:
    """Return the block of each page."""
    return {page: block(results, side) for side, page in PAGES.items()}
