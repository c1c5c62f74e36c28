"""Test the choice of a backend, and the reasons given without a compiler, a GPU or a current torch."""

import importlib.util
import json
import re
import shlex
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from opsd_kernels import cli, doctor, linear_divergence
from opsd_kernels._rows import backends, extension, gpu_checks
from opsd_kernels.testing import evaluate, hard_case

CUDA = torch.device("cuda")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def usable(monkeypatch):
    """Pretend that the CUDA kernels or Triton can serve a GPU; `unchecked` is the GPU check's verdict."""

    def pretend(cuda=None, triton=None, unchecked=None):
        monkeypatch.setattr(extension, "cuda_unavailable", lambda: cuda)
        monkeypatch.setattr(extension, "cuda_unchecked", lambda device: unchecked)
        faked = {"triton": lambda device, dtype: triton if device == "cuda" else "Triton compiles for cuda"}
        monkeypatch.setattr(
            backends,
            "BACKENDS",
            tuple(replace(b, unsupported=faked.get(b.name, b.unsupported)) for b in backends.BACKENDS),
        )

    return pretend


def served(device, dtype=None, name=None):
    rows = backends.select(name, device, dtype)
    return getattr(rows, "__name__", type(rows).__name__).rpartition(".")[2]


def test_cuda_is_preferred_then_triton_then_torch(usable):
    usable()
    assert [served(CUDA, dtype) for dtype in DTYPES] == [
        "triton_rows",
        "CompiledRows",
        "CompiledRows",
        "CompiledRows",
    ]
    assert served(CUDA) == "CompiledRows"
    usable(cuda="the CUDA kernels were not built")
    assert {served(CUDA, dtype) for dtype in DTYPES} == {"triton_rows"}
    usable(cuda="the CUDA kernels were not built", triton="triton is not installed")
    assert {served(CUDA, dtype) for dtype in DTYPES} == {"torch_rows"}


def test_unchecked_cuda_kernels_serve_by_name_alone(usable):
    usable(unchecked="never ran")
    assert {served(CUDA, dtype) for dtype in (None, *DTYPES)} == {"triton_rows"}
    assert served(CUDA, torch.bfloat16, name="cuda") == "CompiledRows"
    usable(triton="triton is not installed", unchecked="never ran")
    assert served(CUDA, torch.bfloat16) == "torch_rows"


