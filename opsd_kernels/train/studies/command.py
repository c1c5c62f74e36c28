"""`opsd reproduce`: run one study and write its results."""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Sequence
from pathlib import Path

from opsd_kernels.provenance import describe_machine, package_version
from opsd_kernels.train.records.log import Progress
from opsd_kernels.train.studies import digest, pages, rerun
from opsd_kernels.train.studies.lab import Lab
from opsd_kernels.train.studies.study import Study, load

PAPERS = ("sdpo", "discovery", "mopd", "iw_opd", "law", "variance", "sdpo_python", "law_python")
PACKAGES = ("torch", "transformers", "opsd_kernels")


def reproduce(
    paper: str,
    out: Path,
    quick: bool,
    workers: int,
    command: Sequence[str],
    master: int = 0,
    against: Path | None = None,
) -> Study:
    """Run the study `paper` with its cells in `out`/cells, and write <paper>.json, .png and .md into `out`.

    `master` decides all base models and seeds. With `against`, the JSON of another run of the study, say how
    many of its intervals hold this run's estimates. Raises ValueError for an unknown paper.
    """
    if paper not in PAPERS:
        raise ValueError(f"paper: expected one of {', '.join(PAPERS)}, got {paper!r}")
    first = load(Path(against)) if against is not None else None
    lab = Lab(Path(out) / "cells", workers, quick, master, Progress())
    module = f"opsd_kernels.train.studies.papers.{paper}"
    # Before the cells run, since a file may be edited in the meantime.
    own = digest.modules([module], [])
    try:
        study = importlib.import_module(module).study(lab)
    finally:
        lab.close()
    study.facts = {
        "machine": describe_machine("cpu")["name"],
        "versions": {package: package_version(package) for package in PACKAGES},
        "commits": sorted(lab.commits),
        "command": "opsd " + " ".join(command),
        "date": time.strftime("%Y-%m-%d"),
        "cell_seconds": round(lab.seconds, 1),
        "not_learned": sorted(lab.not_learned.values()),
        "workers": workers,
        "quick": quick,
        "master": master,
        "modules": dict(sorted({**lab.modules, **own}.items())),
        "defaults": digest.defaults(),
    }
    pages.write(study, Path(out))
    say_claims(lab.progress, study, Path(out))
    if first is not None:
        lab.progress.say(rerun.summary(rerun.pairs(first, study)))
    return study


def say_claims(progress: Progress, study: Study, out: Path) -> None:
    from rich.table import Table

    table = Table(title=study.title)
    for column in ("claim", "measured", "value", "grade"):
        table.add_column(column)
    for claim in study.claims:
        table.add_row(
            *(
                str(getattr(claim, field.name))
                for field in dataclasses.fields(claim)
                if field.name != "remark"
            )
        )
    progress.console.print(table)
    for ending in ("md", "png", "json"):
        progress.say(str(out / f"{study.paper}.{ending}"))
