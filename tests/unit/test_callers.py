"""Test the public functions with the tensors that callers bring: of inference mode, meta, sparse, subclasses.

Also empty steps, lists with repeated ids, and second derivatives.
"""

import math

import pytest
import torch
from torch.masked import masked_tensor
from torch.nn.parameter import UninitializedParameter

from opsd_kernels import (
    DistillationHead,
    linear_divergence,
    linear_logprobs,
    linear_topk_divergence,
    weights,
)
from opsd_kernels.objectives import PPOClip, linear_policy_divergence
from opsd_kernels.spec import TAILS
from opsd_kernels.testing import assert_no_worse, assert_same_bits
from opsd_kernels.testing.reference import linear_logprobs_reference, linear_topk_divergence_reference

B, T, V, H = 3, 4, 37, 8
N = B * T
GATE = weights.EntropyGate("teacher", below=2.0)


def inputs(frozen: bool = False) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(1)
    h, W, t, Wt = (torch.randn(*shape, generator=gen) for shape in ((B, T, H), (V, H)) * 2)
    labels = torch.randint(V, (B, T), generator=gen)
    logprobs, ids = (t @ Wt.T).log_softmax(-1).topk(5)
    given = {"h": h.requires_grad_(), "W": W.requires_grad_(not frozen), "t": t, "Wt": Wt, "labels": labels}
    given |= {"bias": torch.randn(V, generator=gen), "mask": torch.rand(B, T, generator=gen) < 0.8}
    return given | {"ids": ids, "logprobs": logprobs, "per_token": torch.rand(B, T, generator=gen)}


def both(x, **options):
    bias = {"teacher_bias": x["bias"], "labels": x["labels"], "mask": x["mask"]}
    return linear_divergence(x["h"], x["W"], x["t"], x["Wt"], **bias, **options)


def policy(x, **options):
    term = PPOClip(x["per_token"], -6 * x["per_token"])
    call = {"labels": x["labels"], "mask": x["mask"], "policy": term, **options}
    return linear_policy_divergence(x["h"], x["W"], x["t"], x["Wt"], **call)


def listed(x, **options):
    call = {"mask": x["mask"], "token_weights": x["per_token"], **options}
    return linear_topk_divergence(x["h"], x["W"], x["ids"], x["logprobs"], **call)


def logprobs(x, **options):
    return linear_logprobs(x["h"], x["W"], x["labels"], bias=x["bias"], mask=x["mask"], **options)


# Every route of every public function: its loss from `inputs`.
ROUTES = {
    "in forward": both,
    "recompute": lambda x: both(x, backward="recompute"),
    "per token": lambda x: both(x, reduction="none").sum(),
    "weights from statistics": lambda x: both(x, token_weights=GATE),
    "weights of tokens": lambda x: both(x, token_weights=x["per_token"], backward="recompute"),
    "top k": lambda x: both(x, topk=5, backward="recompute"),
    "policy": policy,
    "list": listed,
    "list, recompute": lambda x: listed(x, backward="recompute"),
    "log-probs": lambda x: logprobs(x).sum(),
    "entropy": lambda x: sum(logprobs(x, return_entropy=True)).sum(),
}
ONE_SIDE = ("list", "list, recompute", "log-probs", "entropy")


def gradients(loss, x):
    return torch.autograd.grad(loss, [leaf for leaf in (x["h"], x["W"]) if leaf.requires_grad])


# ---------------------------------------------------------------- tensors of inference mode


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("route", ROUTES)
def test_tensors_made_in_inference_mode(route, frozen):
    """All but the student's own tensors come from inference mode: values and gradients are the same bits."""
    x = inputs(frozen)
    expected = ROUTES[route](x)
    with torch.inference_mode():
        leaves = ("h",) if frozen else ("h", "W")
        made = {name: value if name in leaves else value.clone() for name, value in x.items()}
    if frozen:
        assert made["W"].is_inference()
    got = ROUTES[route](made)
    assert_same_bits(got, expected)
    for one, other in zip(gradients(got, made), gradients(expected, x), strict=True):
        assert_same_bits(one, other)


