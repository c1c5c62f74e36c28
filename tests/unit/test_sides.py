"""Student and teacher of different dtypes, against float64."""

from dataclasses import replace

import pytest
import torch
from operators import check_operators

from opsd_kernels import linear_divergence, linear_logprobs
from opsd_kernels._core import library, sliced_head
from opsd_kernels._core.sliced_head import MovedRows, SlicedHead
from opsd_kernels.testing import (
    assert_no_worse,
    assert_on_target,
    evaluate,
    hard_case,
    plain_outcomes,
    relative_error,
)
from opsd_kernels.testing.reference import linear_divergence_reference

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
ALONE = ("workspace_bytes", "backward", "backend")
# dtypes of the student's hidden states and head, and of the teacher's
MIXES = {
    "bf16 student, fp32 teacher": (BF16, BF16, F32, F32),
    "fp32 student, bf16 teacher": (F32, F32, BF16, BF16),
    "fp32 rows over a bf16 head": (F32, BF16, F32, F32),
    "fp32 rows over bf16 heads": (F32, BF16, F32, BF16),
    "bf16 rows under an fp32 head": (BF16, F32, F32, F32),
    "bf16 student, a teacher of both": (BF16, BF16, BF16, F32),
    "bf16 student, fp16 teacher": (BF16, BF16, F16, F16),
    "fp16 rows over a bf16 head": (F16, BF16, BF16, F16),
    "fp32 student, fp64 teacher": (F32, F32, F64, F64),
    "fp64 student, bf16 teacher": (F64, F64, BF16, BF16),
    "bf16 rows under an fp64 head": (BF16, F64, F32, BF16),
    "bf16 student, fp64 rows over an fp16 head": (BF16, BF16, F64, F16),
}


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(sliced_head, "SLICED_BYTES", {"cpu": 1, "cuda": 1})


def mixed_case(dtypes, **made):
    """Return a hard case whose numbers are those of the narrower dtypes."""
    case = hard_case(31, 203, 24, F64, largest_logit=12.0, **made)
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    cast = {name: getattr(case, name).to(dtype) for name, dtype in zip(names, dtypes, strict=True)}
    if case.teacher_weight is case.student_weight:
        cast["teacher_weight"] = cast["student_weight"]
    return replace(case, **cast)


def target_of(dtypes) -> str | None:
    return None if all(dtype.itemsize > 2 for dtype in dtypes) else "fp32_logits"


def check(case, target, op=linear_divergence, **options):
    told = {name: value for name, value in options.items() if name not in ALONE}
    ours, truth = evaluate(op, case, **options), evaluate(linear_divergence_reference, case.double(), **told)
    for name in case.trainable:
        gradient = getattr(ours, name)
        assert gradient is None or gradient.dtype == getattr(case, name).dtype
    if target is None:
        assert_no_worse(ours, plain_outcomes(case, **told), truth)
    else:
        assert_on_target(ours, truth, target)


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_matches_float64(backend, name, frozen):
    check(mixed_case(MIXES[name], frozen_head=frozen), target_of(MIXES[name]), backend=backend)


OPTIONS = {
    "jsd, chunks": {"divergence": "jsd", "workspace_bytes": 20000},
    "recompute": {"backward": "recompute", "workspace_bytes": 20000},
    "per token, softcap": {"reduction": "none", "student_softcap": 9.0, "teacher_softcap": 20.0},
    "tvd": {"divergence": "tvd"},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    "name", ["bf16 student, fp32 teacher", "fp32 rows over a bf16 head", "fp32 student, bf16 teacher"]
)
def test_options(name, option):
    check(mixed_case(MIXES[name], padding=3), target_of(MIXES[name]), **OPTIONS[option])


@pytest.mark.parametrize(
    "dtypes", [(BF16, BF16, F32), (F32, BF16, BF16), (BF16, F32, F16), (F64, F32, BF16)], ids=str
)
@pytest.mark.parametrize("near", [None, 1e-4])
def test_one_head_under_rows_of_two_dtypes(dtypes, near):
    """Both sides take the widest dtype, and the difference GEMM keeps what the rows differ in."""
    case = mixed_case((*dtypes, dtypes[1]), shared_head=True, near=near)
    check(case, "fp32_logits")


