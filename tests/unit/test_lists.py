"""Test `linear_topk` and `linear_logprobs_at` against dense float64: order, values, gradients, memory."""

import pytest
import torch
from operators import check_operators

import opsd_kernels
from opsd_kernels import linear_logprobs_at, linear_topk, plan
from opsd_kernels._core import listed, loop
from opsd_kernels._rows import backends, torch_topk
from opsd_kernels.spec import LogitTransform
from opsd_kernels.testing import (
    assert_no_worse,
    assert_on_target,
    assert_same_bits,
    evaluate,
    hard_case,
    peak_bytes,
)
from opsd_kernels.testing.reference_lists import linear_logprobs_at_reference, linear_topk_reference

N, V, H = 29, 211, 24
TRANSFORMS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "negative scale": {"logit_scale": -0.5},
    "softcap": {"softcap": 7.0, "logit_scale": 1.3, "temperature": 0.9},
}


def at(op, ids, **how):
    """Return the log-probs at `ids` in the signature of linear_divergence."""

    def run(
        h, W, t, Wt, *, labels, mask, student_bias=None, teacher_bias=None, token_weights=None, **options
    ):
        return op(h, W, ids, bias=student_bias, mask=mask & (labels != -100), **options, **how)

    return run


def topk(op, k, case, **options):
    tensors = case.student_hidden, case.student_weight
    mask, vocab = case.mask & (case.labels != -100), case.vocab_size
    return op(*tensors, k, bias=case.student_bias, mask=mask, vocab_size=vocab, **options)


def mixed_ids(case, K=6, seed=0):
    """Shape (..., K): ids with repetitions, two of -1 in each row, and a row without any id."""
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (*case.student_hidden.shape[:-1], K), generator=gen)
    ids[..., 2], ids[..., -1], ids[..., 3] = -1, -1, ids[..., 0]
    ids.view(-1, K)[-2] = -1
    return ids


