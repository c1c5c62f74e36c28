"""Set up the process around a run: its directory, seeds, threads, and the handling of Ctrl-C."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from opsd_kernels.train.config import TrainConfig, load_config
from opsd_kernels.train.records.durable import remove_pending, write_file
from opsd_kernels.train.records.log import Progress
from opsd_kernels.train.types import RunDirectoryError


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


@contextmanager
def graceful_interrupt(progress: Progress) -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C sets, so that the step can end; a second one interrupts."""
    event = threading.Event()
    # Python delivers signals to the main thread alone.
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def on_interrupt(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        progress.say("stopping after this step; Ctrl-C again stops at once")

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
