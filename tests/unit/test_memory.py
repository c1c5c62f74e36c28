"""Measure the peak memory of forward and backward above inputs, outputs and gradients.

It stays within the byte budget at any N, and within the planner's prediction.
"""

import pytest
import torch

from opsd_kernels import ChunkPlan, plan
from opsd_kernels._rows import backends
from opsd_kernels.testing import peak_bytes

pytestmark = pytest.mark.usefixtures("forked_peaks")
V, H, BUDGET = 151936, 64, 256 << 20


@pytest.fixture
def cpp():
    if reason := backends.explain("cpu")["cpp"]:
        pytest.skip(reason)


def assert_planned(planned: ChunkPlan, peak: int, slack: float = 0.0) -> None:
    """Assert a plan within 5 % of the measured peak, in bytes."""
    off = planned.peak_bytes / peak - 1
    says = f"planned {planned.peak_bytes / 2**20:.1f} MiB, measured {peak / 2**20:.1f} MiB ({off:+.1%})"
    print(says)
    assert -0.05 <= off <= 0.05 + slack, says


CALL = """
def make(N, V, H, name, budget, backend, tolerance):
    import torch
    from opsd_kernels import linear_divergence

    def tensors(N, V):
        dtype = getattr(torch, name)
        head = torch.randn(V, H).to(dtype).requires_grad_()
        return torch.randn(N, H).to(dtype).requires_grad_(), head, torch.randn(N, H).to(dtype), head

    def call(inputs, budget):
        options = {"workspace_bytes": budget, "backend": backend, "gradient_tolerance": tolerance}
        loss = linear_divergence(*inputs, divergence="reverse_kl", **options)
        return loss, torch.autograd.grad(loss, inputs[:2])

    call(tensors(64, 999), 1 << 20)
    inputs = tensors(N, V)
    return lambda: call(inputs, budget)
"""


def assert_as_planned(
    backend: str, N: int, dtype: torch.dtype, threads: int, tolerance: float | None = None
) -> None:
    options = {"workspace_bytes": BUDGET, "threads": threads, "gradient_tolerance": tolerance}
    expected = plan(N, V, H, dtype=dtype, **options)
    name = str(dtype).removeprefix("torch.")
    peak = peak_bytes(CALL, N, V, H, name, BUDGET, backend, tolerance, threads=threads)
    gradients = expected.gradient_bytes
    above = peak - gradients - expected.vector_bytes
    assert above <= BUDGET, (
        f"{above / 2**20:.1f} MiB above inputs, outputs and gradients; budget {BUDGET / 2**20:.0f} MiB"
    )
    of_two = plan(N, V, H, dtype=dtype, **{**options, "threads": 2})
    # More threads: scratch is an upper estimate.
    assert_planned(expected, peak, (expected.scratch_bytes - of_two.scratch_bytes) / peak)


