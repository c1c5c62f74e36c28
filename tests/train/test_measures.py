"""The consensus of teachers: by hand, as a minimiser, as sampled by generate, and what its gap sees."""

import dataclasses
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import softmax

from opsd_kernels.integrations.transformers import Head
from opsd_kernels.train import seeds
from opsd_kernels.train.contexts import build_contexts
from opsd_kernels.train.distributed.sharding import last_hidden
from opsd_kernels.train.envs import make_task
from opsd_kernels.train.sampling import agreement
from opsd_kernels.train.sampling.rollout import requests
from opsd_kernels.train.studies import measures
from opsd_kernels.train.studies.measures import Views, consensus, consensus_answers, measure_consensus
from opsd_kernels.train.types import Context, Verdict

EXACT = 1e-12


def test_consensus_by_hand():
    """Two teachers of (.9, .1) and (.4, .6) as 3 : 1, and one alone."""
    rows = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]], dtype=torch.float64).log()
    shares = torch.tensor([0.75, 0.25, 1.0], dtype=torch.float64)
    group = torch.tensor([0, 0, 1])
    right, wrong = 0.9**0.75 * 0.4**0.25, 0.1**0.75 * 0.6**0.25
    geometric = consensus(rows, shares, group, 2, "reverse_kl").exp()
    assert geometric[0].tolist() == pytest.approx([right / (right + wrong), wrong / (right + wrong)])
    arithmetic = consensus(rows, shares, group, 2, "forward_kl").exp()
    assert arithmetic[0].tolist() == pytest.approx([0.75 * 0.9 + 0.25 * 0.4, 0.75 * 0.1 + 0.25 * 0.6])
    for one in (geometric, arithmetic):
        assert one[1].tolist() == pytest.approx([0.2, 0.8])


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_nothing_is_closer_to_the_teachers_than_their_consensus(kind):
    """No step in any direction lowers the mean divergence."""
    rng = torch.Generator().manual_seed(0)
    p = torch.randn(4, 7, generator=rng, dtype=torch.float64).log_softmax(-1)
    shares = softmax(torch.randn(4, generator=rng, dtype=torch.float64), 0)

    def far(logits):
        q = logits.log_softmax(-1)
        terms = q.exp() * (q - p) if kind == "reverse_kl" else p.exp() * (p - q)
        return (shares * terms.sum(-1)).sum()

    best = consensus(p, shares, torch.zeros(4, dtype=torch.int64), 1, kind)[0].requires_grad_()
    (gradient,) = torch.autograd.grad(far(best), best)
    assert gradient.abs().max() < EXACT
    steps = torch.randn(20, 7, generator=rng, dtype=torch.float64) / 10
    assert all(far(best + step) > far(best) for step in steps)


