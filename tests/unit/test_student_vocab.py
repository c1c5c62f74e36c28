"""A student's head for a part of the teacher's vocabulary, against dense heads and heads gathered by hand."""

import re
from dataclasses import replace

import lora_cases
import pytest
import torch
from draft_cases import Draft, draft_case
from operators import check_operators
from quantised_cases import QUANTISED
from shapes_made import ShapesMade

from opsd_kernels import (
    DistillationHead,
    LinearDivergenceLoss,
    VocabShard,
    linear_divergence,
    linear_divergence_to,
    linear_topk_divergence,
)
from opsd_kernels._core import library, sliced_head
from opsd_kernels.objectives import PPOClip, linear_policy_divergence
from opsd_kernels.spec import KIND_NAMES, TAILS
from opsd_kernels.testing import (
    LOGPROB_NATS,
    assert_no_worse,
    assert_on_target,
    assert_same_bits,
    evaluate,
    hard_case,
)
from opsd_kernels.testing.heads import with_student_vocab
from opsd_kernels.testing.reference import (
    linear_divergence_reference,
    linear_topk_divergence_reference,
)
from opsd_kernels.weights import EntropyGate, FirstFraction, PrefixDiscrepancy

dense = with_student_vocab(linear_divergence_reference)
ALONE = ("workspace_bytes", "backward", "gradient_tolerance", "backend", "logits_dtype")
N, V_S, V_T, H = 29, 101, 173, 16


@pytest.fixture(autouse=True)
def slices(monkeypatch):
    """Read the teacher's head in several slices."""
    monkeypatch.setitem(sliced_head.SLICED_BYTES, "cpu", 0)
    monkeypatch.setattr(sliced_head, "LEAST_ROWS", 40)


def check(draft: Draft, op=linear_divergence, reference=dense, target: str | None = None, **options):
    """Compare value, gradients and statistics with float64, beside plain PyTorch's error."""
    told = {name: value for name, value in options.items() if name not in ALONE}
    truth = evaluate(reference, draft.double().case, student_vocab_ids=draft.ids, **told)
    ours = evaluate(op, draft.case, student_vocab_ids=draft.ids, **options)
    plain = evaluate(reference, draft.case, student_vocab_ids=draft.ids, **told)
    if target is None:
        assert_no_worse(ours, plain, truth)
    else:
        assert_on_target(ours, truth, target)
    for name, exact in (truth.stats or {}).items():
        if target is None:
            assert_no_worse(getattr(ours.stats, name), plain.stats[name], exact)
        elif name.endswith("logprob"):
            assert (getattr(ours.stats, name) - exact).abs().max() <= LOGPROB_NATS, name
    return ours


