"""Replies of vLLM and SGLang, recorded after their documentation, as teachers of linear_topk_divergence."""

import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from server_replies import (
    FlatLogprobs,
    RequestOutput,
    positions,
    sglang,
    through_json,
    vllm_batch_line,
    vllm_chat,
    vllm_completion,
    vllm_offline,
)

from opsd_kernels import linear_topk_divergence
from opsd_kernels.integrations.servers import read_jsonl, teacher_lists
from opsd_kernels.testing import assert_one_rounding
from opsd_kernels.testing.reference import linear_topk_divergence_reference

PAGE = Path(__file__).parent.parent.parent / "docs" / "integrations-servers.md"
B, T, V, H, K = 3, 5, 23, 8, 4
STARTS = [3, 6, 4]  # prompts of the teacher, which differ
LENGTHS = [5, 2, 4]  # completions


class Rollouts:
    """Sequences that a teacher scored, and the labels of the student."""

    def __init__(self) -> None:
        gen = torch.Generator().manual_seed(5)
        self.sequences = [
            torch.randint(V, (start + length,), generator=gen).tolist()
            for start, length in zip(STARTS, LENGTHS, strict=True)
        ]
        self.logprobs = [
            (3 * torch.randn(len(s) - 1, V, generator=gen)).log_softmax(-1) for s in self.sequences
        ]
        self.labels = torch.full((B, T), -100)
        for b, (start, length) in enumerate(zip(STARTS, LENGTHS, strict=True)):
            self.labels[b, :length] = torch.tensor(self.sequences[b][start:])
            # A token that the teacher finds unlikely, and its likeliest one.
            self.logprobs[b][start - 1, self.labels[b, 0]] = -30.0
            self.logprobs[b][start, self.labels[b, 1]] += 20.0
            self.logprobs[b] = self.logprobs[b].log_softmax(-1)
        self.labels[0, 2] = -100  # a tool's output

    def each(self, make, **options):
        return [make(s, rows, K, **options) for s, rows in zip(self.sequences, self.logprobs, strict=True)]

    def expected(self, k=None):
        """Dense lists (B, T, V): the log-probs of the K likeliest and, with `k` None, of the label."""
        dense, own = torch.full((B, T, V), -math.inf), torch.zeros(B, T)
        for b, t in (self.labels != -100).nonzero().tolist():
            row, label = self.logprobs[b][STARTS[b] + t - 1], int(self.labels[b, t])
            kept = row.topk(k or K).indices.tolist() + ([label] if k is None else [])
            dense[b, t, kept] = row[kept]
            own[b, t] = row[label]
        return dense, own


@pytest.fixture
def rollouts():
    return Rollouts()


def flat(sequence, logprobs, k):
    return RequestOutput("0", sequence, FlatLogprobs(positions(sequence, logprobs, k)), [])


REPLIES = {
    "vllm-offline": lambda r: r.each(vllm_offline),
    "vllm-flat": lambda r: r.each(flat),
    "vllm-completion": lambda r: [vllm_completion(r.sequences, r.logprobs, K)],
    "vllm-completion-without-ids": lambda r: [vllm_completion(r.sequences, r.logprobs, K, token_ids=False)],
    "vllm-chat": lambda r: r.each(vllm_chat),
    "vllm-batch": lambda r: r.each(vllm_batch_line),
    "sglang": lambda r: r.each(sglang),
    "sglang-list": lambda r: [r.each(sglang, text=True)],
    "sglang-later": lambda r: r.each(partial(sglang, start=2)),
}


