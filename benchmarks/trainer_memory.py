"""Memory of one rank of the trainer, in MiB.

    torchrun --nproc-per-node 4 benchmarks/trainer_memory.py fsdp    # or none; without torchrun one process

Run it with MALLOC_MMAP_THRESHOLD_=65536: otherwise glibc keeps freed blocks, and the process looks larger
than its live memory. Linux, CPU, half a minute.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from opsd_kernels.train import loop, step
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.contexts import ContextTemplate
from opsd_kernels.train.models import tiny

MIB = 2**20
SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
RUN = {
    "steps": 2,
    "prompts_per_step": 2,
    "group_size": 2,
    "micro_batch": 1,
    "rehearsal_prompts": 1,
    "eval_samples": 2,
    "probe_samples": 2,
}


class Resident:
    """Resident memory of the process above its start, in MiB; peaks of a phase are sampled every 3 ms."""

    def __init__(self) -> None:
        self.start, self.peak, self.peaks = 0.0, 0.0, {}
        self.start = self.now()
        threading.Thread(target=self._watch, daemon=True).start()

    def now(self) -> float:
        """Return the resident memory above the start."""
        return (
            int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB
            - self.start
        )

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.003)

    def during(self, phase: str, function: Any) -> Any:
        """Return `function` with its peak and the memory after it recorded under `phase`."""

        def watched(*arguments: Any, **options: Any) -> Any:
            self.peak = 0.0
            result = function(*arguments, **options)
            self.peaks[phase] = max(self.peaks.get(phase, 0.0), self.peak)
            self.peaks[f"after {phase}"] = self.now()
            return result

        return watched


def held(run: loop.Run) -> dict[str, float]:
    """Return MiB of the state's tensors on this rank."""

    def size(tensors: Any) -> float:
        return (
            sum(
                local.numel() * local.element_size()
                for local in (t.to_local() if hasattr(t, "to_local") else t for t in tensors)
            )
            / MIB
        )

    state = run.state
    moments = [
        value for entry in state.optimizer.state.values() for name, value in entry.items() if name != "step"
    ]
    copies = [weight for teacher in (state.teacher, state.reference) for weight in teacher.model.parameters()]
    return {
        "weights": size(state.model.parameters()),
        "moments": size(moments),
        "teacher and reference": size(copies),
    }


def make_inputs(folder: Path) -> dict[str, str]:
    """Write a Llama of 34 million random weights and a dozen questions, the same on every rank."""
    tokenizer = tiny.build_tokenizer((*"0123456789+-*", "right", "wrong"), ContextTemplate())
    ends = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, **ends), dtype=torch.float32).save_pretrained(
        folder / "model"
    )
    tokenizer.save_pretrained(folder / "model")
    splits = ["train"] * 8 + ["held_out"] * 2 + ["rehearsal"] * 2
    rows = [
        {"prompt": f"{i} + {7 * i}", "answer": str(8 * i), "feedback": f"wrong {8 * i}", "split": split}
        for i, split in enumerate(splits, 10)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "env": "jsonl",
        "feedback": "text",
        "model": str(folder / "model"),
        "data": str(folder / "rows.jsonl"),
    }


def main(shard: str = "none") -> None:
    """Train two steps, and print this rank's memory."""
    with tempfile.TemporaryDirectory() as name:
        config = TrainConfig(**RUN, **make_inputs(Path(name)), shard=shard, tensorboard=False)
        resident, state, one_step = Resident(), {}, loop.one_step

        def measured(run: loop.Run) -> dict[str, Any]:
            metrics = one_step(run)
            state.update(held(run))
            return metrics

        loop.one_step = resident.during("step", measured)
        step.optimisation_step = resident.during("update", step.optimisation_step)
        loop.Run.save = resident.during("save", loop.Run.save)
        loop.train(config, Path(name) / "run")
    mib = {name: round(value, 1) for name, value in (state | resident.peaks).items()}
    rank = f"rank {os.environ.get('RANK', 0)} of {os.environ.get('WORLD_SIZE', 1)}"
    print(f"{rank}, shard={shard}, MiB:", json.dumps(mib), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