@pytest.mark.parametrize("divergence", KIND_NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_matches_the_restricted_heads(backend, dtype, divergence):
    draft = draft_case(N, V_S, V_T, H, dtype, largest_logit=12.0)
    target = None if dtype.itemsize > 2 else "fp32_logits"
    told = {"divergence": divergence, "backend": backend, "return_stats": True}
    ours = check(draft, target=target, **told)
    by_hand = evaluate(linear_divergence, draft.restricted, **told)
    # Narrower products may sum in another order.
    if dtype.itemsize > 2:
        assert_no_worse(
            ours,
            by_hand,
            evaluate(linear_divergence_reference, draft.restricted.double(), divergence=divergence),
        )
    else:
        assert_on_target(ours, by_hand, "fp32_logits")


OPTIONS = {
    **lora_cases.OPTIONS,
    "top 5 of the teacher": {"topk": 5, "topk_support": "teacher", "topk_tail": "renormalize"},
    "softcap of the teacher": {"divergence": "jsd", "teacher_softcap": 12.0},
    "z-loss": {"z_loss": 0.02},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(backend, name):
    told = OPTIONS[name]
    made = {"largest_logit": 8.0, "views": False} if "topk" in told else {}  # no ties
    draft = draft_case(N, V_S, V_T, H, torch.float32, **made)
    check(draft, backend=backend, **told)
    frozen = replace(draft, case=replace(draft.case, trainable=("student_hidden",)))
    check(frozen, backend=backend, **told)


@pytest.mark.parametrize("pack", ["0", "1"])
def test_16_bit_logits(monkeypatch, backend, pack):
    """The constants of the rows and the exact argmax read rows of the teacher's head by its ids."""
    monkeypatch.setenv("OPSD_PACK", pack)
    draft = draft_case(N, V_S, V_T, H, torch.bfloat16, largest_logit=4.0, masked_entry=None)
    told = {"logits_dtype": "input", "return_stats": True, "backend": backend}
    ours = check(draft, target="default", **told)
    truth = evaluate(linear_divergence_reference, draft.restricted.double(), return_stats=True)
    assert torch.equal(ours.stats.top1_agreement, truth.stats["top1_agreement"].float())


def test_ids_of_a_prefix_are_a_vocab_size(backend):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        case = hard_case(N, V_S, H, dtype, largest_logit=12.0)
        more = 50 * torch.randn(V_T - V_S, H, generator=torch.Generator().manual_seed(0)).to(dtype)
        head, bias = torch.cat([case.teacher_weight, more]), torch.cat([case.teacher_bias, more[:, 0]])
        case = replace(case, teacher_weight=head, teacher_bias=bias)
        for divergence in ("reverse_kl", "tvd"):
            told = {"divergence": divergence, "backend": backend}
            ours = evaluate(linear_divergence, case, student_vocab_ids=torch.arange(V_S), **told)
            case = replace(case, vocab_size=V_S)
            cut = evaluate(linear_divergence, case, **told)
            exact = evaluate(linear_divergence_reference, case.double(), divergence=divergence)
            case = replace(case, vocab_size=None)
            if dtype.itemsize > 2:
                assert_no_worse(ours, cut, exact)
            else:
                assert_on_target(ours, exact, "fp32_logits")


# ---------------------------------------------------------------- labels and weights


@pytest.mark.parametrize(
    "scheme", [FirstFraction(0.5), EntropyGate("teacher", below=2.0), PrefixDiscrepancy(0.5)], ids=str
)
@pytest.mark.parametrize("budget", [None, 9000])
def test_weights_see_the_known_tokens(scheme, budget):
    draft = draft_case(28, V_S, V_T, H, torch.float32, batch=4)
    draft = replace(draft, case=replace(draft.case, token_weights=None))
    check(draft, token_weights=scheme, workspace_bytes=budget)


def test_a_label_that_the_student_lacks_is_not_valid(backend):
    draft = draft_case(N, V_S, V_T, H, torch.float64)
    told = {"return_stats": True, "backend": backend, "reduction": "none"}
    case = draft.case
    ours = evaluate(linear_divergence, case, student_vocab_ids=draft.ids, **told)
    known = torch.isin(case.labels, draft.ids) & case.mask & (case.labels != -100)
    assert 0 < known.sum() < (case.mask & (case.labels != -100)).sum()
    assert (ours.loss[~known] == 0).all() and (ours.student_hidden[~known] == 0).all()
    assert (ours.stats.student_logprob[~known] == 0).all() and (ours.stats.student_logprob[known] < 0).all()
    # The mean is over the known tokens, and a mask of them changes nothing.
    mean = linear_divergence(*case.inputs(), **case.options(), student_vocab_ids=draft.ids, backend=backend)
    assert_no_worse(mean, ours.loss.sum() / known.sum(), ours.loss.sum() / known.sum())
    masked = replace(case, mask=known)
    assert_same_bits(evaluate(linear_divergence, masked, student_vocab_ids=draft.ids, **told), ours)


@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (1, 1), (2, 3, 2)], ids=str)
def test_any_leading_shape(leading):
    gen = torch.Generator().manual_seed(0)
    ids = torch.randperm(23, generator=gen)[:11]
    h, t = (torch.randn(*leading, 4, generator=gen, dtype=torch.float64) for _ in range(2))
    W, Wt = (torch.randn(rows, 4, generator=gen, dtype=torch.float64) for rows in (11, 23))
    labels = torch.randint(23, (*leading, 2), generator=gen)[..., 0]  # not contiguous
    for told in ({}, {"labels": labels}, {"labels": labels, "temperature": torch.tensor(0.7)}):
        h.requires_grad_()
        loss = linear_divergence(h, W, t, Wt, student_vocab_ids=ids, reduction="sum", **told)
        truth = dense(h, W, t, Wt, student_vocab_ids=ids, reduction="sum", **told)
        assert_no_worse(loss, truth, truth)
        ours, exact = (torch.autograd.grad(x, h)[0] for x in (loss, truth))
        assert_no_worse(ours, exact, exact)