def test_a_place_where_the_contexts_err_is_outvoted():
    """Three copies of an answer, each with another wrong digit: each teacher is wrong, they agree on it."""
    copies = torch.tensor([[1, 2, 9], [1, 9, 3], [9, 2, 3]])
    logprobs = (
        torch.full((3, 3, 10), 1e-4, dtype=torch.float64).scatter_(2, copies[..., None], 1 - 9e-4).log()
    )
    shares, group = torch.full((3,), 1 / 3, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    agreed = torch.stack([consensus(logprobs[:, t], shares, group, 1, "reverse_kl")[0] for t in range(3)])
    assert agreed.argmax(-1).tolist() == [1, 2, 3] and agreed.amax(-1).exp().prod() > 0.8


def scored(model, prompt, answer):
    """The log-probs of the next token, by one forward."""
    hidden, _ = last_hidden(model, torch.tensor([[*prompt, *answer]]))
    return Head.of(model).logprobs(hidden[0, -1:]).double()[0]


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_answers_are_drawn_from_the_consensus(divergence, config, task, sampler, model):
    """Each token inverts the cumulative consensus of forwards on the context, the prompt and the answer."""
    config = dataclasses.replace(
        config, divergence=divergence, distill_temperature=1.5, teacher_temperature=0.8
    )
    sampler = dataclasses.replace(sampler, temperature=0.9, batch=5)
    prompts = [task.env(problem, 0).prompt() for problem in task.held_out[:3]]
    told = [("12?", "123", "wrong"), ("456",), ("78?", "wrong")]
    asked = []
    for prompt, texts in zip(prompts, told, strict=True):
        views = sampler.encode([(prompt, Context((), text)) for text in texts])
        shares = np.arange(1, len(texts) + 1) / sum(range(len(texts) + 1))
        asked.append(Views(prompt, dict(zip(views, shares.tolist(), strict=True))))
    found = consensus_answers(sampler, model, asked, 2, config, 7, 9)
    assert [len(answers) for answers in found] == [2, 2, 2]
    stops, differ = sampler.stops(model), set()
    for place, (one, answers) in enumerate(zip(asked, found, strict=True)):
        for number, answer in enumerate(answers):
            uniforms = seeds.uniforms(7, 9, place, number, np.arange(sampler.max_new_tokens))
            by_hand = []
            while len(by_hand) < sampler.max_new_tokens:
                rows = torch.stack([scored(model, view, by_hand) / 0.8 for view in one.shares])
                rows = rows[:, : sampler.vocab].log_softmax(-1)
                shares = torch.tensor(list(one.shares.values()), dtype=torch.float64)[:, None]
                mean = (
                    (shares * rows).sum(0)
                    if divergence == "reverse_kl"
                    else (shares * rows.exp()).sum(0).log()
                )
                target = (1.5 * mean.log_softmax(-1) / 0.9).softmax(-1)
                token = int((target.cumsum(-1) <= uniforms[len(by_hand)]).sum())
                if token in stops:
                    break
                by_hand.append(token)
            assert list(answer) == by_hand
            differ.add(answer)
    assert len(differ) >= 3


@contextmanager
def counted(monkeypatch):
    """Record the number of rows of each generate."""
    rows, padded = [], measures.left_padded
    monkeypatch.setattr(
        measures, "left_padded", lambda prompts, *more: rows.append(len(prompts)) or padded(prompts, *more)
    )
    yield rows


def test_a_group_is_never_split_and_a_batch_never_larger(config, task, sampler, model, monkeypatch):
    prompt = task.env(task.held_out[0], 0).prompt()
    many = [Views(prompt, {(5, place): 1 / 4 for place in range(4)})] * 3
    with counted(monkeypatch) as rows:
        consensus_answers(dataclasses.replace(sampler, batch=11), model, many, 1, config, 0)
    assert rows == [8, 4]
    with counted(monkeypatch) as rows:
        consensus_answers(dataclasses.replace(sampler, batch=3), model, many, 1, config, 0)
    assert rows == [4, 4, 4]


class Fixed:
    """A teacher that is the model itself."""

    def __init__(self, model):
        self.model = model

    @contextmanager
    def using(self):
        yield self.model


class Lenient:
    """A task that takes every answer of an odd number of words."""

    def __init__(self, task):
        self.held_out, self.made = task.held_out, task.env

    def env(self, problem, key):
        def verify(text):
            return Verdict(1.0) if len(text.split()) % 2 else Verdict(0.0, "wrong")

        return SimpleNamespace(prompt=self.made(problem, key).prompt, verify=verify)


def test_the_gap_is_that_of_its_accuracies(config, sampler, model, monkeypatch):
    """Three of four answers are right; the student's are now and then."""
    drawn = [row[:-1] for row in sampler.encoder.answer(["123", "123", "321", "12"])]
    monkeypatch.setattr(measures, "consensus_answers", lambda s, m, asked, *more: [drawn] * len(asked))
    config = dataclasses.replace(config, feedback="wrong", siblings=False)
    task = Lenient(make_task(config))
    found = measure_consensus(sampler, model, Fixed(model), task, config, 10 * measures.ATTEMPTS)
    assert found.taught == 1 and 0.05 < found.student.value < 0.7
    assert found.accuracy.value == 0.75
    assert found.gap.value == pytest.approx(0.75 - found.student.value) and found.gap.count == 10


def test_without_a_context_nothing_is_taught(config, sampler, model):
    """A lone sibling of groups of one: no context at all."""
    config = dataclasses.replace(config, feedback="none", group_size=1)
    found = measure_consensus(sampler, model, Fixed(model), make_task(config), config, 4 * measures.ATTEMPTS)
    assert (found.taught, found.gap.value) == (0, 0)


def test_contexts_are_those_of_training(config, sampler, model, monkeypatch):
    """Every context that build_contexts makes has its share, and equal ones are asked once."""
    config = dataclasses.replace(config, feedback="corrupted", siblings=False, group_size=3)
    task, seen = make_task(config), []

    def recorded(sampler, model, asked, answers, config, *key):
        seen.extend(asked)
        return [[(0,)] for _ in asked]

    monkeypatch.setattr(measures, "consensus_answers", recorded)
    measure_consensus(sampler, model, Fixed(model), task, config, 2 * measures.ATTEMPTS)
    prompts = [task.env(problem, 0).prompt() for problem in task.held_out[:2]]
    for place, one in enumerate(seen):
        views = []
        for turn in range(6):  # 16 attempts in groups of 3
            attempts = sampler.sample(
                model, task, requests(prompts, 3), config.seed, measures.CONSENSUS_KEY, turn
            )
            contexts = build_contexts(attempts, config, config.seed, measures.CONSENSUS_KEY, turn)
            views += [
                sampler.encode([(attempt.prompt, context)])[0]
                for attempt, context in zip(attempts, contexts, strict=True)
                if attempt.group == place and context is not None
            ]
        assert one.shares == pytest.approx({view: views.count(view) / len(views) for view in views})
        assert sum(one.shares.values()) == pytest.approx(1)
    assert len(seen) == 2 and all(len(set(one.shares.values())) > 1 for one in seen)


def test_a_model_that_cannot_read_padding_is_not_measured(config, task, sampler, model, monkeypatch):
    monkeypatch.setattr(measures.agreement, "batches", lambda *_: agreement.ONE_LENGTH)
    assert measure_consensus(sampler, model, Fixed(model), task, config, 32) is None
