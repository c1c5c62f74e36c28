"""Measure before training what a context teaches: the accuracy of the consensus of its teachers.

The student does not see the context. At one problem it is pulled towards the teachers of all contexts that
are drawn there, and least far from them on average is their consensus: for reverse KL, the mean over contexts
of KL(q || p_c), the normalised geometric mean of the p_c; for forward KL the arithmetic mean.

    consensus gap = mean over held-out problems of (accuracy of the consensus - accuracy of the student)

Answers of the consensus are drawn from it token by token, and a problem without a context counts as 0. The
gap of arXiv:2605.30070 asks each teacher for a whole answer instead. It sees neither that the errors of the
contexts cancel (`corrupted`), nor what the student forgets where it was right.

Simplification: the geometric mean stands for the other divergences, too, and a trust-region teacher is its
reference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from opsd_kernels.train import seeds
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.contexts import build_contexts
from opsd_kernels.train.envs.base import Task
from opsd_kernels.train.sampling import agreement
from opsd_kernels.train.sampling.rollout import PlacedSampler, Sampler, left_padded, requests
from opsd_kernels.train.studies.statistics import Estimate, estimate
from opsd_kernels.train.teacher import Teacher
from opsd_kernels.train.types import Prompt

# Attempts at a problem whose contexts make one consensus, and answers drawn from that.
ATTEMPTS, ANSWERS = 16, 4
# Streams of random numbers; evaluation has 3.
CONSENSUS_KEY = 4


@dataclass(frozen=True)
class Views:
    """The teacher's prompts for one problem, each with its share of the contexts drawn there."""

    prompt: Prompt
    shares: dict[tuple[int, ...], float]


@dataclass(frozen=True)
class ConsensusProbe:
    """Accuracies over held-out problems, each with its bootstrap interval over problems."""

    taught: float  # share of the problems that have a context
    student: Estimate
    accuracy: Estimate  # of the consensus; of the student where no context was drawn
    gap: Estimate


def consensus(logprobs_RV: Tensor, shares_R: Tensor, group_R: Tensor, groups: int, divergence: str) -> Tensor:
    """Shape (G, V), in nats: the log-probs with the least mean divergence to the rows of each group.

    `shares_R` sum to 1 over the rows of a group; `group_R` names the group of each row.
    """
    zero_GV = logprobs_RV.new_zeros(groups, logprobs_RV.shape[1])
    if divergence == "forward_kl":
        return zero_GV.index_add_(0, group_R, shares_R[:, None] * logprobs_RV.exp()).log()
    return zero_GV.index_add_(0, group_R, shares_R[:, None] * logprobs_RV).log_softmax(-1)


class ConsensusSampler(LogitsProcessor):
    """A processor that draws one token for all rows of a group, from their consensus.

    `draw` has the random numbers, a row for each group.
    """

    def __init__(self, shares_R: Tensor, group_R: Tensor, draw: PlacedSampler, config: TrainConfig):
        self.shares_R, self.group_R, self.draw = shares_R, group_R, draw
        self.groups, self.divergence = int(group_R.max()) + 1, config.divergence
        # What the student's logits divided by `distill_temperature` learn.
        self.student_temperature = config.distill_temperature
        self.teacher_temperature = config.teacher_temperature or config.distill_temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (R, L), (R, V) -> (R, V)
        known_RV = scores[:, : self.draw.vocab].double() / self.teacher_temperature
        agreed_GV = consensus(
            known_RV.log_softmax(-1), self.shares_R, self.group_R, self.groups, self.divergence
        )
        drawn_GV = self.draw(input_ids, self.student_temperature * agreed_GV)
        out = torch.full_like(scores, -torch.inf)
        out[:, : drawn_GV.shape[1]] = drawn_GV[self.group_R].to(scores.dtype)
        return out


def consensus_answers(
    sampler: Sampler,
    model: PreTrainedModel,
    asked: Sequence[Views],
    answers: int,
    config: TrainConfig,
    *key: int,
) -> list[list[tuple[int, ...]]]:
    """Return the tokens of `answers` answers of the consensus at each problem."""
    model.eval()
    found: list[list[tuple[int, ...]]] = [[] for _ in asked]
    draws = [(place, number) for place in range(len(asked)) for number in range(answers)]
    for chunk in _chunks(draws, [len(asked[place].shares) for place, _ in draws], sampler.batch):
        rows = _generate(sampler, model, [asked[place] for place, _ in chunk], chunk, config, key)
        for (place, _), row in zip(chunk, rows, strict=True):
            found[place].append(row)
    return found