def test_all_labels_foreign():
    draft = draft_case(9, 11, 23, 4, torch.float32)
    lacking = next(i for i in range(23) if i not in draft.ids.tolist())
    case = replace(draft.case, labels=torch.full((9,), lacking))
    found = evaluate(linear_divergence, case, student_vocab_ids=draft.ids)
    for _, value in found.named():
        assert_same_bits(value, torch.zeros_like(value))


def test_a_policy_term_of_the_sampled_tokens():
    draft = draft_case(24, V_S, V_T, H, torch.float64, batch=4)
    term = PPOClip(torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None])
    for share in (0.3, 1.0):
        told = {"policy": term, "policy_weight": share, "divergence": "tvd"}
        ours = evaluate(linear_policy_divergence, draft.case, student_vocab_ids=draft.ids, **told)
        by_hand = evaluate(linear_policy_divergence, draft.restricted, **told)
        assert_no_worse(ours, by_hand, by_hand)


# ---------------------------------------------------------------- other teachers


def listed(op, ids, logprobs, **how):
    def run(h, W, t, Wt, *, teacher_bias=None, **options):
        return op(h, W, ids, logprobs, **options, **how)

    return run


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_list_keeps_the_tokens_of_the_student(backend, dtype, tail):
    """Tokens that the student lacks are padding: their mass is the tail's. One list has no other tokens."""
    draft = draft_case(N, V_S, V_T, H, dtype, largest_logit=8.0)
    gen = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(V_T, generator=gen)[:7] for _ in range(N)])
    ids[4] = ids[4].masked_fill(torch.isin(ids[4], draft.ids), ids[4, ~torch.isin(ids[4], draft.ids)][0])
    logprobs = (torch.rand(N, 7, generator=gen, dtype=torch.float64).log() - 3).to(dtype)
    logprobs[2, 3] = -torch.inf
    assert not torch.isin(ids[4], draft.ids).any() and torch.isin(ids, draft.ids).any(1).sum() > N // 2
    told = {"tail": tail, "divergence": "forward_kl", "return_stats": True}
    ours, reference = (
        listed(op, ids, logprobs)
        for op in (linear_topk_divergence, with_student_vocab(linear_topk_divergence_reference))
    )
    check(draft, ours, reference, backend=backend, **told)


def target_of(op, form, dtype, **how):
    """Return an op in the signature of linear_divergence, the teacher's whole head projected first."""

    def run(h, W, t, Wt, *, teacher_bias, **options):
        wide = torch.promote_types(t.dtype, torch.float32)
        with torch.no_grad():
            z = t.to(wide) @ Wt.to(wide).T / 50 + teacher_bias.to(wide)
            z = z if form == "logits" else z.softmax(-1) if form == "probs" else z.log_softmax(-1)
        return op(h, W, z.to(dtype or wide), **options, **how)

    return run


