"""Check that with OPSD_PACK=0 the op never syncs with a device, and gives the results of packed rows.

Invalid rows are then computed as zeros. The tests run on a CPU: the loop and the checks take the branches of
a device, and operators that would sync are recorded.
"""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from opsd_kernels import linear_divergence, linear_logprobs, linear_topk_divergence, objectives, weights
from opsd_kernels._core import autograd, library, loop
from opsd_kernels._rows import extension
from opsd_kernels.testing import assert_no_worse, assert_on_target, assert_same_bits, evaluate, hard_case

aten = torch.ops.aten
B, T, V, H = 4, 7, 67, 24
# Operators that sync with a GPU: a value on the host, a shape that depends on values, a tensor made from
# Python numbers (a copy from pageable memory).
WAITS = {
    *(aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.allclose),
    *(
        aten.nonzero,
        aten.masked_select,
        aten.unique_dim,
        aten._unique2,
        aten.unique_consecutive,
        aten.bincount,
        aten.repeat_interleave,
        aten.histc,
    ),
    *(aten.lift_fresh, aten.lift_fresh_copy, aten.lift),
}
INDEXING = (aten.index, aten.index_put, aten.index_put_)


READS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu)  # on a CPU the first two call no operator
OURS = {
    torch.ops.opsd_kernels.linear_divergence: library._forward,
    torch.ops.opsd_kernels.linear_divergence_backward: library._backward,
}


class Reads(TorchFunctionMode):
    def __init__(self, noted):
        super().__init__()
        self.noted = noted

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in READS:
            self.noted.append(function.__name__)
        return function(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Record the operators that would sync with a GPU, also those inside the package's own operators."""

    def __init__(self):
        super().__init__()
        self.noted = []
        self.reads = Reads(self.noted)

    def __enter__(self):
        self.reads.__enter__()
        return super().__enter__()

    def __exit__(self, *raised):
        super().__exit__(*raised)
        self.reads.__exit__(*raised)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, function.overloadpacket
        by_mask = packet in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])
        moved = (
            packet is aten._to_copy
            and kwargs.get("device", args[0].device) != args[0].device
            and not kwargs.get("non_blocking")
        )
        if packet in WAITS or by_mask or moved:
            self.noted.append(str(packet))
        if packet in OURS:
            with self:
                return OURS[packet](*args)
        return function(*args, **kwargs)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: torch.tensor(1.0),
        lambda x: x.to("meta"),
        lambda x: x.unique(),
    ],
)
def test_waiting_is_noted(wait):
    with Waits() as waits:
        wait(torch.ones(3))
    assert waits.noted


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Take the branches of a GPU call on this CPU, without packing."""
    monkeypatch.setenv("OPSD_PACK", "0")
    for module in (autograd, library, loop):
        monkeypatch.setattr(module, "on_host", lambda device: False)
    # Each runs its GEMM once.
    extension.gemm_unavailable()
    extension.gemm_fp32_serves(torch.float32)


def masked_case(dtype=torch.float32, **made):
    """Return a case with inf and NaN in ignored rows, and a sequence without valid tokens."""
    case = hard_case(B * T, V, H, dtype, batch=B, largest_logit=8.0, **made)
    mask = case.mask.clone()
    mask[2] = False
    return replace(case, mask=mask)


def ignored(case):
    return ~case.mask | (case.labels == -100)


def listed(case):
    """Return a teacher's five entries per token, one of them padding; an ignored token has garbage."""
    gen = torch.Generator().manual_seed(0)
    ids = torch.rand(B, T, V, generator=gen).argsort(-1)[..., :5]
    logprobs = torch.rand(B, T, 6, generator=gen).log_softmax(-1)[..., :5].clone()
    logprobs[..., -1] = -torch.inf
    ids[..., -1], ids[ignored(case)] = V + 9, -3
    return ids, logprobs


def policy_divergence(student, head, teacher, teacher_head, **options):
    return objectives.linear_policy_divergence(
        student, head, teacher, teacher_head, policy_weight=0.3, **options
    )


def topk_divergence(student, head, teacher, teacher_head, *, entries, teacher_bias, **options):
    return linear_topk_divergence(student, head, *entries, **options)


# The tokens of the student's head in a vocabulary of twice the size
PART = torch.randperm(2 * V, generator=torch.Generator().manual_seed(0))[:V]


def part_of_the_vocabulary(student, head, teacher, teacher_head, *, teacher_bias, **options):
    whole = torch.cat([teacher_head, -teacher_head]), torch.cat([teacher_bias, teacher_bias])
    return linear_divergence(
        student, head, teacher, whole[0], teacher_bias=whole[1], student_vocab_ids=PART, **options
    )


