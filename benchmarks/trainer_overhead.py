"""Overhead of a training step beside the model, and the same job in TRL's SDPOTrainer.

    python benchmarks/trainer_overhead.py [--steps 60] [--rounds 3] [--json FILE]

The model's work is generate (with transformers' own host work), both forward passes, the loss op, backward,
the optimiser and the teacher's average; everything else is overhead. Settings are the defaults of `opsd
train`, without the probes of every 50 steps, which train nothing. The base model is trained first if it is
not cached.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import GenerationMixin, PrinterCallback, TrainerCallback

from opsd_kernels import report_json
from opsd_kernels.bench.report.results import script_report
from opsd_kernels.terminal import console, new_table
from opsd_kernels.train import loop, objective, teacher
from opsd_kernels.train import step as steps
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.contexts import ContextTemplate
from opsd_kernels.train.envs import make_task
from opsd_kernels.train.models import warmstart
from opsd_kernels.train.records import log
from opsd_kernels.train.sampling import rollout

WARM = 10  # steps before the clock starts: allocations, caches of encoded prompts
MODEL = (
    "generate",
    "student forward",
    "teacher forward",
    "loss op",
    "backward",
    "optimiser",
    "teacher update",
)
Name = str | Callable[[], str]
Clock = Callable[[], float]


class Parts:
    """Time by part, without the parts nested in it.

    Other load on the machine stretches wall time and, much less, CPU time.
    """

    def __init__(self, clock: Clock) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._clock, self._open, self._since = clock, [], 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside as `name`."""
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def _switch(self) -> None:
        now = self._clock()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def timed(self, name: Name, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with its time counted as `name`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name() if callable(name) else name):
                return function(*args, **kwargs)

        return call


def places() -> list[tuple[Any, str, Name]]:
    """Return (owner, attribute, part) of every call that is timed; the remaining time is the loop's own."""
    return [
        (GenerationMixin, "generate", "generate"),
        (
            objective,
            "hidden_states",
            lambda: "student forward" if torch.is_grad_enabled() else "teacher forward",
        ),
        (objective, "linear_divergence", "loss op"),
        (torch.Tensor, "backward", "backward"),
        (torch.nn.utils, "clip_grad_norm_", "optimiser"),
        (torch.optim.AdamW, "step", "optimiser"),
        (torch.optim.AdamW, "zero_grad", "optimiser"),
        (teacher.Copy, "update", "teacher update"),
        (loop, "prompts_of_step", "prompts"),
        (rollout.Sampler, "sample", "around generate"),
        (rollout.Sampler, "_verified", "verify"),
        (loop, "build_contexts", "contexts"),
        (loop, "batch_of_step", "batch"),
        (loop, "rehearse", "batch"),
        (steps, "optimisation_step", "step's own"),
        (steps, "rollout_metrics", "metrics"),
        (steps, "update_metrics", "metrics"),
        (steps, "reading_metrics", "metrics"),
        (loop, "sample_lines", "samples.jsonl"),
        (log.MetricsLog, "write", "metrics.jsonl"),
        (log.Scalars, "write", "TensorBoard"),
        (log.PlainBar, "update", "progress"),
        (loop.Run, "save", "checkpoint"),
        (loop, "run_steps", "loop's own"),
    ]


def settings(count: int, **changes: Any) -> TrainConfig:
    """Return the settings of a run with `count` measured steps."""
    return TrainConfig(**{"steps": WARM + count, "eval_every": 10**6, "eval_samples": 64, **changes})


def ours(config: TrainConfig, clock: Clock, parts: Parts | None = None) -> list[float]:
    """Return milliseconds of each step after the first WARM, from the end of one step to the end of the next.

    Fills `parts`, if given.
    """
    ends: list[float] = []
    update = log.PlainBar.update

    def ended(bar: Any, done: int, **values: Any) -> None:
        update(bar, done, **values)
        ends.append(clock())
        if done == WARM and parts is not None:
            parts.seconds.clear()

    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        stack.enter_context(mock.patch.object(log.PlainBar, "update", ended))
        for owner, name, part in places() if parts is not None else ():
            stack.enter_context(mock.patch.object(owner, name, parts.timed(part, getattr(owner, name))))
        loop.train(config, Path(folder) / "run")
    return [
        1e3 * (b - a)
        for a, b in zip(ends[-(config.steps - WARM) - 1 :], ends[-(config.steps - WARM) :], strict=False)
    ]


def shares(rounds: int, count: int, clock: Clock) -> dict[str, Any]:
    """Return milliseconds per step by part, and the share of parts outside MODEL: medians over rounds."""
    tables = []
    for _ in range(rounds):
        parts = Parts(clock)
        ours(settings(count), clock, parts)
        tables.append({name: 1e3 * seconds / count for name, seconds in parts.seconds.items()})
    outside = [
        sum(ms for name, ms in each.items() if name not in MODEL) / sum(each.values()) for each in tables
    ]
    names = sorted(tables[0], key=lambda name: (name not in MODEL, -tables[0][name]))
    medians = {name: statistics.median(each[name] for each in tables) for name in names}
    return {"parts_ms": medians, "overhead_share": statistics.median(outside), "rounds": outside}


