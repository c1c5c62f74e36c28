"""Test the sliced fp32 GEMMs of a CPU without units for 16-bit dtypes: exact, with little memory."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from opsd_kernels import cache_forward_kl, linear_cached_forward_kl, linear_divergence
from opsd_kernels._core import adapted, cpu_gemm, loop, lora
from opsd_kernels._rows import extension
from opsd_kernels.testing import assert_no_worse, assert_one_rounding, peak_bytes

SHAPES = {"logits": (33, 48, 5003), "dh": (33, 5003, 48), "dW": (5003, 33, 48), "one row": (1, 7, 3)}


def matrix(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("accumulate", [False, True])
def test_slices_are_exact(monkeypatch, shape, dtype, accumulate):
    monkeypatch.setattr(cpu_gemm, "SLICE_BYTES", 1 << 16)  # dozens of slices
    M, K, N = SHAPES[shape]
    a, b, start = matrix(M, K, dtype, 0), matrix(K, N, dtype, 1), matrix(M, N, torch.float32, 2)
    out = start.clone() if accumulate else torch.full_like(start, torch.nan)
    cpu_gemm.sliced_mm_(a, b, out, accumulate)
    rest = start if accumulate else torch.zeros_like(start)
    assert_no_worse(out, rest + a.float() @ b.float(), rest.double() + a.double() @ b.double())


def test_threads_have_their_own_slices_in_any_mode():
    """The memory of slices is kept: made in inference mode, it serves outside of it."""
    a, b = matrix(64, 512, torch.float16, 0), matrix(512, 64, torch.float16, 1)
    pairs = [(a * scale, b) for scale in range(8)]

    def multiply(pair, mode):
        out = torch.empty(64, 64)
        with torch.inference_mode(mode):
            for _ in range(20):
                cpu_gemm.sliced_mm_(*pair, out.data)
        cpu_gemm.sliced_mm_(*pair, out)
        return out

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(multiply, pairs, [True, False] * 4))
    for (left, right), out in zip(pairs, results, strict=True):
        assert out.equal(left.float() @ right.float())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_16_bit_result_is_rounded_once(monkeypatch, shape):
    monkeypatch.setattr(cpu_gemm, "SLICE_BYTES", 1 << 16)
    M, K, N = SHAPES[shape]
    a, b = matrix(M, K, torch.float16, 0), matrix(K, N, torch.float16, 1)
    out = torch.full((M, N), torch.nan, dtype=torch.float16)
    cpu_gemm.sliced_mm_(a, b, out)
    assert_one_rounding(out, a.double() @ b.double(), torch.float16, magnitude=K**0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_without_units_the_projections_take_slices(monkeypatch, dtype):
    calls: list[torch.dtype] = []

    def noted(a, b, out, accumulate=False, centre=None):
        calls.append(out.dtype)

    monkeypatch.setattr(extension, "mm_has_units", lambda dtype: False)
    monkeypatch.setattr(extension, "has_amx", lambda: False)
    monkeypatch.setattr(extension, "gemm_unavailable", lambda: "planted")
    monkeypatch.setattr(cpu_gemm, "sliced_mm_", noted)
    cpu_gemm.cblas_gemm.cache_clear()
    h, W, G = matrix(5, 8, dtype, 0), matrix(11, 8, dtype, 1), matrix(5, 11, dtype, 2)
    loop.project(h, W, torch.empty(5, 11, dtype=dtype))
    loop.project(G, W.t(), torch.empty(5, 8))
    loop.accumulate_weight_grad(G, h, torch.empty(11, 8), True)
    cpu_gemm.cblas_gemm.cache_clear()
    assert calls == [dtype, torch.float32, torch.float32]


def centred(shape: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return h, W, a constant near each row's products, and the products less the constant in float64."""
    M, K, N = SHAPES[shape]
    h, W = matrix(M, K, dtype, 0), matrix(N, K, dtype, 1)
    exact = h.double() @ W.double().t()
    centre = exact[:, N // 2].float() + matrix(M, 1, torch.float32, 2)[:, 0]
    return h, W, centre, exact - centre.double()[:, None]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_slices_subtract_the_centre_before_the_rounding(monkeypatch, shape, dtype):
    monkeypatch.setattr(cpu_gemm, "SLICE_BYTES", 1 << 16)
    h, W, centre, truth = centred(shape, dtype)
    out = torch.full(truth.shape, torch.nan, dtype=dtype)
    cpu_gemm.sliced_mm_(h, W.t(), out, centre=centre)
    assert_one_rounding(out, truth, dtype, magnitude=1 + h.shape[1] ** 0.5)


@pytest.mark.parametrize("way", ["sliced", "own kernel", "addmm"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_projections_keep_the_digits_relative_to_a_centre(monkeypatch, dtype, way):
    """Products of 300 less a constant near them. Without the own kernel the constant has 16 bits as well."""
    if way == "own kernel" and (dtype == torch.float16 or extension.gemm_unavailable() is not None):
        pytest.skip(extension.gemm_unavailable() or "the kernel multiplies bf16")
    monkeypatch.setattr(extension, "mm_has_units", lambda dtype: way != "sliced")
    if way == "addmm":
        monkeypatch.setattr(extension, "gemm_unavailable", lambda: "planted")
    h, W, centre, _ = centred("logits", dtype)
    h[:, 0], W[:, 0] = 300, 1
    centre = centre + 300
    used = centre.to(dtype) if way == "addmm" else centre
    truth = h.double() @ W.double().t() - used.double()[:, None]
    out = torch.full(truth.shape, torch.nan, dtype=dtype)
    loop.project(h, W, out, centre)
    assert_one_rounding(out, truth, dtype, magnitude=300.0)


@pytest.fixture
def fp32_gemm(monkeypatch):
    """Take the extension's fp32 GEMM on every processor: its own checks of the operands, torch's products."""
    if reason := extension.load():
        pytest.skip(reason)
    checked = torch.ops.opsd_kernels.gemm_fp32_

    def multiply(a, b, out, accumulate, tail=None):
        if extension.gemm_fp32_unavailable() is not None:
            with pytest.raises(RuntimeError, match="gemm_fp32_: expected a machine that can"):
                checked(a, b, out, accumulate, tail)
        if tail is not None:
            rows = torch.arange(a.shape[1] - len(b)) % len(tail)
            b = torch.cat([b, tail[rows]])
        out.copy_(a @ b + out if accumulate else a @ b)

    monkeypatch.setattr(torch.ops.opsd_kernels, "gemm_fp32_", multiply)
    monkeypatch.setattr(extension, "gemm_fp32_serves", lambda dtype: dtype == torch.float32)


LAYOUTS = {
    "every second": lambda x: x.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
    "transposed": lambda x: x.t().contiguous().t(),
    "expanded": lambda x: x[:1].expand_as(x),
}


def cached(h, W, A, B):
    teacher, told = h.detach().roll(1), {"student_lora": (A.detach(), B.detach(), 0.5)}
    cache = cache_forward_kl(teacher, W.detach().roll(1), W.detach(), **told)
    return linear_cached_forward_kl(h, W.detach(), cache, **told)


def adapted_student(h, W, A, B):
    return linear_divergence(h, W, h.detach().roll(1), W.detach().roll(1), student_lora=(A, B, 0.5))


def one_adapter(h, W, A, B):
    """Of a teacher so near that only the difference of the logits has its digits."""
    rows = h.detach().float()
    teacher = (rows + 1e-4 * rows.roll(1)).to(h.dtype)
    return linear_divergence(h, W, teacher, W, student_lora=(A, B, 0.5), teacher_lora=(A, B, 0.5))


@pytest.mark.parametrize("joined", [True, False], ids=["one GEMM", "slices"])
@pytest.mark.parametrize("call", [cached, adapted_student, one_adapter])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_at_the_fp32_gemm(fp32_gemm, monkeypatch, layout, call, joined):
    """It takes only matrices of contiguous rows or columns; callers may bring others."""
    if not joined:
        for module in (adapted, lora):
            monkeypatch.setattr(module, "joins", lambda device_type, dtype, H: False)
    shapes = (5, 12), (40, 12), (3, 12), (40, 3)
    strange = [LAYOUTS[layout](matrix(*shape, torch.float32, k)) for k, shape in enumerate(shapes)]
    plain = [x.clone(memory_format=torch.contiguous_format) for x in strange]
    outcomes = []
    for given in (strange, plain, [x.double() for x in plain]):
        leaves = [x.detach().requires_grad_() for x in given]
        loss = call(*leaves)
        outcomes.append([loss, *torch.autograd.grad(loss, leaves, materialize_grads=True)])
    for ours, peer, truth in zip(*outcomes, strict=True):
        assert_no_worse(ours, peer, truth)


MAKE = """
def make(which):
    import torch
    from opsd_kernels._core import cpu_gemm, loop
    C, H, V = 128, 64, 151936
    G, h, W = torch.zeros(C, V).half(), torch.zeros(C, H).half(), torch.zeros(V, H).half()
    dW, dh = torch.ones(V, H), torch.ones(C, H)
    small = torch.zeros(64, 64).half()
    cpu_gemm.sliced_mm_(small, small, torch.zeros(64, 64))
    calls = {
        "logits": lambda: cpu_gemm.sliced_mm_(h, W.t(), G),
        "dh": lambda: cpu_gemm.sliced_mm_(G, W, dh),
        "dW": lambda: cpu_gemm.sliced_mm_(G.t(), h, dW),
    }
    return calls[which]
"""


@pytest.mark.usefixtures("forked_peaks")
@pytest.mark.parametrize("which", ["logits", "dh", "dW"])
def test_slices_take_little_memory(which):
    """The peak excludes whole fp32 copies: 74 MiB for the logits, 37 MiB for the head."""
    assert peak_bytes(MAKE, which) <= 2 * cpu_gemm.SLICE_BYTES + (8 << 20)
