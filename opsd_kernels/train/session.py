"""Set up the process around a run: its directory, seeds, threads, and the signals that stop it."""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from opsd_kernels.train.config import TrainConfig, load_config
from opsd_kernels.train.records.durable import remove_pending, write_file
from opsd_kernels.train.records.log import Progress
from opsd_kernels.train.types import RunDirectoryError, TrainingInterrupted

# Ctrl-C, the end of a job's time or a preemption, a closed terminal, and what Slurm's --signal=USR1 sends
# before the end. Windows lacks the last two.
STOP_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
]
# A second Ctrl-C within this time is the first one.
SAME_REQUEST_SECONDS = 0.5


def open_run_directory(config: TrainConfig, out: Path, resume: bool, data: str | None = None) -> None:
    """Claim `out` for this configuration, or check that a run to resume has the same one.

    `data` is the fingerprint of the task. Raises RunDirectoryError if it, or the chat template, is another.
    """
    if resume and not out.is_dir():
        raise FileNotFoundError(
            f"out: expected the directory of a run to resume, got {out}, which does not exist"
        )
    if out.exists() and not out.is_dir():
        raise RunDirectoryError(f"out: expected a directory, got the file {out}")
    if not resume and out.exists() and any(out.iterdir()):
        raise RunDirectoryError(
            f"out: expected a new or empty directory, got {out}, which is not empty; "
            "--resume continues the run in it"
        )
    out.mkdir(parents=True, exist_ok=True)
    remove_pending(out)
    record = out / "config.json"
    # Missing if the run was killed before its first write, or if there is no run here.
    if not record.exists():
        if any(out.iterdir()):
            raise RunDirectoryError(
                f"out: expected the directory of a run, got {out}, which holds no config.json"
            )
        write_file(record, config.to_json())
    differences = config.differences(load_config(record))
    if differences:
        raise RunDirectoryError(
            f"out: expected the configuration of the run in {out}, got another one: {'; '.join(differences)}"
        )
    _check_inputs(config, out, data)


def _check_inputs(config: TrainConfig, out: Path, data: str | None) -> None:
    """Record the contents of the files that the settings name, or compare them with the record."""
    template = Path(config.chat_template) if config.chat_template else None
    inputs = {} if data is None else {"data": data}
    if template is not None and template.is_file():
        inputs["chat_template"] = hashlib.sha256(template.read_bytes()).hexdigest()
    record = out / "inputs.json"
    # Missing if the run was killed before its second write, or is of an earlier version.
    if inputs and not record.exists():
        write_file(record, json.dumps(inputs, indent=2) + "\n")
    recorded = json.loads(record.read_text()) if inputs else {}
    changed = [name for name in inputs if inputs[name] != recorded.get(name)]
    if changed:
        named = " and ".join(f"{name}={getattr(config, name)}" for name in changed)
        raise RunDirectoryError(
            f"{changed[0]}: expected the contents that the run in {out} began with, got others: "
            f"{named} changed since then"
        )


@contextmanager
def deterministic(threads: int) -> Iterator[None]:
    """Compute on `threads` threads with deterministic algorithms, then restore the caller's settings.

    Sums over another number of threads round differently.
    """
    filling: Any = torch.utils.deterministic
    before, strict, warn = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = filling.fill_uninitialized_memory
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling takes a pass over every new tensor.
    filling.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(strict, warn_only=warn)
        filling.fill_uninitialized_memory = fill


@contextmanager
def reproducible(config: TrainConfig) -> Iterator[None]:
    """Set seeds, threads and deterministic algorithms for a run, then restore the caller's settings."""
    # transformers would draw a bar for every checkpoint across the bar of the run.
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with deterministic(config.threads):
            torch.manual_seed(config.seed)
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def peak_memory() -> int | None:
    """Return the largest resident memory of this process so far, in bytes; None on Windows."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class StopRequest:
    """The first signal that asked the run to stop: `number`, 0 before one came.

    While `finishing_steps` holds, a signal sets `number` and the step can end; otherwise it raises
    TrainingInterrupted.
    """

    def __init__(self, progress: Progress):
        self.number, self._progress, self._later, self._came = 0, progress, False, 0.0

    @contextmanager
    def finishing_steps(self) -> Iterator[None]:
        self._later = True
        try:
            yield
        finally:
            self._later = False

    def receive(self, number: int, frame: Any = None) -> None:
        """Handle a signal."""
        if not self._later:
            raise TrainingInterrupted("stopped at once; the last checkpoint counts", number)
        if not self.number:
            self.number, self._came = number, time.monotonic()
            self._progress.say(
                f"{signal.Signals(number).name}: stopping after this step; Ctrl-C again stops at once"
            )
        # Schedulers repeat their signals, and torchrun passes on the one that its process group received.
        elif number == signal.SIGINT and time.monotonic() - self._came > SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt


@contextmanager
def stop_signals(progress: Progress) -> Iterator[StopRequest]:
    """Handle Ctrl-C and the signals of schedulers, then restore the caller's handlers.

    A signal that the caller ignores (as `nohup` does with SIGHUP) or handles remains the caller's.
    """
    request, previous = StopRequest(progress), {}
    # Python delivers signals to the main thread alone.
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                previous[number] = signal.signal(number, request.receive)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
