"""Test `linear_divergence_to` against dense float64 and against `linear_divergence` on the same teacher."""

import pytest
import torch

from opsd_kernels import linear_divergence_to, plan
from opsd_kernels._core import loop
from opsd_kernels._rows import backends
from opsd_kernels.spec import KIND_NAMES
from opsd_kernels.testing import (
    LOGPROB_NATS,
    assert_no_worse,
    assert_on_target,
    assert_same_bits,
    evaluate,
    hard_case,
    peak_bytes,
    plain_outcomes,
)
from opsd_kernels.testing.reference import linear_divergence_reference
from opsd_kernels.weights import EntropyGate, MeanOne, PrefixDiscrepancy

N, V, H = 28, 211, 24


def to(form="logits", dtype=None, more=0, gap=0, **how):
    """Return linear_divergence_to in the signature of linear_divergence, the teacher's head projected first.

    `more` columns follow the vocabulary, `gap` entries lie between the rows.
    """

    def run(h, W, t, Wt, *, teacher_bias=None, **options):
        vocab = options.get("vocab_size") or Wt.shape[0]
        temperature = options.get("teacher_temperature") or options.get("temperature", 1.0)
        wide = torch.promote_types(t.dtype, torch.float32)
        with torch.no_grad():
            z = t.to(wide) @ Wt[:vocab].to(wide).T
            z = z if teacher_bias is None else z + teacher_bias[:vocab].to(wide)
            if form == "logprobs":
                z = (z / temperature).log_softmax(-1)
            elif form == "probs":
                z = (z / temperature).double().softmax(-1)
            z = z.to(dtype or (z.dtype if form == "probs" else wide))
            target = z.new_full((*z.shape[:-1], vocab + more + gap), torch.nan)
            target[..., :vocab] = z
            target = target[..., : vocab + more]
        if form != "logits":
            options.pop("teacher_temperature", None)
        told = {"vocab_size": vocab} if more else {}
        return linear_divergence_to(h, W, target, target_is=form, **{**options, **told, **how})

    return run


@pytest.mark.parametrize("form", ["logits", "logprobs", "probs"])
@pytest.mark.parametrize("divergence", KIND_NAMES)
def test_every_divergence_and_form(backend, divergence, form):
    told = {"divergence": divergence, "temperature": 0.8, "teacher_temperature": 1.3}
    case = hard_case(N, V, H, torch.float64, largest_logit=8.0)
    truth = evaluate(linear_divergence_reference, case, **told)
    ours = evaluate(to(form, backend=backend, workspace_bytes=60_000), case, **told)
    assert_no_worse(ours, truth, truth)


