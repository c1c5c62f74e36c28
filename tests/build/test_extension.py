"""The C++ extension: loading, every instruction set, arithmetic, rounding, and failed builds."""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opsd_kernels._rows import backends, extension
from opsd_kernels._rows.contract import Column
from opsd_kernels.spec import Divergence, Kind, LogitTransform, RowSpec
from opsd_kernels.testing import assert_same_bits

ROOT = Path(__file__).resolve().parents[2]
LEVELS = ["default", "avx2", "avx512"]
EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def built():
    """The library is loaded. Only a machine without a compiler may lack it."""
    reason = extension.load()
    if reason is not None and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip(reason)
    assert reason is None, reason


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True
    )


# ---------------------------------------------------------------- instruction sets


@functools.cache
def capability(limit: str) -> str:
    return run_python(CAPABILITY, OPSD_CPU_CAPABILITY=limit).stdout.strip()


CAPABILITY = (
    "from opsd_kernels._rows import extension; assert extension.load() is None; print(extension.capability())"
)


@pytest.mark.parametrize("level", LEVELS)
def test_the_environment_limits_the_instruction_set(built, level):
    assert capability(level) == min(level, capability(""), key=LEVELS.index)


def test_a_limit_of_onednn_leaves_another_gemm(built):
    """Its bf16 micro-kernel needs the units that the limit takes away."""
    code = (
        "import torch, opsd_kernels\n"
        "h, W = torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(5, 3, dtype=torch.bfloat16)\n"
        "print(opsd_kernels.linear_divergence(h, W, h, W).item())"
    )
    outcome = run_python(code, ONEDNN_MAX_CPU_ISA="AVX2")
    assert outcome.returncode == 0 and float(outcome.stdout) == 0, outcome.stderr


def test_an_unknown_instruction_set_is_an_error(built):
    outcome = run_python(CAPABILITY, OPSD_CPU_CAPABILITY="sse9")
    assert outcome.returncode != 0
    assert re.search(
        "OPSD_CPU_CAPABILITY: expected one of .*'avx512'.*'avx2'.*'default'.*got .?sse9", outcome.stderr
    ), outcome.stderr


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_narrower_instruction_sets_keep_the_row_contract(built, level):
    """Run a part of the row contract and the arithmetic below in a process that is limited to `level`.

    The suite itself runs the widest level, on the whole of the contract.
    """
    env = {**os.environ, "OPSD_CPU_CAPABILITY": level}
    if LEVELS.index(level) >= LEVELS.index(extension.capability()):
        pytest.skip(f"this process runs {extension.capability()} itself")
    tests = ["tests/build/rows_limited.py", "tests/build/test_extension.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rp", "-k", "limited or arithmetic", *tests]
    outcome = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout[-3000:]
    for part in ("::TestRowContract", "::TestRowOptions", "::TestColumns", "::test_arithmetic"):
        assert outcome.stdout.count(part) >= 9, f"{part}\n{outcome.stdout[-3000:]}"


def test_the_library_needs_the_stable_interface_alone(built):
    """One binary serves every torch >= 2.10 and any Python: no C++ symbol of torch, none of Python."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    (library,) = extension.PACKAGE.glob("_C.*so")
    listing = subprocess.run(
        ["nm", "-DC", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split(" U ")[-1].strip() for line in listing.splitlines() if " U " in line]
    assert any(name.startswith("torch_parallel_for") for name in names)
    assert [name for name in names if re.match(r"(c10|at|torch)::|_?Py", name)] == []


# ---------------------------------- arithmetic, seen through gradients of rows whose statistics are given


def gradient(
    S: Tensor, T: Tensor, kind: Kind, A: float, out: torch.dtype = torch.float32, beta: float = 0.5
) -> Tensor:
    """factor 1, maxima, log-sums and gap 0: q = exp(S), delta = T, and the gradient is u - q * A."""
    spec = RowSpec(Divergence(kind, beta), difference=True)
    wide = torch.promote_types(S.dtype, torch.float32)
    stats = torch.zeros(1, len(Column), dtype=wide)
    G = torch.zeros(1, S.numel(), dtype=out)
    one = torch.ones(1, dtype=wide)
    backends.COMPILED.row_grad_(S[None], T[None], stats, A * one, one, spec, None, None, G)
    return G[0]


def ladder(low: float, high: float, count: int = 100_003) -> Tensor:
    """Both signs, evenly in the logarithm."""
    x = torch.logspace(low, high, count // 2, base=10, dtype=torch.float64).float()
    return torch.cat([x, -x, torch.zeros(1)])


def worst_ulps(got: Tensor, truth: Tensor) -> float:
    """Largest relative error in units of fp32's eps, where the truth is a normal number."""
    normal = truth.abs() >= torch.finfo(torch.float32).tiny
    return ((got.double() - truth).abs() / truth.abs() / EPS)[normal].max().item()