SOURCES = "0123456789ab"
RECORD = gpu_checks.Record(
    "9.0", SOURCES, "NVIDIA H200", "2026-12-01", "c0", {"torch": "2.13.0"}, {"smoke": "9 passed"}
)


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """Pretend that two GPUs run CUDA kernels of SOURCES; yield a function that writes records."""
    path = tmp_path / "gpu_checks.json"
    monkeypatch.setattr(gpu_checks, "FILE", path)
    monkeypatch.setattr(extension, "cuda_unavailable", lambda: None)
    monkeypatch.setattr(extension, "cuda_sources", lambda: SOURCES)
    architectures = {None: (9, 0), 0: (9, 0), 1: (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: architectures[device.index])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def record(*records):
        gpu_checks.save(records)
        gpu_checks.missing.cache_clear()

    record()
    yield record
    gpu_checks.missing.cache_clear()


def test_a_record_of_the_gpu_check_puts_cuda_first_on_its_architecture(gpus):
    first, second = (torch.device("cuda", index) for index in (0, 1))
    assert "have not passed benchmarks/gpu_check.sh on compute capability 9.0" in extension.cuda_unchecked(
        first
    )
    gpus(RECORD)
    assert extension.cuda_unchecked(first) is extension.cuda_unchecked(CUDA) is None
    assert served(first, torch.bfloat16) == "CompiledRows"
    assert "8.0" in extension.cuda_unchecked(second)


def test_a_record_of_other_sources_does_not_count(gpus, monkeypatch):
    gpus(replace(RECORD, sources="another"))
    reason = extension.cuda_unchecked(CUDA)
    assert "on 2026-12-01 other sources did (another, these are 0123456789ab)" in reason
    gpus(replace(RECORD, sources=""))
    monkeypatch.setattr(extension, "cuda_sources", lambda: "")
    assert "build it again" in extension.cuda_unchecked(CUDA)


def test_a_library_without_a_digest_is_not_checked(monkeypatch):
    monkeypatch.setattr(torch.ops, "opsd_kernels", SimpleNamespace())
    assert extension.cuda_sources() == ""
    monkeypatch.setattr(torch.ops, "opsd_kernels", SimpleNamespace(cuda_sources=lambda: SOURCES))
    assert extension.cuda_sources() == SOURCES


def test_a_record_is_added_to_or_deleted():
    more = replace(RECORD, steps={"tests": "900 passed"})
    (both,) = gpu_checks.passed((RECORD,), more)
    assert both.steps == {"smoke": "9 passed", "tests": "900 passed"}
    (new,) = gpu_checks.passed((RECORD,), replace(more, sources="new"))
    assert new.steps == more.steps
    other = replace(RECORD, architecture="10.0")
    assert set(map(id, gpu_checks.failed((RECORD, other), "9.0", SOURCES))) == {id(other)}
    assert gpu_checks.failed((RECORD,), "9.0", "new") == (RECORD,)


def test_the_committed_records_are_of_checks_that_passed():
    for record in gpu_checks.load():
        assert record.steps and re.fullmatch(r"[0-9a-f]{12}", record.sources), record
        assert re.fullmatch(r"\d+\.\d", record.architecture) and re.fullmatch(r"[0-9a-f]{40}", record.commit)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "gpu_checks.json"
    path.write_text('{"records": [{"device": "NVIDIA H200"}]}')
    with pytest.raises(ValueError, match="expected records with architecture, sources"):
        gpu_checks.load(path)


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
    for ask in (
        lambda: backends.select(name, torch.device(device), dtype),
        lambda: backends.select(None, torch.device(device), dtype),
    ):
        with pytest.raises(ValueError, match=f"backend: expected .*'{name}': .*{reason}"):
            ask()
        monkeypatch.setenv("OPSD_BACKEND", name)
    assert reason in backends.explain(device, dtype)[name]


@pytest.mark.parametrize(
    "options, dtype",
    [
        ({}, torch.bfloat16),
        ({"logits_dtype": torch.float32}, torch.float32),
        ({"divergence": "tvd"}, torch.float32),
    ],
    ids=str,
)
def test_the_buffer_decides_not_the_inputs(monkeypatch, options, dtype):
    asked, select = [], backends.select
    monkeypatch.setattr(
        backends, "select", lambda name, device, dtype: asked.append(dtype) or select(name, device, dtype)
    )
    evaluate(linear_divergence, hard_case(5, 17, 8, torch.bfloat16, shared_head=True), **options)
    assert asked == [dtype]


def words(*arguments):
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


@pytest.mark.parametrize(
    "reason",
    [
        "this torch was built without CUDA",
        "no CUDA device is visible",
        "the CUDA kernels were not built (docs/build.md)",
        None,
    ],
    ids=str,
)
def test_doctor_says_what_the_cuda_kernels_lack(monkeypatch, reason):
    monkeypatch.setattr(extension, "cuda_unavailable", lambda: reason)
    assert f"CUDA kernels {reason or 'built, and the devices can run them'}" in words("doctor")


def test_doctor_has_a_column_for_the_gpu_where_there_is_one(monkeypatch, usable):
    usable(cuda="the CUDA kernels were not built (docs/build.md)", triton="triton is not installed")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: type("Properties", (), {"total_memory": 141 << 30}),
    )
    text = words("doctor")
    assert "NVIDIA H200, 141 GiB" in text and "backend cpu cuda" in text and "triton is not installed" in text


def test_doctor_says_why_cuda_kernels_serve_by_name_alone(gpus):
    (cell,) = {doctor.service(backend, "cuda") for backend in backends.BACKENDS if backend.name == "cuda"}
    assert cell.startswith('usable as backend="cuda" alone: they have not passed benchmarks/gpu_check.sh')
    assert "capability 9.0" in cell and "capability 8.0" in cell
    gpus(RECORD)
    cell = doctor.service(backends.BACKENDS[0], "cuda")
    assert cell.startswith('usable on device 1 as backend="cuda" alone') and "capability 9.0" not in cell
    gpus(RECORD, replace(RECORD, architecture="8.0"))
    assert doctor.service(backends.BACKENDS[0], "cuda") == "usable"


