"""Alignment: both sides predict the same tokens for prompts of any lengths."""

import copy

import pytest
import torch

from opsd_kernels.testing import assert_no_worse
from opsd_kernels.train.batch import IGNORE, completion_hidden, make_batch, micro_batches
from opsd_kernels.train.shared_prompts import hidden_states
from opsd_kernels.train.types import Prompt, Rollout, Verdict

PROMPTS = [(3, 10, 11, 4), (3, 12, 4), (3, 10, 11, 12, 13, 14, 4)]
TEACHER_PROMPTS = [(3, 10, 11, 5, 9, 6, 4), (3, 12, 5, 9, 9, 9, 6, 4), (3, 10, 4)]
COMPLETIONS = [(9, 10, 1), (11, 12, 13, 14), (1,)]


@pytest.fixture
def batch():
    rollouts = [
        Rollout(Prompt(i, ""), i, 0, p, c, "", Verdict(0.0, ""))
        for i, (p, c) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True))
    ]
    return make_batch(rollouts, TEACHER_PROMPTS, pad=0)


def test_labels_and_mask(batch):
    assert batch.labels_BT.tolist() == [[9, 10, 1, IGNORE], [11, 12, 13, 14], [1, IGNORE, IGNORE, IGNORE]]
    assert batch.mask_BT.equal(batch.labels_BT != IGNORE)
    assert batch.totals.tokens == 8


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_each_row_precedes_its_label(batch, side):
    sequences = getattr(batch, side)
    following = torch.cat([sequences.tokens_BL[:, 1:], torch.full((3, 1), -1)], 1)
    for b, completion in enumerate(COMPLETIONS):
        for t, token in enumerate(completion):
            row = int(sequences.rows_BT[b, t])
            seen = sequences.tokens_BL[b, : row + 1].tolist()
            assert seen == list((PROMPTS if side == "student" else TEACHER_PROMPTS)[b] + completion[:t])
            if t + 1 < len(completion):
                assert following[b, row] == token


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_hidden_states_equal_those_of_single_sequences(batch, side, model):
    def alone(model, b):
        prompt = (PROMPTS if side == "student" else TEACHER_PROMPTS)[b]
        return model.model(torch.tensor([prompt + COMPLETIONS[b]])).last_hidden_state[0, len(prompt) - 1 : -1]

    exact = copy.deepcopy(model).double()
    together = hidden_states(model, getattr(batch, side))
    for b, completion in enumerate(COMPLETIONS):
        assert_no_worse(together[b, : len(completion)], alone(model, b), alone(exact, b))


def test_micro_batches_partition_the_batch(batch):
    parts = list(micro_batches(batch, 2))
    assert [part.size for part in parts] == [2, 1]
    assert torch.cat([part.labels_BT for part in parts]).equal(batch.labels_BT)
    assert torch.cat([part.teacher.rows_BT for part in parts]).equal(batch.teacher.rows_BT)
    assert sum(part.totals.tokens for part in parts) == batch.totals.tokens


def test_completion_hidden_picks_rows():
    hidden = torch.arange(24.0).view(2, 4, 3)
    assert completion_hidden(hidden, torch.tensor([[0, 2], [3, 0]]))[:, :, 0].tolist() == [[0, 6], [21, 12]]


def test_an_empty_batch_is_an_error():
    with pytest.raises(ValueError, match="rollouts: expected at least one"):
        make_batch([], [], 0)
