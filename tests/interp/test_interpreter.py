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
import torch
import opsd_kernels
from opsd_kernels.testing import assert_no_worse, evaluate, hard_case
from opsd_kernels.testing.reference import linear_divergence_reference as reference
for options in (dict(shared_head=True, near=1e-2), dict()):
    case = hard_case(9, 1003, 8, torch.float32, **options)
    got = evaluate(opsd_kernels.linear_divergence, case, divergence="jsd", backend="triton")
    plain, truth = (evaluate(reference, c, divergence="jsd") for c in (case, case.double()))
    assert_no_worse(got, plain, truth)
print("through the op")
"""
OFFSETS = """
import functools
import torch
import opsd_kernels
from opsd_kernels.testing import assert_invariant, hard_case
# Logits relative to a constant of their row. The interpreter truncates bf16, so fp16
case = hard_case(48, 300, 16, torch.float16, shared_head=True, near=1e-2, largest_logit=16.0, bias=False)
assert_invariant(functools.partial(opsd_kernels.linear_divergence, backend="triton"), case)
print("on logits of any offset")
"""
# What gives the kernels other arguments than a whole chunk of two heads: logits of -inf beside a softmax of
# all (the sweep of a bucket), a few rows of a chunk with their own teacher, softcap and temperatures, a
# teacher's rows with a stride of their own, and one row for all teachers.
FORMS = """
import functools
import torch
import opsd_kernels as op
from opsd_kernels.testing import assert_no_worse, evaluate, hard_case
from opsd_kernels.testing import reference, reference_rows

def check(ours, exact, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    wide = [x.double().requires_grad_() for x in inputs]
    results = []
    for run, given in ((ours, leaves), (exact, leaves), (exact, wide)):
        loss = run(*given)
        results.append([loss.detach(), *torch.autograd.grad(loss, given)])
    for found, plain, truth in zip(*results):
        assert_no_worse(found, plain, truth)

for made in ({"shared_head": True, "near": 1e-2}, {}):
    case = hard_case(7, 203, 8, largest_logit=8.0, views=False, **made)
    told = {"topk": 5, "divergence": "jsd"}
    plain, truth = (evaluate(reference.linear_divergence_reference, c, **told) for c in (case, case.double()))
    assert_no_worse(evaluate(op.linear_divergence, case, backend="triton", **told), plain, truth)

gen = torch.Generator().manual_seed(0)
h, W, *teachers = (torch.randn(n, 8, generator=gen) for n in (7, 203, 7, 7))
heads = [torch.randn(203, 8, generator=gen) for _ in teachers]
told = {
    "teacher_index": torch.tensor([0, 0, 1, 0, 0, 0, 0]), "teacher_softcap": [None, 5.0],
    "teacher_logit_scale": [1.0, 0.5], "temperature": torch.rand(7, generator=gen) + 0.5,
}

def several(run, h, W, **how):
    wide = lambda x: [y.to(h.dtype) for y in x]
    given = {k: v.to(h.dtype) if k == "temperature" else v for k, v in told.items()}
    return run(h, W, wide(teachers), wide(heads), **given, **how)

by_index = reference_rows.linear_divergence_by_index_reference
ours = functools.partial(several, op.linear_divergence, backend="triton")
check(ours, functools.partial(several, by_index), (h, W))

rows = torch.randn(7, 301, generator=gen)[:, 50:253]
check(
    lambda h, W: op.linear_divergence_to(h, W, rows, backend="triton"),
    lambda h, W: reference_rows.linear_divergence_to_reference(h, W, rows.to(h.dtype)), (h, W),
)

def cached(h):
    made = op.cache_forward_kl(teachers[0], heads[0], W, backend="triton")
    return op.linear_cached_forward_kl(h, W, made, backend="triton")

def dense(h):
    t, U = teachers[0].to(h.dtype), heads[0].to(h.dtype)
    return reference.linear_divergence_reference(h, W.to(h.dtype), t, U, divergence="forward_kl")

check(cached, dense, (h,))
print("in other forms")
"""


def test_through_the_public_op():
    output, _ = interpreted("-c", LOSS + FORMS).communicate(timeout=300)
    for printed in ("through the op", "in other forms"):
        assert printed in output, output[-4000:]


@pytest.mark.slow
def test_an_offset_of_the_logits_changes_nothing():
    output, _ = interpreted("-c", OFFSETS).communicate(timeout=300)
    assert "on logits of any offset" in output, output[-4000:]


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
