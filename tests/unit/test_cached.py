"""Test the cached forward KL against dense float64 and `linear_divergence`; what it refuses."""

import pytest
import torch

from opsd_kernels import ForwardKLCache, cache_forward_kl, linear_cached_forward_kl
from opsd_kernels._core import loop
from opsd_kernels.testing import (
    assert_no_worse,
    assert_on_target,
    assert_same_bits,
    evaluate,
    hard_case,
    plain_outcomes,
)
from opsd_kernels.testing.reference import linear_divergence_reference
from opsd_kernels.weights import EntropyGate, FirstFraction

N, V, H = 28, 211, 24
FORWARD = {"divergence": "forward_kl"}


def through_cache(**how):
    """Return a call through a fresh cache, in the signature of linear_divergence."""

    def run(h, W, t, Wt, *, labels, mask, student_bias=None, teacher_bias=None, **options):
        options.pop("divergence")
        mask = mask & (labels != -100)
        shared = {"student_bias": student_bias, "mask": mask, **how}
        names = ("temperature", "teacher_temperature", "teacher_logit_scale", "teacher_softcap", "vocab_size")
        made = {name: options[name] for name in names if name in options}
        cache = cache_forward_kl(t, Wt, W, teacher_bias=teacher_bias, **shared, **made)
        kept = {name: value for name, value in options.items() if not name.startswith("teacher_")}
        return linear_cached_forward_kl(h, W, cache, **shared, **kept)

    return run


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"temperature": 0.7, "teacher_temperature": 1.4},
        {"student_logit_scale": 1.2, "teacher_logit_scale": 0.8, "teacher_softcap": 9.0},
        {"reduction": "none"},
        {"reduction": "sum", "token_weights": None},
    ],
    ids=["plain", "temperatures", "transforms", "per token", "sum"],
)
def test_it_is_the_forward_kl(backend, told):
    case = hard_case(N, V, H, torch.float64, largest_logit=8.0, frozen_head=True, padding=3, views=False)
    case = type(case)(**{**vars(case), "trainable": ("student_hidden",)})
    truth = evaluate(linear_divergence_reference, case, **FORWARD, **told)
    ours = evaluate(through_cache(backend=backend, workspace_bytes=60_000), case, **FORWARD, **told)
    assert_no_worse(ours, truth, truth)


