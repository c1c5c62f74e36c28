"""Atomic checkpoints without pickle: safetensors and JSON in a directory per step, which appears whole or not at all.

`checkpoint/step_000040/` is itself a Hugging Face model directory: `from_pretrained` loads the trained student from it.
"""

from __future__ import annotations

import functools
import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opsd_kernels.train.distributed.sharding import cut_as, gathered, is_sharded
from opsd_kernels.train.records.durable import remove_pending, write_directory
from opsd_kernels.train.teacher import Teacher
from opsd_kernels.train.types import CheckpointError

NAME = re.compile(r"step_(\d{6,})")
FORMAT = 2


@dataclass
class RunState:
    """Everything that the next step depends on. `facts` are numbers measured before training and the time spent so far."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    teacher: Teacher
    reference: Teacher | None  # the model before the run, where it is rehearsed; may be the teacher
    optimizer: torch.optim.Optimizer
    step: int
    facts: dict[str, Any]


def part(state: RunState, name: str, keep: bool = True) -> dict[str, Tensor] | None:
    """Tensors of the model, teacher, reference or optimizer, whole where `keep`; of a sharded state all ranks must ask. None for what is not saved so."""
    if name == "model":
        return (
            gathered(state.model.state_dict(keep_vars=True), keep) if is_sharded(state.model) else None
        )  # keep_vars: else tied weights would be two
    if name == "reference" and (state.reference is None or state.reference is state.teacher):
        return None
    return gathered(_optimizer_tensors(state) if name == "optimizer" else getattr(state, name).state(), keep)


def save(
    folder: Path,
    state: RunState,
    log_offset: int,
    keep: int = 1,
    ask: Callable[[str], dict[str, Tensor] | None] | None = None,
) -> Path:
    """Writes `folder/step_N` and removes all but the `keep` newest. A step that is there already is not written again. `ask` gets a part from all ranks.

    Raises CheckpointError if the write fails; the checkpoints before it are untouched.
    """
    path = folder / f"step_{state.step:06d}"
    try:
        write_directory(
            path, lambda pending: _fill(pending, state, log_offset, ask or functools.partial(part, state))
        )
    except (OSError, SafetensorError) as error:  # a full disk, above all
        raise CheckpointError(
            f"checkpoint: step {state.step} could not be written to {folder}: {error}; the last checkpoint before it is intact"
        ) from error
    # The new one is on the disk by now; a kill between these lines leaves more, and the newest one counts.
    for _, old in [entry for entry in _complete(folder) if entry[0] <= state.step][:-keep]:
        shutil.rmtree(old)
    return path


def latest(folder: Path, say: Callable[[str], None] = lambda text: None) -> Path | None:
    """The newest intact checkpoint, None where none was ever written; leftovers of a crash are cleared.

    A damaged one is removed, and reported to `say`, if an older one is intact; else CheckpointError names what is wrong.
    """
    if not folder.is_dir():
        return None
    remove_pending(folder)
    damaged: list[tuple[Path, str]] = []
    for _, path in reversed(_complete(folder)):
        damage = damage_of(path)
        if damage is None:
            for bad, why in damaged:
                say(f"checkpoint: {why}; going on from {path.name}")
                shutil.rmtree(bad)  # the run will write this step again
            return path
        damaged.append((path, damage))
    if damaged:
        raise CheckpointError(
            "checkpoint: expected an intact one, got " + "; ".join(why for _, why in damaged)
        )
    return None


def damage_of(path: Path) -> str | None:
    """The first file of a checkpoint that is missing or has another size than was written; None for an intact one."""
    try:
        sizes = json.loads((path / "state.json").read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"no readable {path / 'state.json'}"
    for name, size in sizes.items():
        found = (path / name).stat().st_size if (path / name).is_file() else 0
        if found != size:
            return f"{found} of {size} bytes in {path / name}"
    return None


def restore(path: Path, state: RunState) -> int:
    """Loads teacher, optimiser, random number generators, step and facts into `state`, whose model came from `path`. Returns the log's offset."""
    record = json.loads((path / "state.json").read_text())
    if record["format"] != FORMAT:
        raise ValueError(f"checkpoint: expected format {FORMAT} in {path}, got {record['format']}")
    state.teacher.load(load_file(path / "teacher.safetensors"))
    if state.reference is not None and state.reference is not state.teacher:
        state.reference.load(load_file(path / "reference.safetensors"))
    _load_optimizer(state, load_file(path / "optimizer.safetensors"))
    _load_random(record["random"], load_file(path / "random.safetensors"))
    state.step, state.facts = record["step"], record["facts"]
    return record["log_offset"]


def _fill(
    pending: Path, state: RunState, log_offset: int, ask: Callable[[str], dict[str, Tensor] | None]
) -> None:
    # Tied weights are stored once here, and tied again by from_pretrained.
    state.model.save_pretrained(pending, state_dict=ask("model"))
    state.tokenizer.save_pretrained(pending)
    for name in (
        "teacher",
        "reference",
        "optimizer",
    ):  # one after the other: no more than one is whole at a time
        if (tensors := ask(name)) is not None:
            save_file(
                {key: tensor.contiguous() for key, tensor in tensors.items()}, pending / f"{name}.safetensors"
            )
        del tensors
    save_file(_random_tensors(), pending / "random.safetensors")
    record: dict[str, Any] = {
        "format": FORMAT,
        "step": state.step,
        "log_offset": log_offset,
        "facts": state.facts,
        "random": _random_record(),
    }
    record["files"] = {
        str(file.relative_to(pending)): file.stat().st_size
        for file in sorted(pending.rglob("*"))
        if file.is_file()
    }
    (pending / "state.json").write_text(json.dumps(record, indent=2) + "\n")


def _complete(folder: Path) -> list[tuple[int, Path]]:
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    return sorted(found)


def _optimizer_tensors(state: RunState) -> dict[str, Tensor]:
    named = state.model.named_parameters()
    return {
        f"{key}/{name}": value
        for name, parameter in named
        for key, value in state.optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer(state: RunState, tensors: dict[str, Tensor]) -> None:
    parameters = dict(state.model.named_parameters())
    for entry, value in tensors.items():
        key, _, name = entry.partition("/")
        parameter = parameters[name]
        # AdamW keeps its step count on the CPU whatever the device.
        state.optimizer.state[parameter][key] = value if key == "step" else cut_as(parameter, value)


# The trainer draws from seeds.py, which has no state; the generators are saved for models with dropout and for code that bends it.
def _random_tensors() -> dict[str, Tensor]:
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.random.get_state()[1].astype(np.int64)),
    }
    if torch.cuda.is_initialized():
        tensors |= {f"cuda_{index}": value for index, value in enumerate(torch.cuda.get_rng_state_all())}
    return tensors


def _random_record() -> dict[str, Any]:
    name, _, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": [name, *rest]}


def _load_random(record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    version, values, gauss = record["python"]
    random.setstate((version, tuple(values), gauss))
    name, *rest = record["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), *rest))
    torch.set_rng_state(tensors["torch"])
    for index in range(sum(key.startswith("cuda_") for key in tensors)):
        torch.cuda.set_rng_state(tensors[f"cuda_{index}"], index)
