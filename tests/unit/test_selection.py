"""Which backend serves what, and what a user without a compiler, a GPU or a current torch is told."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from opsd_kernels import cli, linear_divergence
from opsd_kernels._rows import backends, extension
from opsd_kernels.testing import evaluate, hard_case

CUDA = torch.device("cuda")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def usable(monkeypatch):
    """Pretends that the CUDA kernels or Triton can serve a GPU."""

    def pretend(cuda=None, triton=None):
        monkeypatch.setattr(extension, "cuda_unavailable", lambda: cuda)
        faked = {"triton": lambda device, dtype: triton if device == "cuda" else "Triton compiles for cuda"}
        monkeypatch.setattr(backends, "BACKENDS", tuple(replace(b, reason=faked.get(b.name, b.reason)) for b in backends.BACKENDS))

    return pretend


def served(device, dtype=None, name=None):
    return backends.select(name, device, dtype).__name__.rpartition(".")[2]


def test_cuda_is_preferred_then_triton_then_torch(usable):
    usable()
    assert [served(CUDA, dtype) for dtype in DTYPES] == ["triton_rows", "ext_rows", "ext_rows", "ext_rows"]
    assert served(CUDA) == "ext_rows"
    usable(cuda="the CUDA kernels were not built")
    assert {served(CUDA, dtype) for dtype in DTYPES} == {"triton_rows"}
    usable(cuda="the CUDA kernels were not built", triton="triton is not installed")
    assert {served(CUDA, dtype) for dtype in DTYPES} == {"torch_rows"}


@pytest.mark.parametrize(
    "name, device, dtype, reason",
    [
        ("cuda", "cuda", torch.float64, "float32, bfloat16 and float16 logits, not float64"),
        ("cuda", "cuda", torch.float32, "no compiler was there"),
        ("cuda", "cpu", torch.float32, "run on cuda, not on cpu"),
        ("cpp", "cuda", torch.float32, "run on cpu, not on cuda"),
        ("triton", "cuda", torch.float32, "triton is not installed"),
    ],
)
def test_a_backend_asked_for_by_name_serves_or_says_why_not(usable, monkeypatch, name, device, dtype, reason):
    usable(cuda="no compiler was there", triton="triton is not installed")
    for ask in (lambda: backends.select(name, torch.device(device), dtype), lambda: backends.select(None, torch.device(device), dtype)):
        with pytest.raises(ValueError, match=f"backend: expected .*'{name}': .*{reason}"):
            ask()
        monkeypatch.setenv("OPSD_BACKEND", name)
    assert reason in backends.explain(device, dtype)[name]


@pytest.mark.parametrize(
    "options, dtype", [({}, torch.bfloat16), ({"logits_dtype": torch.float32}, torch.float32), ({"divergence": "tvd"}, torch.float32)], ids=str
)
def test_the_buffer_decides_not_the_inputs(monkeypatch, options, dtype):
    asked, select = [], backends.select
    monkeypatch.setattr(backends, "select", lambda name, device, dtype: asked.append(dtype) or select(name, device, dtype))
    evaluate(linear_divergence, hard_case(5, 17, 8, torch.bfloat16, shared_head=True), **options)
    assert asked == [dtype]


def words(*arguments):
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


@pytest.mark.parametrize(
    "reason", ["this torch was built without CUDA", "no CUDA device is visible", "the CUDA kernels were not built (docs/build.md)", None], ids=str
)
def test_doctor_says_what_the_cuda_kernels_lack(monkeypatch, reason):
    monkeypatch.setattr(extension, "cuda_unavailable", lambda: reason)
    assert f"CUDA kernels {reason or 'built, and the devices can run them'}" in words("doctor")


def test_doctor_has_a_column_for_the_gpu_where_there_is_one(monkeypatch, usable):
    usable(cuda="the CUDA kernels were not built (docs/build.md)", triton="triton is not installed")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Properties", (), {"total_memory": 141 << 30}))
    text = words("doctor")
    assert "NVIDIA H200, 141 GiB" in text and "backend cpu cuda" in text and "triton is not installed" in text


@pytest.mark.parametrize("version, old", [("2.9.1+cu128", True), ("2.10.0", False), ("2.13.0+cpu", False), ("3.0.0a0+git1", False), ("1.13", True)])
def test_an_older_torch_is_named(version, old):
    assert (cli.too_old(version) is not None) == old
    assert not old or (version in cli.too_old(version) and "2.10" in cli.too_old(version))


def test_no_library_no_import_error(monkeypatch, tmp_path):
    """Without compiled libraries every reason is a sentence."""
    monkeypatch.setattr(extension, "PACKAGE", tmp_path)
    assert "was not built (docs/build.md)" in extension.load.__wrapped__()
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    assert "_C.abi3.so does not load" in extension.load.__wrapped__()


# ---------------------------------------------------------------- launches


def test_at_most_six_triton_configurations():
    triton_launch = pytest.importorskip("opsd_kernels._rows.triton_launch")
    sizes = {*range(1, 5000), *(10**k for k in range(3, 7)), 32000, 128256, 151936, 256000, 262208}
    assert len({triton_launch.config(V, dtype) for V in sizes for dtype in DTYPES}) <= 6


def test_plan_prints_the_launches_of_a_gpu(monkeypatch):
    monkeypatch.setattr(extension, "cuda_unavailable", lambda: "no CUDA device is visible")
    text = words("plan", "--device", "cuda")
    assert "cuda row kernels no CUDA device is visible" in text
    if importlib.util.find_spec("triton"):
        assert "triton row kernels each sweep one block of 256 threads per row, 2048 columns at a time" in text
    assert "row kernels" not in words("plan", "--device", "cpu")
