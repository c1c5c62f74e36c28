"""Runs the cells of a study: small trainings and probes in worker processes, each result kept as JSON, so that a study that was stopped goes on.

A cell is a function and plain arguments. It is computed once per directory, whatever order or study asks for it; its file holds the commit it ran at.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from opsd_kernels.provenance import git_commit
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.records.durable import write_file
from opsd_kernels.train.records.log import Progress

Result = dict[str, Any]
DECIDING_BASE = ("env", "context", "threads", "cache_dir")  # beside the settings named tiny_ and warm_


@dataclass(frozen=True)
class Cell:
    """`function`, as `module:name`, is called with `arguments` (plain JSON) and a directory of its own; what it returns is plain JSON."""

    function: str
    arguments: dict[str, Any]

    @property
    def key(self) -> str:
        text = json.dumps([self.function, self.arguments], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]


def train_cell(config: TrainConfig) -> Cell:
    """A whole run of the trainer; its result is summary.json, the curves that the trainer measured, and what the run cost."""
    return Cell("opsd_kernels.train.studies.cells:train", asdict(config))


def warm_cell(config: TrainConfig) -> Cell:
    """The base model that `config` starts from, made and cached: one cell for all configurations that start from it."""
    kept = {
        name: value
        for name, value in asdict(config).items()
        if name.startswith(("tiny_", "warm_")) or name in DECIDING_BASE
    }
    return Cell("opsd_kernels.train.studies.cells:warm", asdict(TrainConfig(**kept)))


@dataclass
class Lab:
    """Where the cells of a study run, and what has become of them. `folder` holds a file for each. With no workers they run in this process."""

    folder: Path
    workers: int = 2
    quick: bool = False
    progress: Progress = field(default_factory=Progress)
    commits: set[str] = field(default_factory=set)
    spent: dict[str, float] = field(default_factory=dict)  # seconds of CPU time by cell
    _pool: ProcessPoolExecutor | None = field(default=None, repr=False)

    @property
    def seconds(self) -> float:
        """CPU time of all cells that were asked for, whenever they ran."""
        return sum(self.spent.values())

    def train(self, title: str, configs: Sequence[TrainConfig]) -> list[Result]:
        """One result per configuration. Base models come first, each once, whatever number of cells starts from it."""
        distinct: dict[Path, TrainConfig] = {}
        for config in configs:
            distinct.setdefault(_base_folder(config), config)
        warm = {folder: warm_cell(config) for folder, config in distinct.items()}
        # One that this study made before counts, one that lay in the cache cost it nothing.
        self.run(
            f"{title}: base models",
            [cell for folder, cell in warm.items() if not folder.exists() or self._file(cell.key).exists()],
        )
        return self.run(title, [train_cell(config) for config in configs])

    def run(self, title: str, cells: Sequence[Cell]) -> list[Result]:
        """The cells' results, in their order; what lies in the directory is not computed again. Raises what a cell raised."""
        wanted = {cell.key: cell for cell in cells}
        missing = [cell for key, cell in wanted.items() if not self._file(key).exists()]
        if missing:
            self._compute(title, missing)
        records = {key: json.loads(self._file(key).read_text()) for key in wanted}
        self.commits |= {record["commit"] for record in records.values()}
        self.spent |= {key: record["seconds"] for key, record in records.items()}
        return [records[cell.key]["result"] for cell in cells]

    def _compute(self, title: str, cells: Sequence[Cell]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        commit = git_commit()
        with self.progress.bar(title, len(cells)) as bar:
            done = 0
            for cell, outcome in self._outcomes(cells):
                record = {"function": cell.function, "arguments": cell.arguments, "commit": commit, **outcome}
                write_file(self._file(cell.key), json.dumps(record, indent=1) + "\n")
                done += 1
                bar.update(done)

    def _outcomes(self, cells: Sequence[Cell]) -> Iterator[tuple[Cell, Result]]:
        """As they come. After a failure those that run beside it still do, and then it is raised."""
        if self.workers == 0:
            yield from ((cell, compute(cell, self.folder)) for cell in cells)
            return
        if self._pool is None:
            # Spawned: a fork of a process that has used torch's threads may hang. Kept, as a worker takes seconds to import torch and transformers.
            self._pool = ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn"))
        futures = {self._pool.submit(compute, cell, self.folder): cell for cell in cells}
        taken = set()
        try:
            for future in as_completed(futures):
                outcome = future.result()
                taken.add(future)
                yield futures[future], outcome
        except Exception:
            self.close()
            yield from (
                (cell, f.result())
                for f, cell in futures.items()
                if f not in taken and not f.cancelled() and f.exception() is None
            )
            raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the workers; cells that have not begun never will."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.json"


def compute(cell: Cell, folder: Path) -> Result:
    """Runs a cell in a worker; `seconds` are of CPU time, which other work on the machine does not lengthen. What it prints goes to a log.

    An exception names that log.
    """
    module, _, name = cell.function.partition(":")
    function = getattr(importlib.import_module(module), name)
    log = folder / f"{cell.key}.log"
    began = time.process_time()
    with tempfile.TemporaryDirectory(dir=folder, prefix="cell-") as own, _redirected(log):
        result = function(cell.arguments, Path(own))
    log.unlink(missing_ok=True)
    return {"result": result, "seconds": time.process_time() - began}


@contextlib.contextmanager
def _redirected(log: Path) -> Iterator[None]:
    with log.open("w") as file, contextlib.redirect_stdout(file):
        try:
            yield
        except Exception as error:
            error.add_note(f"log of this cell: {log}") if hasattr(error, "add_note") else None  # Python 3.11
            raise


def _base_folder(config: TrainConfig) -> Path:
    from opsd_kernels.train.models.warmstart import cache_folder  # transformers loads in seconds

    return cache_folder(config)