# ---------------------------------------------------------------- the list


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("k", [1, 6, 40, V])
def test_a_list_is_that_of_a_whole_sort(backend, name, k):
    # A negative factor of a bias of -inf would be a logit of +inf.
    masked = None if "negative" in name else "both"
    case = hard_case(N, V, H, torch.float64, padding=3, largest_logit=8.0, masked_entry=masked)
    ours = topk(linear_topk, k, case, backend=backend, workspace_bytes=60_000, **TRANSFORMS[name])
    truth = topk(linear_topk_reference, k, case, **TRANSFORMS[name])
    assert_same_bits(ours.ids, truth[0])
    assert_no_worse(ours.logprobs, truth[1], truth[1])
    assert_no_worse(ours.tail_logprob, truth[2], truth[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_log_probs_of_a_list_by_dtype(backend, dtype):
    case = hard_case(N, V, H, dtype, batch=1)
    ours = topk(linear_topk, 9, case, backend=backend)
    truth, plain = topk(linear_topk_reference, 9, case.double()), topk(linear_topk_reference, 9, case)
    assert_same_bits(ours.ids, plain[0])
    for mine, peer, exact in zip(ours[1:], plain[1:], truth[1:], strict=True):
        assert mine.dtype == torch.float32 and mine.shape[:2] == (1, N)
        assert_no_worse(mine, peer, exact)


@pytest.mark.parametrize("V, k", [(5, 5), (64, 3), (1000, 17), (4099, 40), (4099, 300), (4099, 4099)])
def test_the_lower_id_comes_first_among_equal_logits(backend, V, k):
    """Small integers, in fp32 and fp64: nearly every logit ties with many others; one row ties throughout."""
    gen = torch.Generator().manual_seed(V)
    hidden, weight = torch.eye(7), torch.randint(-2, 3, (V, 7), generator=gen).float()
    weight[:, 0], weight[:, 1] = 1.0, -torch.arange(V) // 100
    bias = torch.zeros(V)
    bias[::3] = -torch.inf
    for dtype in (torch.float32, torch.float64):
        inputs = hidden.to(dtype), weight.to(dtype)
        for b in (None, bias):
            ours = linear_topk(*inputs, k, bias=b, backend=backend)
            truth = linear_topk_reference(inputs[0].double(), inputs[1].double(), k, bias=b)
            assert_same_bits(ours.ids, truth[0])
            assert_no_worse(ours.logprobs, truth[1].to(dtype), truth[1])
            assert_no_worse(ours.tail_logprob, truth[2].to(dtype), truth[2])


def test_a_tail_far_below_the_list_keeps_its_digits(backend):
    """The mass outside is 3e-13 of the whole: one minus the listed mass would be zero in fp32."""
    weight = torch.tensor([[30.0], [29.0], [1.0], [0.5], [-2.0]])
    ours = linear_topk(torch.ones(1, 1), weight, 2, backend=backend)
    truth = linear_topk_reference(torch.ones(1, 1).double(), weight.double(), 2)
    assert_no_worse(ours.tail_logprob, truth[2].float(), truth[2])
    assert linear_topk(torch.ones(1, 1), weight, 5, backend=backend).tail_logprob.item() == -torch.inf


def test_rows_with_nan_or_without_a_distribution(backend):
    """A NaN logit makes the log-probs of its row NaN; the other rows keep theirs, and ids stay ids."""
    hidden, weight = torch.eye(3), torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    clean = linear_topk(hidden, weight, 4, backend=backend)
    weight[:, 1] = -torch.inf
    weight[50, 2] = torch.nan
    rows = linear_topk(hidden[1:], weight, 4, backend=backend, bias=torch.zeros(100))
    assert rows.logprobs.isnan().all() and rows.tail_logprob.isnan().all()
    assert ((rows.ids >= 0) & (rows.ids < 100)).all()
    weight[:, 1:] = 0
    same = linear_topk(hidden[:1], weight, 4, backend=backend)
    assert_same_bits(same.ids, clean.ids[:1])


def test_masked_tokens_and_none_at_all(backend, monkeypatch):
    hidden, weight = torch.randn(3, 5), torch.randn(20, 5)
    hidden[1] = torch.nan
    for pack in ("1", "0"):
        monkeypatch.setenv("OPSD_PACK", pack)
        out = linear_topk(hidden, weight, 3, mask=torch.tensor([1, 0, 1]), backend=backend)
        assert out.ids[1].tolist() == [-1] * 3 and out.logprobs[1].tolist() == [0] * 3
        assert out.tail_logprob[1] == 0
        kept = linear_topk(hidden[::2], weight, 3, backend=backend)
        for mine, alone in zip(out, kept, strict=True):
            assert_same_bits(mine[::2].contiguous(), alone)
        at_ids = linear_logprobs_at(hidden, weight, out.ids, mask=torch.tensor([1, 0, 1]), backend=backend)
        assert at_ids[1].tolist() == [0] * 3
        assert_no_worse(at_ids, out.logprobs, out.logprobs)
    empty = linear_topk(torch.randn(0, 2, 5), weight, 3, backend=backend)
    assert empty.ids.shape == (0, 2, 3) and empty.tail_logprob.shape == (0, 2)


def test_the_torch_form_takes_groups_and_the_last_columns(monkeypatch):
    """A row where the largest entries are in the columns after the last whole group."""
    x = torch.linspace(0, 1, 32 * 9 + 5).repeat(3, 1)
    assert torch_topk.largest(x, 4).tolist() == [[292, 291, 290, 289]] * 3
    x[1, 31] = x[1, 64] = 2.0
    assert torch_topk.largest(x, 4)[1].tolist() == [31, 64, 292, 291]


@pytest.mark.parametrize("k", [0, V + 1, True, 2.0])
def test_a_bad_k_is_refused(k):
    error = ValueError if type(k) is int else TypeError
    with pytest.raises(error, match="^k: expected"):
        linear_topk(torch.randn(2, 3), torch.randn(V, 3), k)


# ---------------------------------------------------------------- log-probs at ids


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_log_probs_at_ids_by_dtype(backend, dtype, frozen):
    masked = "both" if dtype.itemsize > 2 else None  # of a log-prob of -inf there is no relative error
    case = hard_case(N, V, H, dtype, largest_logit=8.0, frozen_head=frozen, padding=3, masked_entry=masked)
    ids, reference = mixed_ids(case), linear_logprobs_at_reference
    ours = evaluate(at(linear_logprobs_at, ids, backend=backend, workspace_bytes=60_000), case)
    truth = evaluate(at(reference, ids), case.double())
    if dtype in (torch.float32, torch.float64):
        assert_no_worse(ours, evaluate(at(reference, ids), case), truth)
    else:
        assert_on_target(ours, truth, "fp32_logits")
    assert ours.student_hidden.dtype == dtype and (ours.loss[ids < 0] == 0).all()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_log_probs_at_ids_under_transforms(backend, name):
    masked = None if "negative" in name else "both"
    case = hard_case(N, V, H, torch.float64, largest_logit=8.0, batch=1, masked_entry=masked)
    ids = mixed_ids(case)
    truth = evaluate(at(linear_logprobs_at_reference, ids), case, **TRANSFORMS[name])
    ours = evaluate(at(linear_logprobs_at, ids, backend=backend), case, **TRANSFORMS[name])
    assert_no_worse(ours, truth, truth)


def test_passes(backend, monkeypatch):
    """A list and log-probs take one GEMM; backward takes three more, two with a frozen head."""
    seen = []
    for name in ("project", "accumulate_weight_grad"):
        inner = getattr(loop, name)
        monkeypatch.setattr(loop, name, lambda *args, inner=inner: (seen.append(1), inner(*args)))
    for frozen, backward in ((False, 3), (True, 2)):
        case = hard_case(N, V, H, frozen_head=frozen).leaves()
        seen.clear()
        result = at(linear_logprobs_at, mixed_ids(case), backend=backend)(*case.inputs(), **case.options())
        assert len(seen) == 1
        result.sum().backward()
        assert len(seen) == 1 + backward
    seen.clear()
    linear_topk(case.student_hidden, case.student_weight, 5, mask=case.mask, backend=backend)
    assert len(seen) == 1


def test_an_id_outside_the_vocabulary_is_refused():
    hidden, weight, ids = torch.randn(2, 3), torch.randn(7, 3), torch.tensor([[0], [7]])
    with pytest.raises(ValueError, match=r"ids: expected entries in \[0, 7\), or -1 for none, got \[7\]"):
        linear_logprobs_at(hidden, weight, ids)
    assert linear_logprobs_at(hidden, weight, ids, mask=torch.tensor([1, 0]))[1].item() == 0
    for bad, error in ((ids[:1], ValueError), (ids[:, 0], ValueError), (ids.int(), TypeError)):
        with pytest.raises(error, match="^ids: expected"):
            linear_logprobs_at(hidden, weight, bad)


def test_both_compile_whole(backend):
    case = hard_case(N, V, H, torch.float32)
    ids = mixed_ids(case)
    run = at(linear_logprobs_at, ids, backend=backend)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same_bits(evaluate(compiled, case), evaluate(run, case))

    def listed_of(h, W):
        return linear_topk(h, W, 5, backend=backend)

    inputs = case.student_hidden.detach().nan_to_num(0, 0, 0), case.student_weight.detach()
    for mine, eager in zip(
        torch.compile(listed_of, fullgraph=True, backend="aot_eager")(*inputs),
        listed_of(*inputs),
        strict=True,
    ):
        assert_same_bits(mine, eager)


def test_other_token_counts_compile_whole(backend):
    torch._dynamo.reset()

    def run(h, W, ids):
        return linear_logprobs_at(h, W, ids, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for tokens in (9, 7, 5):  # the second one makes their number symbolic
        inputs = torch.randn(tokens, H), torch.randn(V, H), torch.randint(V, (tokens, 3))
        assert_same_bits(compiled(*inputs), run(*inputs))


def test_operators_pass_opcheck(backend):
    """The flat arguments of real calls, through torch's own checks of schemas and fakes."""
    case = hard_case(5, 17, 3, torch.float32).leaves()

    def run():
        topk(linear_topk, 4, case, backend=backend)
        chosen = at(linear_logprobs_at, mixed_ids(case) % 17, backend=backend)
        chosen(*case.inputs(), **case.options()).sum().backward()

    assert check_operators(listed, ("op_topk", "op_at", "op_at_backward"), run) == 3


# ---------------------------------------------------------------- the kernel and the memory


def test_the_kernel_names_a_bad_argument():
    if reason := backends.explain("cpu")["cpp"]:
        pytest.skip(reason)
    S, ids, values, tail = torch.randn(2, 9), torch.zeros(2, 3).long(), torch.empty(2, 3), torch.empty(2)
    good = {"S": S, "of_side": LogitTransform(), "bias": None, "ids": ids, "values": values, "tail": tail}
    backends.COMPILED.row_topk_(**good)
    for name, bad in (
        ("S", S.bfloat16()), ("values", values[:, :0]), ("ids", ids.int()), ("ids", ids[:1]),
        ("tail", tail.double()), ("bias", torch.zeros(8)),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=f"^{name}: expected"):
            backends.COMPILED.row_topk_(**{**good, name: bad})


MEMORY = """
def make(N, V, H, K, name, budget, gradient):
    import torch
    from opsd_kernels import linear_logprobs_at, linear_topk

    def tensors(N, V):
        dtype = getattr(torch, name)
        leaves = torch.randn(N, H).to(dtype), (torch.randn(V, H) / 8).to(dtype)
        if not gradient:
            return *leaves, K
        return *(x.requires_grad_() for x in leaves), torch.randint(V, (N, K))

    def call(inputs, budget):
        if not gradient:
            return linear_topk(*inputs, workspace_bytes=budget, backend="cpp")
        out = linear_logprobs_at(*inputs, workspace_bytes=budget, backend="cpp")
        return out, torch.autograd.grad(out.sum(), inputs[:2])

    call(tensors(64, 999), 1 << 20)
    inputs = tensors(N, V)
    return lambda: call(inputs, budget)
"""


@pytest.mark.usefixtures("forked_peaks")
@pytest.mark.slow
@pytest.mark.parametrize("gradient", [False, True], ids=["list", "log-probs at ids"])
def test_the_peak_of_long_batches_is_within_the_budget_and_as_planned(gradient):
    """The lists take 24 MiB at this N. test_memory_forms.py has fewer tokens, in fp32 too."""
    if reason := backends.explain("cpu")["cpp"]:
        pytest.skip(reason)
    N, V, H, K, dtype, budget = 32768, 151936, 64, 64, torch.bfloat16, 256 << 20
    name = str(dtype).removeprefix("torch.")
    expected = plan(
        N, V, H, 0, dtype, grad=gradient, backward="recompute", shared_head=False, logits_dtype="float32",
        listed=K, workspace_bytes=budget, threads=2,
    )  # fmt: skip
    peak = peak_bytes(MEMORY, N, V, H, K, name, budget, gradient)
    above = peak - expected.gradient_bytes - expected.vector_bytes
    assert above <= budget, f"{above / 2**20:.1f} MiB above the outputs"
    off = expected.peak_bytes / peak - 1
    assert abs(off) <= 0.05, f"planned {expected.peak_bytes / 2**20:.1f}, measured {peak / 2**20:.1f} MiB"


def test_the_names_are_public():
    assert {"TopK", "linear_topk", "linear_logprobs_at"} <= set(opsd_kernels.__all__)
