"""Count the graphs that torch.compile makes of the public functions over batches of many shapes."""

from inspect import isfunction

import pytest
import torch

from opsd_kernels import (
    DistillationHead,
    linear_divergence,
    linear_logprobs,
    linear_topk_divergence,
    weights,
)
from opsd_kernels.testing import assert_no_worse

V, H = 50, 8
# tokens, and valid tokens among them
BATCHES = [(17, 9), (64, 64), (65, 1), (130, 77), (33, 32), (256, 0)]


class Counting:
    """A backend that runs graphs eagerly and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def tensors(N: int, valid: int) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(N)
    hidden, teacher = (torch.randn(N, H, generator=gen) for _ in range(2))
    return {
        "hidden": hidden.requires_grad_(),
        "teacher": teacher,
        "labels": torch.randint(V, (N,), generator=gen),
        "mask": torch.arange(N) < valid,
        "per_token": 0.5 + torch.rand(N, generator=gen),
        "ids": torch.stack([torch.randperm(V, generator=gen)[:5] for _ in range(N)]),
        "logprobs": torch.full((N, 5), -2.0),
    }


W, WT = (torch.randn(V, H, generator=torch.Generator().manual_seed(i), requires_grad=i == 0) for i in (0, 1))


def divergence(**options):
    def call(f, x, N, valid):
        made = {name: value(x, N, valid) if isfunction(value) else value for name, value in options.items()}
        return f(x["hidden"], W, x["teacher"], WT, mask=x["mask"], **made)

    return linear_divergence, call


CALLS = {
    "plain": divergence(),
    "labels": divergence(labels=lambda x, N, valid: x["labels"]),
    "recompute": divergence(backward="recompute"),
    "per token": divergence(reduction="none"),
    "top k": divergence(topk=5),
    "weights of tokens": divergence(token_weights=lambda x, N, valid: x["per_token"]),
    "weights by position": divergence(token_weights=weights.ExponentialDecay(0.3)),
    "a count": divergence(normalizer=lambda x, N, valid: float(valid + 1)),
    "a count as a tensor": divergence(normalizer=lambda x, N, valid: torch.tensor(float(valid + 1))),
    "temperatures": divergence(temperature=lambda x, N, valid: x["per_token"]),
    "a temperature that changes": divergence(temperature=lambda x, N, valid: x["per_token"][0]),
    "log-probs": (linear_logprobs, lambda f, x, *_: f(x["hidden"], W, x["labels"], mask=x["mask"])),
    "list": (
        linear_topk_divergence,
        lambda f, x, *_: f(x["hidden"], W, x["ids"], x["logprobs"], mask=x["mask"]),
    ),
}


QUICK = ("plain", "labels", "temperatures", "list")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CALLS]
)
def test_two_graphs_at_most(name):
    """One for the first shape and one for all others, whatever the counts of tokens and valid tokens."""
    function, call = CALLS[name]
    torch._dynamo.reset()
    count = Counting()
    compiled = torch.compile(function, fullgraph=True, backend=count)
    for N, valid in BATCHES:
        x = tensors(N, valid)
        loss = call(compiled, x, N, valid).sum()
        expected = call(function, x, N, valid).sum()
        assert_no_worse(loss.detach(), expected.detach(), expected.detach())
        got, one = (torch.autograd.grad(value, [x["hidden"], W]) for value in (loss, expected))
        for a, b in zip(got, one, strict=True):
            assert_no_worse(a, b, b)
    assert count.graphs <= 2


@pytest.mark.parametrize(
    "teacher, buffer", [(False, False), (True, False), (True, True)], ids=["shared", "two heads", "a buffer"]
)
def test_heads_that_are_parameters_compile_whole(teacher, buffer):
    student, other = (torch.nn.Linear(H, V, bias=bias) for bias in (True, False))
    if buffer:
        other.weight, frozen = None, other.weight.detach()
        del other.weight
        other.weight = torch.nn.Buffer(frozen)
    head, x = DistillationHead(student), tensors(6, 6)

    def call():
        return head(x["hidden"], x["teacher"], teacher_head=other if teacher else None)

    torch._dynamo.reset()
    backend = Counting()
    compiled = torch.compile(call, fullgraph=True, backend=backend)()
    assert backend.graphs == 1 and torch.equal(compiled, call())
