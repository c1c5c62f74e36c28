"""Where the time of a training step of a language model goes, with prompts that run once and without.

    python benchmarks/step_time.py [--steps 2] [--rounds 2] [--json FILE] [--against CHECKOUT] [key=value ...]

SmolLM2-135M, two problems of env=python with eight answers of at most 48 tokens. Both sides make the same
steps in turns, each in a process of its own: `before` with share_prompts=false, `after` with the defaults.
In fp32 the rollouts must be equal, and the losses to 1e-5. `--against` runs `before` from another checkout.
Wall time and processor time of a step by part, medians over steps and rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from trainer_overhead import Parts

from opsd_kernels.train import loop, objective, teacher
from opsd_kernels.train.config import load_config
from opsd_kernels.train.sampling.rollout import Sampler

HERE = Path(__file__).resolve().parents[1]
SETTINGS = (
    "env=python", "prompts_per_step=2", "group_size=8", "max_new_tokens=48", "rollout_temperature=1.0",
    "micro_batch=16", "teacher=ema", "dtype=float32", "eval_samples=1", "probe_samples=1",
    "eval_every=1000000", "checkpoint_every=1000000", "tensorboard=false", "seed=3",
)  # fmt: skip
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
ALLOWED = 1e-5


def parts() -> list[tuple[Any, str, Any]]:
    """Return (owner, attribute, part) of the calls that are timed; "the rest" is the step's own."""
    return [
        (Sampler, "sample", "sampling"),
        (Sampler, "_verified", "verifying"),
        (objective, "hidden_states", lambda: "student trunk" if torch.is_grad_enabled() else "teacher trunk"),
        (objective, "linear_divergence", "loss head"),
        (torch.Tensor, "backward", "backward"),
        (torch.nn.utils, "clip_grad_norm_", "optimiser"),
        (torch.optim.AdamW, "step", "optimiser"),
        (teacher.Copy, "update", "teacher update"),
    ]


def measured(settings: list[str]) -> list[dict[str, Any]]:
    """Train, and return for each step its loss, its answers and its seconds by clock and part."""
    found: list[dict[str, Any]] = []
    clocks = {name: Parts(clock) for name, clock in CLOCKS.items()}
    one_step, batch_of_step = loop.one_step, loop.batch_of_step

    def step(run: loop.Run) -> Any:
        found.append({})
        for each in clocks.values():
            each.seconds.clear()
        with clocks["wall"].part("the rest"), clocks["processor"].part("the rest"):
            metrics = one_step(run)
        found[-1] |= {"loss": metrics["loss"], "tokens": metrics["completion_tokens"]}
        found[-1] |= {name: dict(each.seconds) for name, each in clocks.items()}
        return metrics

    def batch(config: Any, sampler: Any, rollouts: Any, contexts: Any) -> Any:
        found[-1]["answers"] = [list(rollout.tokens) for rollout in rollouts]
        return batch_of_step(config, sampler, rollouts, contexts)

    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        for owner, name, part in parts():
            inner = clocks["processor"].timed(part, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, clocks["wall"].timed(part, inner)))
        # The accuracies before and after take longer than the steps.
        for name in ("measure", "finish"):
            stack.enter_context(mock.patch.object(loop, name, lambda *_: {}))
        stack.enter_context(mock.patch.object(loop, "one_step", step))
        stack.enter_context(mock.patch.object(loop, "batch_of_step", batch))
        loop.train(load_config(None, settings), Path(folder) / "run")
    return found


def in_process(settings: list[str], checkout: Path) -> list[dict[str, Any]]:
    """Return `measured` of a process that imports the package from a checkout."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", *settings],
        env={**os.environ, "PYTHONPATH": str(checkout)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def check(before: list[dict[str, Any]], after: list[dict[str, Any]], exact: bool) -> float:
    """Return the largest difference of a loss; raises SystemExit if rollouts or losses differ."""
    for number, (one, other) in enumerate(zip(before, after, strict=True), 1):
        if exact and one["answers"] != other["answers"]:
            raise SystemExit(f"step {number}: expected equal answers of both sides")
    error = max(abs(a["loss"] - b["loss"]) for a, b in zip(before, after, strict=True))
    if exact and error > ALLOWED:
        raise SystemExit(f"expected losses equal to {ALLOWED}, got a difference of {error:.2g}")
    return error


def summary(sides: dict[str, list[list[dict[str, Any]]]]) -> dict[str, Any]:
    """Return by clock and part the median seconds of a step, before and after, and the median ratio."""
    result: dict[str, Any] = {}
    for clock in CLOCKS:
        steps = {side: [step[clock] for run in runs for step in run] for side, runs in sides.items()}
        names = list(dict.fromkeys(name for each in steps.values() for step in each for name in step))
        result[clock] = {
            name: {
                side: statistics.median(step.get(name, 0.0) for step in each) for side, each in steps.items()
            }
            for name in names
        }
        whole = {side: [sum(step.values()) for step in each] for side, each in steps.items()}
        ratios = [one / other for one, other in zip(whole["before"], whole["after"], strict=True)]
        result[clock]["a step"] = {side: statistics.median(each) for side, each in whole.items()}
        result[clock]["ratio"] = {"median": statistics.median(ratios), "least": min(ratios)}
    return result


def show(result: dict[str, Any]) -> None:
    """Print a table by part."""
    from opsd_kernels.terminal import console, new_table

    found, columns = result["seconds"], [(clock, side) for clock in CLOCKS for side in ("before", "after")]
    table = new_table("seconds a step", "part", *(f"{clock}, {side}" for clock, side in columns))
    wall = {name: each["before"] for name, each in found["wall"].items() if name != "ratio"}
    for name in sorted(wall, key=lambda name: (name == "a step", -wall[name])):
        table.add_row(name, *(f"{found[clock][name][side]:.2f}" for clock, side in columns))
    console.print(table)
    for clock in CLOCKS:
        ratio = found[clock]["ratio"]
        console.print(f"{clock} time: {ratio['median']:.2f} times as fast, {ratio['least']:.2f} at least")
    console.print(
        f"{result['tokens']} tokens of {result['answers']} answers in the last step; losses differ by "
        f"{result['loss_difference']:.1e} at most"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of the trainer, on both sides")
    parser.add_argument("--steps", type=int, default=2, help="of a run; the first counts only alone")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--against", type=Path, default=HERE, help="a checkout to run `before` from")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measured(arguments.settings)))
        return
    from opsd_kernels import report_json
    from opsd_kernels.bench.report.results import script_report

    settings = [*SETTINGS, f"steps={arguments.steps}", *arguments.settings]
    exact = load_config(None, settings).dtype == "float32"
    sides: dict[str, list[Any]] = {"before": [], "after": []}
    error = 0.0
    for _ in range(arguments.rounds):
        before = in_process([*settings, "share_prompts=false"], arguments.against.resolve())
        after = in_process(settings, HERE)
        error = max(error, check(before, after, exact))
        sides["before"].append(before[1:] or before)
        sides["after"].append(after[1:] or after)
    last = sides["after"][-1][-1]
    result = {
        **script_report("step_time", "step_time.py"),
        "settings": settings,
        "seconds": summary(sides),
        "loss_difference": error,
        "tokens": last["tokens"],
        "answers": len(last["answers"]),
    }
    show(result)
    if arguments.json is not None:
        arguments.json.write_text(report_json.dumps(result))


if __name__ == "__main__":
    main()
