"""The search for a first right answer to one question: test-time self-distillation (arXiv:2601.20802), beside sampling the base model and beside asking
it again with its last failures in view, each with the same number of attempts.

An attempt is an answer that was verified. Those of a batch count in their order up to the first right one, so `first` is exact whatever the batch.

Deliberate simplifications: one question at a time, each from the base model's weights; no rehearsal and no warm-up of the learning rate, since a search
takes a few dozen updates; a batch is sampled whole, and its tokens are paid for, although a success inside ends the search.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd_kernels.train import loop, objective
from opsd_kernels.train import step as steps
from opsd_kernels.train.batch import make_batch, micro_batches
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.contexts import build_contexts, neutralise
from opsd_kernels.train.envs import DemoTask, Task, make_task
from opsd_kernels.train.models import pretrained
from opsd_kernels.train.records.log import Progress
from opsd_kernels.train.sampling.prompts import PromptEncoder
from opsd_kernels.train.sampling.rollout import Request, Sampler, make_engine, requests
from opsd_kernels.train.step import Trainer
from opsd_kernels.train.teacher import make_teacher
from opsd_kernels.train.types import Context, Prompt, Rollout, Verdict

SELF, BEST, TURNS, PROBE, CONTEXTS = 21, 22, 23, 24, 25  # streams of random numbers
# Their verifiers accept one string, each of whose words is one token: the chance of an attempt is a product of token probabilities.
SOLE_ANSWER = ("secret_op", "mastermind", "chain", "plan")
PROBED, PROBES = 256, 64  # problems looked at together; attempts that estimate a chance which is not exact


@dataclass(frozen=True)
class Budget:
    """Of one method at one question: attempts; of those, how many an optimisation step learns from; past failures that a multi-turn prompt shows."""

    attempts: int = 256
    batch: int = 8
    window: int = 3

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(
                    f"{field.name}: expected a whole number of at least 1, got {getattr(self, field.name)}"
                )


@dataclass
class Search:
    """One method at one question. `first` is the number of its first right attempt, from 1; None if the budget went without one."""

    problem: int
    first: int | None = None
    attempts: int = 0
    generated_answers: int = 0  # those behind the first right one of the last batch included
    completion_tokens: int = 0
    context_tokens: int = 0  # of feedback that was read, by the teacher or in a multi-turn prompt
    teacher_tokens: int = 0
    updates: int = 0

    def count(self, rollouts: Sequence[Rollout]) -> None:
        """Takes answers in as attempts."""
        place = next((i for i, rollout in enumerate(rollouts, 1) if rollout.verdict.success), None)
        self.first = None if place is None else self.attempts + place
        self.attempts += len(rollouts) if place is None else place
        self.generated_answers += len(rollouts)
        self.completion_tokens += sum(len(rollout.tokens) for rollout in rollouts)

    def goes_on(self, budget: Budget) -> bool:
        return self.first is None and self.attempts < budget.attempts


@dataclass
class Base:
    """The base model, which every search starts from, and what it takes to sample and to learn. `start` holds the weights that a search changes."""

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
    """Raises ConfigError for a model or a device that is not there."""
    config = dataclasses.replace(config, lr_warmup_steps=0, rehearsal_prompts=0)
    pretrained.check_machine(config)
    task = make_task(config)
    model, tokenizer = pretrained.load_student(loop.base_of(config, task, progress), None, config)
    encoder = PromptEncoder(tokenizer, task.template)
    sampler = Sampler(
        encoder,
        config.max_new_tokens,
        config.rollout_temperature,
        config.rollout_batch,
        pretrained.vocabulary(tokenizer),
        make_engine(config),
    )
    start = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return Base(config, task, model, loop.external_teacher(config, task, tokenizer, progress), sampler, start)


def self_distil(base: Base, problem: int, budget: Budget) -> Search:
    """Attempts by the batch; what the world says about those that failed becomes the teacher's context, and the student takes a step towards it."""
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
        contexts = build_contexts(rollouts, config, config.seed, CONTEXTS, problem, step)
        batch = loop.batch_of_step(config, base.sampler, rollouts, contexts)
        if batch is None:  # nothing was said
            continue
        update = steps.update_on(trainer, batch, config, step)
        read = steps.reading_metrics(update, batch)
        search.updates += config.updates_per_batch
        search.teacher_tokens += config.updates_per_batch * read["teacher_tokens"]
        search.context_tokens += config.updates_per_batch * read["context_tokens"]
    base.restore()
    return search


def best_of_k(base: Base, problems: Sequence[int], budget: Budget) -> list[Search]:
    """The base model again and again. Where `success_probabilities` knows the chance of an attempt, nothing needs to be sampled."""
    prompts = {problem: base.prompt(problem) for problem in problems}

    def asks(search: Search) -> list[Request]:
        count = min(budget.batch, budget.attempts - search.attempts)
        return [Request(prompts[search.problem], search.problem, search.attempts + i) for i in range(count)]

    return _together(base, problems, budget, BEST, asks)