def test_a_module_with_a_teacher_of_inference_mode():
    x, head = inputs(), DistillationHead(torch.nn.Linear(H, V), backward="recompute")
    with torch.inference_mode():
        teacher = x["t"].clone()
    head(x["h"], teacher).backward()
    assert head.lm_head.weight.grad.isfinite().all()


def test_a_call_inside_inference_mode():
    x = inputs()
    with torch.inference_mode():
        values = [call(x) for call in ROUTES.values()]
    for call, value in zip(ROUTES.values(), values, strict=True):
        expected = call(x).detach()
        assert_no_worse(value, expected, expected)


# ---------------------------------------------------------------- empty steps


@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0), torch.tensor(0.0)], ids=repr)
@pytest.mark.parametrize("call", [both, policy, listed])
def test_an_empty_step(call, zero):
    """A global count of 0 tokens: loss and gradients of 0, attached to the graph, by every route."""
    routes = [{}] if call is policy else [{}, {"backward": "recompute"}, {"token_weights": GATE}]
    for how in routes if call is both else routes[:2]:
        x = inputs() | {"mask": torch.zeros(B, T, dtype=torch.bool)}
        loss = call(x, normalizer=zero, **how)
        assert loss.requires_grad and loss == 0
        for gradient in gradients(loss, x):
            assert (gradient == 0).all()


# ---------------------------------------------------------------- lists with repetitions


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "none"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_an_id_counts_once(tail, divergence, backend):
    """Servers append the sampled token, which may be in the list: the value is that of the plain list."""
    x = inputs()
    how = {"divergence": divergence, "tail": tail, "backend": backend}
    sets = [
        (torch.cat([x["ids"], x["ids"][..., :1]], -1), [0, 1, 2, 3, 4, 0]),
        (torch.cat([x["ids"][..., 3:4], x["ids"]], -1), [3, 0, 1, 2, 3, 4]),
        (x["ids"][..., [0, 1, 1, 2, 1, 3, 4, 0]], [0, 1, 1, 2, 1, 3, 4, 0]),
    ]
    for backward in ("auto", "recompute"):
        once = listed(x, **how, backward=backward)
        for ids, order in sets:
            repeated = listed(
                x | {"ids": ids, "logprobs": x["logprobs"][..., order]}, **how, backward=backward
            )
            pairs = zip((repeated, *gradients(repeated, x)), (once, *gradients(once, x)), strict=True)
            for got, expected in pairs:
                assert_no_worse(got.detach(), expected.detach(), expected.detach())
            once = listed(x, **how, backward=backward)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "tvd"])
def test_repeated_ids_are_those_of_the_reference(tail, divergence, backend):
    """An id that comes again has another log-prob, or comes after padding of the same id."""
    x = inputs()
    order = [0, 0, 1, 2, 1, 3, 0]
    x |= {"ids": x["ids"][..., order], "logprobs": x["logprobs"][..., order] - torch.linspace(0, 1, 7)}
    x["logprobs"][..., 0] = -math.inf
    wide = {name: value.double() if value.is_floating_point() else value for name, value in x.items()}
    how = {"divergence": divergence, "tail": tail, "token_weights": None}
    loss = listed(x, **how, backend=backend)
    outcomes = [(loss, *gradients(loss, x))]
    for given in (x, wide):
        tensors = given["h"], given["W"], given["ids"], given["logprobs"]
        loss = linear_topk_divergence_reference(*tensors, mask=given["mask"], **how)
        outcomes.append((loss, *gradients(loss, given)))
    for ours, peer, truth in zip(*outcomes, strict=True):
        assert_no_worse(ours, peer, truth)