@pytest.mark.parametrize(
    "version, old",
    [
        ("2.9.1+cu128", True),
        ("2.10.0", False),
        ("2.13.0+cpu", False),
        ("3.0.0a0+git1", False),
        ("1.13", True),
    ],
)
def test_an_older_torch_is_named(version, old):
    assert (doctor.too_old(version) is not None) == old
    assert not old or (version in doctor.too_old(version) and "2.10" in doctor.too_old(version))


@pytest.fixture
def unbuilt(monkeypatch):
    """Remove the C++ kernels, and reset the warning of their absence."""
    monkeypatch.setattr(extension, "load", lambda: "the C++ extension was not built: no compiler")
    backends._warn_of_missing_kernels.cache_clear()
    yield
    backends._warn_of_missing_kernels.cache_clear()


def loss(**options):
    h, w = torch.ones(2, 3, requires_grad=True), torch.eye(4, 3)
    return linear_divergence(h, w, -h.detach(), w, **options)


def test_the_first_call_without_cpp_kernels_warns_once_and_points_at_the_call(unbuilt):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss().backward()
        loss()
    (warning,) = [w for w in caught if w.category is backends.SlowBackendWarning]
    assert warning.filename == __file__  # the nearest frame outside the package and torch
    assert "no compiler" in str(warning.message) and extension.build_command() in str(warning.message)


def test_torch_operators_that_were_asked_for_do_not_warn(unbuilt, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error", backends.SlowBackendWarning)
        loss(backend="torch").backward()
        backends.select(None, torch.device("meta"))
        monkeypatch.setenv("OPSD_BACKEND", "torch")
        loss().backward()


def test_the_warning_survives_compilation(unbuilt):
    torch._dynamo.reset()
    with pytest.warns(backends.SlowBackendWarning, match="no compiler"):
        torch.compile(loss, backend="eager")()


PYTHON = shlex.quote(sys.executable)
PIP = f"{PYTHON} -m pip install --force-reinstall --no-deps --no-cache-dir"
UV = f"uv pip install --python {PYTHON} --no-build-isolation --reinstall --no-deps --no-cache"
FOLDER = "file:///src/my%20copy"


@pytest.mark.parametrize(
    "installer, url, command",
    [
        ("pip", {"url": FOLDER, "dir_info": {}}, f"{PIP} '/src/my copy'"),
        ("pip", {"url": "https://x.org/opsd.tar.gz", "archive_info": {}}, f"{PIP} https://x.org/opsd.tar.gz"),
        (
            "pip",
            {"url": "https://x.org/o", "vcs_info": {"vcs": "git", "commit_id": "c0"}},
            f"{PIP} git+https://x.org/o@c0",
        ),
        (
            "pip",
            {"url": "file:///w/opsd-py3-none-any.whl", "archive_info": {}},
            f"{PIP} --no-binary opsd_kernels opsd_kernels",
        ),
        ("pip", None, f"{PIP} --no-binary opsd_kernels opsd_kernels"),
        ("uv", {"url": FOLDER, "dir_info": {}}, f"{UV} '/src/my copy'"),
    ],
)
def test_the_command_that_builds_installs_from_where_it_came(monkeypatch, tmp_path, installer, url, command):
    files = {"INSTALLER": installer, "direct_url.json": url and json.dumps(url)}
    monkeypatch.setattr(extension, "PACKAGE", tmp_path / "opsd_kernels")
    monkeypatch.setattr(extension, "distribution", lambda name: SimpleNamespace(read_text=files.get))
    assert extension.build_command() == command
    (tmp_path / "csrc").mkdir()
    (tmp_path / "setup.py").touch()
    here = shlex.quote(str(tmp_path))
    assert extension.build_command() == f"cd {here} && {PYTHON} setup.py build_ext --inplace"


def test_no_library_no_import_error(monkeypatch, tmp_path):
    """Every reason is a sentence without compiled libraries too."""
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
        assert (
            "triton row kernels each sweep one block of 256 threads per row, 2048 columns at a time" in text
        )
    assert "row kernels" not in words("plan", "--device", "cpu")
