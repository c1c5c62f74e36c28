"""The report of benchmarks/parallel.py: its rows, its links, and the projections that use its numbers."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from ...parallel import Link, LMHead, Machine, Projection, project
from ...report.results import Row, parse_row, where
from ...report.tables import HIDES
from ...shapes import Setting
from .assumptions import gpus

REPORT = "parallel.json"
WAYS = {"vocabulary": "half of the vocabulary each", "data": "half of the tokens each"}


def figures(ms: float) -> str:
    """Return milliseconds, to three digits below 100."""
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def shard_key(row: Row) -> tuple[object, ...]:
    """Return the vocabulary columns of a shard, and its setting."""
    return row.V, row.N, row.H, row.dtype, row.divergence


class Measured:
    """A report of benchmarks/parallel.py."""

    def __init__(self, path: Path) -> None:
        self.data: dict[str, Any] = json.loads(path.read_text())
        self.rows: list[Row] = [parse_row(row) for row in self.data["rows"]]
        self.links = {
            kind: Link(link["latency"], link["bandwidth"]) for kind, link in self.data["links"].items()
        }

    @property
    def where(self) -> str:
        """One line: machine, versions, commit, date, command."""
        return f"{where(self.data)}. `{self.data['command']}`"

    def of(self, *providers: str) -> list[Row]:
        """Return the rows of some providers."""
        return [row for row in self.rows if row.provider in providers]

    def whole(self, row: Row) -> Row:
        """Return the bare GEMMs of one rank that holds the whole vocabulary."""
        share = (*shard_key(row)[1:], row.V)
        return next(
            r
            for r in self.of("gemms")
            if r.variant == "1" and (*shard_key(r)[1:], -(-r.V // int(row.variant))) == share
        )

    def headline(self, group: bool) -> list[Row]:
        """Return the rows that represent a large head: the op at the largest H, in bf16, with reverse KL.

        Without `group` the op on the whole head, with it the op in groups of several ranks.
        """
        rows = [
            r
            for r in self.of("group" if group else "op")
            if r.dtype == "bfloat16" and r.divergence == "reverse_kl" and (r.variant != "1") == group
        ]
        return [row for row in rows if row.H == max(row.H for row in rows)]

    def _ratio(self, group: bool) -> float:
        return statistics.median(row.ratio.median for row in self.headline(group) if row.ratio)

    def overhead(self, vocab_ranks: int) -> float:
        """Return the op's time over its bare GEMMs, at least 1.

        All groups share one number: they differ by less than a rerun moves them. It is at least that of one
        rank, whose work they include.
        """
        return max(1.0, *(self._ratio(group) for group in (False, True)[: 1 + (vocab_ranks > 1)]))

    @property
    def warning(self) -> str:
        """A paragraph for the report of a busy machine; empty otherwise."""
        used = [*self.headline(False), *self.headline(True)]
        unknown = sum(bool(row.noise and row.ratio and row.ratio.uncertainty > HIDES) for row in used)
        if not unknown:
            return ""
        load, cores = self.data["machine"]["load_before"], self.data["machine"]["cores"]
        return (
            f"**The machine was too busy for reliable times**: a load of {load:.1f} on {cores} cores before "
            f"the run, and {unknown} of the {len(used)} ratios that the projection uses are not known within "
            f"{2 * HIDES:.0%}.\n\n"
        )

    def on_gpus(
        self, head: LMHead, tokens: int, vocab_ranks: int, data_ranks: int, *, shared_head: bool = True
    ) -> Projection:
        """Project a call onto GPUs, with the overhead measured here."""
        machine = gpus(vocab_ranks, data_ranks)
        overhead = self.overhead(vocab_ranks)
        return project(head, tokens, vocab_ranks, data_ranks, machine, overhead, shared_head=shared_head)

    def predicted(self, run: dict[str, Any], way: str) -> Projection:
        """Project a run of two processes from one rank's GEMMs, the op's ratio to them, and the links."""
        setting = Setting(**{name: run[name] for name in ("N", "H", "V", "dtype", "head", "divergence")})
        vocab_ranks, data_ranks = (run["world"], 1) if way == "vocabulary" else (1, run["world"])
        share = setting.at(V=-(-setting.V // vocab_ranks), N=setting.N // data_ranks)
        rate = share.flops / (run["ms"][f"{way} gemms"]["median"] / 1e3)
        return project(
            LMHead("", setting.H, setting.V),
            setting.N,
            vocab_ranks,
            data_ranks,
            Machine(rate, self.links["gather"], self.links["reduce"], self.links["data"], "cpu"),
            max(1.0, run["overheads"][way]["median"]),
            dtype=setting.torch_dtype,
            labels=False,
            shared_head=setting.head == "shared",
        )
