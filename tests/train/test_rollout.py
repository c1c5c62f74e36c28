"""Sampling: a rollout depends on its place alone, and follows the model's distribution."""

import copy
import dataclasses
import tracemalloc

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opsd_kernels.train import seeds
from opsd_kernels.train.batch import make_batch
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.contexts import build_contexts
from opsd_kernels.train.envs.verifiers import exact
from opsd_kernels.train.sampling import prompts
from opsd_kernels.train.sampling.prompts import PromptEncoder
from opsd_kernels.train.sampling.rollout import PlacedSampler, Request, requests
from opsd_kernels.train.types import Context, Prompt


@pytest.fixture
def asked(task):
    prompts = [task.env(problem, 0).prompt() for problem in task.train[:6]]
    contexts = [None, Context(("123",)), Context((), "wrong")]
    return [
        dataclasses.replace(request, context=contexts[request.group % 3]) for request in requests(prompts, 3)
    ]


def test_rollouts_do_not_depend_on_their_batch(sampler, model, task, asked):
    together = sampler.sample(model, task, asked, 0, 1)
    assert len({rollout.tokens for rollout in together}) > 8
    assert dataclasses.replace(sampler, batch=4).sample(model, task, asked, 0, 1) == together
    assert sampler.sample(model, task, asked[::-1], 0, 1)[::-1] == together
    assert sampler.sample(model, task, asked, 0, 2) != together


def test_rollouts_keep_the_models_own_tokens(sampler, model, task, asked, encoder):
    for rollout in sampler.sample(model, task, asked, 0, 1):
        assert 1 <= len(rollout.tokens) <= sampler.max_new_tokens
        assert encoder.tokenizer.eos_token_id not in rollout.tokens[:-1]
        assert rollout.text == encoder.tokenizer.decode(
            [t for t in rollout.tokens if t != encoder.tokenizer.eos_token_id]
        )


def test_generation_follows_the_full_forward(sampler, model, task, asked):
    """Each token equals the draw from a plain forward over the sequence so far, without cache or padding."""
    for rollout, request in zip(sampler.sample(model, task, asked, 5), asked, strict=True):
        sequence = torch.tensor([rollout.prompt_tokens + rollout.tokens])
        probs = model(sequence).logits[0, len(rollout.prompt_tokens) - 1 : -1].double().softmax(-1).cumsum(-1)
        at = torch.from_numpy(
            seeds.uniforms(5, 1, request.group, request.sample, np.arange(len(rollout.tokens)))
        )[:, None]
        assert torch.searchsorted(probs, at, right=True)[:, 0].tolist() == list(rollout.tokens)