@pytest.mark.parametrize("k", [None, 2, 9])
@pytest.mark.parametrize("name", REPLIES)
def test_replies_are_lists(rollouts, name, k):
    """K likeliest entries and the label beside them; `k` cuts both; a -100 inside a row stays empty."""
    replies = REPLIES[name](rollouts)
    if "offline" not in name and "flat" not in name:
        replies = through_json(replies)
    lists = teacher_lists(replies, rollouts.labels, STARTS, k=k)
    dense, own = rollouts.expected(2 if k == 2 else None)
    width = int((dense > -math.inf).sum(-1).max())
    assert lists.ids.shape == lists.logprobs.shape == (B, T, width) and lists.ids.dtype == torch.int64
    assert (lists.logprobs[..., 1:] <= lists.logprobs[..., :-1]).all()
    scattered = torch.full((B, T, V + 1), -math.inf)
    scattered.scatter_(-1, torch.where(lists.logprobs > -math.inf, lists.ids, V), lists.logprobs)
    assert torch.equal(scattered[..., :V], dense) and (lists.ids[lists.logprobs == -math.inf] == 0).all()
    assert torch.equal(lists.token_logprobs, own)
    sizes = (dense > -math.inf).sum(-1)[rollouts.labels != -100]
    assert k == 2 or {K, K + 1} == set(sizes.tolist())


@pytest.mark.parametrize("name", ["vllm-completion", "sglang"])
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "none"])
def test_the_loss_is_that_of_the_teacher(rollouts, name, tail):
    """Loss and gradients equal the reference's on lists that were never in a reply."""
    gen = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(B, T, H, generator=gen), torch.randn(V, H, generator=gen)
    dense, _ = rollouts.expected()
    everything = torch.arange(V).expand(B, T, V)
    lists = teacher_lists(REPLIES[name](rollouts), rollouts.labels, STARTS)
    outcomes = []
    for op, ids, logprobs, dtype in (
        (linear_topk_divergence, lists.ids, lists.logprobs, torch.float32),
        (linear_topk_divergence_reference, everything, dense, torch.float64),
    ):
        operands = [x.to(dtype).requires_grad_() for x in (hidden, head)]
        loss = op(*operands, ids, logprobs.to(dtype), labels=rollouts.labels, tail=tail)
        outcomes.append((loss, *torch.autograd.grad(loss, operands)))
    for actual, expected in zip(*outcomes, strict=True):
        assert expected.abs().max() > 0
        assert_one_rounding(actual, expected, torch.float32, magnitude=max(1.0, expected.abs().max().item()))


def test_the_label_alone(rollouts):
    """`prompt_logprobs=0`, and SGLang without top_logprobs_num, give the token's log-prob alone."""
    pairs = list(zip(rollouts.sequences, rollouts.logprobs, strict=True))
    for replies in ([vllm_completion(*zip(*pairs, strict=True), 0)], [sglang(*pair, 0) for pair in pairs]):
        lists = teacher_lists(replies, rollouts.labels, torch.tensor(STARTS))
        valid = rollouts.labels != -100
        assert lists.ids.shape == (B, T, 1) and torch.equal(lists.token_logprobs, rollouts.expected()[1])
        assert torch.equal(lists.ids[..., 0][valid], rollouts.labels[valid])


def test_minus_infinity_of_json(rollouts):
    """-9999 stands for -inf: a token without probability is padding, of which the rest is known."""
    label = int(rollouts.labels[0, 0])
    rollouts.logprobs[0][STARTS[0] - 1, label] = -math.inf
    for replies in ([vllm_completion(rollouts.sequences, rollouts.logprobs, K)], rollouts.each(vllm_offline)):
        lists = teacher_lists(replies, rollouts.labels, STARTS)
        assert lists.token_logprobs[0, 0] == -math.inf
        assert not (lists.ids[0, 0][lists.logprobs[0, 0] > -math.inf] == label).any()
        assert (lists.logprobs[0, 0] > -math.inf).sum() == K


def shifted(rollouts, replies):
    return teacher_lists(replies, rollouts.labels, [STARTS[0], STARTS[1] - 1, STARTS[2]])