@pytest.mark.parametrize("pack", ["0", "1"])
@pytest.mark.parametrize("form", ["logits", "logprobs", "probs"])
def test_a_target_over_the_whole_vocabulary(backend, monkeypatch, form, pack):
    monkeypatch.setenv("OPSD_PACK", pack)
    for dtype, held in ((torch.float64, None), (torch.float32, None), (torch.float32, torch.float64)):
        draft = draft_case(N, V_S, V_T, H, dtype, largest_logit=8.0)
        whole = target_of(linear_divergence_to, form, held, target_is=form, backend=backend)

        def by_hand(h, W, target, *, student_vocab_ids, labels, **options):
            labels = torch.where(torch.isin(labels, student_vocab_ids), labels, -100)
            column = (labels[:, None] == student_vocab_ids).int().argmax(1)
            labels = torch.where(labels < 0, -100, column)
            return linear_divergence_to(
                h, W, target[:, student_vocab_ids], labels=labels, target_is=form, backend=backend, **options
            )

        told = {"student_vocab_ids": draft.ids, "return_stats": True, "workspace_bytes": 40_000}
        ours, expected = (evaluate(op, draft.case, **told) for op in (whole, target_of(by_hand, form, held)))
        assert_no_worse(ours, expected, expected)
        for name, value in vars(expected.stats).items():
            if value is not None:
                assert_no_worse(getattr(ours.stats, name), value, value)


def test_several_teachers(backend):
    drafts = [draft_case(N, V_S, V_T, H, torch.float64, teacher_width=width) for width in (16, 20)]
    first, second = (draft.case for draft in drafts)
    index = torch.arange(N) % 2
    ids = drafts[0].ids
    pairs = [first.teacher_hidden, second.teacher_hidden], [first.teacher_weight, second.teacher_weight]
    biases = [first.teacher_bias, second.teacher_bias]

    def run(h, W, t, Wt, *, teacher_bias, by_hand=False, labels=None, **options):
        heads, theirs, names = pairs[1], biases, labels
        told = {"student_vocab_ids": ids}
        if by_hand:
            heads, theirs, told = [head[ids] for head in heads], [bias[ids] for bias in theirs], {}
            names = drafts[0].restricted.labels
        return linear_divergence(
            h, W, pairs[0], heads, teacher_bias=theirs, teacher_index=index, labels=names, **told, **options
        )

    for how in ({}, {"workspace_bytes": 12000}, {"backward": "recompute"}):
        ours, expected = (
            evaluate(run, first, backend=backend, by_hand=by_hand, **how) for by_hand in (False, True)
        )
        assert_no_worse(ours, expected, expected)


@pytest.mark.parametrize("form", ["int4 in int8, groups, zero points", "float8_e4m3fn, blocks", "bf16"])
def test_a_teacher_s_head_in_another_form(backend, form):
    """The rows of the ids have their own scales."""
    draft = draft_case(N, V_S, V_T, H, torch.float32)
    head = draft.case.teacher_weight
    head = head.bfloat16() if form == "bf16" else QUANTISED[form](head)
    whole = head.float() if form == "bf16" else head.dequantize()
    told = {"divergence": "jsd", "backend": backend}

    def run(h, W, t, Wt, **options):
        return linear_divergence(h, W, t, head, **options)

    ours = evaluate(run, draft.case, student_vocab_ids=draft.ids, **told)
    expected = evaluate(linear_divergence, replace(draft.restricted, teacher_weight=whole[draft.ids]), **told)
    assert_no_worse(ours, expected, expected)


def test_adapters_of_both_heads():
    draft = draft_case(N, V_S, V_T, H, torch.float32)
    gen = torch.Generator().manual_seed(0)

    def adapter(rows):
        return torch.randn(3, H, generator=gen) / 4, torch.randn(rows, 3, generator=gen) / 3, 0.7

    own, theirs = adapter(V_S), adapter(V_T)
    told = {"student_lora": own, "divergence": "jsd"}
    ours = evaluate(linear_divergence, draft.case, student_vocab_ids=draft.ids, teacher_lora=theirs, **told)
    by_hand = (theirs[0], theirs[1][draft.ids], theirs[2])
    expected = evaluate(linear_divergence, draft.restricted, teacher_lora=by_hand, **told)
    assert_no_worse(ours, expected, expected)


# ---------------------------------------------------------------- callers


