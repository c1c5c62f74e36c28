"""The providers, and their gate: a wrong result gets no number."""

import sys
from dataclasses import replace

import pytest
import torch

from opsd_kernels.bench import providers
from opsd_kernels.bench.measure import gate
from opsd_kernels.bench.measure.rows import compare_providers
from opsd_kernels.bench.providers import BASE, LABEL_PROVIDERS, LABELS, PROVIDERS, Provider, parse_providers
from opsd_kernels.bench.runner import SUITES, make_context
from opsd_kernels.bench.shapes import MODES, Setting, make_case, parse_shape
from opsd_kernels.bench.suites import sweeps
from opsd_kernels.bench.suites.accuracy import errors
from opsd_kernels.bench.suites.logprobs import compare_label_losses
from opsd_kernels.bench.suites.space import MEMORY_SHAPE
from opsd_kernels.spec import Kind

TINY = Setting(64, 32, 501, "float32")
QUICK = {"rounds": (3, 3), "seconds": 1.0}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name",
    [
        "opsd",
        *(pytest.param(f"opsd-{kind}", marks=pytest.mark.slow) for kind in ("cpp", "torch", "fp32")),
        "torch",
        "trl",
        "liger-chunked",
        "unsloth",
        pytest.param("liger-compiled", marks=pytest.mark.slow),
    ],
)
def test_every_provider_passes_or_says_why_not(name, mode):
    setting = TINY.at(mode=mode)
    (row,) = [
        row
        for row in compare_providers("ratios", setting, [PROVIDERS[name]], **QUICK)
        if row.provider == name
    ]
    if row.reason is not None:
        assert "not installed" in row.reason or "no loss per token" in row.reason or "built" in row.reason, (
            row.reason
        )
        return
    assert row.ratio.median > 0 and row.ms.n == 3 and 0 < row.ceiling
    assert row.loss_error is not None and (row.gradient_error is None) == (mode == "statistics")


@pytest.mark.parametrize(
    "name, says", [("liger-triton", "NVIDIA GPU"), ("opsd-triton", "interprets"), ("cce", "NVIDIA GPU")]
)
def test_what_cannot_serve_is_a_row(name, says):
    rows = {row.provider: row for row in compare_providers("ratios", TINY, [PROVIDERS[name]], **QUICK)}
    assert says in rows[name].reason and rows[name].ms is None
    assert rows[BASE].ms.n == 3 and rows["whole"].ratio.median > 0


UNSLOTH = """
import torch
import torch.nn.functional as F

def fused_linear_jsd(h, W, t, Wt, *, labels=None, beta=0.5):
    assert beta == 1.0
    q, p = (h @ W.t()).log_softmax(-1), (t @ Wt.t()).log_softmax(-1)
    return F.kl_div(p, q, log_target=True, reduction="none").sum(-1).mean() * FACTOR
"""


@pytest.mark.parametrize("factor, says", [(1.0, None), (1.1, "no number")])
def test_unsloth_is_loaded_by_path_alone(monkeypatch, tmp_path, factor, says):
    """From a package whose import fails, as the real one's does without its dependencies."""
    folder = tmp_path / "unsloth_zoo"
    (folder / "fused_losses").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('needs everything')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "unsloth_zoo", raising=False)
    provider = PROVIDERS["unsloth"]
    gate._checked.cache_clear()
    providers._unsloth_module.cache_clear()
    assert "has no fused_losses" in provider.unsupported(TINY)
    file = folder / "fused_losses" / "fused_linear.py"
    file.write_text(UNSLOTH.replace("FACTOR", str(factor)))
    try:
        assert provider.unsupported(TINY) is None
        failure = gate.check(provider, TINY).failure
        assert failure is None if says is None else says in failure
        assert "unsloth_zoo" not in sys.modules
    finally:
        gate._checked.cache_clear()
        providers._unsloth_module.cache_clear()


def test_an_absent_unsloth_is_a_row(monkeypatch):
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
    assert PROVIDERS["unsloth"].unsupported(TINY) == "unsloth_zoo is not installed"


@pytest.mark.parametrize("mode", ["trainable", "frozen"])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_losses_of_labels_pass_or_say_why_not(dtype, mode):
    rows = compare_label_losses(TINY.at(dtype=dtype, mode=mode), LABEL_PROVIDERS.values(), QUICK)
    assert [row.provider for row in rows] == [BASE, *LABEL_PROVIDERS]
    for row in rows[1:]:
        if row.reason is not None:
            assert row.provider == "torch-lce" and "torch >= 2.13" in row.reason
            continue
        assert row.divergence == "log-prob" and row.ms.n == 3 and row.ratio.median > 0
        assert row.gradient_error < 2e-2 and row.loss_error < 5e-3


