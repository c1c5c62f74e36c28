"""Sample rollouts in batches through transformers' generate and its KV cache.

Each token is drawn by inverting the cumulative distribution at a random number that depends on (key, group,
sample, position) only. The other rollouts of the batch change the rounding of the logits and nothing else: it
hardly ever changes a draw in fp32, and about one in a hundred in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from opsd_kernels.train import seeds
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.distributed.ranks import ALONE, Ranks
from opsd_kernels.train.distributed.sharding import whole
from opsd_kernels.train.envs.base import Task
from opsd_kernels.train.sampling import agreement
from opsd_kernels.train.sampling.decoding import RowProcessor, decode, generating_as
from opsd_kernels.train.sampling.prompts import PromptEncoder
from opsd_kernels.train.sampling.vllm_engine import VllmEngine
from opsd_kernels.train.types import Context, Prompt, Rollout

# Streams of random numbers.
ROLLOUT, FEEDBACK = 1, 2


@dataclass(frozen=True)
class Request:
    """One answer to sample. `group` and `sample` decide its random numbers."""

    prompt: Prompt
    group: int
    sample: int
    context: Context | None = None


class PlacedSampler(RowProcessor):
    """A processor that draws the next token and leaves generate a row with one finite entry.

    `uniforms_BT` holds the random numbers of the draws.
    """

    def __init__(self, uniforms_BT: Tensor, temperature: float, vocab: int | None = None):
        self.uniforms_BT, self.temperature, self.vocab, self.position = uniforms_BT, temperature, vocab, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, L), (B, V) -> (B, V)
        cumulative = (scores[:, : self.vocab].double() / self.temperature).softmax(-1).cumsum(-1)
        at = self.uniforms_BT[:, self.position, None] * cumulative[:, -1:]
        self.position += 1
        # Past the end only if scores are NaN, which the loss reports.
        drawn = torch.searchsorted(cumulative, at, right=True).clamp(max=cumulative.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)

    def keep(self, rows: Tensor) -> None:
        self.uniforms_BT = self.uniforms_BT[rows]


@dataclass(frozen=True)
class Sampler:
    """The settings of sampling: encoder, length, temperature, batch size, and the context of the models."""

    encoder: PromptEncoder
    max_new_tokens: int
    temperature: float
    batch: int
    vocab: int  # rows of the head from here on are padding
    engine: Engine | None = None  # None: transformers' generate
    ranks: Ranks = ALONE
    longest: int | None = None  # tokens of prompt and answer that student and teacher can read; None: any
    shares_prompts: bool = False  # a prompt of several requests is read once

    def sample(
        self, model: PreTrainedModel, task: Task, requests: Sequence[Request], *key: int
    ) -> list[Rollout]:
        """Return one verified rollout per request, in their order, all of them on every rank.

        A collective call. `key` (seed, step) selects the stream of random numbers.
        """
        # No dropout in an answer.
        model.eval()
        rollouts: list[Rollout] = []
        mine = self.ranks.share(requests)
        # vLLM makes its own batches, of at most as many.
        size = self.batch if self.engine is None else max(1, len(mine))
        with whole(model):
            for chunk in _chunks(mine, size):
                prompts = self.encode([(r.prompt, r.context) for r in chunk])
                if self.engine is None:
                    answers = self._generate(model, prompts, chunk, key)
                else:
                    answers = self._through_engine(self.engine, model, prompts, chunk, key)
                rollouts += self._verified(task, chunk, prompts, answers, self.stops(model), key)
        if self.ranks.world == 1:
            return rollouts
        # With the prompt objects of the requests, since `encode` compares them by identity.
        return [
            replace(rollout, prompt=request.prompt)
            for rollout, request in zip(self.ranks.together(rollouts), requests, strict=True)
        ]

    def encode(self, views: Sequence[tuple[Prompt, Context | None]]) -> list[tuple[int, ...]]:
        """Return the tokens of each (prompt, context). A repeated pair, as in a group, is encoded once."""
        if not views:
            return []
        # By identity, since a prompt's earlier turns cannot be hashed.
        keys = [(id(prompt), context) for prompt, context in views]
        different = dict(zip(keys, views, strict=True))
        known = dict(zip(different, self.encoder.encode(*zip(*different.values(), strict=True)), strict=True))
        return [known[key] for key in keys]

    def fits(self, prompt: Prompt, context: Context | None, answer: int) -> bool:
        """True if the models can read this view and an answer of `answer` tokens."""
        return self.longest is None or len(self.encode([(prompt, context)])[0]) + answer <= self.longest

    def fitting(
        self, rollouts: Sequence[Rollout], contexts: Sequence[Context | None], again: bool = False
    ) -> list[Context | None]:
        """Return the contexts, None in place of one too long for the models with the rollout's answer.

        `again`: with another answer of `max_new_tokens`.
        """
        if self.longest is None:
            return list(contexts)
        views = [(r.prompt, c) for r, c in zip(rollouts, contexts, strict=True) if c is not None]
        lengths = iter([len(view) for view in self.encode(views)])
        answers = [self.max_new_tokens if again else len(rollout.tokens) for rollout in rollouts]
        return [
            context if context is not None and next(lengths) + answer <= self.longest else None
            for answer, context in zip(answers, contexts, strict=True)
        ]

    def _generate(
        self,
        model: PreTrainedModel,
        prompts: list[tuple[int, ...]],
        requests: Sequence[Request],
        key: tuple[int, ...],
    ) -> list[tuple[int, ...]]:
        """Sample in one batch, or in several for a model whose answers would depend on it (agreement.py)."""
        apart = agreement.batches(model, self.pad_token)
        if apart == agreement.ANY:
            return self._generate_together(model, prompts, requests, key)
        batches: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            batches.setdefault(row if apart == agreement.ALONE else len(prompt), []).append(row)
        answers: dict[int, tuple[int, ...]] = {}
        for rows in batches.values():
            some = self._generate_together(
                model, [prompts[r] for r in rows], [requests[r] for r in rows], key
            )
            answers |= zip(rows, some, strict=True)
        return [answers[row] for row in range(len(prompts))]

    @torch.no_grad()
    def _generate_together(
        self,
        model: PreTrainedModel,
        prompts: list[tuple[int, ...]],
        requests: Sequence[Request],
        key: tuple[int, ...],
    ) -> list[tuple[int, ...]]:
        places = np.array([(request.group, request.sample) for request in requests], dtype=np.uint64)
        # (B, T)
        uniforms = seeds.uniforms(*key, ROLLOUT, places[:, :1], places[:, 1:], np.arange(self.max_new_tokens))
        pad, stops, length = self.pad_token, self.stops(model), max(map(len, prompts))
        different = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
        rows, attended = left_padded(list(different), pad, model.device)
        places_B = torch.tensor([different[prompt] for prompt in prompts], device=model.device)
        draw = PlacedSampler(torch.from_numpy(uniforms).to(model.device), self.temperature, self.vocab)
        # Greedy, since `draw` leaves one finite entry.
        greedy = GenerationConfig(
            max_new_tokens=self.max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=sorted(stops)
        )
        if self.shares_prompts and agreement.can_share_cache(model, pad):
            sampled = decode(model, rows, attended, places_B, greedy, draw)
        else:
            generate: Any = model.generate
            with generating_as(model, greedy):
                # generate syncs the ranks under FSDP by default, but some may have fewer tokens to sample,
                # or none.
                sampled = generate(
                    rows[places_B],
                    attention_mask=attended[places_B],
                    generation_config=greedy,
                    logits_processor=[draw],
                    synced_gpus=False,
                )[:, length:]
        return [_until_stop(row, stops) for row in sampled.tolist()]

    def _through_engine(
        self,
        engine: Engine,
        model: PreTrainedModel,
        prompts: list[tuple[int, ...]],
        requests: Sequence[Request],
        key: tuple[int, ...],
    ) -> list[tuple[int, ...]]:
        places = [
            int(seeds.mix(*key, ROLLOUT, request.group, request.sample) >> np.uint64(33))
            for request in requests
        ]
        stops = self.stops(model)
        answers = engine.generate(
            model, prompts, places, sorted(stops), self.max_new_tokens, self.temperature
        )
        return [_until_stop(list(answer), stops) for answer in answers]

    def _verified(
        self,
        task: Task,
        requests: Sequence[Request],
        prompts: list[tuple[int, ...]],
        answers: list[tuple[int, ...]],
        stops: set[int],
        key: tuple[int, ...],
    ) -> list[Rollout]:
        # Whichever token ended the answer, it is no part of its text.
        bodies = [tokens[:-1] if tokens[-1] in stops else tokens for tokens in answers]
        # The answers of a group agree more and more often.
        different: Any = list(dict.fromkeys(bodies))
        # Special tokens stay: a marker inside an answer is part of it. So does a space before a full stop.
        decoded = self.encoder.tokenizer.batch_decode(
            different, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        text_of = dict(zip(different, decoded, strict=True))
        groups = np.array([request.group for request in requests])
        samples = np.array([request.sample for request in requests])
        keys = seeds.mix(*key, FEEDBACK, groups, samples).tolist()
        rollouts = []
        for request, of, prompt, answer, body in zip(requests, keys, prompts, answers, bodies, strict=True):
            text = text_of[body]
            verdict = task.env(request.prompt.problem, of).verify(text)
            rollouts.append(
                Rollout(request.prompt, request.group, request.sample, prompt, answer, text, verdict)
            )
        return rollouts

    @property
    def pad_token(self) -> int:
        tokenizer = self.encoder.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def stops(self, model: PreTrainedModel) -> set[int]:
        """Return the end-of-sequence tokens of the tokenizer and of the model's generation config."""
        generation: Any = model.generation_config
        extra = generation.eos_token_id
        listed = extra if isinstance(extra, list) else [] if extra is None else [extra]
        return {self.encoder.tokenizer.eos_token_id, *listed}