def test_padding_may_repeat_ids():
    x = inputs()
    expected = listed(x).detach()
    for fill in (0, -1, V + 5):
        ids = torch.cat([x["ids"], torch.full((B, T, 3), fill)], -1)
        padded = torch.cat([x["logprobs"], torch.full((B, T, 3), -math.inf)], -1)
        got = listed(x | {"ids": ids, "logprobs": padded}).detach()
        assert_no_worse(got, expected, expected)
    first = torch.cat([x["ids"][..., :1], x["ids"]], -1)
    hidden = torch.cat([torch.full((B, T, 1), -math.inf), x["logprobs"]], -1)
    got = listed(x | {"ids": first, "logprobs": hidden}).detach()
    assert_no_worse(got, expected, expected)


# ---------------------------------------------------------------- second derivatives


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("route", ROUTES)
def test_second_derivatives_are_refused(route, frozen):
    """A gradient penalty raises wherever it is differentiated, also beside a term that has derivatives."""
    x = inputs(frozen)
    first = gradients(ROUTES[route](x), x)
    # A fresh graph: create_graph keeps it for the second pass.
    made = torch.autograd.grad(ROUTES[route](x), x["h"], create_graph=True)[0]
    assert made.requires_grad
    assert_same_bits(made.detach(), first[0])
    penalty = made.square().sum()
    for leaf in [x["h"]] if frozen else [x["h"], x["W"]]:
        with pytest.raises(RuntimeError, match="second derivatives"):
            torch.autograd.grad(penalty + leaf.square().sum(), leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        (penalty + x["h"].square().sum()).backward()


def test_create_graph_without_a_second_derivative():
    """Other terms keep their second derivatives."""
    x = inputs()
    loss = both(x) + x["h"].pow(3).sum()
    made = torch.autograd.grad(loss, x["h"], create_graph=True)[0]
    assert made.requires_grad
    other = torch.autograd.grad(x["h"].pow(3).sum(), x["h"], create_graph=True)[0]
    assert torch.equal(torch.autograd.grad(other.sum(), x["h"])[0], 6 * x["h"])


# ---------------------------------------------------------------- no plain tensors


@pytest.mark.parametrize("route", ROUTES)
def test_meta_tensors_give_shapes(route):
    x = inputs()
    meta = {name: value.detach().to("meta") for name, value in x.items()}
    for name in ("h", "W"):
        meta[name].requires_grad_()
    got, expected = ROUTES[route](meta), ROUTES[route](x)
    assert got.is_meta and got.shape == expected.shape and got.dtype == expected.dtype
    for one, other in zip(gradients(got, meta), gradients(expected, x), strict=True):
        assert one.is_meta and one.shape == other.shape and one.dtype == other.dtype


class Unknown(torch.Tensor):
    """A tensor without data of its own, as quantised ones are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(f"{function} of an unknown tensor")

    def __repr__(self, **_):
        return "Unknown()"


STRANGE = {
    "sparse": (lambda x: x.to_sparse(), "sparse_coo"),
    "sparse rows": (lambda x: x.reshape(-1, x.shape[-1]).to_sparse_csr(), "sparse_csr"),
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), "nested"),
    "jagged": (lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged), "nested"),
    "masked": (lambda x: masked_tensor(x, torch.ones_like(x, dtype=torch.bool)), "MaskedTensor"),
    "unknown": (Unknown, "Unknown"),
    "lazy": (lambda x: UninitializedParameter(), "UninitializedParameter"),
    "no tensor": (lambda x: x.tolist(), "list"),
}
# argument: the name of the tensor in `inputs`, and the calls that take it
ARGUMENTS = {
    "student_hidden": ("h", both),
    "student_weight": ("W", both),
    "teacher_hidden": ("t", both),
    "teacher_weight": ("Wt", both),
    "teacher_bias": ("bias", both),
    "labels": ("labels", both),
    "mask": ("mask", both),
    "token_weights": ("per_token", lambda x: both(x, token_weights=x["per_token"])),
    "teacher_topk_ids": ("ids", listed),
    "teacher_topk_logprobs": ("logprobs", listed),
    "hidden": ("h", logprobs),
    "weight": ("W", logprobs),
    "bias": ("bias", logprobs),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_other_tensors_are_refused_by_name(argument, strange):
    make, came = STRANGE[strange]
    name, call = ARGUMENTS[argument]
    x = inputs()
    if strange in ("sparse rows", "nested", "jagged") and name == "bias":
        pytest.skip("a bias has one dimension")
    x[name] = make(x[name].detach())
    with pytest.raises(TypeError, match=f"^{argument}: expected .*{came}"):
        call(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strange", ["sparse", "masked", "unknown", "no tensor"])
def test_tensors_of_terms_and_weights_are_refused_by_name(strange):
    make, came = STRANGE[strange]
    given = make(torch.rand(B, T))
    for argument, call in {
        "advantages": lambda: PPOClip(given),
        "old_logprobs": lambda: weights.ImportanceRatio(given),
        "weights": lambda: weights.Given(given),
    }.items():
        with pytest.raises(TypeError, match=f"^{argument}: expected .*{came}"):
            call()


def test_subclasses_that_are_plain_tensors_work():
    class Named(torch.Tensor):
        """Without a dispatch of its own."""

    x = inputs()
    named = {name: value.detach().as_subclass(Named) for name, value in x.items()}
    named["W"] = torch.nn.Parameter(x["W"].detach())
    assert_same_bits(both(named).as_subclass(torch.Tensor).detach(), both(x).detach())


@pytest.mark.parametrize("route", ["in forward", "log-probs", "policy", "list"])
def test_a_head_in_fp32_over_a_16_bit_trunk(route):
    """As `lm_head.float()` leaves a bf16 model: the rows are cast, their gradients come back in bf16."""
    x = inputs()
    run = {"in forward": both, "log-probs": lambda x: logprobs(x).sum(), "policy": policy, "list": listed}[
        route
    ]
    trunk = {name: x[name].detach().bfloat16() for name in ("h", "t")}
    narrow = x | {"h": trunk["h"].clone().requires_grad_(), "t": trunk["t"]}
    wide = x | {"h": trunk["h"].float().requires_grad_(), "t": trunk["t"].float()}
    losses = [run(given) for given in (narrow, wide)]
    assert_same_bits(*(loss.detach() for loss in losses))
    of_narrow, of_wide = (
        torch.autograd.grad(loss, [given["h"], given["W"]])
        for loss, given in zip(losses, (narrow, wide), strict=True)
    )
    assert_same_bits(of_narrow[0], of_wide[0].bfloat16())
    assert_same_bits(of_narrow[1], of_wide[1])


def test_a_head_narrower_than_its_hidden_states_is_cast_by_slices():
    """Floating-point types mix upwards: tests/unit/test_sides.py has the values of every pair."""
    x = inputs(frozen=True)
    narrow = x["W"].bfloat16()
    losses = [linear_divergence(x["h"], head, x["t"], x["Wt"]) for head in (narrow, narrow.float())]
    gradients = [torch.autograd.grad(loss, x["h"])[0] for loss in losses]
    assert_same_bits(*(loss.detach() for loss in losses))
    assert_same_bits(*gradients)


def test_labels_may_be_a_column_of_a_larger_tensor(backend):
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    ids = torch.randint(11, (6, 3))
    for labels in (ids[:, 0], ids[:, 0].contiguous()):
        logprobs = linear_logprobs(hidden, weight, labels, backend=backend)
        grads = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    truth = linear_logprobs_reference(hidden, weight, ids[:, 0])
    assert_no_worse(logprobs, truth, truth)
    for mine, exact in zip(grads, torch.autograd.grad(truth.sum(), (hidden, weight)), strict=True):
        assert_no_worse(mine, exact, exact)