@pytest.mark.parametrize("widest", [F64, F32])
def test_several_teachers_of_different_dtypes(widest):
    """One teacher's dtype may widen the student's rows for all; its place in the list does not matter."""
    gen = torch.Generator().manual_seed(0)

    def made(*shape, dtype):
        return (torch.randn(*shape, generator=gen, dtype=F64) / 2).to(dtype)

    student, index = (made(31, 24, dtype=F32), made(203, 24, dtype=BF16)), torch.arange(31) % 3
    teachers = [
        (made(31, 24, dtype=BF16), student[1]),  # the student's head
        (made(31, 16, dtype=F16), made(203, 16, dtype=BF16)),
        (made(31, 8, dtype=widest), made(203, 8, dtype=widest)),
    ]
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        rows, heads = zip(*(teachers[k] for k in order), strict=True)
        own = torch.tensor([order.index(k) for k in range(3)])[index]
        leaves = [x.clone().requires_grad_() for x in student]
        heads = [leaves[1] if head is student[1] else head for head in heads]
        loss = linear_divergence(*leaves, rows, heads, teacher_index=own, reduction="sum")
        exact = [x.double().requires_grad_() for x in student]
        truth = sum(
            linear_divergence_reference(
                *exact, h.double(), exact[1].detach() if W is student[1] else W.double(),
                mask=index == k, reduction="sum",
            )
            for k, (h, W) in enumerate(teachers)
        )  # fmt: skip
        ours, wanted = (torch.autograd.grad(x, y) for x, y in ((loss, leaves), (truth, exact)))
        for one, other in zip((loss.detach(), *ours), (truth.detach(), *wanted), strict=True):
            assert relative_error(one, other) < (3e-3 if one.dtype == BF16 else 1e-5)


def test_each_side_is_projected_in_its_own_dtype(monkeypatch):
    """fp32 buffers are wide enough for both; of the bf16 head nothing is cast."""
    from opsd_kernels._core import loop

    seen, project = [], loop.project

    def noted(hidden, weight, out, centre=None):
        seen.append((hidden.dtype, weight.dtype, out.dtype, isinstance(weight, torch.Tensor)))
        return project(hidden, weight, out, centre)

    monkeypatch.setattr(loop, "project", noted)
    case = mixed_case(MIXES["bf16 student, fp32 teacher"])
    evaluate(linear_divergence, case, backend="torch")
    assert seen == [(BF16, BF16, F32, True), (F32, F32, F32, True), (BF16, BF16, F32, True)]


def test_log_probs_of_one_mixed_head():
    case = mixed_case(MIXES["fp32 rows over a bf16 head"], bias=False)
    h, W, labels = case.student_hidden, case.student_weight, case.labels
    valid = case.mask & (labels >= 0)
    ours = linear_logprobs(h, W, labels)[valid]
    truth = (h.double() @ W.double().T).log_softmax(-1)[valid].gather(1, labels[valid][:, None])[:, 0]
    assert ours.dtype == F32 and (ours - truth).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["bf16 student, fp32 teacher", "fp32 rows over a bf16 head"])
def test_opcheck_and_one_graph(name):
    case = mixed_case(MIXES[name])
    check_operators(library, ("op",), lambda: evaluate(linear_divergence, case))
    compiled = torch.compile(linear_divergence, fullgraph=True, backend="aot_eager")
    eager, traced = (evaluate(run, case) for run in (linear_divergence, compiled))
    for (_, one), (_, other) in zip(eager.named(), traced.named(), strict=True):
        assert torch.equal(one, other)


class Elsewhere(torch.Tensor):
    """A tensor that says it is on another device, and notes the rows that are moved from there."""

    moved: list = []

    @property
    def device(self):
        return torch.device("cuda", 7)

    def to(self, *args, **kwargs):
        Elsewhere.moved.append(tuple(self.shape))
        return self.as_subclass(torch.Tensor).to(*[x for x in args if isinstance(x, torch.dtype)])


def test_slices_and_rows_are_moved_between_devices():
    """On a machine with one device: what is asked to move, and that no more rows are than a slice has."""
    weight, hidden, cpu = torch.randn(203, 24), torch.randn(31, 24), torch.device("cpu")
    Elsewhere.moved = []
    head = SlicedHead(weight.as_subclass(Elsewhere), None, 0, 203, F32, cpu)
    slices = [(part, rows.clone()) for part, rows in head.slices()]
    for part, rows in slices:
        assert type(rows) is torch.Tensor and torch.equal(rows, weight[part])
    assert Elsewhere.moved == [(64, 24)] * 3 + [(11, 24)]
    Elsewhere.moved = []
    rows = MovedRows(hidden.as_subclass(Elsewhere), F64, cpu)
    assert torch.equal(rows[3:9], hidden[3:9].double()) and Elsewhere.moved == [(6, 24)]


BAD = [
    ({"student_weight": torch.ones(5, 4, device="meta")}, ["student_weight", "cpu", "meta"]),
    ({"teacher_weight": torch.ones(5, 4, device="meta")}, ["teacher_weight", "cpu", "meta"]),
    ({"teacher_hidden": torch.ones(3, 4, device="meta")}, ["teacher_hidden", "cpu", "meta"]),
    ({"student_bias": torch.ones(5, device="meta")}, ["student_bias", "cpu", "meta"]),
]


@pytest.mark.parametrize("changes, parts", BAD)
def test_a_tensor_without_values_is_refused(changes, parts):
    given = {
        "student_hidden": torch.ones(3, 4), "student_weight": torch.ones(5, 4),
        "teacher_hidden": torch.ones(3, 4), "teacher_weight": torch.ones(5, 4),
    }  # fmt: skip
    with pytest.raises(ValueError) as caught:
        linear_divergence(**{**given, **changes})
    assert all(part in str(caught.value) for part in parts), str(caught.value)
