"""A prompt that runs once for all its answers gives the states, gradients and samples of separate rows."""

import copy
import dataclasses

import pytest
import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
)

from opsd_kernels.testing import assert_no_worse, assert_same_bits
from opsd_kernels.train import shared_prompts
from opsd_kernels.train.batch import align
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.sampling import agreement
from opsd_kernels.train.sampling.decoding import SEGMENT, RowProcessor, decode
from opsd_kernels.train.sampling.rollout import requests
from opsd_kernels.train.shared_prompts import hidden_states, pack
from opsd_kernels.train.types import Context

ONE, OTHER, LONG = (3, 10, 11, 12, 13, 14, 4), (3, 12, 4, 9, 9), (3, 10, 11, 12, 13, 9, 9, 9, 4)
# In a mixed order, with answers of one token, which has no row of its own, and of many.
PROMPTS = [ONE, OTHER, ONE, LONG, OTHER, ONE, LONG]
ANSWERS = [(9, 10, 1), (11, 12, 13, 14), (1,), (10, 9, 1), (12, 1), (9, 10, 11, 12, 13, 1), (1,)]


@pytest.fixture
def side():
    return align(PROMPTS, ANSWERS, pad=0)


def known(values, answers=ANSWERS):
    return torch.cat([values[b, : len(answer)] for b, answer in enumerate(answers)])


def forwarded(model, run):
    """Return the number of tokens that `run` puts through the model, padding included."""
    count, embedding = 0, model.get_input_embeddings()

    def add(_, arguments):
        nonlocal count
        count += arguments[0].numel()

    hook = embedding.register_forward_pre_hook(add)
    run()
    hook.remove()
    return count


def states_and_gradients(model, side, share):
    model = copy.deepcopy(model)
    states = known(hidden_states(model, side, share))
    weights = torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)
    (states * weights).sum().backward()
    return [states.detach(), *(p.grad for p in model.model.parameters())]


@pytest.mark.parametrize("longest, shape", [(1024, (1, 26)), (8, (3, 12))])
def test_states_and_gradients_are_those_of_separate_rows(side, model, monkeypatch, longest, shape):
    monkeypatch.setattr(shared_prompts, "LONGEST", longest)  # answers of a prompt in several rows
    monkeypatch.setattr(shared_prompts, "LEAST_SAVED", -9.0)
    exact = states_and_gradients(copy.deepcopy(model).double(), side, False)
    packed = states_and_gradients(model, side, True)
    for mine, peer, truth in zip(packed, states_and_gradients(model, side, False), exact, strict=True):
        assert_no_worse(mine, peer, truth)
    assert pack(side).tokens_GL.shape == shape


def test_a_beginning_runs_once(side, model):
    """The tree of all rows: 3, then OTHER and LONG beside ONE, which parts from LONG after five tokens."""
    assert shared_prompts.can_share(model)
    assert forwarded(model, lambda: hidden_states(model, side)) == side.tokens_BL.numel()
    trees = {"OTHER": 5 + 3 + 1, "ONE": 6 + 5, "LONG": 4 + 2}
    assert forwarded(model, lambda: hidden_states(model, side, True)) == sum(trees.values())


def test_rows_that_share_too_little_stay_apart(model):
    side = align([(5, *ONE[1:]), OTHER, (6, *LONG[1:])], ANSWERS[:3], pad=0)
    assert pack(side) is None
    assert_same_bits(hidden_states(model, side, True), hidden_states(model, side))


def llama(**options):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=32, initializer_range=0.3, eos_token_id=1, pad_token_id=0, **sizes)
    config.update(options)
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def test_a_window_narrower_than_a_row_is_kept(side):
    wide, narrow = llama(sliding_window=side.tokens_BL.shape[1]), llama(sliding_window=5)
    for model, shares in ((wide, True), (narrow, False)):
        assert shared_prompts.can_share(model)
        tokens = forwarded(model, lambda model=model: hidden_states(model, side, True))
        assert (tokens < side.tokens_BL.numel()) == shares
    assert_same_bits(hidden_states(narrow, side, True), hidden_states(narrow, side))


