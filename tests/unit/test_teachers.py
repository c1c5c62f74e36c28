"""Several teachers by index against the dense logits of each, and against masked calls added up."""

import re
from dataclasses import replace

import pytest
import torch
from operators import check_operators
from shapes_made import ShapesMade
from teacher_cases import Several, outcome, several_case, with_adapters

from opsd_kernels import LinearDivergenceLoss, linear_divergence
from opsd_kernels._core import library
from opsd_kernels.objectives import PPOClip, linear_policy_divergence
from opsd_kernels.testing import assert_no_worse, assert_on_target
from opsd_kernels.testing.heads import with_dense_heads
from opsd_kernels.testing.reference import linear_divergence_reference
from opsd_kernels.testing.reference_rows import linear_divergence_by_index_reference
from opsd_kernels.weights import EntropyGate, MeanOne, PrefixDiscrepancy

dense = with_dense_heads(linear_divergence_by_index_reference)
ALONE = ("workspace_bytes", "backward", "gradient_tolerance", "backend")
GRADED = ("loss", "student_hidden", "student_weight", "student_bias", "A", "B")


def check(several: Several, target: str | None = None, **options):
    """Compare value, statistics and every gradient with float64, beside plain PyTorch's error."""
    told = {name: value for name, value in options.items() if name not in ALONE}
    ours, truth = outcome(linear_divergence, several, **options), outcome(dense, several.double(), **told)
    plain = outcome(dense, several, **told)
    for name, exact in truth.items():
        if target is None:
            assert_no_worse(ours[name], plain[name], exact)
        elif name in GRADED:
            assert_on_target(ours[name], exact, target)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("shared", [False, True], ids=["own heads", "one head"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_one_dense_head(backend, dtype, shared, packed):
    several = several_case(31, 203, 16, dtype, packed=packed, shared_head=shared, largest_logit=12.0)
    target = None if dtype.itemsize > 2 else "default" if shared else "fp32_logits"
    check(several, target, backend=backend, return_stats=True)


OPTIONS = {
    "chunks": {"workspace_bytes": 12000},
    "recompute": {"backward": "recompute"},
    "per token": {"reduction": "none"},
    "sum": {"reduction": "sum", "divergence": "forward_kl"},
    "top 5": {"topk": 5},
    "top 5 of the teacher": {"topk": 5, "topk_support": "teacher", "topk_tail": "renormalize"},
    "jsd, temperatures": {"divergence": "jsd", "temperature": 0.7, "teacher_temperature": 1.3},
    "mix, clips": {"teacher_mix": 0.3, "entry_clip": 0.05, "token_clip": 0.6},
    "no tolerance": {"gradient_tolerance": 0.0},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shared", [False, True], ids=["own heads", "one head"])
def test_options(name, shared):
    told = OPTIONS[name]
    made = {"largest_logit": 8.0, "views": False} if "topk" in told else {}  # no ties
    several = several_case(29, 101, 16, torch.float32, shared_head=shared, **made)
    if "topk" in told:
        several = replace(several, case=replace(several.case, token_weights=None))
    check(several, **told)
    check(replace(several, case=replace(several.case, trainable=("student_hidden",))), **told)


@pytest.mark.parametrize(
    "scheme",
    [EntropyGate("teacher", below=2.0), PrefixDiscrepancy(0.5), MeanOne(PrefixDiscrepancy(0.5))],
    ids=str,
)
@pytest.mark.parametrize("budget", [None, 9000])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_weights_see_the_whole_sequence(scheme, budget, packed):
    several = several_case(28, 101, 16, torch.float32, batch=4, packed=packed)
    several = replace(several, case=replace(several.case, token_weights=None))
    check(several, token_weights=scheme, workspace_bytes=budget)
    check(several, token_weights=scheme, workspace_bytes=budget, reduction="sequence_mean")


@pytest.mark.parametrize("trained", [False, True], ids=["base student", "adapted student"])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("shared", [False, True], ids=["own heads", "one head"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_adapters_by_index(backend, dtype, shared, packed, trained):
    """On one head: self-teachers that are adapters of the student's own weight."""
    several = several_case(31, 203, 16, dtype, packed=packed, shared_head=shared, largest_logit=8.0)
    target = None if dtype.itemsize > 2 else "default" if shared else "fp32_logits"
    check(with_adapters(several, trained), target, backend=backend, return_stats=True)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shared", [False, True], ids=["own heads", "one head"])
def test_options_beside_adapters(name, shared):
    told = OPTIONS[name]
    made = {"largest_logit": 8.0, "views": False} if "topk" in told else {}  # no ties
    several = with_adapters(several_case(29, 101, 16, torch.float32, shared_head=shared, **made))
    if "topk" in told:
        several = replace(several, case=replace(several.case, token_weights=None))
    check(several, **told)
    check(replace(several, case=replace(several.case, trainable=("student_hidden",))), **told)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_of_another_dtype(dtype):
    """peft keeps adapters of 16-bit models in fp32."""
    several = several_case(29, 101, 16, dtype, shared_head=True, largest_logit=8.0)
    check(with_adapters(several, dtype=torch.float32), None if dtype.itemsize > 2 else "default")


def test_an_adapter_for_all_teachers_is_given_once():
    several = with_adapters(several_case(17, 67, 8, torch.float64, shared_head=True), student=False)
    case, (h, W), adapter = several.case, several.case.inputs()[:2], several.options["teacher_lora"][1]
    told = {**case.options(), **several.options}
    each = linear_divergence(h, W, list(several.hidden), W, **{**told, "teacher_lora": [adapter] * 3})
    once = linear_divergence(h, W, list(several.hidden), W, **{**told, "teacher_lora": adapter})
    assert torch.equal(each, once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_second_head_is_made_for_the_adapters(narrow_slices, dtype):
    N, V, H = 13, 503, 40
    h, W = torch.randn(N, H).to(dtype).requires_grad_(), torch.randn(V, H).to(dtype)
    adapters = [(torch.randn(4, H).to(dtype), torch.randn(V, 4).to(dtype), 1.0 + k) for k in range(3)]
    with ShapesMade(W) as seen:
        states, index = [torch.randn(N, H).to(dtype) for _ in range(3)], torch.arange(N) % 3
        linear_divergence(h, W, states, W, teacher_index=index, teacher_lora=adapters).backward()
    assert (V, H) not in seen.shapes and (H, V) not in seen.shapes and len(seen.shapes) > 3
    assert h.grad is not None


@pytest.mark.parametrize("shape", [(4, 1), (7,), (1, 7), ()], ids=str)
def test_the_index_broadcasts(shape):
    """As temperatures do: (B, 1) for a teacher of each sequence."""
    several = several_case(28, 67, 8, torch.float64, batch=4)
    index = torch.arange(max(1, *shape, 1)).view(shape) % 3 if shape else torch.tensor(2)
    whole = index.expand(4, 7).contiguous()
    hidden = [torch.nan_to_num(x, 0.5) for x in several.hidden]
    found, expected = (
        outcome(
            linear_divergence,
            replace(several, hidden=tuple(hidden), options={**several.options, "teacher_index": given}),
            return_stats=True,
        )
        for given in (index, whole)
    )
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def masked_calls(student, weight, hidden, weights, *, mask, teacher_index, teacher_softcap, **options):
    """The definition: one call for each teacher, on its own tokens."""
    total = 0
    for k, (states, head) in enumerate(zip(hidden, weights, strict=True)):
        told = {
            "teacher_softcap": teacher_softcap[k],
            "mask": mask & (teacher_index == k),
            "reduction": "sum",
        }
        for name in ("teacher_bias", "teacher_logit_scale"):
            told[name] = options[name][k]
        others = {n: v for n, v in options.items() if n not in told}
        total = total + linear_divergence_reference(student, weight, states, head, **told, **others)
    return total


@pytest.mark.parametrize("budget", [None, 9000])
def test_each_teacher_has_its_softcap(budget):
    several = several_case(29, 101, 16, torch.float32)
    told = {**several.options, "teacher_softcap": [None, 5.0, 2.0]}
    several = replace(several, options=told)
    ours = outcome(linear_divergence, several, reduction="sum", workspace_bytes=budget)
    truth, plain = (outcome(masked_calls, x) for x in (several.double(), several))
    for name, exact in truth.items():
        assert_no_worse(ours[name], plain[name], exact)


def test_heads_of_which_some_are_the_student_s():
    """Two of three share its head: no difference form, and the same value."""
    for dtype, target in ((torch.float32, None), (torch.bfloat16, "default")):
        several = several_case(29, 101, 16, dtype, widths=(16, 16, 16), largest_logit=8.0, bias=False)
        head = several.case.student_weight
        check(replace(several, weight=(head, several.weight[1], head)), target)


def test_one_head_for_all_teachers_is_given_once():
    several = several_case(17, 67, 8, torch.float64, shared_head=True)
    case, (h, W) = several.case, several.case.inputs()[:2]
    told = {**case.options(), **several.options}
    each = linear_divergence(h, W, list(several.hidden), [W, W, W], **told)
    assert torch.equal(each, linear_divergence(h, W, several.hidden, W, **told))
    module = LinearDivergenceLoss(teacher_logit_scale=[1.0, 1.0, 1.0])
    assert torch.equal(each, module(h, W, several.hidden, W, **told))


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_a_teacher_may_have_no_token(monkeypatch, packed):
    for pack in ("1", "0"):
        monkeypatch.setenv("OPSD_PACK", pack)
        several = several_case(19, 67, 8, torch.float64, packed=packed)
        index = torch.where(several.options["teacher_index"] == 1, 2, several.options["teacher_index"])
        tokens = index.numel() if not packed else int((index == 2).sum())
        hidden = [
            several.hidden[0],
            several.hidden[1][:0] if packed else several.hidden[1],
            torch.randn(tokens, 24).double(),
        ]
        check(replace(several, hidden=tuple(hidden), options={**several.options, "teacher_index": index}))


def test_a_policy_term_beside_several_teachers():
    several = several_case(21, 67, 8, torch.float64)
    told = {
        **several.case.options(),
        **several.options,
        "policy": PPOClip(torch.ones(1, 21)),
        "policy_weight": 0.5,
    }
    h, W = (x.detach().requires_grad_() for x in several.case.inputs()[:2])
    mixed = linear_policy_divergence(h, W, several.hidden, several.weight, **told)
    alone = linear_policy_divergence(h, W, several.hidden, several.weight, **{**told, "policy_weight": 1.0})
    plain = dense(h, W, several.hidden, several.weight, **several.case.options(), **several.options)
    truth = torch.autograd.grad(0.5 * plain + 0.5 * alone, (h, W))
    for ours, exact in zip(torch.autograd.grad(mixed, (h, W)), truth, strict=True):
        assert_no_worse(ours, exact, exact)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("backward", ["in_forward", "recompute"])
@pytest.mark.parametrize("adapters", [False, True], ids=["plain", "adapters"])
def test_registered_and_compiled(packed, backward, adapters):
    several = several_case(13, 67, 8, torch.float32, packed=packed, views=False)
    several = with_adapters(several) if adapters else several
    torch._dynamo.reset()
    compiled = torch.compile(linear_divergence, fullgraph=True, backend="aot_eager")
    found, expected = (outcome(op, several, backward=backward) for op in (compiled, linear_divergence))
    for name, value in expected.items():
        assert_no_worse(found[name], value, value)
    clean = replace(
        several.case, student_hidden=torch.randn(13, 8), mask=None, labels=None, token_weights=None
    )
    index = several.options["teacher_index"].clamp(0, 2)
    hidden = tuple(torch.nan_to_num(x, 0.5) for x in several.hidden)
    clean = Several(clean, hidden, several.weight, {**several.options, "teacher_index": index})
    check_operators(
        library, ("op", "op_backward"), lambda: outcome(linear_divergence, clean, backward=backward)
    )


H, W = torch.ones(3, 8), torch.ones(67, 8)
INDEX = torch.tensor([0, 1, 1])
ADAPTER = (torch.ones(2, 8), torch.ones(67, 2), 1.0)


@pytest.mark.parametrize(
    "hidden, weight, told, error, match",
    [
        (H, W, {}, TypeError, "teacher_hidden: expected a sequence of K tensors"),
        (
            [H, H],
            [W, W],
            {"teacher_index": None},
            ValueError,
            "teacher_index: expected a tensor (3,) of numb",
        ),
        ([H, H], [W], {}, ValueError, "teacher_weight: expected 2 tensors"),
        ([H, H], W, {"teacher_index": INDEX + 1}, ValueError, "teacher_index: expected entries in [0, 2)"),
        ([H, H], W, {"teacher_index": INDEX.int()}, TypeError, "teacher_index: expected dtype int64"),
        (
            [H, H],
            W,
            {"teacher_index": INDEX[:2]},
            ValueError,
            "teacher_index: expected a tensor on cpu that broadcasts to (3,), got shape (2,)",
        ),
        ([H, H[:1]], W, {}, ValueError, "teacher_hidden[1]: expected 2 rows"),
        ([H, torch.ones(3, 7)], W, {}, ValueError, "teacher_hidden[1]: expected (..., 8)"),
        ([H, H], W, {"teacher_softcap": [1.0]}, ValueError, "teacher_softcap: expected 2 values"),
        (
            [H, H],
            W,
            {"teacher_logit_scale": [1, "a"]},
            TypeError,
            "teacher_logit_scale[1]: expected a number",
        ),
        ([H, H], W, {"teacher_lora": [ADAPTER]}, ValueError, "teacher_lora: expected 2 values, one per"),
        ([H, H], W, {"teacher_lora": [None, 3.0]}, TypeError, "teacher_lora[1]: expected None or (A, B, sc"),
        (
            [H, H],
            W,
            {"teacher_lora": [None, (ADAPTER[0][:, :7], *ADAPTER[1:])]},
            ValueError,
            "teacher_lora[1] A: expected shape (r, 8)",
        ),
        ([H, H], W, {"teacher_lora": (*ADAPTER[:2], "a")}, TypeError, "teacher_lora scaling: expected a num"),
        # What all teachers share has no number.
        ([H, H], W, {"teacher_temperature": [1.0, 2.0]}, TypeError, "teacher_temperature: expected a number"),
        ([H, H], W[0], {}, ValueError, "teacher_weight: expected shape (V, H)"),
        ([H, H], [W, W[0]], {}, ValueError, "teacher_weight[1]: expected shape (V, H)"),
    ],
)
def test_errors(hidden, weight, told, error, match):
    with pytest.raises(error, match="^" + re.escape(match)):
        linear_divergence(H, W, hidden, weight, **{"teacher_index": INDEX, **told})


@pytest.mark.parametrize("hidden", [None, [H, H]])
def test_a_student_that_is_no_tensor(hidden):
    with pytest.raises(TypeError, match="^student_hidden: expected a tensor, got "):
        linear_divergence(hidden, W, [H, H], W, teacher_index=INDEX)


def test_a_single_token_of_no_leading_dimension():
    student, head = torch.randn(4), torch.randn(9, 4)
    packed = [torch.randn(0, 4), torch.randn(1, 4)]
    ours = linear_divergence(student, head, packed, [head, head], teacher_index=torch.tensor(1))
    one = linear_divergence(student, head, packed[1][0], head)
    assert_no_worse(ours, one, one)


def test_a_trainable_bias_under_weights_of_a_sequence(backend):
    """The weights of a token wait for the statistics of tokens with another teacher."""
    several = several_case(28, 33, 8, torch.float64, largest_logit=4.0, batch=4)
    case = replace(several.case, trainable=("student_hidden", "student_bias"), token_weights=None)
    weighting = PrefixDiscrepancy(0.9, of="divergence")
    check(replace(several, case=case), backend=backend, token_weights=weighting)