class Ends(TrainerCallback):
    """Records the end of each step of TRL's trainer."""

    def __init__(self, clock: Clock) -> None:
        self.at, self.clock = [], clock

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.at.append(self.clock())


def theirs(config: TrainConfig, base: Path, clock: Clock) -> list[float]:
    """Return milliseconds of each step of the same job in SDPOTrainer.

    It has the same model, prompts and answers per step, both contexts, full-vocabulary reverse KL, EMA
    teacher, AdamW.
    """
    from datasets import Dataset
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    task, ends = make_task(config), Ends(clock)
    problems = list(task.train)[: config.steps * config.prompts_per_step]
    rows = {
        "prompt": [[{"role": "user", "content": task.env(problem, 0).prompt().text}] for problem in problems],
        "privileged_context": [task.solution(problem) for problem in problems],
        "problem": problems,
    }

    def reward(completions: list[Any], problem: list[int], **_: Any) -> list[float]:
        return [
            task.env(p, 0).verify(answer[0]["content"]).reward
            for answer, p in zip(completions, problem, strict=True)
        ]

    with tempfile.TemporaryDirectory() as folder:
        arguments = SDPOConfig(output_dir=folder, **trl_settings(config, task.template))
        trainer = SDPOTrainer(str(base), reward, arguments, Dataset.from_dict(rows), callbacks=[ends])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [1e3 * (b - a) for a, b in zip(ends.at[WARM - 1 : -1], ends.at[WARM:], strict=True)]


def trl_settings(config: TrainConfig, template: ContextTemplate) -> dict[str, Any]:
    """Return the arguments of SDPOConfig that match `config`."""
    demonstration, feedback = ("\n{" + name + "}" for name in ("successful_previous_attempt", "feedback_raw"))
    return {
        "max_steps": config.steps,
        "per_device_train_batch_size": config.prompts_per_step * config.group_size,
        "num_generations": config.group_size,
        "max_completion_length": config.max_new_tokens,
        "temperature": config.rollout_temperature,
        "distillation_mode": "full_logits",
        "distillation_alpha": 1.0,  # reverse KL
        "teacher_model_kind": "ema",
        "teacher_update_rate": config.teacher_rate,
        "include_environment_feedback": True,
        # Our text blocks, so that the teacher reads as many tokens.
        "solution_template": demonstration.join(template.demonstration),
        "feedback_template": feedback.join(template.feedback),
        "reprompt_template": "{prompt}{solution}{feedback}\n" + template.instruction,
        "learning_rate": config.learning_rate,
        "warmup_steps": config.lr_warmup_steps,
        "lr_scheduler_type": "constant_with_warmup",
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        # No recomputation, mixed precision, trackers, checkpoints or progress bars.
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def against_trl(rounds: int, count: int, clock: Clock) -> dict[str, Any]:
    """Time a step of ours and of SDPOTrainer in turn; medians over the rounds.

    Without rehearsal, which SDPOTrainer lacks, and with its loss, a mean over sequences.
    """
    config = settings(count, rehearsal_prompts=0, reduction="sequence_mean")
    base = warmstart.base_model(config, make_task(config), log.Progress())
    times: dict[str, list[float]] = {"opsd": [], "trl": []}
    for _ in range(rounds):
        times["opsd"].append(statistics.median(ours(config, clock)))
        torch.set_num_threads(config.threads)
        times["trl"].append(statistics.median(theirs(config, base, clock)))
    ratios = [b / a for a, b in zip(times["opsd"], times["trl"], strict=True)]
    medians = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
    return {**medians, "ratio": statistics.median(ratios), "rounds": ratios}


def show(result: dict[str, Any]) -> None:
    """Print the parts of a step, and the comparison with SDPOTrainer."""
    table = new_table("milliseconds a step", "part", "ms", "share")
    whole = sum(result["parts"]["parts_ms"].values())
    for name, ms in result["parts"]["parts_ms"].items():
        table.add_row(name if name in MODEL else f"  {name}", f"{ms:.2f}", f"{ms / whole:.1%}")
    console.print(table)
    console.print(f"overhead: {result['parts']['overhead_share']:.1%} of a step of {whole:.0f} ms")
    if "sdpo_trainer" in result:
        peer = result["sdpo_trainer"]
        console.print(
            f"a step of the same job: opsd {peer['opsd_ms']:.0f} ms, SDPOTrainer {peer['trl_ms']:.0f} ms, "
            f"ratio {peer['ratio']:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="number of measured steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parts-only", action="store_true", help="without TRL")
    parser.add_argument("--cpu-time", action="store_true", help="for a machine that does other work")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    torch.set_num_threads(TrainConfig.threads)
    result: dict[str, Any] = {
        **script_report("trainer_overhead", "trainer_overhead.py"),
        "config": dataclasses.asdict(settings(arguments.steps)),
        "clock": "CPU time of the process" if arguments.cpu_time else "wall",
        "parts": shares(arguments.rounds, arguments.steps, clock),
    }
    if not arguments.parts_only:
        result["sdpo_trainer"] = against_trl(arguments.rounds, arguments.steps, clock)
    show(result)
    if arguments.json is not None:
        arguments.json.write_text(report_json.dumps(result))


if __name__ == "__main__":
    main()