@pytest.mark.parametrize("name", REPLIES)
def test_a_wrong_alignment_names_position_and_tokens(rollouts, name):
    """The second sequence is read one position early; without ids in the reply the entries tell."""
    expected, got = int(rollouts.labels[1, 0]), rollouts.sequences[1][STARTS[1] - 1]
    assert expected not in rollouts.logprobs[1][STARTS[1] - 2].topk(K).indices and expected != got
    message = f"token {expected} at position {STARTS[1] - 1} (labels[1, 0]), got token {got}"
    if "without" in name:
        message = (
            f"token {expected} among the log-probs at position {STARTS[1] - 1} (labels[1, 0]), got entries"
        )
    with pytest.raises(ValueError, match=re.escape(message)):
        shifted(rollouts, REPLIES[name](rollouts))


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda r: r[:2], "replies: expected 3 sequences, as labels, got 2"),
        (lambda r: [{"text": "x"}, *r[1:]], r"replies\[0\]: expected a reply of vLLM .*, got text"),
        (lambda r: [r[0], r[1] | {"prompt_logprobs": r[1]["prompt_logprobs"][:-1]}, r[2]],
         r"replies\[1\]: expected prompt_logprobs of all 8 tokens in prompt_token_ids, got 7"),
        (lambda r: [r[0] | {"prompt_logprobs": [0.5] * 8}, *r[1:]],
         r"replies\[0\]: expected prompt_logprobs with a dict from token id to logprob"),
        (lambda r: [{"meta_info": {"prompt_tokens": 8}}, *r[1:]],
         r"replies\[0\]: expected input_token_logprobs in meta_info: .* got prompt_tokens"),
        (lambda r: [vllm_batch_line([1], None, 1, status=400), *r[1:]],
         r"replies\[0\]: expected a response with status 200"),
    ],
)  # fmt: skip
def test_replies_of_another_kind(rollouts, change, match):
    with pytest.raises(ValueError, match=match):
        teacher_lists(change(rollouts.each(vllm_chat)), rollouts.labels, STARTS)


def test_positions_without_a_distribution(rollouts):
    replies = rollouts.each(partial(sglang, start=STARTS[2]))
    rollouts.labels[0, 0] = -100
    match = r"replies\[0\]: expected log-probs at position 4 \(labels\[0, 1\]\)"
    with pytest.raises(ValueError, match=match):
        teacher_lists(replies, rollouts.labels, STARTS)
    match = r"replies\[2\]: .* reaches position 8 \(labels\[2, 0\]\), got 8 positions"
    with pytest.raises(ValueError, match=match):
        teacher_lists(rollouts.each(vllm_offline), rollouts.labels, [3, 6, 8])


@pytest.mark.parametrize("scale, shift", [(-1.0, 0.0), (1.0, 4.0), (math.nan, 0.0)])
def test_values_that_are_no_logprobs(rollouts, scale, shift):
    """Logits (`logprobs_mode`), probabilities above 1 and NaN raise."""
    rollouts.logprobs[2] = scale * rollouts.logprobs[2] + shift
    with pytest.raises(ValueError, match=r"replies\[2\]: expected log-probs, with a sum of probabilities of"):
        teacher_lists(rollouts.each(vllm_offline), rollouts.labels, STARTS)


def write(path, values):
    path.write_text("\n".join(v if isinstance(v, str) else json.dumps(v) for v in values) + "\n")
    return path