@pytest.mark.parametrize("name", ["opsd-logprobs", "torch-lce"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_loss_of_labels_gets_no_number(name, dtype):
    right = LABEL_PROVIDERS[name]
    if right.unsupported(TINY):
        pytest.skip(right.unsupported(TINY))
    wrong = replace(right, make=lambda s: lambda *heads, labels: 1.02 * right.make(s)(*heads, labels=labels))
    assert "no number" in gate.check_label_loss(wrong, TINY.at(dtype=dtype)).failure


def test_an_older_torch_is_a_row(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    row = compare_label_losses(TINY, [LABEL_PROVIDERS["torch-lce"]], QUICK)[-1]
    assert "torch >= 2.13 is not installed" in row.reason and row.ms is None


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["quick", "full"])
def test_the_shapes_of_the_memory_suite_pass(quick):
    """Their logits reach 16 with H = 64: raw ones in bf16 are off by more than 2 %."""
    shape = MEMORY_SHAPE[quick]
    verdict = gate.check(PROVIDERS["opsd"], Setting(shape.N, shape.H, shape.V, "bfloat16"))
    assert verdict.failure is None and verdict.gradient_error < 0.01


@pytest.mark.parametrize("exact", [True, False], ids=["ours", "a peer"])
def test_a_wrong_kernel_gets_no_number(exact):
    wrong = Provider(
        "opsd",
        "wrong",
        lambda s: lambda *heads, labels=None: 1.02 * PROVIDERS["opsd"].make(s)(*heads),
        lambda s: None,
        exact=exact,
    )
    verdict = gate.check(wrong, TINY)
    assert "no number" in verdict.failure and verdict.gradient_error is None
    (row,) = [
        row
        for row in compare_providers("ratios", TINY, [wrong], target=9.0, **QUICK)
        if row.provider == "opsd"
    ]
    assert row.reason == verdict.failure and row.ms is None and row.verdict is None


def test_a_provider_that_raises_is_a_row():
    def raises(*heads, labels=None):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    broken = Provider("torch", "broken", lambda s: raises, lambda s: None)
    assert gate.check(broken, TINY).failure == "out of memory"


@pytest.mark.parametrize("exact", [True, False], ids=["ours", "a peer"])
@pytest.mark.parametrize("mode", ["trainable", "recompute", "statistics"])
def test_a_provider_that_counts_masked_tokens_gets_no_number(mode, exact):
    ours, setting = PROVIDERS["opsd"], TINY.at(mode=mode)
    blind = replace(ours, make=lambda s: lambda *heads, labels=None: ours.make(s)(*heads), exact=exact)
    assert gate.check(blind, setting).failure is None
    row = compare_providers("masked", setting.at(masked=0.5), [blind], **QUICK)[-1]
    assert "no number" in row.reason and row.ms is None


@pytest.mark.parametrize("mode", ["trainable", "recompute"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["opsd", "opsd-torch", "opsd-fp32", "torch", "trl", "liger-chunked", "unsloth"]
)
def test_every_provider_leaves_masked_tokens_out(name, dtype, mode):
    """At the largest share of the suite, which leaves as many tokens as the gate has without a mask."""
    setting = TINY.at(masked=0.9, mode=mode, dtype=dtype)
    if PROVIDERS[name].unsupported(setting):
        pytest.skip(PROVIDERS[name].unsupported(setting))
    verdict = gate.check(PROVIDERS[name], setting)
    assert verdict.failure is None and verdict.gradient_error > 0, verdict.failure


def test_masked_tokens_are_ignored_labels():
    case = make_case(TINY.at(masked=0.5))
    assert int((case.labels == -100).sum()) == 32 == TINY.N - TINY.at(masked=0.5).valid


def test_accuracy_tells_a_rounded_pair_from_the_difference():
    """At KL 1e-3 logits rounded to bf16 lose the direction of the gradient."""
    setting = Setting(48, 64, 2048, "bfloat16")
    found = {
        row.provider: row for row in errors(setting, (PROVIDERS["opsd"], PROVIDERS["torch"]), 1e-3, "normal")
    }
    assert found["torch"].gradient_error > 4 * found["opsd"].gradient_error > 0


def test_names_are_checked():
    with pytest.raises(ValueError, match="provider: expected one of 'opsd'"):
        parse_providers(["unknown"], quick=True)
    with pytest.raises(ValueError, match="shape: expected one of qwen3-0.6b"):
        parse_shape("N=12")
    with pytest.raises(ValueError, match="device: expected one of"):
        make_context("tpu")
    assert (parse_shape("N=3,H=4,V=5").V, parse_shape("gemma2-2b").V) == (5, 256000)
    assert set(PROVIDERS) < set(LABELS) and "ratios" in SUITES


# ---------------------------------------------------------------- predictions


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_fused_sweeps_are_compared_with_their_prediction(monkeypatch, backend):
    """On GPUs of the model alone, by the numbers that `opsd plan --device cuda` prints."""
    setting = Setting(8192, 4096, 151936, device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    found = sweeps.predicted_ms(setting, backend, "row_fused_", 1024, torch.bfloat16)
    (gpu,) = (gpu for gpu in sweeps.sweep_times.GPUS if gpu.name == "H200")
    expected = sweeps.sweep_times.predict(backend, Kind.REVERSE_KL, torch.bfloat16, 1024, 151936, gpu)
    assert found == 1e3 * expected[-1].seconds > 0
    assert sweeps.predicted_ms(setting, backend, "row_stats", 1024, torch.bfloat16) is None
    assert sweeps.predicted_ms(setting, "torch", "row_fused_", 1024, torch.bfloat16) is None
    for other in ("NVIDIA L4", "NVIDIA H100 PCIe", "NVIDIA GH200 480GB"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=other: name)
        assert sweeps.predicted_ms(setting, backend, "row_fused_", 1024, torch.bfloat16) is None
    assert sweeps.predicted_ms(setting.at(device="cpu"), backend, "row_fused_", 8, torch.bfloat16) is None
