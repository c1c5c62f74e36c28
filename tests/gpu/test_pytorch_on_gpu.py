"""The op inside PyTorch on the device: autocast, compile, opcheck, equal bits, the memory of a call."""

import placing
import pytest
import torch
from placing import placed, unmasked
from torch.library import opcheck

from opsd_kernels import linear_divergence, plan
from opsd_kernels.spec import KIND_NAMES
from opsd_kernels.testing import (
    assert_no_worse,
    assert_on_target,
    assert_same_bits,
    evaluate,
    hard_case,
    peak_bytes,
)
from opsd_kernels.testing.reference import linear_divergence_reference

unit = placing.unit("test_autograd")


@pytest.mark.parametrize("shared_head", [True, False], ids=["shared head", "two heads"])
def test_autocast_computes_in_its_dtype(backend, device, shared_head):
    case = hard_case(67, 1003, 32, torch.float32, shared_head=shared_head, near=1e-2, largest_logit=8.0)
    with torch.autocast(device.type, torch.bfloat16):
        ours = evaluate(linear_divergence, placed(case), backend=backend)
    rounded = case._map(lambda t: t.bfloat16() if t.dim() == 2 and t.is_floating_point() else t)
    assert all(value.dtype == torch.float32 and value.device.type == device.type for _, value in ours.named())
    assert_on_target(ours, evaluate(linear_divergence_reference, rounded.double()), "default")


@pytest.mark.parametrize("options", unit.ROUTES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck(backend, monkeypatch, options, dtype):
    case = placed(unmasked(hard_case(13, 67, 8, dtype, padding=3, views=False)))
    calls = unit.recorded_calls(
        monkeypatch, lambda: evaluate(linear_divergence, case, backend=backend, return_stats=True, **options)
    )
    assert calls
    for op, args in calls:
        plain = tuple(arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args)
        opcheck(
            op.default, plain, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
        )


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("options", unit.ROUTES, ids=str)
def test_compile_fullgraph(backend, options, compiler):
    """Per-token results have the bits of eager; what is summed over tokens is held to the gate."""
    if compiler == "inductor" and placing.DRY_RUN:
        pytest.skip("Inductor needs a C++ compiler on a CPU, and Triton outside its interpreter")
    torch._dynamo.reset()
    case = hard_case(13, 67, 8)

    def loss_of(*tensors, **named):
        return linear_divergence(*tensors, **named, **options, divergence="jsd", backend=backend) * 2.0

    there = placed(case)
    ours, eager = (
        evaluate(torch.compile(loss_of, fullgraph=True, backend=compiler), there),
        evaluate(loss_of, there),
    )
    reference = {name: value for name, value in options.items() if name == "reduction"}
    truth, plain = (
        evaluate(lambda *t, **n: 2 * linear_divergence_reference(*t, **n, **reference, divergence="jsd"), c)
        for c in (case.double(), case)
    )
    assert_no_worse(ours, plain, truth)
    if options["reduction"] == "none":
        assert_same_bits(ours.loss, eager.loss)


@pytest.mark.parametrize("divergence", KIND_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shared_head", [True, False], ids=["shared head", "two heads"])
def test_two_runs_give_the_same_bits(backend, divergence, dtype, shared_head):
    """Chunks enough that the accumulation over them shows, rows enough that blocks race."""
    N, V, H = (29, 211, 24) if placing.DRY_RUN else (1003, 5003, 96)
    case = placed(hard_case(N, V, H, dtype, shared_head=shared_head, largest_logit=8.0))
    options = {
        "backend": backend,
        "divergence": divergence,
        "workspace_bytes": 40 * V * 8 + 4 * V * H,
        "return_stats": True,
    }
    one, two = (evaluate(linear_divergence, case, **options) for _ in range(2))
    assert_same_bits(two, one)
    for name in vars(one.stats):
        if getattr(one.stats, name) is not None:
            assert_same_bits(getattr(two.stats, name), getattr(one.stats, name))


@pytest.mark.parametrize("shared_head", [True, False], ids=["shared head", "two heads"])
def test_a_chunk_in_parts(backend, device, shared_head):
    """Two chunks of several parts each, which share the teacher's buffer."""
    N, V, H = (29, 211, 24) if placing.DRY_RUN else (3001, 5003, 64)
    budget = (24 if shared_head else 52) << 20
    made = plan(N, V, H, device_type=device.type, shared_head=shared_head, workspace_bytes=budget)
    assert placing.DRY_RUN or (made.chunks == 2 and made.part_rows < made.rows)
    case = placed(unmasked(hard_case(N, V, H, torch.bfloat16, shared_head=shared_head, largest_logit=8.0)))
    found = evaluate(linear_divergence, case, backend=backend, workspace_bytes=budget)
    truth = evaluate(linear_divergence_reference, case.double())
    assert_on_target(found, truth, "default" if shared_head else "fp32_logits")


def test_a_call_leaves_no_memory_behind(backend, cuda, as_users_run):
    case = placed(unmasked(hard_case(67, 1003, 48, torch.bfloat16, shared_head=True)))
    evaluate(linear_divergence, case, backend=backend)
    before = torch.cuda.memory_allocated()
    evaluate(linear_divergence, case, backend=backend)
    assert torch.cuda.memory_allocated() == before


# ---------------------------------------------------------------- peak memory

CALL = """
def make(N, V, H, name, budget, backend, device, shared):
    import torch
    from opsd_kernels import linear_divergence

    def tensors(N, V):
        def random(*shape):
            return torch.randn(shape, device=device, dtype=getattr(torch, name))
        head = random(V, H).requires_grad_()
        return random(N, H).requires_grad_(), head, random(N, H), head if shared else random(V, H)

    def call(inputs, budget):
        loss = linear_divergence(*inputs, divergence="reverse_kl", workspace_bytes=budget, backend=backend)
        return loss, torch.autograd.grad(loss, inputs[:2])

    call(tensors(64, 999), 1 << 20)
    inputs = tensors(N, V)
    return lambda: call(inputs, budget)
"""
PLANNED_WITHIN = 0.05  # of the measured peak


@pytest.mark.parametrize("N", [4096, 131072])
@pytest.mark.parametrize(
    "dtype, shared", [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True)], ids=str
)
def test_peak_is_within_the_budget_and_as_planned(backend, device, N, dtype, shared):
    """Flat in N but for gradients and N-sized vectors."""
    if backend == "torch":
        pytest.skip("plain torch sweeps hold some dozen rows of temporaries beside the buffers (docs/api.md)")
    V, H, budget = (2003, 16, 64 << 20) if placing.DRY_RUN else (151936, 256, 1 << 30)
    N = 64 if placing.DRY_RUN else N
    expected = plan(N, V, H, dtype=dtype, shared_head=shared, workspace_bytes=budget, device_type=device.type)
    peak = peak_bytes(
        CALL,
        N,
        V,
        H,
        str(dtype).removeprefix("torch."),
        budget,
        backend,
        device.type,
        shared,
        device=device.type,
    )
    above = peak - (N + V) * H * dtype.itemsize - expected.vector_bytes
    assert above <= budget, (
        f"{above / 2**20:.1f} MiB above inputs, outputs and gradients; budget {budget / 2**20:.0f} MiB"
    )
    off = expected.peak_bytes / peak - 1
    if not placing.DRY_RUN:  # resident memory of so small a call says nothing
        assert abs(off) <= PLANNED_WITHIN, (
            f"planned {expected.peak_bytes / 2**20:.1f} MiB, measured {peak / 2**20:.1f} MiB ({off:+.1%})"
        )