@pytest.mark.parametrize("near", [False, True], ids=["far", "near"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_by_dtype(backend, dtype, near):
    """Near: .01 nats in fp32 and .1 in 16 bits, whose rounding is that of q - onehot, not of q - p."""
    kl = (1e-2 if dtype == torch.float32 else 0.1) if near else None
    case = hard_case(N, V, H, dtype, largest_logit=8.0, frozen_head=True, near=kl, masked_entry=None)
    truth = evaluate(linear_divergence_reference, case.double(), **FORWARD)
    ours = evaluate(through_cache(backend=backend, workspace_bytes=60_000), case, **FORWARD)
    assert ours.student_hidden.dtype == dtype
    if dtype == torch.float32 and not near:
        assert_no_worse(ours, plain_outcomes(case, **FORWARD), truth)
    else:
        assert_on_target(ours, truth, "fp32_logits" if dtype == torch.float32 else "default")


def test_weights_by_position_and_sequences(backend):
    case = hard_case(N, V, H, torch.float64, largest_logit=8.0, frozen_head=True, batch=4)
    for told in ({"token_weights": FirstFraction(0.5)}, {"reduction": "sequence_mean"}):
        truth = evaluate(linear_divergence_reference, case, **FORWARD, **told)
        ours = evaluate(through_cache(backend=backend), case, **FORWARD, **told)
        assert_no_worse(ours, truth, truth)


def test_two_passes_and_one(backend, monkeypatch):
    h, W, t = torch.randn(9, H), torch.randn(V, H), torch.randn(9, H)
    cache, seen = cache_forward_kl(t, W, W, backend=backend), []
    inner = loop.project
    monkeypatch.setattr(loop, "project", lambda *args: (seen.append(1), inner(*args)))
    linear_cached_forward_kl(h.requires_grad_(), W, cache, backend=backend).backward()
    assert len(seen) == 2
    with torch.no_grad():
        linear_cached_forward_kl(h, W, cache, backend=backend)
    assert len(seen) == 3


def test_a_token_that_the_student_excludes(backend):
    """+inf where the teacher gives it probability: at its most likely token, and at another one."""
    h, W = torch.randn(1, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    t = torch.tensor([[3.0, 1.0, 0.0]], dtype=torch.float64)
    for excluded, inside in ((0, True), (1, True), (2, False)):
        bias = torch.zeros(3, dtype=torch.float64)
        bias[excluded] = -torch.inf
        teacher_bias = None if inside else bias
        told = {"teacher_bias": teacher_bias, "student_bias": bias, "backend": backend}
        cache = cache_forward_kl(t, W, W, **told)
        loss = linear_cached_forward_kl(h, W, cache, student_bias=bias, backend=backend)
        truth = linear_divergence_reference(
            h, W, t, W, student_bias=bias, teacher_bias=teacher_bias, **FORWARD
        )
        assert_no_worse(loss, truth, truth)


def test_a_file_holds_the_same_and_rows_are_indexed(backend, tmp_path):
    h, W, t = torch.randn(4, 5, H), torch.randn(V, H), torch.randn(4, 5, H)
    mask = torch.ones(4, 5)
    mask[2, 1:] = 0
    cache = cache_forward_kl(t, W, W, mask=mask, temperature=0.5, backend=backend)
    cache.save(tmp_path / "cache.pt")
    loaded = ForwardKLCache.load(tmp_path / "cache.pt")
    told = {"reduction": "none", "backend": backend}
    whole = linear_cached_forward_kl(h, W, loaded, mask=mask, **told)
    assert_same_bits(whole, linear_cached_forward_kl(h, W, cache, mask=mask, **told))
    order = torch.tensor([3, 2])
    some = linear_cached_forward_kl(h[order], W, cache[order], mask=mask[order], **told)
    assert_no_worse(some, whole[order], whole[order].double())
    torch.save({"mean": t}, tmp_path / "other.pt")
    torch.save(pytest.approx(1), tmp_path / "object.pt")
    (tmp_path / "text.pt").write_text("hi")
    for other in ("other.pt", "object.pt", "text.pt"):
        with pytest.raises(ValueError, match=f"path: expected a file that ForwardKLCache.save.*{other}"):
            ForwardKLCache.load(tmp_path / other)
    with pytest.raises(FileNotFoundError):
        ForwardKLCache.load(tmp_path / "none.pt")


def test_an_index_takes_tokens_alone():
    cache = cache_forward_kl(torch.randn(2, 3, H), torch.randn(V, H), torch.randn(V, H))
    for taken, same in (
        ((..., 0), (slice(None), 0)),
        (..., slice(None)),
        ((1, ...), 1),
        ((1, 2, ...), (1, 2)),
    ):
        mine, other = cache[taken], cache[same]
        for name in ("mean", "bias", "negative_entropy", "token"):
            assert_same_bits(getattr(mine, name), getattr(other, name))
        assert mine.mean.shape == (*mine.token.shape, H)
    with pytest.raises(IndexError):
        cache[0, 0, 0]


def test_what_it_refuses(backend):
    h, W, t, bias = torch.randn(4, H), torch.randn(V, H), torch.randn(4, H), torch.zeros(V)
    mask = torch.tensor([1, 1, 1, 0])
    cache = cache_forward_kl(t, W, W, mask=mask, backend=backend)
    moved = W.clone()
    moved.add_(1e-3)
    refused = [
        ("student_softcap", {"student_softcap": 30.0}),
        ("temperature", {"temperature": 2.0}),
        ("vocab_size", {"vocab_size": V - 1}),
        ("student_bias", {"student_bias": bias}),
        ("token_weights", {"token_weights": EntropyGate("teacher", below=1.0)}),
        ("student_weight", {"student_weight": W.clone().requires_grad_()}),
        ("student_weight", {"student_weight": moved}),
        (
            "student_weight",
            {"student_weight": torch.randn(V, H + 1), "student_hidden": torch.randn(4, H + 1)},
        ),
        ("cache", {"cache": cache[:2]}),
        ("mask", {"mask": None}),
    ]
    given = {"student_hidden": h, "student_weight": W, "cache": cache, "mask": mask, "backend": backend}
    assert linear_cached_forward_kl(**given, temperature=1.0, vocab_size=V).isfinite()
    for name, change in refused:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            linear_cached_forward_kl(**{**given, **change})
    with pytest.raises(TypeError, match="^cache: expected a ForwardKLCache"):
        linear_cached_forward_kl(h, W, None)
    for name, change in (("student_weight", torch.randn(V + 1, H)), ("student_weight", torch.randn(V))):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            cache_forward_kl(t, W, change)
    with pytest.raises(ValueError, match="^student_weight: expected a tensor on cpu, as teacher_hidden, got"):
        cache_forward_kl(t, W, W.to("meta"))
    whole_numbers = {"student_weight": W.long()}, {"student_weight": W, "student_bias": torch.zeros(V).long()}
    for change in whole_numbers:
        with pytest.raises(TypeError, match=f"^{list(change)[-1]}: expected a floating-point tensor"):
            cache_forward_kl(t, W, **change)
    biased = cache_forward_kl(t, W, W, student_bias=bias, mask=mask, backend=backend)
    with pytest.raises(ValueError, match="^student_bias: expected the bias"):
        linear_cached_forward_kl(**{**given, "cache": biased})


def test_it_compiles(backend):
    h, W, t = torch.randn(9, H, requires_grad=True), torch.randn(V, H), torch.randn(9, H)
    cache = cache_forward_kl(t, W, W, backend=backend)

    def run(h):
        return linear_cached_forward_kl(h, W, cache, backend=backend)

    loss = torch.compile(run, backend="aot_eager")(h)
    eager = run(h)
    assert_same_bits(loss.detach(), eager.detach())
    for mine, other in zip(torch.autograd.grad(loss, h), torch.autograd.grad(eager, h), strict=True):
        assert_no_worse(mine, other, other.double())

    def make(t):
        return cache_forward_kl(t, W, W, backend=backend).mean

    compiled = torch.compile(make, backend="aot_eager")
    for tokens in (9, 7, 5):  # the second one makes their number symbolic
        assert_same_bits(compiled(t[:tokens]), make(t[:tokens]))


def test_a_single_token_of_no_leading_dimension():
    student, teacher, head = torch.randn(H), torch.randn(H), torch.randn(V, H)
    cache = cache_forward_kl(teacher, head, head)
    assert cache.mean.shape == (H,) and cache.token.shape == ()
    truth = linear_divergence_reference(student, head, teacher, head, **FORWARD)
    assert_no_worse(linear_cached_forward_kl(student, head, cache), truth, truth)