def token_logprobs(
    student,
    head,
    teacher,
    teacher_head,
    *,
    student_bias,
    teacher_bias,
    token_weights=None,
    entropy=False,
    **options,
):
    """Sum per-token results with an upstream gradient that differs at ignored tokens."""
    result = linear_logprobs(student, head, bias=student_bias, return_entropy=entropy, **options)
    return result[0] + 2 * result[1] if entropy else result


ROW = weights.TrustGate(0.2) * weights.EntropyGate("teacher", below=4.0)
SEQUENCE = weights.MeanOne(weights.PrefixDiscrepancy(0.5))
OLD = torch.full((B, T), -3.0)
CALLS = {
    "mean": (linear_divergence, {}),
    "sum": (linear_divergence, {"reduction": "sum", "divergence": "jsd"}),
    "normalizer": (linear_divergence, {"normalizer": 7.0}),
    "per token": (linear_divergence, {"reduction": "none", "divergence": "jsd"}),
    "sequence mean": (linear_divergence, {"reduction": "sequence_mean", "divergence": "forward_kl"}),
    "recompute": (linear_divergence, {"backward": "recompute", "divergence": "skew_forward_kl"}),
    "statistics": (linear_divergence, {"return_stats": True}),
    "index weights": (
        linear_divergence,
        {"token_weights": weights.FirstFraction(0.5) * weights.LinearDecay(0.5)},
    ),
    "row weights": (linear_divergence, {"token_weights": ROW, "divergence": "jsd"}),
    "row weights, recomputed": (linear_divergence, {"token_weights": ROW, "backward": "recompute"}),
    "row weights, by sequence": (linear_divergence, {"token_weights": ROW, "reduction": "sequence_mean"}),
    "importance ratios by segment": (
        linear_divergence,
        {
            "token_weights": weights.SegmentMean(
                weights.ImportanceRatio(OLD), (torch.arange(B * T) % 3 == 0).view(B, T)
            )
        },
    ),
    "sequence weights": (linear_divergence, {"token_weights": SEQUENCE}),
    "sequence weights, own pass": (linear_divergence, {"token_weights": SEQUENCE, "workspace_bytes": 5_000}),
    "clips": (linear_divergence, {"entry_clip": 0.1, "token_clip": 2.0, "teacher_mix": 0.3}),
    "student's top-k": (linear_divergence, {"topk": 5}),
    "teacher's top-k": (
        linear_divergence,
        {"topk": 5, "topk_support": "teacher", "topk_tail": "renormalize"},
    ),
    "several chunks": (linear_divergence, {"workspace_bytes": 12_000}),
    "listed top-k": (topk_divergence, {"tail": "none"}),
    "listed top-k, per token": (topk_divergence, {"reduction": "none"}),
    "part of the vocabulary": (part_of_the_vocabulary, {"return_stats": True}),
    "policy": (policy_divergence, {"policy": objectives.PPOClip(torch.ones(B, 1), OLD)}),
    "policy of scope index": (
        policy_divergence,
        {"policy": objectives.PolicyGradient(torch.ones(B, T)), "divergence": "jsd"},
    ),
    "policy of scope sequence": (
        policy_divergence,
        {
            "policy": objectives.OnPolicyDistillation(weights=weights.PrefixDiscrepancy()),
            "token_weights": ROW,
        },
    ),
    "log-probs": (token_logprobs, {}),
    "log-probs and entropy": (token_logprobs, {"entropy": True}),
}


def run(name, case, backend, waits=None):
    op, options = CALLS[name]
    if op is topk_divergence:
        options = {**options, "entries": listed(case)}
    with contextlib.nullcontext() if waits is None else waits:
        return evaluate(op, case, backend=backend, **options)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_and_ignored_rows_influence_nothing(backend, as_on_a_gpu, monkeypatch, name, frozen):
    case = masked_case(frozen_head=frozen)
    unpacked = run(name, case, backend, waits := Waits())
    assert waits.noted == []
    exact = run(name, case.double(), backend)
    monkeypatch.setenv("OPSD_PACK", "1")
    packed = run(name, case, backend)
    assert_no_worse(unpacked, packed, exact)
    assert (unpacked.student_hidden[ignored(case)] == 0).all()
    if unpacked.stats is not None:
        for field, value in vars(unpacked.stats).items():
            if value is not None:
                assert (value[ignored(case)] == 0).all(), field
                assert_no_worse(value, getattr(packed.stats, field), getattr(exact.stats, field))