def _chunks(
    draws: Sequence[tuple[int, int]], rows: Sequence[int], most: int
) -> Iterator[list[tuple[int, int]]]:
    """Yield the draws in chunks of at most `most` rows, or of one draw with more."""
    chunk: list[tuple[int, int]] = []
    held = 0
    for draw, count in zip(draws, rows, strict=True):
        if chunk and held + count > most:
            yield chunk
            chunk, held = [], 0
        chunk.append(draw)
        held += count
    if chunk:
        yield chunk


@torch.no_grad()
def _generate(
    sampler: Sampler,
    model: PreTrainedModel,
    views: Sequence[Views],
    draws: Sequence[tuple[int, int]],
    config: TrainConfig,
    key: tuple[int, ...],
) -> list[tuple[int, ...]]:
    """Return an answer for each of the draws, which are (problem, number) and decide the random numbers."""
    places = np.array(draws, dtype=np.uint64)
    uniforms = seeds.uniforms(*key, places[:, :1], places[:, 1:], np.arange(sampler.max_new_tokens))
    prompts = [prompt for one in views for prompt in one.shares]
    shares = [share for one in views for share in one.shares.values()]
    groups = [group for group, one in enumerate(views) for _ in one.shares]
    group_R = torch.tensor(groups, device=model.device)
    draw = PlacedSampler(torch.from_numpy(uniforms).to(model.device), sampler.temperature, sampler.vocab)
    agreed = ConsensusSampler(
        torch.tensor(shares, dtype=torch.float64, device=model.device), group_R, draw, config
    )
    stops, pad = sampler.stops(model), sampler.pad_token
    rows, attended = left_padded(prompts, pad, model.device)
    greedy = GenerationConfig(
        max_new_tokens=sampler.max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=sorted(stops)
    )
    generate: Any = model.generate
    with agreement.generating_as(model, greedy):
        out = generate(rows, attention_mask=attended, generation_config=greedy, logits_processor=[agreed])
    first = [groups.index(group) for group in range(len(views))]
    return [_answer(row, stops) for row in out[first, rows.shape[1] :].tolist()]


def _answer(tokens: Sequence[int], stops: set[int]) -> tuple[int, ...]:
    """Return the tokens before the first stop."""
    end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
    return tuple(tokens[:end])


def measure_consensus(
    sampler: Sampler,
    student: PreTrainedModel,
    teacher: Teacher,
    task: Task,
    config: TrainConfig,
    samples: int,
) -> ConsensusProbe | None:
    """Measure the consensus of a context at the problems of about `samples` attempts.

    Contexts are built as in training, from groups of `group_size`. Returns None for a model that cannot
    answer prompts of different lengths in one batch.
    """
    if agreement.batches(student, sampler.pad_token) != agreement.ANY:
        return None
    count = min(max(1, samples // ATTEMPTS), len(task.held_out))
    prompts = [task.env(problem, 0).prompt() for problem in task.held_out[:count]]
    told: list[Counter[tuple[int, ...]]] = [Counter() for _ in prompts]
    right_NP: list[np.ndarray] = []
    # A round asks each problem once, as a step of training does: no other group has its answers.
    for turn in range(-(-ATTEMPTS // config.group_size)):
        attempts = sampler.sample(
            student, task, requests(prompts, config.group_size), config.seed, CONSENSUS_KEY, turn
        )
        contexts = build_contexts(attempts, config, config.seed, CONSENSUS_KEY, turn)
        shown = [
            (attempt, context)
            for attempt, context in zip(
                attempts, sampler.fitting(attempts, contexts, again=True), strict=True
            )
            if context is not None
        ]
        views = sampler.encode([(attempt.prompt, context) for attempt, context in shown])
        for (attempt, _), view in zip(shown, views, strict=True):
            told[attempt.group][view] += 1
        right_NP.append(np.reshape([attempt.verdict.success for attempt in attempts], (count, -1)).mean(1))
    asked = [
        Views(prompt, {view: number / seen.total() for view, number in seen.items()})
        for prompt, seen in zip(prompts, told, strict=True)
        if seen
    ]
    alone_P = np.mean(right_NP, axis=0)
    agreed_P = alone_P.copy()
    with teacher.using() as model:
        answers = consensus_answers(sampler, model, asked, ANSWERS, config, config.seed, CONSENSUS_KEY)
    agreed_P[[bool(seen) for seen in told]] = [
        _accuracy(sampler, task, one.prompt, drawn) for one, drawn in zip(asked, answers, strict=True)
    ]
    return ConsensusProbe(
        len(asked) / count, estimate(alone_P), estimate(agreed_P), estimate(agreed_P - alone_P)
    )


def _accuracy(sampler: Sampler, task: Task, prompt: Prompt, answers: Sequence[tuple[int, ...]]) -> float:
    # As the sampler decodes rollouts.
    decoded: Any = list(answers)
    texts = sampler.encoder.tokenizer.batch_decode(
        decoded, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return float(np.mean([task.env(prompt.problem, 0).verify(text).success for text in texts]))