def test_modules_take_the_ids():
    draft = draft_case(N, V_S, V_T, H, torch.float32, bias=False)
    case = draft.case
    told = {"labels": case.labels, "mask": case.mask, "divergence": "tvd"}
    expected = linear_divergence(*case.inputs(), student_vocab_ids=draft.ids, **told)
    loss = LinearDivergenceLoss(student_vocab_ids=draft.ids)
    assert_same_bits(loss(*case.inputs(), **told), expected)
    heads = [torch.nn.Linear(H, rows, bias=False) for rows in (V_S, V_T)]
    for head, weight in zip(heads, (case.student_weight, case.teacher_weight), strict=True):
        head.weight.data.copy_(weight)
    module = DistillationHead(heads[0], student_vocab_ids=draft.ids)
    found = module(case.student_hidden, case.teacher_hidden, heads[1], **told)
    assert_no_worse(found, expected, expected)


def test_autocast():
    draft = draft_case(N, V_S, V_T, H, torch.float32, largest_logit=8.0)
    with torch.autocast("cpu", torch.bfloat16):
        ours = evaluate(linear_divergence, draft.case, student_vocab_ids=draft.ids)
        expected = evaluate(linear_divergence, draft.restricted)
    assert_on_target(ours, expected, "fp32_logits")


@pytest.mark.parametrize("backward", ["in_forward", "recompute"])
def test_registered_and_compiled(backward):
    draft = draft_case(13, 67, 83, 8, torch.float32, views=False)
    torch._dynamo.reset()
    compiled = torch.compile(linear_divergence, fullgraph=True, backend="aot_eager")
    told = {"backward": backward, "student_vocab_ids": draft.ids, "return_stats": False}
    found, expected = (evaluate(op, draft.case, **told) for op in (compiled, linear_divergence))
    assert_no_worse(found, expected, expected)
    clean = replace(
        draft.case,
        student_hidden=torch.randn(13, 8),
        teacher_hidden=torch.randn(13, 8),
        mask=None,
        labels=None,
    )
    clean = replace(clean, token_weights=None)
    check_operators(library, ("op", "op_backward"), lambda: evaluate(linear_divergence, clean, **told))


def test_other_token_counts_compile_whole():
    torch._dynamo.reset()
    ids, head, other = torch.randperm(83)[:67], torch.randn(67, 8), torch.randn(83, 8)

    def run(h, t, labels):
        return linear_divergence(h, head, t, other, student_vocab_ids=ids, labels=labels)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for tokens in (9, 7, 5):  # the second one makes their number symbolic
        inputs = torch.randn(tokens, 8), torch.randn(tokens, 8), torch.randint(83, (tokens,))
        assert_same_bits(compiled(*inputs), run(*inputs))


def test_meta_tensors_give_shapes():
    h, W, t, Wt = (torch.empty(shape, device="meta") for shape in ((3, 8), (5, 8), (3, 8), (11, 8)))
    ids, labels = (torch.empty(size, dtype=torch.int64, device="meta") for size in (5, 3))
    for x in (h, W):
        x.requires_grad_()
    loss = linear_divergence(h, W, t, Wt, student_vocab_ids=ids, labels=labels)
    assert loss.is_meta and loss.shape == ()
    assert [grad.shape for grad in torch.autograd.grad(loss, (h, W))] == [h.shape, W.shape]


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_rows_of_the_teacher_are_never_gathered_whole(dtype):
    """A slice of the ids at a time: no tensor has the size of teacher_weight[ids], nor of whole logits."""
    rows, size, width = 503, 701, 44
    h, W, t, Wt = (
        torch.randn(shape).to(dtype) for shape in ((13, 24), (rows, 24), (13, width), (size, width))
    )
    ids = torch.randperm(size)[:rows]
    for options in ({}, {"logits_dtype": "input", "labels": torch.arange(13)}, {"backward": "recompute"}):
        with ShapesMade(Wt) as seen:
            leaf = h.clone().requires_grad_()
            linear_divergence(leaf, W, t, Wt, student_vocab_ids=ids, **options).backward()
        assert (40, width) in seen.shapes, "a slice"
        assert any(shape[-1:] == (rows,) and len(shape) > 1 for shape in seen.shapes), "the logits"
        assert not any(shape[-1:] == (width,) and shape[0] > 40 for shape in seen.shapes), seen.shapes
        assert not any(size in shape for shape in seen.shapes), seen.shapes