def test_arithmetic_of_exp(built):
    """One ulp near 0; ln 2 as a single float adds 3e-9 |x|."""
    x = -ladder(-8, 1.94).abs()
    got = gradient(x, torch.zeros_like(x), Kind.REVERSE_KL, -1.0)
    near = x > -10
    assert worst_ulps(got[near], x[near].double().exp()) < 1.3
    assert worst_ulps(got, x.double().exp()) < 4
    special = torch.tensor([-torch.inf, -200.0, -1e30, torch.nan, 0.0, -0.0])
    got = gradient(special, torch.zeros_like(special), Kind.REVERSE_KL, -1.0)
    assert_same_bits(got[[0, 1, 2, 4, 5]], torch.tensor([0.0, 0, 0, 1, 1]))
    assert got[3].isnan()


def test_arithmetic_of_expm1(built):
    d = ladder(-30, 1.3)
    got = gradient(torch.zeros_like(d), d, Kind.FORWARD_KL, -1.0)
    assert worst_ulps(-got, torch.expm1(d.double())) < 2


@pytest.mark.parametrize("beta", [0.5, 0.03, 0.97])
def test_arithmetic_of_log1p(built, beta):
    """JSD's log(m/q) = log1p(beta * expm1(delta)) where delta < 0, with u = -(1 - beta) * q * log(m/q)."""
    d = -ladder(-30, 1.3).abs()
    got = gradient(torch.zeros_like(d), d, Kind.JSD, 0.0, beta=beta)
    truth = (beta - 1) * torch.log1p(beta * torch.expm1(d.double()))
    assert worst_ulps(got, truth) < 4 + 2 * beta / (
        1 - beta
    )  # where m/q nears 1 - beta, the rounding of 1 - m/q counts for more


def test_arithmetic_of_tanh(built):
    z = ladder(-30, 2.5)
    for cap, scale in ((30.0, 1.0), (50.0, -1.3)):
        spec = RowSpec(Divergence(Kind.TVD), LogitTransform(scale, cap), LogitTransform())
        got = backends.COMPILED.row_stats(z[:, None], z[:, None], spec, None, None, False)[
            :, Column.STUDENT_MAX
        ]
        assert worst_ulps(got, cap * torch.tanh(scale * z.double() / cap)) < 2.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_arithmetic_of_widening(built, dtype):
    """Every 16-bit pattern that is a normal float or zero, exactly. Subnormal bfloat16 may be read as 0."""
    T = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    got = gradient(torch.zeros_like(T), -T, Kind.REVERSE_KL, 0.0)
    finite = T.isfinite() & ((T.float().abs() >= torch.finfo(torch.float32).tiny) | (T == 0))
    assert finite.sum() > 63_000
    assert (got[finite] == T[finite].float()).all()
    assert not got[~T.isfinite()].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_arithmetic_of_narrowing(built, dtype):
    """To the nearest, ties to even; overflow to infinity, subnormal halves, NaN."""
    gen = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 1 << 32, (200_003,), generator=gen).to(torch.int32).view(torch.float32)
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    ties = (every.view(torch.int32) + (1 << 15 if dtype == torch.bfloat16 else 1 << 12)).view(torch.float32)
    around = ladder(-9, 5)
    special = torch.tensor(
        [
            torch.inf,
            -torch.inf,
            65504.0,
            65519.99,
            65520.0,
            -65520.0,
            2.0**-24,
            2.0**-25,
            3 * 2.0**-25,
            3.39e38,
            0.0,
        ]
    )
    v = torch.cat([patterns, every, ties, around, special])
    v = v[
        (v.abs() >= torch.finfo(torch.float32).tiny) | (v == 0)
    ]  # subnormal floats may be read as 0; drops NaN, too
    got = gradient(torch.zeros_like(v), -v, Kind.REVERSE_KL, 0.0, out=dtype)
    assert (got == v.to(dtype)).all()
    nan = torch.full((19,), torch.nan)
    assert gradient(torch.zeros_like(nan), nan, Kind.REVERSE_KL, 0.0, out=dtype).isnan().all()


# ---------------------------------------------------------------- threads, arguments


@pytest.mark.parametrize("kind", [Kind.REVERSE_KL, Kind.JSD], ids=lambda kind: kind.name.lower())
def test_long_rows_have_the_same_bits_on_one_and_two_threads(built, kind):
    gen = torch.Generator().manual_seed(1)
    S, T = (scale * torch.randn(9, 40_003, generator=gen) for scale in (5.0, 0.3))
    spec, threads, results = RowSpec(Divergence(kind), difference=True), torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            G = torch.empty_like(S, dtype=torch.bfloat16)
            results.append((*backends.COMPILED.row_fused_(S, T, torch.ones(9), spec, None, None, True, G), G))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two)


