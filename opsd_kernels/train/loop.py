"""The whole story of a run, top to bottom.

Deliberate simplifications: one process; every rollout is used for one update, so no importance ratio; the learning rate is constant after its
warm-up; the teacher's forward runs in the same micro-batches as the student's; no mixed precision beyond the dtype of the weights.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from opsd_kernels.train import checkpoint, evaluate, models, report, seeds, warmstart
from opsd_kernels.train import step as steps
from opsd_kernels.train.batch import make_batch
from opsd_kernels.train.checkpoint import RunState
from opsd_kernels.train.config import TrainConfig, load_config
from opsd_kernels.train.contexts import build_contexts
from opsd_kernels.train.durable import remove_pending, write_file
from opsd_kernels.train.envs import make_task
from opsd_kernels.train.envs.base import Task
from opsd_kernels.train.log import MetricsLog, Progress, Scalars, read_metrics
from opsd_kernels.train.prompts import PromptEncoder
from opsd_kernels.train.rollout import Sampler, requests
from opsd_kernels.train.teacher import Teacher
from opsd_kernels.train.types import NonFiniteLoss, Prompt, RunDirectoryError, StepMetrics, TrainingInterrupted

PROMPTS, CONTEXTS, ROLLOUTS = 11, 12, 13  # streams of random numbers


def train(config: TrainConfig, out: Path, resume: bool = False) -> dict[str, Any]:
    """Trains, or continues the run in `out`; returns what summary.json holds.

    Raises RunDirectoryError (a FileExistsError) if `out` holds another run, FileNotFoundError if there is nothing to resume, TrainingInterrupted
    (a KeyboardInterrupt) on Ctrl-C, NonFiniteLoss on a loss that is inf or NaN (a checkpoint lies in `out` then), and ConfigError for a model or a
    device that is not there.
    """
    out, progress = Path(out), Progress()
    models.check_machine(config)
    open_run_directory(config, out, resume)
    if (out / "summary.json").exists():
        progress.say(f"{out}: this run is complete")
        return json.loads((out / "summary.json").read_text())
    with reproducible(config):
        try:
            run = prepare(config, out, progress)
        except KeyboardInterrupt:
            raise TrainingInterrupted("stopped before a step was made; --resume continues") from None
        try:
            run_steps(run)
            return finish(run)
        finally:
            run.close()


@dataclass
class Run:
    """A run in progress: what is fixed, and the state that every step changes."""

    config: TrainConfig
    out: Path
    progress: Progress
    task: Task
    sampler: Sampler
    state: RunState
    log: MetricsLog
    scalars: Scalars
    started: float  # clock at which this process began, less the seconds that earlier ones spent

    def save(self) -> None:
        self.state.facts["seconds"] = time.monotonic() - self.started
        checkpoint.save(self.out / "checkpoint", self.state, self.log.sync())

    def close(self) -> None:
        self.log.close()
        self.scalars.close()


def prepare(config: TrainConfig, out: Path, progress: Progress) -> Run:
    """The state of the newest checkpoint, or a new one: base model, teacher, optimiser, and the measurements before training."""
    started = time.monotonic()
    task = make_task(config)
    saved = checkpoint.latest(out / "checkpoint")
    source = saved or (warmstart.base_model(config, task, progress) if config.model == "tiny" else config.model)
    model, tokenizer = models.load_pretrained(source, config)
    teacher = Teacher(model, config.teacher_rate if config.teacher == "ema" else 0.0)
    state = RunState(model, tokenizer, teacher, steps.make_optimizer(model, config), 0, {})
    sampler = Sampler(PromptEncoder(tokenizer, task.template), config.max_new_tokens, config.rollout_temperature, config.rollout_batch)
    offset = 0
    if saved is not None:
        offset = checkpoint.restore(saved, state)
        started -= state.facts["seconds"]
        progress.say(f"resuming after step {state.step} of {config.steps}")
    log = MetricsLog(out / "metrics.jsonl", offset)
    run = Run(config, out, progress, task, sampler, state, log, Scalars(out / "tensorboard", config.tensorboard, state.step), started)
    if saved is None:
        # The gap between the two first numbers predicts what training will bring (arXiv:2605.30070).
        state.facts |= {f"{name}_before": value for name, value in measure(run, config.eval_samples).items()}
        progress.say("before: " + ", ".join(f"{name.replace('_', ' ')} {value:.1%}" for name, value in measured(state.facts, "_before").items()))
        run.save()
    return run


def run_steps(run: Run) -> None:
    """Steps until the last one, with a checkpoint now and then, and one on the way out."""
    config, state = run.config, run.state
    with graceful_interrupt(run.progress) as interrupted, run.progress.bar("train", config.steps, state.step) as bar:
        while state.step < config.steps:
            try:
                metrics = one_step(run)
            except NonFiniteLoss as error:
                run.save()
                raise NonFiniteLoss(f"{error}. The state before this step is saved in {run.out / 'checkpoint'}") from None
            run.log.write(metrics)
            run.scalars.write(metrics)
            state.step += 1
            shown = {"reward": metrics["reward"], "divergence": metrics["divergence"], "gap": metrics["sampled_logprob_gap"]}
            bar.update(state.step, **shown, tokens_per_second=metrics["tokens_per_second"])
            # After the log, so that the checkpoint's offset covers the line of this step.
            if state.step % config.checkpoint_every == 0 or state.step == config.steps or interrupted.is_set():
                run.save()
            if interrupted.is_set() and state.step < config.steps:
                raise TrainingInterrupted(f"stopped after step {state.step} of {config.steps}; the state is saved, --resume continues")


def one_step(run: Run) -> StepMetrics:
    """Sample, verify, give the teacher its contexts, distil; returns the line of metrics.jsonl."""
    began = time.monotonic()
    config, state, number = run.config, run.state, run.state.step + 1
    # The student answers, the world judges; the teacher's view of each answer follows from the judgement.
    rollouts = run.sampler.sample(state.model, run.task, requests(prompts_of_step(run), config.group_size), config.seed, ROLLOUTS, state.step)
    contexts = build_contexts(rollouts, config.siblings, config.seed, CONTEXTS, state.step)

    # Both sides score the student's own tokens; the teacher with its context in front of them.
    chosen = [(rollout, context) for rollout, context in zip(rollouts, contexts, strict=True) if context is not None]
    batch = update = None
    if chosen:
        views = run.sampler.encoder.encode([rollout.prompt for rollout, _ in chosen], [context for _, context in chosen])
        batch = make_batch([rollout for rollout, _ in chosen], views, run.sampler.pad_token, config.device)
        update = steps.optimisation_step(state.model, state.teacher, state.optimizer, batch, config, number)

    metrics = {"step": number, **steps.rollout_metrics(rollouts, contexts), **steps.update_metrics(update, batch)}
    metrics["learning_rate"] = steps.learning_rate(config, number)
    seconds = time.monotonic() - began
    # Only these two may differ between a run and its repetition.
    metrics |= {"seconds": seconds, "tokens_per_second": metrics["completion_tokens"] / seconds}
    if torch.cuda.is_initialized():
        metrics["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    if number % config.eval_every == 0 and number < config.steps:
        metrics |= measure(run, config.probe_samples)
    return metrics


def prompts_of_step(run: Run) -> list[Prompt]:
    """The next prompts of an endless walk through the training problems, shuffled anew in every epoch."""
    count, problems = run.config.prompts_per_step, run.task.train
    places = range(run.state.step * count, (run.state.step + 1) * count)
    epochs = {epoch: seeds.shuffled(problems, run.config.seed, PROMPTS, epoch) for epoch in {place // len(problems) for place in places}}
    return [run.task.env(epochs[place // len(problems)][place % len(problems)], 0).prompt() for place in places]


def measure(run: Run, samples: int) -> dict[str, float]:
    """Accuracy of the student and of its teacher on held-out problems, and the skill that the run does not practise."""
    state, task, seed = run.state, run.task, run.config.seed
    return {
        "held_out_accuracy": evaluate.accuracy(run.sampler, state.model, task, task.held_out, samples, seed),
        "self_teacher_accuracy": evaluate.self_teacher_accuracy(run.sampler, state.model, state.teacher.model, task, run.config, samples),
        "untrained_skill": evaluate.accuracy(run.sampler, state.model, task, task.untrained, samples, seed),
    }


def measured(facts: dict[str, Any], suffix: str) -> dict[str, float]:
    return {name.removesuffix(suffix): value for name, value in facts.items() if name.endswith(suffix)}


def finish(run: Run) -> dict[str, Any]:
    """The measurements after training, summary.json, curves.png and the table."""
    facts = run.state.facts
    after = {f"{name}_after": value for name, value in measure(run, run.config.eval_samples).items()}
    summary = {**facts, **after, "steps": run.state.step, "seconds": time.monotonic() - run.started}
    # summary.json comes last: it marks a run as complete, and a run that was killed here is finished again on resume.
    report.draw_curves(run.out / "curves.png", read_metrics(run.out / "metrics.jsonl"))
    write_file(run.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    report.print_table(run.progress.console, summary, run.out)
    return summary


def open_run_directory(config: TrainConfig, out: Path, resume: bool) -> None:
    """Claims `out` for this configuration, or checks that it was claimed for it."""
    if resume and not out.is_dir():
        raise FileNotFoundError(f"out: expected the directory of a run to resume, got {out}, which does not exist")
    if out.exists() and not out.is_dir():
        raise RunDirectoryError(f"out: expected a directory, got the file {out}")
    if not resume and out.exists() and any(out.iterdir()):
        raise RunDirectoryError(f"out: expected a new or empty directory, got {out}, which is not empty; --resume continues the run in it")
    out.mkdir(parents=True, exist_ok=True)
    remove_pending(out)
    record = out / "config.json"
    if not record.exists():  # killed before it had written anything, or no run at all
        if any(out.iterdir()):
            raise RunDirectoryError(f"out: expected the directory of a run, got {out}, which holds no config.json")
        write_file(record, config.to_json())
    differences = config.differences(load_config(record))
    if differences:
        raise RunDirectoryError(f"out: expected the configuration of the run in {out}, got another one: " + "; ".join(differences))


@contextmanager
def reproducible(config: TrainConfig) -> Iterator[None]:
    """Seeds, threads and deterministic algorithms for the length of a run; the caller's settings come back afterwards."""
    threads, strict, warn = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs a pass over every new tensor
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # one bar for every checkpoint would cut the run's own to pieces
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def graceful_interrupt(progress: Progress) -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, so that a step can end and be saved; the second interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # Python hands signals to the main thread alone
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
