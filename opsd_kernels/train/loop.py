"""Run a training from its configuration to its summary.

Read this file from top to bottom; `one_step` is the method. Deliberate simplifications:

- `updates_per_batch` repeats the whole batch instead of cutting it into parts.
- The learning rate is constant after its warm-up.
- The teacher's forward runs in the same micro-batches as the student's, again for every update of a teacher
  that moves.
- Mixed precision is bf16 weights with fp32 masters; there is no autocast.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opsd_kernels.train import seeds, shared_prompts
from opsd_kernels.train import step as steps
from opsd_kernels.train.batch import advantages, make_batch
from opsd_kernels.train.config import ConfigError, TrainConfig
from opsd_kernels.train.contexts import build_contexts
from opsd_kernels.train.distributed import sharding
from opsd_kernels.train.distributed.ranks import Ranks, joined
from opsd_kernels.train.envs import make_task
from opsd_kernels.train.envs.base import Task
from opsd_kernels.train.models import gguf_file, pretrained, warmstart
from opsd_kernels.train.records import checkpoint, report, report_page
from opsd_kernels.train.records.checkpoint import RunState
from opsd_kernels.train.records.durable import write_file
from opsd_kernels.train.records.log import MetricsLog, Progress, Scalars, offset_after
from opsd_kernels.train.records.samples import sample_lines, samples_due
from opsd_kernels.train.sampling import evaluate
from opsd_kernels.train.sampling.prompts import PromptEncoder
from opsd_kernels.train.sampling.rollout import Sampler, make_engine, requests
from opsd_kernels.train.session import (
    StopRequest,
    open_run_directory,
    peak_memory,
    reproducible,
    stop_signals,
)
from opsd_kernels.train.step import Rehearsal, Trainer
from opsd_kernels.train.task import checked_task
from opsd_kernels.train.teacher import Teacher, make_reference, make_teacher
from opsd_kernels.train.types import (
    Batch,
    Context,
    NonFiniteLoss,
    Prompt,
    Rollout,
    StepMetrics,
    TrainingInterrupted,
)

# Streams of random numbers.
PROMPTS, CONTEXTS, ROLLOUTS, REHEARSAL = 11, 12, 13, 14
# Prompts of each split that are measured before a run; those of a data file are checked one by one.
ROOM_CHECKED = 64


def train(config: TrainConfig, out: Path, resume: bool = False) -> dict[str, Any]:
    """Train, or continue the run in `out`; return the contents of summary.json.

    Raises RunDirectoryError (a FileExistsError) if `out` holds another run, FileNotFoundError if there is
    nothing to resume, TrainingInterrupted (a KeyboardInterrupt) on Ctrl-C and the signals of schedulers,
    NonFiniteLoss if the loss is inf or NaN (`out` holds a checkpoint then), and ConfigError if the model or
    the device does not exist.
    """
    pretrained.check_machine(config)
    # The rows of a run to resume were checked at its start; its record tells if they have changed.
    task, out = (make_task if resume else checked_task)(config), Path(out)
    with (
        joined(config.device, config.collective_timeout) as ranks,
        reproducible(config),
        tempfile.TemporaryDirectory() as scratch,
        stop_signals(progress := Progress() if ranks.first else Progress(Console(quiet=True))) as stop,
    ):
        ranks.on_first(lambda: open_run_directory(config, out, resume, task.fingerprint()))
        if ranks.any((out / "summary.json").exists()):
            progress.say(f"{out}: this run is complete")
            return json.loads((out / "summary.json").read_text())
        try:
            run = prepare(config, task, out, progress, ranks, out if ranks.first else Path(scratch))
        except KeyboardInterrupt as stopped:
            number = getattr(stopped, "number", signal.SIGINT)
            message = "stopped before a step was made; --resume continues"
            raise TrainingInterrupted(message, number) from None
        try:
            run_steps(run, stop)
            return finish(run)
        finally:
            run.close()


@dataclass
class Run:
    """A run in progress: its settings and files, and the state that every step changes."""

    config: TrainConfig
    out: Path
    progress: Progress
    task: Task
    sampler: Sampler
    state: RunState
    log: MetricsLog
    samples: MetricsLog
    scalars: Scalars
    # Clock time at the start of this process, minus the seconds spent by the processes before it.
    started: float
    ranks: Ranks
    told_too_long: bool = False

    def save(self) -> None:
        """Write a checkpoint from rank 0.

        This is a collective call: sharded tensors are gathered on that rank.
        """
        self.ranks.on_first_asking(
            self._write, lambda name: checkpoint.part(self.state, name, self.ranks.first)
        )

    def _write(self, ask: Callable[[str], dict[str, Tensor] | None]) -> None:
        self.state.facts["seconds"] = time.monotonic() - self.started
        self.samples.sync()
        self.scalars.flush()
        checkpoint.save(
            self.out / "checkpoint", self.state, self.log.sync(), self.config.keep_checkpoints, ask
        )

    def close(self) -> None:
        self.log.close()
        self.samples.close()
        self.scalars.close()


def prepare(config: TrainConfig, task: Task, out: Path, progress: Progress, ranks: Ranks, logs: Path) -> Run:
    """Build the state of a run, or restore its newest checkpoint. This rank writes its logs into `logs`.

    A new run measures its accuracies before training and saves its first checkpoint here.
    """
    started = time.monotonic()
    if config.rehearsal_prompts and not task.rehearsal:
        raise ConfigError(
            f"rehearsal_prompts: expected 0, as {config.env} has no problems to rehearse, "
            f"got {config.rehearsal_prompts}"
        )
    saved = ranks.first_then_all(lambda: checkpoint.latest(out / "checkpoint", progress.say))
    model, tokenizer = pretrained.load_student(
        ranks.first_then_all(lambda: base_of(config, task, progress, saved)), saved, config
    )
    vocab = pretrained.vocabulary(tokenizer)
    teacher = make_teacher(
        model,
        config,
        ranks.first_then_all(lambda: external_teacher(config, task, tokenizer, progress)),
        ranks,
    )
    reference = make_reference(model, config, teacher, ranks)
    # After the copies for teacher and reference: a sharded model cannot be copied.
    model = sharding.place(model, config, ranks)
    state = RunState(model, tokenizer, teacher, reference, steps.make_optimizer(model, config), 0, {})
    encoder = PromptEncoder(tokenizer, task.template)
    sampler = Sampler(
        encoder,
        config.max_new_tokens,
        config.rollout_temperature,
        config.rollout_batch,
        vocab,
        make_engine(config),
        ranks,
        pretrained.context_length(model.config, teacher.model.config),
        config.shares_prompts,
    )
    check_room(config, task, sampler)
    if config.shares_prompts:
        for each in (model, teacher.model, *([] if reference is None else [reference.model])):
            shared_prompts.can_share(each)
    offset = 0
    if saved is not None:
        offset = checkpoint.restore(saved, state)
        started -= state.facts["seconds"]
        progress.say(f"resuming after step {state.step} of {config.steps}")
    log = MetricsLog(logs / "metrics.jsonl", offset)
    kept = MetricsLog(logs / "samples.jsonl", offset_after(logs / "samples.jsonl", state.step))
    scalars = Scalars(logs / "tensorboard", config.tensorboard and ranks.first, state.step + 1)
    run = Run(config, out, progress, task, sampler, state, log, kept, scalars, started, ranks)
    if saved is None:
        # The gap between the first two numbers predicts the improvement by training (arXiv:2605.30070).
        state.facts |= {f"{name}_before": value for name, value in measure(run, config.eval_samples).items()}
        known = {name: value for name, value in measured(state.facts, "_before").items() if value is not None}
        progress.say(
            "before: " + ", ".join(f"{name.replace('_', ' ')} {value:.1%}" for name, value in known.items())
        )
        run.save()
    return run


def check_room(config: TrainConfig, task: Task, sampler: Sampler) -> None:
    """Raise ConfigError if answers of `max_new_tokens` do not fit into the context of the models."""
    problems = [*task.train[:ROOM_CHECKED], *task.held_out[:ROOM_CHECKED]]
    views = sampler.encode([(task.env(problem, 0).prompt(), None) for problem in problems])
    longest = max(map(len, views))
    if sampler.longest is not None and longest + config.max_new_tokens > sampler.longest:
        raise ConfigError(
            f"max_new_tokens: expected at most {sampler.longest - longest}, as the model reads "
            f"{sampler.longest} tokens and a prompt has {longest}, got {config.max_new_tokens}"
        )


def base_of(config: TrainConfig, task: Task, progress: Progress, saved: Path | None = None) -> str | Path:
    """Return the path or name of the base model. A checkpoint that holds a whole model needs none."""
    if saved is not None and not config.lora_rank:
        return config.model
    if config.model == "tiny":
        return warmstart.base_model(config, task, progress)
    return gguf_file.located(config.model, config.cache_dir)


def external_teacher(
    config: TrainConfig, task: Task, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> PreTrainedModel | None:
    """Load the external teacher, or return None.

    `tiny` gets the student's warm start, up to `teacher_accuracy`.
    """
    if config.teacher_model is None:
        return None
    source: str | Path = config.teacher_model
    if source == "tiny":
        source = warmstart.base_model(
            dataclasses.replace(config, warm_accuracy=config.teacher_accuracy), task, progress
        )
    model, theirs = pretrained.load_pretrained(source, config, "teacher_model")
    pretrained.check_same_vocabulary(tokenizer, theirs)
    return model


def run_steps(run: Run, stop: StopRequest) -> None:
    """Run the remaining steps, with a checkpoint every `checkpoint_every` steps and one before stopping."""
    config, state = run.config, run.state
    with (
        stop.finishing_steps(),
        run.progress.bar("train", config.steps, state.step) as bar,
    ):
        while state.step < config.steps:
            try:
                metrics = one_step(run)
            except NonFiniteLoss as error:
                if error.updates == 0:
                    run.save()
                where = (
                    "The state before this step"
                    if error.updates == 0
                    else "The last checkpoint, of an earlier step,"
                )
                raise NonFiniteLoss(f"{error}. {where} is saved in {run.out / 'checkpoint'}") from None
            run.log.write(metrics)
            run.scalars.write(metrics)
            state.step += 1
            shown = {
                "reward": metrics["reward"],
                "divergence": metrics["divergence"],
                "gap": metrics["sampled_logprob_gap"],
            }
            bar.update(state.step, **shown, tokens_per_second=metrics["tokens_per_second"])
            # After the log, so that the checkpoint's offset covers the line of this step.
            stopping = max(run.ranks.together([stop.number]))
            if state.step % config.checkpoint_every == 0 or state.step == config.steps or stopping:
                run.save()
            if stopping and state.step < config.steps:
                raise TrainingInterrupted(
                    f"stopped after step {state.step} of {config.steps}; "
                    "the state is saved, --resume continues",
                    stopping,
                )


def one_step(run: Run) -> StepMetrics:
    """Sample, verify, build the teacher's contexts, distil; return the step's line of metrics.jsonl."""
    began = time.monotonic()
    config, state, number = run.config, run.state, run.state.step + 1
    # Sample and score rollouts, then build each teacher context from the verdict. Rehearsal shares the batch.
    asked = requests(
        prompts_of_step(run, run.task.train, config.prompts_per_step, PROMPTS), config.group_size
    )
    kept = requests(
        prompts_of_step(run, run.task.rehearsal, config.rehearsal_prompts, REHEARSAL),
        1,
        config.prompts_per_step,
    )
    answers = run.sampler.sample(state.model, run.task, [*asked, *kept], config.seed, ROLLOUTS, state.step)
    rollouts, rehearsed = answers[: len(asked)], answers[len(asked) :]
    built = build_contexts(rollouts, config, config.seed, CONTEXTS, state.step)
    contexts = run.sampler.fitting(rollouts, built)
    too_long = sum(told is not None for told in built) - sum(told is not None for told in contexts)
    if too_long and not run.told_too_long:
        run.told_too_long = True
        run.progress.say(
            f"step {number}: {too_long} of {len(rollouts)} views of the teacher are longer than the model's "
            f"context of {run.sampler.longest} tokens and left out of the loss; samples_too_long counts them"
        )

    # Both sides score the student's tokens; the teacher's prompt also contains the context.
    batch, update = batch_of_step(config, run.sampler, rollouts, contexts), None
    metrics = {"step": number, **steps.rollout_metrics(rollouts, contexts)}
    metrics["samples_too_long"] = too_long / len(rollouts)
    if batch is not None:
        rehearsal = None
        if state.reference is not None:
            rehearsal = rehearse(run, state.reference, rehearsed, metrics)
        update = steps.update_on(
            Trainer(state.model, state.teacher, state.optimizer, run.sampler.vocab, run.ranks),
            batch,
            config,
            number,
            rehearsal,
        )

    metrics |= {**steps.update_metrics(update, batch), **steps.reading_metrics(update, batch)}
    metrics["learning_rate"] = steps.learning_rate(config, number)
    if samples_due(config, number):
        for line in sample_lines(number, rollouts, contexts, batch, update, run.sampler.encoder, config):
            run.samples.write(line)
    seconds = time.monotonic() - began
    # Only these two differ between a run and its repetition.
    metrics |= {"seconds": seconds, "tokens_per_second": metrics["completion_tokens"] / seconds}
    if torch.cuda.is_initialized():
        metrics["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    if number % config.eval_every == 0 and number < config.steps:
        metrics |= measure(run, config.probe_samples)
    return metrics


def batch_of_step(
    config: TrainConfig, sampler: Sampler, rollouts: list[Rollout], contexts: list[Context | None]
) -> Batch | None:
    """Return the rollouts of the loss as a batch, or None if there are none.

    Without a policy gradient only rollouts with a teacher context are in the loss.
    """
    gains = advantages(rollouts, config.advantage_std) if config.policy_weight else [0.0] * len(rollouts)
    kept = [i for i, context in enumerate(contexts) if context is not None or config.policy_weight > 0]
    if not kept:
        return None
    views = iter(sampler.encode([(rollouts[i].prompt, contexts[i]) for i in kept if contexts[i] is not None]))
    prompts = [next(views) if contexts[i] is not None else None for i in kept]
    separators = (
        sampler.encoder.containing(config.segment_separator)
        if "SegmentMean" in (config.token_weights or "")
        else frozenset()
    )
    return make_batch(
        [rollouts[i] for i in kept],
        prompts,
        sampler.pad_token,
        config.device,
        [gains[i] for i in kept],
        separators,
    )


def rehearse(run: Run, reference: Teacher, rollouts: list[Rollout], metrics: StepMetrics) -> Rehearsal:
    """Return the batch of rehearsal answers.

    Their target is the model before the run: no verdict, no context.
    """
    metrics["rehearsal_reward"] = sum(rollout.verdict.reward for rollout in rollouts) / len(rollouts)
    views = [rollout.prompt_tokens for rollout in rollouts]
    return Rehearsal(make_batch(rollouts, views, run.sampler.pad_token, run.config.device), reference)


def prompts_of_step(run: Run, problems: Sequence[int], count: int, stream: int) -> list[Prompt]:
    """Return the next `count` prompts of an endless walk through the problems, reshuffled in every epoch."""
    places = range(run.state.step * count, (run.state.step + 1) * count)
    chosen = [
        problems[
            epoch_order(len(problems), run.config.seed, stream, place // len(problems))[place % len(problems)]
        ]
        for place in places
    ]
    return [run.task.env(problem, 0).prompt() for problem in chosen]


@functools.lru_cache(maxsize=4)
def epoch_order(count: int, *key: int) -> list[int]:
    """Return the order of an epoch's problems; callers must not modify it.

    Cached: shuffling the 8000 problems of an epoch in every step took 1.6 % of its time.
    """
    return seeds.shuffled(range(count), *key)


def measure(run: Run, samples: int) -> dict[str, float | None]:
    """Measure student and teacher on held-out problems, and the student on the skill that is not trained."""
    state, task, seed = run.state, run.task, run.config.seed
    return {
        "held_out_accuracy": evaluate.accuracy(run.sampler, state.model, task, task.held_out, samples, seed),
        "self_teacher_accuracy": evaluate.self_teacher_accuracy(
            run.sampler, state.model, state.teacher, task, run.config, samples
        ),
        "untrained_skill": evaluate.accuracy(run.sampler, state.model, task, task.untrained, samples, seed),
    }


def measured(facts: dict[str, Any], suffix: str) -> dict[str, Any]:
    return {name.removesuffix(suffix): value for name, value in facts.items() if name.endswith(suffix)}


def finish(run: Run) -> dict[str, Any]:
    """Measure after training; write summary.json, curves.png and report.html; print the table."""
    facts = run.state.facts
    after = {f"{name}_after": value for name, value in measure(run, run.config.eval_samples).items()}
    summary = {**facts, **after, "steps": run.state.step, "seconds": time.monotonic() - run.started}
    accuracies = (summary["held_out_accuracy_before"], summary["held_out_accuracy_after"])
    summary["held_out_gain_interval"] = list(evaluate.gain_interval(*accuracies, run.config.eval_samples))
    summary["peak_memory_bytes"] = peak_memory()
    if not run.ranks.first:
        return summary
    # summary.json comes last: it marks a run as complete. A run killed before it repeats `finish` on resume.
    record = report.read_run(run.out, summary)
    report.draw_curves(run.out / "curves.png", record.metrics)
    write_file(run.out / "report.html", report_page.page(record))
    write_file(run.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    report.print_table(run.progress.console, summary, run.out)
    return summary
