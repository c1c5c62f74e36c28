"""Run the cells of a study, small trainings and probes, in worker processes.

Results are kept, so a study can resume. A cell is a function and plain arguments. It is computed once per
directory, in any order and for any study; its JSON file holds the result and the commit.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from opsd_kernels.provenance import git_commit
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.records.durable import write_file
from opsd_kernels.train.records.log import Progress
from opsd_kernels.train.studies import digest

Result = dict[str, Any]
# The settings of a base model, besides those named tiny_ and warm_.
DECIDING_BASE = ("env", "context", "threads", "cache_dir")
# The function that makes a base model, how its error begins where one has not learned in `warm_max_steps`,
# and what is then added to `warm_seed`: a study's other seeds differ by less than 100 or by thousands.
MAKES_BASE, NOT_LEARNED, NEXT_SEED = "opsd_kernels.train.studies.cells:warm", "warm start: expected", 100
LARGEST_FAILURES = 3


@dataclass(frozen=True)
class Cell:
    """A call of `function`, as `module:name`, with `arguments` and a directory of its own.

    It returns plain JSON.
    """

    function: str
    arguments: dict[str, Any]

    @property
    def key(self) -> str:
        """Return the name of the cell's file: a hash of the call and of the code that decides its result."""
        text = json.dumps([self.function, self.arguments, self.modules], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    @cached_property
    def modules(self) -> dict[str, str]:
        """Return the hashes of the modules that decide the result."""
        module = self.function.partition(":")[0]
        envs = {config["env"] for config in _configs(self.arguments)}
        return digest.modules([module], [name for env in sorted(envs) for name in digest.env_modules(env)])


def _configs(value: Any) -> Iterator[dict[str, Any]]:
    """Yield the trainer's settings within the arguments of a cell."""
    if isinstance(value, dict):
        if "env" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _configs(one)


def train_cell(config: TrainConfig) -> Cell:
    """Return the cell of a whole run of the trainer: accuracies, the measured curves, and the costs."""
    module = "cells" if config.model == "tiny" else "language_cells"
    return Cell(f"opsd_kernels.train.studies.{module}:train", asdict(config))


def warm_cell(config: TrainConfig) -> Cell:
    """Return the cell that makes the base model of `config`, one for all that share the model."""
    kept = {
        name: value
        for name, value in asdict(config).items()
        if name.startswith(("tiny_", "warm_")) or name in DECIDING_BASE
    }
    return Cell(MAKES_BASE, asdict(TrainConfig(**kept)))


@dataclass
class Lab:
    """The runner of a study's cells. `folder` holds a file for each.

    Without workers they run in this process.
    """

    folder: Path
    workers: int = 2
    quick: bool = False
    # Another number gives other base models and seeds to all cells of a study.
    master: int = 0
    progress: Progress = field(default_factory=Progress)
    commits: set[str] = field(default_factory=set)
    # The hashes of the modules that decided the cells' results, by name.
    modules: dict[str, str] = field(default_factory=dict)
    # Seconds of CPU time by cell.
    spent: dict[str, float] = field(default_factory=dict)
    # Base models that did not learn, and whose place one of another seed took, by cell: their errors.
    not_learned: dict[str, str] = field(default_factory=dict)
    _pool: ProcessPoolExecutor | None = field(default=None, repr=False)

    @property
    def seconds(self) -> float:
        """Return the CPU time of all requested cells, in this process or an earlier one."""
        return sum(self.spent.values())

    def train(self, title: str, configs: Sequence[TrainConfig]) -> list[Result]:
        """Return one result per configuration. Base models are made first, each once."""
        warm: dict[Path, Cell] = {}
        for config in (config for config in configs if config.model == "tiny"):
            cell = self._with_learned(warm_cell(config))
            warm.setdefault(_base_folder(TrainConfig(**cell.arguments)), cell)
        # A base model that this study made earlier counts in its costs, one from the cache does not.
        self.run(
            f"{title}: base models",
            [cell for folder, cell in warm.items() if not folder.exists() or self._file(cell.key).exists()],
        )
        return self.run(title, [train_cell(config) for config in configs])

    def run(self, title: str, cells: Sequence[Cell]) -> list[Result]:
        """Return the cells' results, in their order. Results in the directory are not computed again.

        A base model that does not learn gives its place to one of another seed, in cells that follow too.
        Raises the exception of a cell that failed.
        """
        learned = [self._with_learned(cell) for cell in cells]
        wanted = {cell.key: cell for cell in learned}
        missing = [cell for key, cell in wanted.items() if not self._file(key).exists()]
        if missing:
            self._compute(title, missing)
        records = {key: json.loads(self._file(key).read_text()) for key in wanted}
        self.commits |= {record["commit"] for record in records.values()}
        self.spent |= {key: record["seconds"] for key, record in records.items()}
        for cell in wanted.values():
            self.modules |= cell.modules
        if any("not_learned" in record["result"] for record in records.values()):
            return self.run(title, cells)
        return [records[cell.key]["result"] for cell in learned]

    def _with_learned(self, cell: Cell) -> Cell:
        """Return the cell with the seeds of base models that have learned, as far as is known.

        Raises RuntimeError where as many as LARGEST_FAILURES in a row have not.
        """
        arguments = copy.deepcopy(cell.arguments)
        for config in _configs(arguments):
            failures = 0
            while config.get("model") == "tiny" and (error := self._failure(config)):
                failures += 1
                if failures == LARGEST_FAILURES:
                    raise RuntimeError(error)
                config["warm_seed"] += NEXT_SEED
        return replace(cell, arguments=arguments)

    def _failure(self, config: dict[str, Any]) -> str | None:
        """Return the error of a configuration's base model, if it was made here and has not learned."""
        file = self._file(key := warm_cell(TrainConfig(**config)).key)
        record = json.loads(file.read_text()) if file.exists() else {"result": {}}
        if error := record["result"].get("not_learned"):
            self.not_learned[key], self.spent[key] = error, record["seconds"]
        return error

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
        """Yield results as they complete. After a failure the running cells complete before it is raised."""
        if self.workers == 0:
            yield from ((cell, compute(cell, self.folder)) for cell in cells)
            return
        if self._pool is None:
            # Spawned, since a fork of a process that has used torch's threads may hang. Kept, since a worker
            # takes seconds to import torch and transformers.
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
        """End the workers; cells that have not started are cancelled."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.json"


def compute(cell: Cell, folder: Path) -> Result:
    """Run a cell in a worker, with its output in a log, which an exception names.

    `seconds` are of CPU time, which other work on the machine does not lengthen.
    """
    module, _, name = cell.function.partition(":")
    function = getattr(importlib.import_module(module), name)
    log = folder / f"{cell.key}.log"
    began = time.process_time()
    with tempfile.TemporaryDirectory(dir=folder, prefix="cell-") as own, _redirected(log):
        try:
            result = function(cell.arguments, Path(own))
        except RuntimeError as error:
            if cell.function != MAKES_BASE or not str(error).startswith(NOT_LEARNED):
                raise
            result = {"not_learned": str(error)}
    log.unlink(missing_ok=True)
    return {"result": result, "seconds": time.process_time() - began}


@contextlib.contextmanager
def _redirected(log: Path) -> Iterator[None]:
    with log.open("w") as file, contextlib.redirect_stdout(file):
        try:
            yield
        except Exception as error:
            # From Python 3.11 on.
            if hasattr(error, "add_note"):
                error.add_note(f"log of this cell: {log}")
            raise


def _base_folder(config: TrainConfig) -> Path:
    # Imported here, since transformers takes seconds to load.
    from opsd_kernels.train.models.warmstart import cache_folder

    return cache_folder(config)
