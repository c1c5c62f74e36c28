"""Set up the whole suite."""

import functools
import gc
import json
import os
import platform
import signal

# Set before torch is loaded: threads that spin between small kernels made this suite 13 times slower on two
# busy cores (62 s against 4.6 s for the row tests).
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import measured
import pytest
import torch
from _pytest.junitxml import xml_key

from opsd_kernels import provenance, tested_versions
from opsd_kernels._core import cpu_gemm
from opsd_kernels._rows import backends
from opsd_kernels.testing import memory

pytest.register_assert_rewrite("row_contract", "row_options_contract", "column_contract")


# A shell starts jobs in the background with SIGINT ignored, `nohup` with SIGHUP, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_sessionstart(session):
    """Write versions and machine into the --junitxml report, for tests/record_versions.py."""
    report = session.config.stash.get(xml_key, None)
    # Absent in the workers of pytest-xdist and without --junitxml.
    if report is None:
        return
    machine = provenance.describe_machine("cpu")
    facts = {
        "commit": provenance.git_commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": f"{machine['processor']}, {machine['cores']} cores, {machine['capability']}",
        "packages": tested_versions.installed(),
        # Without --junitxml=FILE.
        "arguments": [
            argument
            for argument in session.config.invocation_params.args
            if not argument.startswith("--junit")
        ],
    }
    for name, value in facts.items():
        report.add_global_property(f"opsd_{name}", json.dumps(value))


def pytest_collection_finish(session):
    """Leave the tests themselves out of later garbage collections.

    The benchmark's code collects between measurements: .6 s each time beside 10 000 tests, .05 s without.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    """Libraries bound by nanobind call what is still frozen at the exit a leak."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def threads():
    """Use OMP_NUM_THREADS threads, by default two as in CI.

    Sums over another number of threads round differently.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(autouse=True)
def nan_filled_allocations():
    """Fill every torch.empty with NaN, so that an unwritten output shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # the fill happens in this mode only
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def gguf_read_once():
    """Parse a GGUF file, and make the map of its tensors' names, once for transformers' own loads too."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (`make test` does)")
    read = functools.cache(gguf.GGUFReader)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", lambda path: read(str(path)))
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        yield


@pytest.fixture(scope="session")
def forks_of_peaks():
    yield measured
    measured.end()


@pytest.fixture
def forked_peaks(monkeypatch, forks_of_peaks):
    """Measure peaks in forks of one process. The tests of `peak_bytes` itself use fresh ones too."""
    monkeypatch.setattr(memory, "in_child", forks_of_peaks.run)


@pytest.fixture
def narrow_slices(monkeypatch):
    """Let no slice that is widened on CPUs without 16-bit products hold a whole head of a test."""
    monkeypatch.setattr(cpu_gemm, "SLICE_BYTES", 1)


@pytest.fixture(params=["torch", "cpp"])
def backend(request):
    """Return the name of each CPU backend; skip with its reason where it is absent."""
    reason = next(b for b in backends.BACKENDS if b.name == request.param).unsupported("cpu", None)
    if reason is not None:
        pytest.skip(reason)
    return request.param