@pytest.mark.slow
@pytest.mark.parametrize("N", [2048, 32768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_is_within_the_budget_and_as_planned(cpp, N, dtype):
    """The peak is the budget and N-sized vectors (losses, statistics), as documented.

    The torch backend is left out, because its sweeps hold a few dozen rows of temporaries.
    """
    assert_as_planned("cpp", N, dtype, threads=2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_backward_pass_over_some_columns_is_as_planned(cpp, dtype):
    """These logits have a standard deviation of 8, so that most columns are left out."""
    assert_as_planned("cpp", 2048, dtype, 2, tolerance=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "threads, dtype",
    [
        (1, torch.bfloat16),
        (4, torch.float32),
        (8, torch.float32),
        (8, torch.bfloat16),
        (8, torch.float16),
    ],
    ids=str,
)
def test_scratch_of_other_numbers_of_threads_is_counted(cpp, dtype, threads):
    """The prediction holds with the scratch per thread of library and sweeps: 16 MiB at 8 threads in fp32."""
    assert_as_planned("cpp", 1024, dtype, threads)


DIALECTS = """
def make(N, V, H, dialect, budget):
    import torch
    from opsd_kernels import linear_divergence, objectives, weights

    B = 8

    def prepared(N, V):
        labels, old = torch.randint(V, (B, N // B)), torch.zeros(B, N // B)
        head = torch.randn(V, H, requires_grad=True)
        inputs = torch.randn(B, N // B, H, requires_grad=True), head, torch.randn(B, N // B, H), head
        options = {
            "row": {"token_weights": weights.ImportanceRatio(old)},
            "sequence": {"token_weights": weights.PrefixDiscrepancy()},
            "top-k": {"topk": 100},
            "teacher's top-k": {"topk": 100, "topk_support": "teacher"},
            "clip": {"entry_clip": 0.1, "token_clip": 3.0},
            "jsd": {"divergence": "jsd"},
            "policy": {"policy": objectives.PPOClip(torch.ones(B, 1), old)},
        }[dialect]
        return inputs, {**options, "labels": labels, "backend": "cpp"}

    op = objectives.linear_policy_divergence if dialect == "policy" else linear_divergence

    def call(inputs, options, budget):
        loss = op(*inputs, **options, workspace_bytes=budget)
        return loss, torch.autograd.grad(loss, inputs[:2])

    call(*prepared(64, 999), 1 << 20)
    ready = prepared(N, V)
    return lambda: call(*ready, budget)
"""


ADAPTED = """
def make(N, V, H, rank, name, shared, budget):
    import torch
    from opsd_kernels import linear_divergence

    def prepared(N, V):
        dtype = getattr(torch, name)
        head = torch.randn(V, H).to(dtype)
        other = head if shared else torch.randn(V, H).to(dtype)
        adapter = [torch.randn(rank, H).to(dtype), torch.randn(V, rank).to(dtype)] if rank else []
        leaves = [x.requires_grad_() for x in (torch.randn(N, H).to(dtype), *adapter)]
        return leaves, head, torch.randn(N, H).to(dtype), other

    def call(leaves, head, teacher, other, budget):
        h, *adapter = leaves
        lora = (*adapter, 2.0) if rank else None
        options = {"student_lora": lora, "workspace_bytes": budget, "backend": "cpp"}
        loss = linear_divergence(h, head, teacher, other, **options)
        return loss, torch.autograd.grad(loss, leaves)

    call(*prepared(64, 999), 1 << 20)
    ready = prepared(N, V)
    return lambda: call(*ready, budget)
"""


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False], ids=["shared head", "two heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_peak_with_an_adapter_is_as_planned(cpp, dtype, shared):
    """Of rank 64 an adapter adds 14 % to the peak, which a plan without it would lack."""
    N, hidden, name = 2048, 256, str(dtype).removeprefix("torch.")
    told = {"dtype": dtype, "shared_head": shared, "trainable_head": False, "workspace_bytes": BUDGET}
    planned = plan(N, V, hidden, threads=2, ranks=(64, 0), **told)
    assert_planned(planned, peak_bytes(ADAPTED, N, V, hidden, 64, name, shared, BUDGET))


SELF_TEACHERS = """
def make(N, V, H, rank, name, budget):
    import torch
    from opsd_kernels import linear_divergence

    def prepared(N, V):
        dtype, K = getattr(torch, name), 4
        head, hidden = torch.randn(V, H).to(dtype), torch.randn(N, H).to(dtype).requires_grad_()
        states = [torch.randn(N // K, H).to(dtype) for _ in range(K)]
        given = [(torch.randn(rank, H).to(dtype), torch.randn(V, rank).to(dtype), 0.5) for _ in range(K)]
        return hidden, head, states, torch.arange(N) * K // N, given if rank else None

    def call(hidden, head, states, index, given, budget):
        told = {"teacher_index": index, "teacher_lora": given, "workspace_bytes": budget, "backend": "cpp"}
        loss = linear_divergence(hidden, head, states, head, **told)
        return loss, torch.autograd.grad(loss, hidden)

    call(*prepared(64, 999), 1 << 20)
    ready = prepared(N, V)
    return lambda: call(*ready, budget)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_peak_with_adapters_of_four_teachers_is_as_planned(cpp, dtype):
    """Four adapters of one head: no second head."""
    N, hidden, name = 2048, 256, str(dtype).removeprefix("torch.")
    told = {"dtype": dtype, "trainable_head": False, "workspace_bytes": BUDGET, "threads": 2}
    if dtype == torch.float32:
        told["shared_head"] = False  # the teachers' logits, not their differences, beside adapters
    planned = plan(N, V, hidden, ranks=(0, *[64] * 4), **told)
    assert_planned(planned, peak_bytes(SELF_TEACHERS, N, V, hidden, 64, name, BUDGET))


SIDES = """
def make(N, V, H, forms, budget):
    import torch
    from opsd_kernels import QuantizedHead, linear_divergence

    def head(form, V):
        if not form.startswith("int8"):
            return torch.randn(V, H, dtype=torch.float32).to(getattr(torch, form))
        return QuantizedHead(torch.randint(-100, 100, (V, H), dtype=torch.int8), torch.rand(V) / 100)

    def prepared(N, V):
        (own, first), (other, second), trained = forms
        rows = [torch.randn(N, H).to(getattr(torch, name)) for name in (own, other)]
        student = head(first, V)
        teacher = student if second == "shared" else head(second, V)
        leaves = [rows[0].requires_grad_()] + ([student.requires_grad_()] if trained else [])
        return leaves, student, rows[1], teacher

    def call(leaves, student, rows, teacher, budget):
        loss = linear_divergence(leaves[0], student, rows, teacher, workspace_bytes=budget, backend="cpp")
        return loss, torch.autograd.grad(loss, leaves)

    call(*prepared(64, 999), 1 << 20)
    ready = prepared(N, V)
    return lambda: call(*ready, budget)
"""
FORMS = {  # (dtype of the rows, head) of student and teacher, whether the student's head is trained; the plan
    "bf16, an int8 teacher": (
        (("bfloat16", "bfloat16"), ("bfloat16", "int8"), False),
        {"dtype": torch.bfloat16, "heads": ("whole", "quantised")},
    ),
    "fp32, int8 for both": (
        (("float32", "int8"), ("float32", "shared"), False),
        {"dtype": torch.float32, "heads": ("quantised", "quantised"), "shared_head": True},
    ),
    "bf16 student, fp32 teacher": (
        (("bfloat16", "bfloat16"), ("float32", "float32"), True),
        {"dtype": torch.bfloat16, "teacher_dtype": torch.float32, "trainable_head": True},
    ),
    "fp32 student, bf16 teacher": (
        (("float32", "float32"), ("bfloat16", "bfloat16"), False),
        {"dtype": torch.float32, "teacher_dtype": torch.bfloat16},
    ),
    "fp32 rows over a bf16 head": (
        (("float32", "bfloat16"), ("float32", "shared"), True),
        {"dtype": torch.float32, "heads": ("sliced", "sliced"), "shared_head": True, "trainable_head": True},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_heads_read_by_slices_are_as_planned(cpp, name):
    """A head in another form makes no copy of its size: 148 MiB in fp32, of a budget of 256."""
    N, hidden, (forms, told) = 2048, 256, FORMS[name]
    options = {"shared_head": False, "trainable_head": False, "workspace_bytes": BUDGET, "threads": 2, **told}
    planned = plan(N, V, hidden, **options)
    assert_planned(planned, peak_bytes(SIDES, N, V, hidden, forms, BUDGET))


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["row", "sequence", "top-k", "teacher's top-k", "clip", "jsd", "policy"])
def test_dialects_stay_in_the_budget(cpp, dialect):
    """The peak is the budget, N-sized vectors and a few numbers per entry of a support."""
    N = 2048
    peak = peak_bytes(DIALECTS, N, V, H, dialect, BUDGET)
    above = peak - 4 * (N + V) * H - plan(N, V, H, dtype=torch.float32, workspace_bytes=BUDGET).vector_bytes
    assert above <= BUDGET, (
        f"{above / 2**20:.1f} MiB above inputs, outputs and gradients; budget {BUDGET / 2**20:.0f} MiB"
    )


PART = """
def make(N, V, H, name, whole, budget, form):
    import torch
    from opsd_kernels import linear_divergence

    def prepared(N, V, whole):
        dtype = getattr(torch, name)
        head, hidden = (torch.randn(rows, H).to(dtype).requires_grad_() for rows in (V, N))
        other, ids = torch.randn(whole, H).to(dtype), torch.randperm(whole)[:V]
        other = other[ids] if form == "own head" else other
        return hidden, head, torch.randn(N, H).to(dtype), other, ids

    def call(hidden, head, states, other, ids, budget):
        told = {"student_vocab_ids": ids} if form == "by ids" else {}
        told = {"divergence": "tvd", "workspace_bytes": budget, "backend": "cpp", **told}
        loss = linear_divergence(hidden, head, states, other, **told)
        return loss, torch.autograd.grad(loss, (hidden, head))

    call(*prepared(64, 99, 999), 1 << 20)
    ready = prepared(N, V, whole)
    return lambda: call(*ready, budget)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_peak_with_a_part_of_the_vocabulary_is_as_planned(cpp, dtype):
    """Rows of the teacher's head gathered whole would take another 62 (31) MiB: 31 % (16 %) of the peak."""
    N, part, hidden, name = 1024, 32000, 512, str(dtype).removeprefix("torch.")
    told = {"dtype": dtype, "shared_head": False, "one_sweep": False, "workspace_bytes": BUDGET}
    for form, head in (("own head", "whole"), ("by ids", "sliced")):
        planned = plan(N, part, hidden, threads=2, heads=("whole", head), **told)
        assert_planned(planned, peak_bytes(PART, N, part, hidden, name, 128000, BUDGET, form))