class Engine(Protocol):
    """Another sampler: one answer per prompt, up to and including a stop; `places` seed the answers."""

    def generate(
        self,
        model: PreTrainedModel,
        prompts: list[tuple[int, ...]],
        places: list[int],
        stops: list[int],
        max_new_tokens: int,
        temperature: float,
    ) -> list[tuple[int, ...]]: ...


def make_engine(config: TrainConfig) -> Engine | None:
    """Make the configured engine; None for transformers. Raises ConfigError if vLLM is not installed."""
    return VllmEngine(config) if config.rollout_engine == "vllm" else None


def left_padded(prompts: Sequence[tuple[int, ...]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tokens and attention mask, (B, L): the last column predicts every row's next token."""
    length = max(map(len, prompts))
    tokens = [[pad] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    attended = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(tokens, device=device), torch.tensor(attended, device=device)


def _until_stop(tokens: list[int], stops: set[int]) -> tuple[int, ...]:
    end = next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))
    return tuple(tokens[:end])


def _chunks(items: Sequence[Request], size: int) -> Iterator[Sequence[Request]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def requests(prompts: Sequence[Prompt], samples: int, first_group: int = 0) -> list[Request]:
    """Return `samples` requests for each prompt."""
    return [
        Request(prompt, group, sample)
        for group, prompt in enumerate(prompts, first_group)
        for sample in range(samples)
    ]