# ---------------------------------------------------------------- errors

STUDENT, TEACHER, STATES = torch.ones(5, 8), torch.ones(11, 8), torch.ones(3, 8)
IDS = torch.tensor([2, 9, 0, 10, 4])
NAME = "student_vocab_ids"
ALONE_IN_A_GROUP = torch.distributed.ProcessGroup(0, 1)


@pytest.mark.parametrize(
    "told, error, says",
    [
        ({NAME: [2, 9, 0, 10, 4]}, TypeError, f"{NAME}: expected a tensor or None, got list"),
        ({NAME: IDS.int()}, TypeError, f"{NAME}: expected dtype int64, the ids of tokens, got torch.int32"),
        ({NAME: torch.ones(11).bool()}, TypeError, f"{NAME}: expected dtype int64"),
        ({NAME: IDS[:4]}, ValueError, f"{NAME}: expected shape (5,), the rows of student_weight, got (4,)"),
        ({NAME: IDS[None]}, ValueError, f"{NAME}: expected shape (5,)"),
        (
            {NAME: IDS.to("meta")},
            ValueError,
            f"{NAME}: expected a tensor on cpu, as student_hidden, got meta",
        ),
        ({NAME: IDS + 1}, ValueError, f"{NAME}: expected entries in [0, 11), got [11]"),
        ({NAME: IDS - 1}, ValueError, f"{NAME}: expected entries in [0, 11), got [-1]"),
        (
            {NAME: torch.tensor([2, 9, 0, 9, 4])},
            ValueError,
            f"{NAME}: expected distinct ids (of offsets such as EAGLE-3's d2t: d2t + arange), got [9]",
        ),
        ({"vocab_size": 5}, ValueError, f"vocab_size: expected None beside {NAME}, which name the columns"),
        (
            {"labels": torch.tensor([1, 11, 2])},
            ValueError,
            "labels: expected entries in [0, 11) or ignore_ind",
        ),
        (
            {"labels": torch.tensor([1, -1, 2])},
            ValueError,
            "labels: expected entries in [0, 11) or ignore_ind",
        ),
        (
            {"group": VocabShard((0, 5), ALONE_IN_A_GROUP)},
            ValueError,
            f"group: expected None beside {NAME}: a rank lacks rows of teacher_weight",
        ),
    ],
)
def test_errors(told, error, says):
    with pytest.raises(error, match="^" + re.escape(says)):
        linear_divergence(STATES, STUDENT, STATES, TEACHER, **{NAME: IDS, **told})


def test_errors_of_other_teachers():
    with pytest.raises(ValueError, match=f"{NAME}: expected None where student_weight is teacher_weight"):
        linear_divergence(STATES, STUDENT, STATES, STUDENT, student_vocab_ids=torch.arange(5))
    ids, logprobs = torch.tensor([[1, 2], [3, -4], [5, 6]]), -torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"teacher_topk_ids: expected entries in .*got \[-4\]"):
        linear_topk_divergence(STATES, STUDENT, ids, logprobs, student_vocab_ids=IDS)
    with pytest.raises(ValueError, match=rf"{NAME}: expected ids of at least 0, got \[-1\]"):
        linear_topk_divergence(STATES, STUDENT, ids.abs(), logprobs, student_vocab_ids=IDS - 1)
    with pytest.raises(ValueError, match=rf"{NAME}: expected entries in \[0, 9\), got \[9\]"):
        linear_divergence_to(STATES, STUDENT, torch.ones(3, 9), student_vocab_ids=IDS)
    with pytest.raises(ValueError, match=r"target: expected shape \(3, 5\) or more columns"):
        linear_divergence_to(STATES, STUDENT, torch.ones(3, 4), student_vocab_ids=IDS)
