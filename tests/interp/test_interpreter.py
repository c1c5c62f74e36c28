"""The Triton kernels under Triton's interpreter, in subprocesses: importing Triton reads TRITON_INTERPRET."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Tests of each class that must pass: an empty selection must not look green.
AT_LEAST = {"TestRowContract": 170, "TestRowOptions": 95, "TestColumns": 30}

pytestmark = pytest.mark.interp


def interpreted(*arguments: str) -> subprocess.Popen:
    # NumPy warns of every inf and NaN in a sweep.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    environment.pop("OPSD_BACKEND", None)
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_the_row_contract():
    command = ("-m", "pytest", "-q", "-rfp", "-p", "no:cacheprovider", str(HERE / "rows_interpreted.py"))
    process = interpreted(*command)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output[-6000:]
    for name, least in AT_LEAST.items():
        passed = re.findall(rf"^PASSED .*::{name}::", output, re.MULTILINE)
        assert len(passed) >= least, f"{name}: {len(passed)} passed\n{output[-2000:]}"


LOSS = """
import functools
import torch
import opsd_kernels
from opsd_kernels.testing import assert_invariant, assert_no_worse, evaluate, hard_case
from opsd_kernels.testing.reference import linear_divergence_reference as reference
for options in (dict(shared_head=True, near=1e-2), dict()):
    case = hard_case(9, 1003, 8, torch.float32, **options)
    got = evaluate(opsd_kernels.linear_divergence, case, divergence="jsd", backend="triton")
    plain, truth = (evaluate(reference, c, divergence="jsd") for c in (case, case.double()))
    assert_no_worse(got, plain, truth)
print("through the op")
# Logits relative to a constant of their row. The interpreter truncates bf16, so fp16
case = hard_case(48, 300, 16, torch.float16, shared_head=True, near=1e-2, largest_logit=16.0, bias=False)
assert_invariant(functools.partial(opsd_kernels.linear_divergence, backend="triton"), case)
print("on logits of any offset")
"""


def test_through_the_public_op():
    output, _ = interpreted("-c", LOSS).communicate(timeout=300)
    assert "through the op" in output and "on logits of any offset" in output, output[-4000:]


def test_without_the_interpreter_a_cpu_is_refused_with_the_reason():
    code = (
        "import torch, opsd_kernels._rows.backends as b\n"
        "assert 'cuda' in b.explain('cpu')['triton']\n"
        "try: b.select('triton', torch.device('cpu'))\n"
        "except ValueError as e: assert 'TRITON_INTERPRET' in str(e)\n"
        "else: raise SystemExit('no error')\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
