"""TRL's trainers with their loss and with ours: time of loss and gradients, and peak memory, at the vocabulary of Qwen2.5.

    python benchmarks/trl_steps.py [--rounds 3] [--tokens 64] [--dtype float32 --dtype bfloat16] [--json FILE]

Each row is one process that holds both trainers and steps them in turn on one batch, so that what else the machine does falls on both; peaks are those of
a process each. A step is compute_loss and backward: sampling and the optimiser are TRL's in either case. The loss is compared with TRL's own in fp32 on the
same weights: ours gets no number if it is off.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from opsd_kernels.bench.results import PACKAGES
from opsd_kernels.provenance import describe_machine, git_commit, package_version
from opsd_kernels.terminal import console, new_table
from opsd_kernels.testing import TARGETS, peak_bytes

V, HIDDEN, SEQUENCES, PROMPT = 151_936, 256, 4, 32
NAMES = ("DistillationTrainer", "SDPOTrainer", "IWOPDTrainer")
WHAT = {
    "DistillationTrainer": "JSD, beta 0.5",
    "SDPOTrainer": "top-20 with tail, alpha 0.5, importance clip",
    "IWOPDTrainer": "sampled tokens, prefix weights",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "DistillationTrainer": {"beta": 0.5},
    "SDPOTrainer": {"teacher_model_kind": "live", "distillation_mode": "topk_logits", "distillation_topk": 20, "distillation_add_tail": True,
                    "distillation_alpha": 0.5, "num_generations": SEQUENCES},
    "IWOPDTrainer": {"max_length": 1024},
}  # fmt: skip


def model(seed: int, dtype: str, folder: str) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": HIDDEN, "intermediate_size": 4 * HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    made = Qwen2ForCausalLM(Qwen2Config(vocab_size=V, initializer_range=0.1, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, **shape))
    made.config._name_or_path = folder  # where IWOPDTrainer looks for the teacher's tokenizer
    return made.to(getattr(torch, dtype))


def tokenizer(folder: str) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left")
    made.save_pretrained(folder)
    return made


def trainer(name: str, side: str, dtype: str, folder: str) -> Any:
    """TRL's or ours, with a student and a teacher of their own heads."""
    warnings.simplefilter("ignore")
    import trl
    from datasets import Dataset
    from trl.experimental import iw_opd, sdpo

    from opsd_kernels.integrations import trl as fused

    theirs = {"DistillationTrainer": trl.DistillationTrainer, "SDPOTrainer": sdpo.SDPOTrainer, "IWOPDTrainer": iw_opd.IWOPDTrainer}
    config = {"DistillationTrainer": trl.DistillationConfig, "SDPOTrainer": sdpo.SDPOConfig, "IWOPDTrainer": iw_opd.IWOPDConfig}[name]
    common = {"output_dir": folder, "per_device_train_batch_size": SEQUENCES, "bf16": False, "use_cpu": True, "report_to": [], "gradient_checkpointing": False}
    words, student, teacher = tokenizer(folder), model(0, dtype, folder), model(1, dtype, folder)
    others = (lambda completions, **_: [0.0] * len(completions),) if name == "SDPOTrainer" else (teacher,)
    data = Dataset.from_dict({"prompt": ["a"] * 8})
    made = (theirs[name] if side == "trl" else getattr(fused, name))(
        student, *others, config(**common, **SETTINGS[name]), train_dataset=data, processing_class=words
    )
    made.teacher_model, made.current_gradient_accumulation_steps = teacher, 1
    return made