def multi_turn(base: Base, problems: Sequence[int], budget: Budget) -> list[Search]:
    """The base model, one attempt at a time, each with what was said about the last `window` of its failures in the prompt; older ones fall out."""
    prompts = {problem: base.prompt(problem) for problem in problems}
    failures: dict[int, deque[Rollout]] = {problem: deque(maxlen=budget.window) for problem in problems}

    def asks(search: Search) -> list[Request]:
        return [conversation(base, prompts[search.problem], failures[search.problem], search.attempts)]

    def heard(search: Search, rollouts: Sequence[Rollout]) -> None:
        bare = len(base.sampler.encoder.encode([prompts[search.problem]], [None])[0])
        search.context_tokens += sum(len(rollout.prompt_tokens) - bare for rollout in rollouts)
        failures[search.problem].extend(rollouts)

    return _together(base, problems, budget, TURNS, asks, heard)


def conversation(base: Base, prompt: Prompt, failures: Sequence[Rollout], attempt: int) -> Request:
    """The question after its failures: earlier turns for a chat model, a block of feedback for a tiny one, which knows one turn only."""
    told = [failure for failure in failures if failure.verdict.feedback is not None]
    if not told:
        return Request(prompt, prompt.problem, attempt)
    if isinstance(base.task, DemoTask):
        return Request(
            prompt,
            prompt.problem,
            attempt,
            Context((), "\n".join(failure.verdict.feedback for failure in told)),
        )
    markers = base.sampler.encoder.markers
    turns, asked = list(prompt.before), prompt.text
    for failure in told:
        turns += [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": neutralise(failure.text, markers)},
        ]
        asked = neutralise(failure.verdict.feedback, markers) + "\n" + base.task.template.instruction
    return Request(Prompt(prompt.problem, asked, tuple(turns)), prompt.problem, attempt)


def _together(
    base: Base,
    problems: Sequence[int],
    budget: Budget,
    stream: int,
    asks: Callable[[Search], list[Request]],
    heard: Callable[..., None] | None = None,
) -> list[Search]:
    """Searches that leave the model as it is, side by side in one batch. A request's group is its problem, so that neighbours change no draw."""
    base.restore()
    searches = [Search(problem) for problem in problems]
    while running := [search for search in searches if search.goes_on(budget)]:
        asked = [asks(search) for search in running]
        rollouts = iter(
            base.sampler.sample(
                base.model,
                base.task,
                [request for each in asked for request in each],
                base.config.seed,
                stream,
            )
        )
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
    """The base model's exact chance of being right in one attempt; None where more than one answer may be right, or none fits `max_new_tokens`."""
    if base.config.env not in SOLE_ANSWER:
        return None
    encoder = base.sampler.encoder
    prompts, answers = (
        [base.prompt(problem) for problem in problems],
        encoder.answer([base.task.solution(problem) for problem in problems]),
    )
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
    return logprobs_B.exp().clamp(max=1.0).tolist()  # rounding may leave a sure answer a hair above 1


def sampled_probabilities(base: Base, problems: Sequence[int]) -> list[float]:
    """Shares of right answers among `PROBES` attempts, in a stream of their own: the searches must not begin with attempts that are known to fail."""
    base.restore()
    asked = [Request(base.prompt(problem), problem, i) for problem in problems for i in range(PROBES)]
    right = [
        rollout.verdict.success
        for rollout in base.sampler.sample(base.model, base.task, asked, base.config.seed, PROBE)
    ]
    return np.reshape(right, (len(problems), PROBES)).mean(1).tolist()


def hard_questions(base: Base, count: int, below: float, skip: int = 0) -> dict[int, float]:
    """The first `count` held-out problems, behind `skip` of their kind, that the base model gets right with a chance below `below`; problem -> chance.

    Raises ValueError if there are too few.
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
        f"questions: expected at most {max(0, len(found) - skip)}, the held-out problems with a chance below {below}, got {count}"
    )


def solved_within(firsts: Sequence[int | None], attempts: int) -> np.ndarray:  # -> (Q, K)
    """1 where a question was solved within k = 1 ... `attempts` attempts."""
    return np.array(
        [[first is not None and first <= k for k in range(1, attempts + 1)] for first in firsts], dtype=float
    )


def chance_within(probabilities: Sequence[float], attempts: int | np.ndarray) -> np.ndarray:  # -> (Q, K)
    """Best-of-k exactly: 1 - (1 - p)^k."""
    counts = np.arange(1, attempts + 1) if isinstance(attempts, int) else attempts
    with np.errstate(divide="ignore"):
        return -np.expm1(np.log1p(-np.asarray(probabilities, dtype=float))[:, None] * counts)
