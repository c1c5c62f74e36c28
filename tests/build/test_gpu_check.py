"""benchmarks/gpu_check.sh, without a GPU: its dry run, and that it tells a step that failed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
        "--dry-run", "--only", "build,serves,tests", PYTHON=sys.executable, GPU_CHECK_TESTS=TESTS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "correctness: every step passed; measurements without a result: none" in done.stdout
    assert int(re.search(r"tests +ok +\d+ s +(\d+) passed", done.stdout)[1]) > 3, done.stdout


def test_a_step_that_fails_is_told_and_the_rest_goes_on():
    done = gpu_check("--dry-run", "--only", "build,serves", PYTHON="/bin/false")
    assert done.returncode == 1
    assert re.search(r"build +failed, status 1", done.stdout) and re.search(
        r"serves +failed, status 1", done.stdout
    ), done.stdout
    assert "correctness: build serves;" in done.stdout


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