def batch(name: str, tokens: int) -> dict[str, Any]:
    """SEQUENCES completions of `tokens`, a half, three quarters and all of them long in turn."""
    gen = torch.Generator().manual_seed(0)
    lengths = torch.tensor([tokens, tokens // 2, 3 * tokens // 4, tokens])[:, None]
    mask, asked = (torch.arange(tokens) < lengths).long(), torch.ones(SEQUENCES, PROMPT, dtype=torch.int64)
    prompt, completion = (torch.randint(3, V, (SEQUENCES, width), generator=gen) for width in (PROMPT, tokens))
    if name == "IWOPDTrainer":
        labels = torch.cat([torch.full_like(prompt, -100), torch.where(mask == 1, completion, -100)], 1)
        return {"input_ids": torch.cat([prompt, completion], 1), "attention_mask": torch.cat([asked, mask], 1), "labels": labels}
    made: dict[str, Any] = {"prompt_ids": prompt, "prompt_mask": asked, "completion_ids": completion, "completion_mask": mask}
    made |= {"teacher_input_ids": torch.cat([prompt, prompt, completion], 1), "teacher_attention_mask": torch.cat([asked, asked, mask], 1)}
    return {**made, "advantages": torch.zeros(SEQUENCES), "old_per_token_logps": -12 - torch.rand(completion.shape, generator=gen)}


def stepper(made: Any, inputs: dict[str, Any]) -> Callable[[], torch.Tensor]:
    def step() -> torch.Tensor:
        made.model.train().zero_grad(set_to_none=True)
        loss = made.compute_loss(made.model, inputs)
        loss.backward()
        return loss.detach()

    return step


def make(name: str, side: str, dtype: str, tokens: int) -> Callable[[], torch.Tensor]:
    """The call that `testing.peak_bytes` measures: gradients of all parameters included, models not."""
    made = trainer(name, side, dtype, tempfile.mkdtemp())
    stepper(made, batch(name, 4))()
    made.model.zero_grad(set_to_none=True)
    return stepper(made, batch(name, tokens))


def true_loss(name: str, dtype: str, tokens: int, folder: str) -> float:
    """TRL's, in fp32, of the weights as `dtype` has them."""
    made = trainer(name, "trl", dtype, folder)
    made.model.float(), made.teacher_model.float()
    with torch.no_grad():
        loss = made.compute_loss(made.model.train(), batch(name, tokens)).item()
    assert math.isfinite(loss)
    return loss


def times(name: str, dtype: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Milliseconds, wall and CPU, of both in turn."""
    with tempfile.TemporaryDirectory() as folder:
        sides = {side: stepper(trainer(name, side, dtype, folder), batch(name, tokens)) for side in ("trl", "opsd")}
        losses = {side: step().double().item() for side, step in sides.items()}
        true = losses["trl"] if dtype == "float32" else true_loss(name, dtype, tokens, folder)
        errors = {side: abs(loss - true) / abs(true) for side, loss in losses.items()}
        if not errors["opsd"] <= TARGETS["default"]:
            raise SystemExit(f"{name}, {dtype}: the loss is {losses['opsd']}, TRL's in fp32 {true}: {errors['opsd']:.2%} apart")
        taken: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side, step in sides.items():
                wall, cpu = time.perf_counter(), time.process_time()
                step()
                taken[side].append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)))
    row: dict[str, Any] = {"losses": losses, "loss_errors": errors}
    for index, clock in enumerate(("wall", "cpu")):
        row |= {f"{side}_{clock}_ms": statistics.median(pair[index] for pair in taken[side]) for side in sides}
        row[f"{clock}_ratios"] = [theirs[index] / ours[index] for theirs, ours in zip(taken["trl"], taken["opsd"], strict=True)]
        row[f"{clock}_ratio"] = statistics.median(row[f"{clock}_ratios"])
    return row


def measure(name: str, dtype: str, tokens: int, rounds: int, threads: int) -> dict[str, Any]:
    load = os.getloadavg()[0]
    program = [sys.executable, __file__, "--row", name, dtype, str(tokens), str(rounds), str(threads)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("ROW")), None)
    if line is None:
        raise SystemExit(f"{name}, {dtype}: {done.stderr.strip()[-2000:]}")
    peaks = {f"{side}_peak_bytes": peak_bytes("from trl_steps import make", name, side, dtype, tokens, threads=threads) for side in ("trl", "opsd")}
    row = {"trainer": name, "loss": WHAT[name], "dtype": dtype, "load": [load, os.getloadavg()[0]], **json.loads(line[3:]), **peaks}
    return {**row, "peak_ratio": row["trl_peak_bytes"] / row["opsd_peak_bytes"]}


def show(rows: list[dict[str, Any]]) -> None:
    table = new_table("loss and gradients", "", "dtype", "TRL ms", "ours ms", "ratio", "CPU ratio", "TRL MiB", "ours MiB", "ratio", "load")
    for row in rows:
        clocks = (f"{row['trl_wall_ms']:.0f}", f"{row['opsd_wall_ms']:.0f}", f"{row['wall_ratio']:.2f}", f"{row['cpu_ratio']:.2f}")
        peaks = (f"{row['trl_peak_bytes'] / 2**20:.0f}", f"{row['opsd_peak_bytes'] / 2**20:.0f}", f"{row['peak_ratio']:.2f}")
        table.add_row(row["trainer"].removesuffix("Trainer"), row["dtype"], *clocks, *peaks, " - ".join(f"{load:.1f}" for load in row["load"]))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="of the longest completion")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--row", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row is not None:
        name, dtype, tokens, rounds, threads = arguments.row
        torch.set_num_threads(int(threads))
        print("ROW" + json.dumps(times(name, dtype, int(tokens), int(rounds))))
        return
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {
        "kind": "trl_steps",
        "machine": describe_machine("cpu"),
        "versions": {package: package_version(package) for package in PACKAGES},
        "commit": git_commit(),
        "command": shlex.join(["python", "benchmarks/trl_steps.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "shape": {"V": V, "H": HIDDEN, "sequences": SEQUENCES, "prompt": PROMPT, "completion": arguments.tokens, "rounds": arguments.rounds},
    }
    dtypes = arguments.dtype or ["float32", "bfloat16"]
    result["rows"] = []
    for name, dtype in ((name, dtype) for dtype in dtypes for name in NAMES):
        result["rows"].append(measure(name, dtype, arguments.tokens, arguments.rounds, arguments.threads))
        if arguments.json is not None:  # after each row: a run may be cut short
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    show(result["rows"])


if __name__ == "__main__":
    main()