@pytest.mark.parametrize("name", ["in place", "gap", "longer", "cast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_by_dtype(backend, dtype, name):
    """Rows that are read in place, rows with a gap, rows longer than the vocabulary, rows in fp64."""
    how = {"in place": {}, "gap": {"gap": 5}, "longer": {"more": 9}, "cast": {"dtype": torch.float64}}[name]
    case = hard_case(N, V, H, dtype, largest_logit=8.0)
    truth = evaluate(linear_divergence_reference, case.double(), divergence="jsd")
    for pack in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OPSD_PACK", "1" if pack else "0")
            ours = evaluate(to(**how, backend=backend, workspace_bytes=60_000), case, divergence="jsd")
        if dtype == torch.float32:
            assert_no_worse(ours, plain_outcomes(case, divergence="jsd"), truth)
        else:
            assert_on_target(ours, truth, "fp32_logits")


def test_16_bit_logits_and_a_16_bit_target(backend):
    """Rows of the dtype of 16-bit logits are read in place, and labels' log-probs are those of the rows."""
    case = hard_case(N, V, H, torch.bfloat16, largest_logit=4.0, masked_entry=None)
    run = to(dtype=torch.bfloat16, logits_dtype="input", backend=backend, return_stats=True)
    ours = evaluate(run, case)
    truth = evaluate(linear_divergence_reference, case.double(), return_stats=True)
    assert_on_target(ours, truth, "default")
    off = (ours.stats.teacher_logprob - truth.stats["teacher_logprob"]).abs().max()
    assert off <= 4.0 * torch.finfo(torch.bfloat16).eps
    assert (ours.stats.student_logprob - truth.stats["student_logprob"]).abs().max() <= LOGPROB_NATS
    restricted = to(dtype=torch.bfloat16, logits_dtype="input", backend=backend, return_stats=True, topk=9)
    agreement = evaluate(restricted, case).stats.top1_agreement
    assert agreement.mean() < 0.5  # the teacher's own argmax, not the student's


@pytest.mark.parametrize(
    "told",
    [
        {"topk": 7, "topk_support": "teacher"},
        {"topk": 7, "topk_tail": "renormalize"},
        {"teacher_mix": 0.3},
        {"entry_clip": 0.05, "token_clip": 0.6},
        {"z_loss": 0.01},
        {"backward": "recompute"},
        {"reduction": "none"},
        {"student_softcap": 9.0, "student_logit_scale": 1.2},
        {"temperature": torch.linspace(0.5, 2.0, N).double()},
    ],
    ids=lambda told: next(iter(told)),
)
def test_the_student_side_options(backend, told):
    case = hard_case(N, V, H, torch.float64, largest_logit=8.0)
    truth = evaluate(linear_divergence_reference, case, **told)
    ours = evaluate(to(backend=backend, workspace_bytes=60_000), case, **told)
    assert_no_worse(ours, truth, truth)


@pytest.mark.parametrize(
    "scheme", [EntropyGate("teacher", below=2.0), MeanOne(PrefixDiscrepancy(0.5))], ids=["row", "sequence"]
)
def test_weights_and_statistics(backend, scheme):
    case = hard_case(N, V, H, torch.float64, largest_logit=8.0, batch=4)
    told = {"token_weights": scheme, "return_stats": True}
    truth = evaluate(linear_divergence_reference, case, **told)
    ours = evaluate(to(backend=backend), case, **told)
    assert_no_worse(ours, truth, truth)
    for name, value in truth.stats.items():
        assert_no_worse(getattr(ours.stats, name), value, value)


def test_zero_probabilities_and_rows_that_are_not_normalised(backend):
    hidden, weight = torch.randn(2, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    probs = torch.tensor([[0.0, 0.5, 0.5, 0.0, 0.0], [2.0, 1.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    told = {"divergence": "forward_kl", "backend": backend, "reduction": "none"}
    ours = linear_divergence_to(hidden, weight, probs, target_is="probs", **told)
    p = probs / probs.sum(1, keepdim=True)
    log_q = (hidden @ weight.T).log_softmax(1)
    truth = (torch.special.xlogy(p, p) - p * log_q).sum(1)
    assert_no_worse(ours, truth, truth)
    # p^(1/2), normalised
    ours = linear_divergence_to(hidden, weight, probs, target_is="probs", teacher_temperature=2.0, **told)
    p = probs.sqrt() / probs.sqrt().sum(1, keepdim=True)
    truth = (torch.special.xlogy(p, p) - p * log_q).sum(1)
    assert_no_worse(ours, truth, truth)


def test_three_passes_and_two(backend, monkeypatch):
    seen = []
    for name in ("project", "accumulate_weight_grad"):
        inner = getattr(loop, name)
        monkeypatch.setattr(loop, name, lambda *args, inner=inner: (seen.append(1), inner(*args)))
    for frozen, passes in ((False, 3), (True, 2)):
        case = hard_case(N, V, H, frozen_head=frozen)
        seen.clear()
        evaluate(to(backend=backend), case)
        assert len(seen) == passes
    made = plan(N, V, H, 0, torch.float32)
    assert made.passes == 3 and plan(N, V, H, 0, torch.float32, trainable_head=False).passes == 2


def test_it_compiles_whole(backend):
    case = hard_case(N, V, H, torch.float32)
    target = torch.randn(N, V)

    def run(h, W, t, Wt, *, teacher_bias, **options):
        return linear_divergence_to(h, W, target.softmax(-1), target_is="probs", **options, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same_bits(evaluate(compiled, case).loss, evaluate(run, case).loss)


def test_other_token_counts_compile_whole(backend):
    torch._dynamo.reset()

    def run(h, W, target):
        return linear_divergence_to(h, W, target, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for tokens in (9, 7, 5):  # the second one makes their number symbolic
        inputs = torch.randn(tokens, H), torch.randn(V, H), torch.randn(tokens, V)
        assert_same_bits(compiled(*inputs), run(*inputs))


@pytest.mark.parametrize(
    "change, error, says",
    [
        ({"target": torch.randn(3, 8)}, ValueError, r"target: expected shape \(3, 7\), or with vocab_size"),
        ({"target": torch.randn(2, 7)}, ValueError, r"target: expected shape \(3, 7\)"),
        ({"target": torch.randn(3, 5), "vocab_size": 6}, ValueError, r"\(3, 6\) or more columns"),
        ({"target": torch.zeros(3, 7).long()}, TypeError, "target: expected a floating-point tensor"),
        ({"target": None}, TypeError, "target: expected a tensor"),
        ({"target_is": "odds"}, ValueError, "target_is: expected one of 'logits', 'logprobs', 'probs'"),
    ],
)
def test_errors_name_the_argument(change, error, says):
    given = {"target": torch.randn(3, 7), **change}
    with pytest.raises(error, match=says):
        linear_divergence_to(torch.randn(3, 2), torch.randn(7, 2), **given)


MEMORY = """
def make(N, V, H, budget):
    import torch
    from opsd_kernels import linear_divergence_to

    def tensors(N, V):
        head = torch.randn(V, H).requires_grad_()
        return torch.randn(N, H).requires_grad_(), head, torch.randn(N, V).softmax(-1)

    def call(inputs, budget):
        loss = linear_divergence_to(*inputs, target_is="probs", workspace_bytes=budget, backend="cpp")
        return loss, torch.autograd.grad(loss, inputs[:2])

    call(tensors(64, 999), 1 << 20)
    inputs = tensors(N, V)
    return lambda: call(inputs, budget)
"""


@pytest.mark.usefixtures("forked_peaks")
@pytest.mark.slow
def test_the_peak_of_probabilities_is_within_the_budget_and_as_planned():
    """test_memory_forms.py has logits, in place and cast."""
    if reason := backends.explain("cpu")["cpp"]:
        pytest.skip(reason)
    N, V, H, budget = 1024, 151936, 64, 256 << 20
    expected = plan(N, V, H, 0, torch.float32, workspace_bytes=budget, threads=2, target_copied=True)
    peak = peak_bytes(MEMORY, N, V, H, budget)
    above = peak - expected.gradient_bytes - expected.vector_bytes
    assert above <= budget, f"{above / 2**20:.1f} MiB above the outputs"
    off = expected.peak_bytes / peak - 1
    assert abs(off) <= 0.05, f"planned {expected.peak_bytes / 2**20:.1f}, measured {peak / 2**20:.1f} MiB"