@pytest.mark.parametrize("name", [name for name in REPLIES if name not in ("vllm-offline", "vllm-flat")])
def test_a_file_of_replies(rollouts, name, tmp_path):
    replies = REPLIES[name](rollouts)
    replies[0]["note" if isinstance(replies[0], dict) else 0] = (
        "a line\u2028inside" if isinstance(replies[0], dict) else replies[0][0]
    )
    path = write(tmp_path / "teacher.jsonl", [replies[0], "", *replies[1:]])
    found = teacher_lists(read_jsonl(path), rollouts.labels, STARTS)
    expected = teacher_lists(replies, rollouts.labels, STARTS)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_errors_of_a_file_name_the_line(rollouts, tmp_path):
    replies = rollouts.each(sglang)
    path = write(tmp_path / "teacher.jsonl", replies)
    with pytest.raises(ValueError, match=r"teacher.jsonl:2: expected token \d+ at position 5"):
        shifted(rollouts, read_jsonl(path))
    write(path, [replies[0], "{"])
    with pytest.raises(ValueError, match=r"teacher.jsonl:2: expected a JSON value, got Expecting property"):
        read_jsonl(path)
    write(path, [replies[0], "", {"error": "busy"}])
    with pytest.raises(ValueError, match=r"teacher.jsonl:3: expected a reply of vLLM .* got error"):
        read_jsonl(path)


def test_bad_arguments(rollouts):
    replies = rollouts.each(sglang)
    with pytest.raises(ValueError, match=r"labels: expected a tensor \(B, T\)"):
        teacher_lists(replies, rollouts.labels[0], 3)
    with pytest.raises(ValueError, match="k: expected at least 1, or None, got 0"):
        teacher_lists(replies, rollouts.labels, STARTS, k=0)


@pytest.mark.parametrize(
    "told, error, match",
    [
        ({"starts": [3, 6]}, ValueError, r"starts: expected one int, or 3 of them, got shape \(2,\)"),
        ({"starts": [3]}, ValueError, r"starts: expected one int, or 3 of them, got shape \(1,\)"),
        ({"starts": torch.ones(3, 1).long()}, ValueError, r"starts: .*, got shape \(3, 1\)"),
        ({"starts": 1.0}, TypeError, "starts: expected one int, or 3 of them, got 1.0$"),
        ({"starts": True}, TypeError, "starts: expected one int, or 3 of them, got True$"),
        ({"starts": torch.ones(3)}, TypeError, r"starts: expected one int, or 3 of them, got tensor\("),
        ({"starts": [3, 6.0, 4]}, TypeError, r"starts: .*, got \[3, 6.0, 4\]"),
        ({"starts": "3"}, TypeError, "starts: expected one int, or 3 of them, got '3'"),
        ({"starts": None}, TypeError, "starts: expected one int, or 3 of them, got None"),
        ({"k": "2"}, TypeError, "k: expected an int or None, got str"),
        ({"k": 2.5}, TypeError, "k: expected an int or None, got float"),
        ({"k": True}, TypeError, "k: expected an int or None, got bool"),
    ],
)
def test_starts_and_k_are_ints(rollouts, told, error, match):
    with pytest.raises(error, match=f"^{match}"):
        teacher_lists(rollouts.each(sglang), rollouts.labels, **{"starts": STARTS, **told})


def test_no_sequence_and_no_label():
    empty = teacher_lists([], torch.empty(0, 4, dtype=torch.long), 0)
    assert empty.ids.shape == (0, 4, 1)
    ignored = teacher_lists([sglang([1, 2], torch.zeros(1, V), 1)], torch.full((1, 2), -100), 0)
    assert (ignored.logprobs == -math.inf).all() and (ignored.token_logprobs == 0).all()


def test_the_page_runs(rollouts):
    """The code of docs/integrations-servers.md, on a batch of every kind of reply."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    gen = torch.Generator().manual_seed(1)
    hidden, head = (torch.randn(*shape, generator=gen, requires_grad=True) for shape in ((B, T, H), (V, H)))
    session = {"student_hidden": hidden, "student_head": head, "labels": rollouts.labels}
    losses = []
    for make in REPLIES.values():
        exec(block, session | {"replies": make(rollouts), "prompt_lengths": STARTS, "losses": losses})
        losses.append(hidden.grad.clone())
        hidden.grad = None
    assert losses[0].abs().max() > 0
    assert all(torch.equal(losses[0], other) for other in losses[1:])