def test_errors_name_the_argument(built):
    S, T, one, spec = torch.zeros(2, 5), torch.zeros(2, 5), torch.ones(2), RowSpec(Divergence(Kind.JSD))
    fused = backends.COMPILED.row_fused_
    cases = [
        (
            lambda: fused(S.long(), T.long(), one, spec, None, None, False, S),
            "S: expected float64, float32, bfloat16 or float16, got Long",
        ),
        (lambda: fused(S, T.half(), one, spec, None, None, False, S), "T: expected Float, got Half"),
        (
            lambda: fused(S, T[:, :4], one, spec, None, None, False, S),
            r"T: expected shape \(2, 5\), got shape \(2, 4\)",
        ),
        (
            lambda: fused(torch.zeros(5, 2).T, T, one, spec, None, None, False, S),
            "S: expected a column stride of 1, got 2",
        ),
        (lambda: fused(S, T, one.double(), spec, None, None, False, S), "factor: expected Float, got Double"),
        (
            lambda: fused(S, T, one[:1], spec, None, None, False, S),
            r"factor: expected shape \(2\), got shape \(1\)",
        ),
        (
            lambda: fused(S, T, one, spec, torch.zeros(4), None, False, S),
            r"bias_s: expected shape \(5\), got shape \(4\)",
        ),
        (
            lambda: fused(S, T, one, spec, None, None, False, S.double()),
            "G: expected float32 or a 16-bit type, got Double",
        ),
        (
            lambda: backends.COMPILED.row_dot(S, T, torch.zeros(2, 3), spec, None, None),
            r"stats: expected shape \(2, 15\), got shape \(2, 3\)",
        ),
    ]
    for call, text in cases:
        with pytest.raises(RuntimeError, match=text):
            call()


# ---------------------------------------------------------------- building


def build(checkout: Path, **env: str) -> str:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    outcome = subprocess.run(
        command,
        cwd=checkout,
        env={**os.environ, "OPSD_BUILD_CUDA": "0", **env},
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout + outcome.stderr


def reason_in(checkout: Path) -> str:
    code = (
        "import opsd_kernels; from opsd_kernels._rows import extension; "
        "print(opsd_kernels.__file__, extension.load(), sep='\\n')"
    )
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    outcome = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, env=env, capture_output=True, text=True, check=True
    )
    path, reason = outcome.stdout.splitlines()
    assert Path(path).is_relative_to(checkout)
    return reason


def test_a_library_of_older_sources_is_refused_by_name(built):
    """Its operators would raise AttributeError in the first call."""
    sources = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*.cpp"))
    registered = set(re.findall(r'm\.def\(\s*"(\w+)\(', sources))
    assert set(extension.OPERATORS) == registered - {"cuda_sources"}
    code = (
        "import torch, opsd_kernels; from opsd_kernels._rows import extension\n"
        "extension.OPERATORS += ('gemm_of_tomorrow_',)\n"
        "h, W = torch.ones(2, 3), torch.ones(5, 3)\n"
        "print(extension.load()); print(opsd_kernels.linear_divergence(h, W, h, W).item())"
    )
    outcome = run_python(code)
    assert outcome.returncode == 0, outcome.stderr
    reason, value = outcome.stdout.splitlines()
    assert reason == "the C++ extension was built from older sources, without gemm_of_tomorrow_"
    assert float(value) == 0 and "slow" in outcome.stderr, outcome.stderr


def test_without_a_compiler_the_package_works_and_says_why(checkout):
    said = [line for line in build(checkout, CXX="/nonexistent/c++").splitlines() if line]
    assert len(said) == 1
    assert "without its C++ kernels" in said[0] and "/nonexistent/c++" in said[0]
    assert "not built" in reason_in(checkout)


FAILS = {
    "at once": ("exit 1", "cannot compile a small C++20 program"),
    "at the kernels": ('case "$*" in *probe.cpp*) exit 0;; esac; exit 1', "failed (CompileError)"),
}


@pytest.mark.parametrize("when", FAILS)
def test_a_compiler_that_fails_leaves_a_checkout_that_works(checkout, when):
    script, expected = FAILS[when]
    fails = checkout / "c++"
    fails.write_text(f"#!/bin/sh\n{script}\n")
    fails.chmod(0o755)
    said = build(checkout, CXX=shlex.quote(str(fails)))
    assert "without its C++ kernels" in said and str(fails) in said and expected in said
    assert "not built" in reason_in(checkout)


def test_it_is_built_again_only_when_a_source_changed(built, checkout):
    """Without a compiler: what is up to date is kept, what is not goes, for it would be code of yesterday."""
    (library,) = extension.PACKAGE.glob("_C.*so")
    shutil.copy(library, checkout / "opsd_kernels")
    assert build(checkout, CXX="/nonexistent/c++") == ""
    assert reason_in(checkout) == "None"
    (checkout / "csrc" / "divergence.h").touch()
    assert "/nonexistent/c++" in build(checkout, CXX="/nonexistent/c++")
    assert "not built" in reason_in(checkout)
