"""benchmarks/gpu_check.sh, without a GPU: its dry run, what it tells, and the record that it writes."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opsd_kernels._rows import extension, gpu_checks

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
# The row contract, under the interpreter too; the op with its tensors moved; a test of a graph, which is
# skipped.
TESTS = "options_a_label or test_op_reductions or graph"


def gpu_check(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", SCRIPT, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_it_is_a_shell_script():
    subprocess.run(["bash", "-n", SCRIPT], check=True)


@pytest.mark.slow
def test_a_dry_run_passes():
    done = gpu_check(
        "--dry-run", "--only", "build,doctor,smoke", PYTHON=sys.executable, GPU_CHECK_TESTS=TESTS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "correctness: every step passed; measurements without a result: none" in done.stdout
    assert int(re.search(r"smoke +ok +\d+ s +(\d+) passed", done.stdout)[1]) > 3, done.stdout


def test_a_step_that_fails_is_told_and_the_rest_goes_on():
    done = gpu_check("--dry-run", "--only", "build,smoke,sweeps", PYTHON="/bin/false")
    assert done.returncode == 1
    for step in ("build", "smoke", "sweeps"):
        assert re.search(rf"{step} +failed, status 1", done.stdout), done.stdout
    assert "correctness: build smoke; measurements without a result: sweeps" in done.stdout


@pytest.mark.parametrize("arguments", [("--only", "smok"), ("--only",), ("--dry",)], ids=str)
def test_an_unknown_step_or_argument_is_refused(arguments):
    done = gpu_check("--dry-run", *arguments)
    assert done.returncode == 2 and done.stderr.startswith("gpu_check: ") and not done.stdout


def test_help_is_no_failure():
    done = gpu_check("--help")
    assert done.returncode == 0 and "--only STEP" in done.stdout and not done.stderr


def test_the_build_is_for_the_architectures_of_a_release():
    """Elsewhere a release runs the code of an older GPU, or PTX: a record of other code proves nothing."""
    (listed,) = re.findall(r"^CUDA_ARCHITECTURES = (\(.*\))$", (ROOT / "setup.py").read_text(), re.M)
    alone = re.search(r"case \$capability in.*\n +(\d+)\) ;;\n +(\d+) \| (\d+)\)", SCRIPT.read_text())
    assert alone.groups() == tuple(arch.rstrip("a") for arch in ast.literal_eval(listed))


@pytest.fixture
def pretended(tmp_path):
    """Return a function that runs the script beside a GPU, with a Python that only notes its arguments."""
    tools = tmp_path / "tools"
    tools.mkdir()
    scripts = {
        "nvidia-smi": """case $* in *compute_cap*) echo 9.0 ;; *) echo NVIDIA H200 ;; esac""",
        "python": """echo "$*" >>"$CALLS"
            case $* in
              *"-m pytest"*) echo '12 passed in 3 s, "quoted"'; exit "$SMOKE" ;;
              *" bench "*) cp "$RESULTS/steps.json" "$RESULTS/at_bench.json" ;;
            esac""",
    }
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)

    def run(*arguments: str, smoke: int = 0) -> tuple[subprocess.CompletedProcess, list[str]]:
        calls, out = tmp_path / "calls", tmp_path / "out"
        done = gpu_check(
            *arguments,
            PATH=f"{tools}:{os.environ['PATH']}",
            PYTHON=str(tools / "python"),
            OUT=str(out),
            RESULTS=str(out),
            CALLS=str(calls),
            SMOKE=str(smoke),
        )
        return done, calls.read_text().splitlines()

    return run


def test_steps_are_written_as_they_finish_and_the_record_before_the_times(pretended, tmp_path):
    done, calls = pretended("--commit", "c0ffee", "--only", "doctor,smoke,ratios,sweeps")
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = [n for n, call in enumerate(calls) if "gpu_record.py" in call]
    assert calls[record].endswith("--commit c0ffee --passed doctor= smoke=12 passed in 3 s, quoted --failed")
    measured = [n for n, call in enumerate(calls) if " bench " in call]
    assert len(measured) == 2 and record < measured[0]
    early, late = (
        json.loads((tmp_path / "out" / name).read_text()) for name in ("at_bench.json", "steps.json")
    )
    assert [step["step"] for step in early["steps"]] == ["doctor", "smoke", "ratios"]
    assert [step["step"] for step in late["steps"]] == ["doctor", "smoke", "ratios", "sweeps"]
    assert late["commit"] == "c0ffee" and {step["status"] for step in late["steps"]} == {0}
    assert "===== smoke: status 0" in (tmp_path / "out" / "log.txt").read_text()


def test_a_smoke_run_that_fails_is_given_to_the_record(pretended):
    done, calls = pretended("--commit", "c0", "--only", "smoke,sweeps", smoke=3)
    assert done.returncode == 1 and "correctness: smoke;" in done.stdout
    (record,) = [call for call in calls if "gpu_record.py" in call]
    assert record.endswith("--commit c0 --passed --failed smoke=3")
    assert any(" bench " in call for call in calls)


@pytest.fixture
def record(monkeypatch, tmp_path):
    """Return gpu_record.py as a module beside a GPU, with a file of its own."""
    spec = importlib.util.spec_from_file_location("gpu_record", ROOT / "benchmarks" / "gpu_record.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(gpu_checks, "FILE", tmp_path / "gpu_checks.json")
    monkeypatch.setattr(extension, "cuda_unavailable", lambda: None)
    monkeypatch.setattr(extension, "cuda_sources", lambda: "0123456789ab")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    gpu_checks.save(())
    return module


def test_passed_steps_make_a_record_that_later_steps_add_to(record):
    assert "no deciding step" in record.update("c0", {"build": "", "memcheck": "0 errors"}, {})
    assert gpu_checks.load() == ()
    assert record.update("c0", {"build": "", "smoke": "12 passed"}, {}).startswith(
        "recorded 9.0, 0123456789ab"
    )
    record.update("c1", {"memcheck": "0 errors"}, {})
    (made,) = gpu_checks.load()
    assert made.steps == {"smoke": "12 passed", "memcheck": "0 errors"} and made.device == "NVIDIA H200"


def test_a_failed_step_deletes_the_record_and_one_out_of_time_leaves_it(record, monkeypatch):
    record.update("c0", {"smoke": "12 passed"}, {})
    record.update("c0", {"tests": "2000 passed"}, {"racecheck": "124"})
    (made,) = gpu_checks.load()
    assert set(made.steps) == {"smoke"}
    record.update("c0", {"smoke": "12 passed"}, {"tests": "1"})
    assert gpu_checks.load() == ()
    monkeypatch.setattr(extension, "cuda_unavailable", lambda: "no compiler")
    assert record.update("c0", {"smoke": "12 passed"}, {}) == "no record: no compiler"


def test_without_a_gpu_it_says_so(tmp_path):
    """With a PATH that has everything but nvidia-smi."""
    for tool in ("bash", "head", "tr", "dirname", "sed"):
        (tmp_path / tool).symlink_to(
            subprocess.run(
                ["sh", "-c", f"command -v {tool}"], capture_output=True, text=True, check=True
            ).stdout.strip()
        )
    done = gpu_check(PATH=str(tmp_path))
    assert done.returncode == 2 and "nvidia-smi names no GPU" in done.stderr


def test_the_summary_takes_a_whole_report():
    """The committed one has rows of every suite, with noise and with what failed."""
    summary, report = (
        ROOT / "benchmarks" / "gpu_summary.py",
        ROOT / "benchmarks" / "results" / "epyc-2-cores" / "suites.json",
    )
    done = subprocess.run([sys.executable, summary, report], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (
        ", noisy" in done.stdout
        and "out of memory" in done.stdout
        and "accuracy, worst gradient at any KL" in done.stdout
    )
