"""The plan: inside its budget, no chunk wasted, passes and operations as the cost model has them, and the plan that the op follows."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd_kernels import ChunkPlan, chunked, plan
from opsd_kernels.testing import evaluate, hard_case

many = settings(max_examples=200, deadline=None, derandomize=True)
shapes = st.tuples(st.integers(1, 300_000), st.integers(1, 300_000), st.integers(1, 8192), st.integers(1, 8192))
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


@given(shape=shapes, dtype=dtypes, shared=st.booleans(), trainable=st.booleans(), grad=st.booleans(), mib=st.integers(16, 4096))
@many
def test_workspace_stays_in_the_budget_and_covers_all_tokens(shape, dtype, shared, trainable, grad, mib):
    N, V, H_s, H_t = shape
    made = plan(N, V, H_s, H_s if shared else H_t, dtype, shared_head=shared, trainable_head=trainable, grad=grad, workspace_bytes=mib << 20)
    assert made.tokens == N and made.rows >= 1
    assert made.rows * (made.chunks - 1) < N <= made.rows * made.chunks, "every token has one chunk, and no chunk is empty"
    assert made.workspace_bytes <= mib << 20
    assert 2 * min(made.rows, N) * V * made.logits_dtype.itemsize <= made.workspace_bytes
    if made.accumulator_bytes <= mib << 20:
        assert made.workspace_bytes + made.accumulator_bytes / 2 <= (mib << 20) * 1.001
    assert made.peak_bytes >= made.workspace_bytes + made.vector_bytes


@given(shape=shapes, dtype=dtypes, mib=st.integers(32, 1024))
@many
def test_a_larger_budget_never_makes_more_chunks(shape, dtype, mib):
    small, large = (plan(*shape, dtype, shared_head=False, workspace_bytes=size << 20) for size in (mib, 2 * mib))
    assert large.chunks <= small.chunks


@pytest.mark.parametrize(
    "options, passes",
    [
        ({}, 4),
        ({"trainable_head": False}, 3),
        ({"backward": "recompute"}, 6),
        ({"grad": False}, 2),
        ({"grad": False, "backward": "recompute"}, 2),
    ],
    ids=str,
)
def test_passes_and_operations(options, passes):
    made = plan(1024, 32000, 1024, **options)
    assert made.passes == passes
    assert made.flops == passes * 2 * 1024 * 1024 * 32000


def test_buffers_of_16_bit_inputs():
    """16 bits where the difference GEMM loses nothing, else fp32; and as asked."""
    assert plan(64, 1000, 64, dtype=torch.bfloat16, shared_head=True).logits_dtype == torch.bfloat16
    assert plan(64, 1000, 64, dtype=torch.bfloat16, shared_head=True).difference
    assert plan(64, 1000, 64, dtype=torch.bfloat16, shared_head=False).logits_dtype == torch.float32
    assert plan(64, 1000, 64, dtype=torch.bfloat16, shared_head=False, logits_dtype="input").logits_dtype == torch.bfloat16
    assert plan(64, 1000, 64, dtype=torch.bfloat16, logits_dtype=torch.float32).logits_dtype == torch.float32
    assert plan(64, 1000, 64, dtype=torch.float64, logits_dtype=torch.float32).logits_dtype == torch.float64


def test_peak_is_flat_in_tokens():
    """Beyond what has the size of inputs and outputs, up to the rounding of a chunk to 16 rows."""
    short, long = (plan(N, 151936, 64, dtype=torch.float32, workspace_bytes=256 << 20) for N in (2048, 131072))
    grown = long.peak_bytes - short.peak_bytes - (long.gradient_bytes - short.gradient_bytes) - (long.vector_bytes - short.vector_bytes)
    assert abs(grown) <= 16 * 151936 * 2 * 4 * 1.01


def test_the_budget_from_the_environment(monkeypatch):
    monkeypatch.setenv("OPSD_WORKSPACE_BYTES", str(64 << 20))
    assert plan(4096, 151936, 64).workspace_bytes <= 64 << 20 < plan(4096, 151936, 64, workspace_bytes=256 << 20).workspace_bytes


def test_a_plan_prints():
    made = plan(1024, 32000, 1024)
    assert json.loads(json.dumps(made.as_dict()))["chunks"] == made.chunks


@pytest.mark.parametrize("budget", [20_000, 100_000, 1 << 24])
def test_the_op_follows_its_plan(monkeypatch, budget):
    from opsd_kernels import linear_divergence

    followed: list[ChunkPlan] = []
    original = chunked.run
    monkeypatch.setattr(chunked, "run", lambda heads, spec, chunks, *args, **kwargs: followed.append(chunks) or original(heads, spec, chunks, *args, **kwargs))
    case = hard_case(29, 211, 24, shared_head=True)
    evaluate(linear_divergence, case, workspace_bytes=budget)
    assert followed == [plan(27, 211, 24, dtype=torch.float32, bias_grad=True, workspace_bytes=budget)]  # two of the tokens are ignored