OTHERS = {
    "recurrent": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2, initializer_range=0.3)
    ),
    # ALiBi: distances in the row, whatever the positions.
    "alibi": lambda: MptForCausalLM(
        MptConfig(vocab_size=32, d_model=16, n_layers=2, n_heads=2, initializer_range=0.3, max_seq_len=128)
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_that_cannot_share_reads_separate_rows(kind, side):
    torch.manual_seed(0)
    model = OTHERS[kind]().eval()
    assert not shared_prompts.can_share(model)
    assert_same_bits(hidden_states(model, side, True), hidden_states(model, side))


def test_samples_are_those_of_separate_prompts(model, sampler, task):
    asked = requests([task.env(problem, 0).prompt() for problem in task.train[:2]], 6)
    # A longer prompt for the second half, so that there is padding on the left.
    asked[6:] = [dataclasses.replace(request, context=Context(("123",))) for request in asked[6:]]
    apart = dataclasses.replace(sampler, max_new_tokens=20)
    shared = dataclasses.replace(apart, shares_prompts=True)
    assert agreement.batches(model, sampler.pad_token) == agreement.ANY
    assert agreement.can_share_cache(model, sampler.pad_token)
    alone, together = (each.sample(model, task, asked, 0, 7) for each in (apart, shared))
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    assert len({r.tokens for r in alone}) > 4
    answers, length = [len(r.tokens) for r in alone], max(len(r.prompt_tokens) for r in alone)
    assert min(answers) <= SEGMENT and max(answers) == 20, "some leave the batch, some stay to the end"
    counts = [forwarded(model, lambda s=s: s.sample(model, task, asked, 0, 7)) for s in (apart, shared)]
    # The last token of an answer predicts nothing.
    assert counts[0] == 12 * (length + 20 - 1)
    # A prompt less its last token once, and in each part the answers that had not ended before it.
    going = [sum(answer > done for answer in answers) for done in range(0, 20, SEGMENT)]
    assert counts[1] == 2 * (length - 1) + 8 * going[0] + 8 * going[1] + 4 * going[2]


@pytest.mark.parametrize("segment", [1, 3])
def test_answers_that_end_leave_the_batch(model, segment):
    """Greedy answers with many stops: those of separate prompts, up to their ends, whatever the part."""
    torch.manual_seed(1)
    rows, places = torch.randint(9, 29, (3, 5)), torch.tensor([0, 2, 1, 0])
    attended = torch.ones_like(rows)
    attended[1, :2] = 0
    settings = GenerationConfig(max_new_tokens=7, do_sample=False, pad_token_id=0, eos_token_id=[11, 13, 20])

    class Kept(RowProcessor):
        rows = torch.arange(4)

        def __call__(self, input_ids, scores):
            # Rows of one prompt differ.
            return scores + torch.linspace(0, 9, 29) * (self.rows == 3)[:, None]

        def keep(self, rows):
            self.rows = self.rows[rows]

    sampled = decode(model, rows, attended, places, settings, Kept(), segment)
    for b, place in enumerate(places):
        prompt = rows[place][attended[place] == 1][None]
        one = Kept()
        one.rows = torch.tensor([b])
        alone = model.generate(prompt, generation_config=settings, logits_processor=[one])[
            0, prompt.shape[1] :
        ]
        assert sampled[b].tolist() == alone.tolist() + [0] * (7 - len(alone))
    lengths = (sampled != 0).sum(1)
    assert lengths.min() < lengths.max()


def test_a_cache_that_cannot_be_cut_serves_no_sharing():
    torch.manual_seed(0)
    assert not agreement.can_share_cache(OTHERS["recurrent"]().eval(), 0)


def test_the_setting():
    assert not TrainConfig().shares_prompts
    assert TrainConfig(share_prompts=True).shares_prompts
    real = TrainConfig(model="some/model", env="secret_op")
    assert real.shares_prompts and not dataclasses.replace(real, share_prompts=False).shares_prompts
