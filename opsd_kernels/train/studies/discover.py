"""Search for a first correct answer to one question by test-time self-distillation (arXiv:2601.20802).

The baselines are sampling the base model, and a prompt with its last failures, each with the same number of
attempts. An attempt is a verified answer. Those of a batch count in their order up to the first correct one,
so `first` does not depend on the batch size.

Deliberate simplifications:

- One question at a time, each from the base model's weights.
- No rehearsal and no warm-up of the learning rate, since a search takes a few dozen updates.
- A batch is sampled as a whole and its tokens are counted, although a success inside it ends the search.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd_kernels.train import loop, objective
from opsd_kernels.train import step as steps
from opsd_kernels.train.batch import make_batch, micro_batches
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.contexts import build_contexts, neutralise
from opsd_kernels.train.envs import DemoTask, Task
from opsd_kernels.train.models import pretrained
from opsd_kernels.train.records.log import Progress
from opsd_kernels.train.sampling.prompts import PromptEncoder
from opsd_kernels.train.sampling.rollout import Request, Sampler, make_engine, requests
from opsd_kernels.train.step import Trainer
from opsd_kernels.train.task import checked_task
from opsd_kernels.train.teacher import make_teacher
from opsd_kernels.train.types import Context, Prompt, Rollout, Verdict

# Streams of random numbers.
SELF, BEST, TURNS, PROBE, CONTEXTS = 21, 22, 23, 24, 25
# DemoTasks whose verifiers accept one string, each word of which is one token: the chance of an attempt is a
# product of token probabilities.
SOLE_ANSWER = ("secret_op", "mastermind", "chain", "plan")
# Problems per batch, and attempts that estimate a chance which is not exact.
PROBED, PROBES = 256, 64


@dataclass(frozen=True)
class Budget:
    """The budget of one method at one question."""

    attempts: int = 256
    batch: int = 8  # attempts per optimisation step
    window: int = 3  # past failures in a multi-turn prompt

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(
                    f"{field.name}: expected a whole number of at least 1, got {getattr(self, field.name)}"
                )


@dataclass
class Search:
    """One method at one question.

    `first` is the number of its first correct attempt, from 1; None without one.
    """

    problem: int
    first: int | None = None
    attempts: int = 0
    generated_answers: int = 0  # includes those after the first correct one in its batch
    completion_tokens: int = 0
    context_tokens: int = 0  # of feedback, in the teacher's or a multi-turn prompt
    teacher_tokens: int = 0
    updates: int = 0

    def count(self, rollouts: Sequence[Rollout]) -> None:
        """Count answers as attempts."""
        place = next((i for i, rollout in enumerate(rollouts, 1) if rollout.verdict.success), None)
        self.first = None if place is None else self.attempts + place
        self.attempts += len(rollouts) if place is None else place
        self.generated_answers += len(rollouts)
        self.completion_tokens += sum(len(rollout.tokens) for rollout in rollouts)

    def goes_on(self, budget: Budget) -> bool:
        return self.first is None and self.attempts < budget.attempts


@dataclass
class Base:
    """The base model of every search, with its task and sampler.

    `start` holds the weights that a search changes.
    """

    config: TrainConfig
    task: Task
    model: PreTrainedModel
    other: PreTrainedModel | None  # an external teacher
    sampler: Sampler
    start: dict[str, Tensor]

    def prompt(self, problem: int) -> Prompt:
        return self.task.env(problem, 0).prompt()

    @torch.no_grad()
    def restore(self) -> None:
        for name, parameter in self.model.named_parameters():
            if name in self.start:
                parameter.copy_(self.start[name])


def load_base(config: TrainConfig, progress: Progress) -> Base:
    """Load the base model. Raises ConfigError if the model or the device does not exist."""
    config = dataclasses.replace(config, lr_warmup_steps=0, rehearsal_prompts=0)
    pretrained.check_machine(config)
    task = checked_task(config)
    model, tokenizer = pretrained.load_student(loop.base_of(config, task, progress), None, config)
    other = loop.external_teacher(config, task, tokenizer, progress)
    encoder = PromptEncoder(tokenizer, task.template)
    sampler = Sampler(
        encoder,
        config.max_new_tokens,
        config.rollout_temperature,
        config.rollout_batch,
        pretrained.vocabulary(tokenizer),
        make_engine(config),
        longest=pretrained.context_length(model.config, *([other.config] if other is not None else [])),
    )
    loop.check_room(config, task, sampler)
    start = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return Base(config, task, model, other, sampler, start)


def self_distil(base: Base, problem: int, budget: Budget) -> Search:
    """Sample attempts in batches, and distil from a teacher with the feedback on those that failed."""
    base.restore()
    config, search = base.config, Search(problem)
    teacher = make_teacher(base.model, config, base.other)
    trainer = Trainer(base.model, teacher, steps.make_optimizer(base.model, config), base.sampler.vocab)
    for step in range(1, -(-budget.attempts // budget.batch) + 1):
        asked = requests([base.prompt(problem)], min(budget.batch, budget.attempts - search.attempts))
        rollouts = base.sampler.sample(base.model, base.task, asked, config.seed, SELF, problem, step)
        search.count(rollouts)
        if not search.goes_on(budget):
            break
        contexts = base.sampler.fitting(
            rollouts, build_contexts(rollouts, config, config.seed, CONTEXTS, problem, step)
        )
        batch = loop.batch_of_step(config, base.sampler, rollouts, contexts)
        # No attempt has feedback.
        if batch is None:
            continue
        update = steps.update_on(trainer, batch, config, step)
        read = steps.reading_metrics(update, batch)
        search.updates += config.updates_per_batch
        search.teacher_tokens += config.updates_per_batch * read["teacher_tokens"]
        search.context_tokens += config.updates_per_batch * read["context_tokens"]
    base.restore()
    return search


def best_of_k(base: Base, problems: Sequence[int], budget: Budget) -> list[Search]:
    """Sample the base model repeatedly.

    If `success_probabilities` gives the exact chance, this is not needed.
    """
    prompts = {problem: base.prompt(problem) for problem in problems}

    def asks(search: Search) -> list[Request]:
        count = min(budget.batch, budget.attempts - search.attempts)
        return [Request(prompts[search.problem], search.problem, search.attempts + i) for i in range(count)]

    return _together(base, problems, budget, BEST, asks)


def multi_turn(base: Base, problems: Sequence[int], budget: Budget) -> list[Search]:
    """Sample the base model one attempt at a time, with feedback on its last `window` failures."""
    prompts = {problem: base.prompt(problem) for problem in problems}
    failures: dict[int, deque[Rollout]] = {problem: deque(maxlen=budget.window) for problem in problems}

    def asks(search: Search) -> list[Request]:
        shown = list(failures[search.problem])
        request = conversation(base, prompts[search.problem], shown, search.attempts)
        # The oldest failures go first where the model cannot read all of them.
        while shown and not base.sampler.fits(request.prompt, request.context, base.config.max_new_tokens):
            shown = shown[1:]
            request = conversation(base, prompts[search.problem], shown, search.attempts)
        return [request]

    def heard(search: Search, rollouts: Sequence[Rollout]) -> None:
        bare = len(base.sampler.encoder.encode([prompts[search.problem]], [None])[0])
        search.context_tokens += sum(len(rollout.prompt_tokens) - bare for rollout in rollouts)
        failures[search.problem].extend(rollouts)

    return _together(base, problems, budget, TURNS, asks, heard)


def conversation(base: Base, prompt: Prompt, failures: Sequence[Rollout], attempt: int) -> Request:
    """Ask the question after its failures.

    They are earlier turns for a chat model, and a block of feedback for a tiny one, which knows a single
    turn.
    """
    told = [
        (failure.text, failure.verdict.feedback)
        for failure in failures
        if failure.verdict.feedback is not None
    ]
    if not told:
        return Request(prompt, prompt.problem, attempt)
    if isinstance(base.task, DemoTask):
        context = Context((), "\n".join(feedback for _, feedback in told))
        return Request(prompt, prompt.problem, attempt, context)
    markers = base.sampler.encoder.markers
    turns, asked = list(prompt.before), prompt.text
    for answer, feedback in told:
        turns += [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": neutralise(answer, markers)},
        ]
        asked = neutralise(feedback, markers) + "\n" + base.task.template.instruction
    return Request(Prompt(prompt.problem, asked, tuple(turns)), prompt.problem, attempt)


def _together(
    base: Base,
    problems: Sequence[int],
    budget: Budget,
    stream: int,
    asks: Callable[[Search], list[Request]],
    heard: Callable[..., None] | None = None,
) -> list[Search]:
    """Run searches without updates in shared batches.

    A request's group is its problem, so draws are independent.
    """
    base.restore()
    searches = [Search(problem) for problem in problems]
    while running := [search for search in searches if search.goes_on(budget)]:
        asked = [asks(search) for search in running]
        flat = [request for each in asked for request in each]
        rollouts = iter(base.sampler.sample(base.model, base.task, flat, base.config.seed, stream))
        for search, each in zip(running, asked, strict=True):
            answers = [next(rollouts) for _ in each]
            search.count(answers)
            if heard is not None:
                heard(search, answers)
    return searches


@torch.no_grad()
def success_probabilities(
    base: Base, problems: Sequence[int], contexts: Sequence[Context | None] | None = None
) -> list[float] | None:
    """Return the base model's exact chance of a correct answer in one attempt.

    None if several answers may be correct, or if the answer does not fit `max_new_tokens`.
    """
    if base.config.env not in SOLE_ANSWER:
        return None
    encoder, task = base.sampler.encoder, cast(DemoTask, base.task)
    prompts = [base.prompt(problem) for problem in problems]
    answers = encoder.answer([task.solution(problem) for problem in problems])
    if max(map(len, answers)) > base.config.max_new_tokens:
        return None
    base.restore()
    base.model.eval()
    places = zip(prompts, encoder.encode(prompts, contexts or [None] * len(prompts)), answers, strict=True)
    rollouts = [
        Rollout(prompt, i, 0, tokens, answer, "", Verdict(1.0))
        for i, (prompt, tokens, answer) in enumerate(places)
    ]
    batch = make_batch(rollouts, [None] * len(rollouts), base.sampler.pad_token, base.config.device)
    policy = dataclasses.replace(base.config, distill_temperature=base.config.rollout_temperature)
    micros = micro_batches(batch, base.config.micro_batch)
    logprobs_B = torch.cat(
        [
            objective.sampling_logprobs(base.model, micro, policy, base.sampler.vocab).double().sum(1)
            for micro in micros
        ]
    )
    # Rounding may put a certain answer slightly above 1.
    return logprobs_B.exp().clamp(max=1.0).tolist()


def sampled_probabilities(base: Base, problems: Sequence[int]) -> list[float]:
    """Return the shares of correct answers among `PROBES` attempts.

    They have a stream of random numbers of their own: the searches must not start with attempts known to
    fail.
    """
    base.restore()
    asked = [Request(base.prompt(problem), problem, i) for problem in problems for i in range(PROBES)]
    right = [
        rollout.verdict.success
        for rollout in base.sampler.sample(base.model, base.task, asked, base.config.seed, PROBE)
    ]
    return np.reshape(right, (len(problems), PROBES)).mean(1).tolist()


def hard_questions(base: Base, count: int, below: float, skip: int = 0) -> dict[int, float]:
    """Return problem -> chance of `count` held-out problems whose chance in one attempt is below `below`.

    They are the first after `skip` such problems. Raises ValueError if there are too few.
    """
    found: list[tuple[int, float]] = []
    for start in range(0, len(base.task.held_out), PROBED):
        part = base.task.held_out[start : start + PROBED]
        chances = success_probabilities(base, part)
        chances = sampled_probabilities(base, part) if chances is None else chances
        found += [(problem, chance) for problem, chance in zip(part, chances, strict=True) if chance < below]
        if len(found) >= skip + count:
            return dict(found[skip : skip + count])
    raise ValueError(
        f"questions: expected at most {max(0, len(found) - skip)}, "
        f"the held-out problems with a chance below {below}, got {count}"
    )


def solved_within(firsts: Sequence[int | None], attempts: int) -> np.ndarray:
    """Shape (Q, K): 1 where a question was solved within k = 1 ... `attempts` attempts."""
    return np.array(
        [[first is not None and first <= k for k in range(1, attempts + 1)] for first in firsts], dtype=float
    )


def chance_within(probabilities: Sequence[float] | np.ndarray, attempts: int | np.ndarray) -> np.ndarray:
    """Shape (Q, K): best-of-k exactly, 1 - (1 - p)^k."""
    counts = np.arange(1, attempts + 1) if isinstance(attempts, int) else attempts
    with np.errstate(divide="ignore"):
        return -np.expm1(np.log1p(-np.asarray(probabilities, dtype=float))[:, None] * counts)
