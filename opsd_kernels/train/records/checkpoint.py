"""Write and read checkpoints: safetensors and JSON, without pickle, in one atomic directory per step.

`checkpoint/step_000040/` is also a Hugging Face model directory: `from_pretrained` loads the trained student
from it.
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
from opsd_kernels.train.optimizer import masters_of
from opsd_kernels.train.records.durable import remove_pending, write_directory
from opsd_kernels.train.teacher import Teacher
from opsd_kernels.train.types import CheckpointError

NAME = re.compile(r"step_(\d{6,})")
FORMAT = 2
# Entry of the optimiser's tensors with the fp32 weights that 16-bit ones are rounded from.
MASTER = "master"


@dataclass
class RunState:
    """Everything that the next step depends on.

    `facts` holds the measurements before training and the time spent.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    teacher: Teacher
    reference: Teacher | None  # the model before the run, for rehearsal; may be the teacher itself
    optimizer: torch.optim.Optimizer
    step: int
    facts: dict[str, Any]


def part(state: RunState, name: str, keep: bool = True) -> dict[str, Tensor] | None:
    """Gather the tensors of the model, teacher, reference or optimizer, on ranks with `keep`.

    A collective call for a sharded state. Returns None for a part that is saved otherwise or not at all.
    """
    if name == "model":
        # keep_vars, so that tied weights are one tensor.
        return gathered(state.model.state_dict(keep_vars=True), keep) if is_sharded(state.model) else None
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
    """Write `folder/step_N`, unless it exists, and remove all but the `keep` newest checkpoints.

    `ask` gathers a part from all ranks. Raises CheckpointError if the write fails; earlier checkpoints stay
    intact.
    """
    path = folder / f"step_{state.step:06d}"
    ask = ask or functools.partial(part, state)
    try:
        write_directory(path, lambda pending: _fill(pending, state, log_offset, ask))
    # Above all a full disk.
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint: step {state.step} could not be written to {folder}: {error}; "
            "the last checkpoint before it is intact"
        ) from error
    # The new checkpoint is on the disk. A kill here leaves more of them, and the newest is used.
    for _, old in [entry for entry in _complete(folder) if entry[0] <= state.step][:-keep]:
        shutil.rmtree(old)
    return path


def latest(folder: Path, say: Callable[[str], None] = lambda text: None) -> Path | None:
    """Return the newest intact checkpoint, or None if there is none, and remove leftovers of a crash.

    A damaged one is removed and reported to `say` if an older one is intact; else CheckpointError names the
    damage.
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
                # The run will write this step again.
                shutil.rmtree(bad)
            return path
        damaged.append((path, damage))
    if damaged:
        found = "; ".join(why for _, why in damaged)
        raise CheckpointError(f"checkpoint: expected an intact one, got {found}")
    return None


def damage_of(path: Path) -> str | None:
    """Name the first file of a checkpoint that is missing or differs in size; None if all are intact."""
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
    """Load teacher, optimiser, generators, step and facts into `state`, whose model was loaded from `path`.

    Returns the log's offset.
    """
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
    # Tied weights are stored once; from_pretrained ties them again.
    state.model.save_pretrained(pending, state_dict=ask("model"))
    state.tokenizer.save_pretrained(pending)
    # One after the other, so that at most one is unsharded at a time.
    for name in ("teacher", "reference", "optimizer"):
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
    tensors, masters = {}, masters_of(state.optimizer)
    for name, parameter in state.model.named_parameters():
        master = masters.get(parameter, parameter)
        if master is not parameter:
            tensors[f"{MASTER}/{name}"] = master
        tensors |= {f"{key}/{name}": value for key, value in state.optimizer.state.get(master, {}).items()}
    return tensors


@torch.no_grad()
def _load_optimizer(state: RunState, tensors: dict[str, Tensor]) -> None:
    parameters, masters = dict(state.model.named_parameters()), masters_of(state.optimizer)
    for entry, value in tensors.items():
        key, _, name = entry.partition("/")
        master = masters.get(parameters[name], parameters[name])
        if key == MASTER:
            master.copy_(cut_as(master, value))
        else:
            # AdamW keeps its step count on the CPU whatever the device.
            state.optimizer.state[master][key] = (
                value if key == "step" else cut_as(master, value.to(master.dtype))
            )


# The trainer draws from seeds.py, which has no state. The generators are saved for dropout and for modified
# trainers.
def _random_tensors() -> dict[str, Tensor]:
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(_numpy_state()[1].astype(np.int64)),
    }
    if torch.cuda.is_initialized():
        tensors |= {f"cuda_{index}": value for index, value in enumerate(torch.cuda.get_rng_state_all())}
    return tensors


def _numpy_state() -> tuple[Any, ...]:
    state = np.random.get_state(legacy=True)
    assert isinstance(state, tuple)
    return state


def _random_record() -> dict[str, Any]:
    name, _, *rest = _numpy_state()
    return {"python": random.getstate(), "numpy": [name, *rest]}


def _load_random(record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    version, values, gauss = record["python"]
    random.setstate((version, tuple(values), gauss))
    name, *rest = record["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), *rest))
    torch.set_rng_state(tensors["torch"])
    for key, value in tensors.items():
        device, _, index = key.partition("_")
        # A machine with fewer devices has no use for the states of the others.
        if device == "cuda" and int(index) < torch.cuda.device_count():
            torch.cuda.set_rng_state(value, int(index))