class Products(TorchDispatchMode):
    """Notes how many heads an operator that multiplies by a head, given as (V, H), has in its operand."""

    def __init__(self, head):
        super().__init__()
        self.head, self.heads = head, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if len(args) == 2 and getattr(args[1], "shape", ())[-2:] == self.head.shape[::-1]:
            self.heads.add(args[1].numel() // self.head.numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shares_prompts", [True, False])
def test_a_frozen_head_is_not_copied_for_each_prompt(sampler, model, task, asked, shares_prompts):
    """A batch of products copies a 16-bit head for each prompt on a CPU."""
    model.requires_grad_(False)
    sampler = dataclasses.replace(sampler, shares_prompts=shares_prompts)
    with Products(model.get_output_embeddings().weight) as products:
        sampler.sample(model, task, asked, 0, 1)
    assert products.heads == {1}


def test_the_models_own_generation_settings_stay_out(sampler, model, task, asked):
    plain = sampler.sample(model, task, asked, 0, 1)
    model.generation_config.repetition_penalty, model.generation_config.min_length = 9.0, 20
    assert sampler.sample(model, task, asked, 0, 1) == plain
    assert model.generation_config.repetition_penalty == 9.0
    model.generation_config.eos_token_id = [1, plain[0].tokens[0]]  # a second end of a turn counts
    assert sampler.sample(model, task, asked, 0, 1)[0].tokens == plain[0].tokens[:1]


@pytest.mark.parametrize("listed", [True, False])
def test_a_stop_of_the_generation_config_is_no_part_of_the_text(sampler, model, asked, task, encoder, listed):
    """A second end of a turn, as of Gemma and Phi-3: cut, not decoded, rewarded without, and a label."""
    eos = encoder.tokenizer.eos_token_id
    plain = sampler.sample(model, task, asked, 0, 1)[0]
    other = plain.tokens[1]
    assert eos not in plain.tokens[:2] and other != plain.tokens[0]
    model.generation_config.eos_token_id = [eos, other] if listed else other
    right = encoder.tokenizer.decode(plain.tokens[:1])

    class Judge:
        def env(self, problem, key):
            return self

        def verify(self, text):
            return exact(text, {"answer": right})

    rollout = sampler.sample(model, Judge(), asked, 0, 1)[0]
    assert rollout.tokens == plain.tokens[:2] and rollout.text == right and rollout.verdict.success
    assert make_batch([rollout], [rollout.prompt_tokens], 0).labels_BT.tolist() == [list(rollout.tokens)]
    assert build_contexts([dataclasses.replace(rollout, sample=9), rollout], TrainConfig(), 0)[1] == Context(
        (right,)
    )


def test_placed_sampler_draws_the_distribution():
    """Shares of 40000 draws are within five standard deviations of the probabilities."""
    draws, logits = 40_000, torch.tensor([1.0, 0.0, -torch.inf, 2.0])
    uniforms = torch.from_numpy(seeds.uniforms(1, np.arange(draws)[:, None], np.arange(1)))
    chosen = PlacedSampler(uniforms, 0.7)(torch.empty(draws, 0), logits.expand(draws, 4)).argmax(-1)
    share, probability = chosen.bincount(minlength=4) / draws, (logits / 0.7).softmax(-1)
    assert share[2] == 0
    assert ((share - probability).abs() <= 5 * (probability * (1 - probability) / draws).sqrt()).all()


def test_places_are_independent():
    keys = seeds.mix(np.arange(50)[:, None, None], np.arange(50)[:, None], np.arange(50)).ravel()
    assert len(set(keys.tolist())) == keys.size
    assert seeds.shuffled(range(100), 1) != seeds.shuffled(range(100), 2)
    assert sorted(seeds.shuffled(range(100), 1)) == list(range(100))


def test_a_model_that_is_broken_does_not_break_sampling(sampler, model, task):
    model.lm_head.weight.data.fill_(torch.nan)
    rollouts = sampler.sample(model, task, [Request(task.env(1, 0).prompt(), 0, 0)], 0)
    assert len(rollouts[0].tokens) == sampler.max_new_tokens


TEMPLATES = {
    "verbatim": "{% for m in messages %}<user>{{ m.content }}{% endfor %}<assistant>",
    "trims": "{% for m in messages %}<user> {{ m.content | trim }}{% endfor %}<assistant>",
    "changes": "{% for m in messages %}<user>{{ m.content | replace('<', '(') }}{% endfor %}<assistant>",
    "capitals": "{% for m in messages %}<user>{{ m.content | upper }}{% endfor %}<assistant>",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_short_cut_around_the_chat_template_is_none(name, encoder, task):
    """The template is bypassed only for turns on which the result is equal."""
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.chat_template = TEMPLATES[name]
    quick = PromptEncoder(tokenizer, task.template)
    assert (quick.frame is None) == (name in ("changes", "capitals"))
    texts = ["21*43", " 21*43 ", "1\n2", "<solve> right", "", "21*43"]
    prompts = [Prompt(i, text) for i, text in enumerate(texts)] + [
        Prompt(9, "1*2", ({"role": "user", "content": "3*4"},))
    ]
    whole = [
        tokenizer.apply_chat_template(
            [*p.before, {"role": "user", "content": p.text}], tokenize=False, add_generation_prompt=True
        )
        for p in prompts
    ]
    expected = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in whole]
    assert quick.encode(prompts, [None] * len(prompts)) == expected
    assert quick.encode(prompts[::-1], [None] * len(prompts)) == expected[::-1]


def test_encoded_turns_are_kept_up_to_a_number_of_bytes(encoder, task, monkeypatch):
    """A group and the next step find their turns; long ones do not add up to the memory of the host."""
    monkeypatch.setattr(prompts, "REMEMBERED_BYTES", 1 << 20)
    tokenizer, calls = copy.deepcopy(encoder.tokenizer), []
    # Ids above 256, for each of which Python makes an object.
    real = PromptEncoder(tokenizer, task.template)

    class Counting:
        def __call__(self, texts, **options):
            calls.extend(map(len, texts))
            return {"input_ids": [[1000 + i for i in range(len(text))] for text in texts]}

    real.tokenizer = Counting()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for problem in range(200):
            asked = [Prompt(problem, f"{problem}+" + "1" * 4096)] * 3
            assert real.encode(asked, [None] * 3) == real.encode(asked, [None] * 3)
            held = tracemalloc.get_traced_memory()[0] - before
            assert held < 1.5 * (1 << 20), f"{held} bytes after {problem} turns"
    finally:
        tracemalloc.stop()
    assert 200 <= len(calls) < 250, "a turn is encoded once, and once more where the cache was emptied"