@pytest.mark.parametrize("budget", [1 << 24, 12_000, 5_000])
def test_packed_sequences(backend, as_on_a_gpu, monkeypatch, budget):
    """Packed sequences work in one chunk, in chunks of sequences, and with a statistics pass first."""
    case = replace(hard_case(B * T, V, H, batch=1, largest_logit=8.0), token_weights=None)
    options = {
        "token_weights": weights.PackedSequences(SEQUENCE, (9, 0, 4, 15)),
        "backend": backend,
        "workspace_bytes": budget,
    }
    with Waits() as waits:
        unpacked = evaluate(linear_divergence, case, **options)
    assert waits.noted == []
    monkeypatch.setenv("OPSD_PACK", "1")
    assert_no_worse(unpacked, *(evaluate(linear_divergence, c, **options) for c in (case, case.double())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name", ["mean", "per token", "recompute", "row weights", "sequence weights", "policy"]
)
def test_16_bit_inputs(backend, as_on_a_gpu, name, dtype):
    case = masked_case(dtype, shared_head=True, near=1e-2)
    unpacked = run(name, case, backend, waits := Waits())
    assert waits.noted == []
    assert_on_target(unpacked, run(name, case.double(), backend), "default")


@pytest.mark.parametrize(
    "name, forward",
    [("mean", 1), ("per token", 1), ("row weights", 1), ("sequence weights", 1), ("statistics", 1)],
)
def test_packing_waits_once(backend, as_on_a_gpu, monkeypatch, name, forward):
    monkeypatch.setenv("OPSD_PACK", "1")
    case, (op, options) = masked_case(frozen_head=True).leaves(), CALLS[name]
    with Waits() as waits:
        op(*case.inputs(), **{**case.options(), "backend": backend, **options})
    assert len(waits.noted) == forward, waits.noted


def test_without_mask_and_labels_packing_waits_for_nothing(backend, as_on_a_gpu, monkeypatch):
    monkeypatch.setenv("OPSD_PACK", "1")
    case = masked_case()
    hidden = {name: getattr(case, name).nan_to_num(0, 0, 0) for name in ("student_hidden", "teacher_hidden")}
    case = replace(case, **hidden, mask=None, labels=None, token_weights=None)
    for weighting in (
        None,
        weights.EntropyGate("student", below=3.0),
        weights.PrefixDiscrepancy(of="divergence"),
    ):
        with Waits() as waits:
            evaluate(linear_divergence, case, token_weights=weighting, backend=backend)
        assert waits.noted == []


@pytest.mark.parametrize(
    "packed, capturing, expected",
    [("1", False, True), ("1", True, False), ("0", False, False), ("0", True, False)],
)
def test_rows_are_packed_unless_a_graph_is_captured_or_the_user_says_so(
    monkeypatch, packed, capturing, expected
):
    monkeypatch.setenv("OPSD_PACK", packed)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    def packs(valid):
        return library.packs(SimpleNamespace(rows=SimpleNamespace(valid=valid)))

    assert packs(SimpleNamespace(device=SimpleNamespace(type="cuda"))) == expected
    assert packs(torch.ones(2, dtype=torch.bool)) == (packed == "1")
    assert not packs(None)


@pytest.mark.parametrize("pack", ["0", "1"])
@pytest.mark.parametrize("labels", [[0, V, 1], [0, -1, 1]])
def test_a_label_outside_the_vocabulary_is_asserted_on_the_device(as_on_a_gpu, monkeypatch, labels, pack):
    monkeypatch.setenv("OPSD_PACK", pack)
    states, head = torch.ones(3, H), torch.ones(V, H)
    mask = torch.tensor([1, 0, 1])
    assert linear_divergence(
        states, head, states, head, labels=torch.tensor(labels), mask=mask, backend="torch"
    ).isfinite(), "it is masked"
    with pytest.raises(RuntimeError, match="labels: expected entries in"):
        linear_divergence(states, head, states, head, labels=torch.tensor(labels), backend="torch")


def test_gradients_of_16_bits_have_one_rounding_of_the_upstream_factor(as_on_a_gpu, backend):
    """The factor 1/3 is not rounded to bf16, which would scale the whole gradient."""
    case = replace(masked_case(torch.bfloat16, shared_head=True, near=1e-2), upstream=1.0)
    live = case.leaves()
    loss = linear_divergence(*live.inputs(), **live.options(), backend=backend)
    once, third, again = (
        torch.autograd.grad(loss, live.student_weight, torch.tensor(upstream), retain_graph=keep)[0]
        for upstream, keep in ((1.0, True), (1 / 3, True), (1 / 3, False))
    )
    assert_same_bits(third, (once.float() / 3).bfloat16())
    assert_same_bits(again, third)
