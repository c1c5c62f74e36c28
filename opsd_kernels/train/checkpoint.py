"""Atomic checkpoints without pickle: safetensors and JSON in a directory per step, which appears whole or not at all.

`checkpoint/step_000040/` is itself a Hugging Face model directory: `from_pretrained` loads the trained student from it.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opsd_kernels.train.durable import remove_pending, write_directory
from opsd_kernels.train.teacher import Teacher

NAME = re.compile(r"step_(\d{6,})")
FORMAT = 1


@dataclass
class RunState:
    """Everything that the next step depends on. `facts` are numbers measured before training and the time spent so far."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    teacher: Teacher
    optimizer: torch.optim.Optimizer
    step: int
    facts: dict[str, Any]


def save(folder: Path, state: RunState, log_offset: int) -> Path:
    """Writes `folder/step_N` and removes the older ones. A step that is there already is not written again."""
    path = folder / f"step_{state.step:06d}"
    write_directory(path, lambda pending: _fill(pending, state, log_offset))
    # The new one is on the disk by now; a kill between these lines leaves two, and the newer one counts.
    for step, old in _complete(folder):
        if step < state.step:
            shutil.rmtree(old)
    return path


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint; leftovers of a crash are cleared."""
    if not folder.is_dir():
        return None
    remove_pending(folder)
    complete = _complete(folder)
    return complete[-1][1] if complete else None


def restore(path: Path, state: RunState) -> int:
    """Loads teacher, optimiser, random number generators, step and facts into `state`, whose model came from `path`. Returns the log's offset."""
    record = json.loads((path / "state.json").read_text())
    if record["format"] != FORMAT:
        raise ValueError(f"checkpoint: expected format {FORMAT} in {path}, got {record['format']}")
    state.teacher.load(load_file(path / "teacher.safetensors"))
    _load_optimizer(state, load_file(path / "optimizer.safetensors"))
    _load_random(record["random"], load_file(path / "random.safetensors"))
    state.step, state.facts = record["step"], record["facts"]
    return record["log_offset"]


def _fill(pending: Path, state: RunState, log_offset: int) -> None:
    # Tied weights are stored once here, and tied again by from_pretrained.
    state.model.save_pretrained(pending)
    state.tokenizer.save_pretrained(pending)
    save_file({name: tensor.contiguous() for name, tensor in state.teacher.state().items()}, pending / "teacher.safetensors")
    save_file(_optimizer_tensors(state), pending / "optimizer.safetensors")
    save_file(_random_tensors(), pending / "random.safetensors")
    record = {"format": FORMAT, "step": state.step, "log_offset": log_offset, "facts": state.facts, "random": _random_record()}
    (pending / "state.json").write_text(json.dumps(record, indent=2) + "\n")


def _complete(folder: Path) -> list[tuple[int, Path]]:
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    return sorted(found)


def _optimizer_tensors(state: RunState) -> dict[str, Tensor]:
    named = state.model.named_parameters()
    return {f"{key}/{name}": value.contiguous() for name, parameter in named for key, value in state.optimizer.state.get(parameter, {}).items()}


def _load_optimizer(state: RunState, tensors: dict[str, Tensor]) -> None:
    parameters = dict(state.model.named_parameters())
    for entry, value in tensors.items():
        key, _, name = entry.partition("/")
        parameter = parameters[name]
        # AdamW keeps its step count on the CPU whatever the device.
        state.optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)


# The trainer draws from seeds.py, which has no state; the generators are saved for models with dropout and for code that bends it.
def _random_tensors() -> dict[str, Tensor]:
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.random.get_state()[1].astype(np.int64))}
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
