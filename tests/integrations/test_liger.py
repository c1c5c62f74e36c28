"""Liger's two JSD losses as shims: against dense float64, against Liger, and under Liger's own tests.

Liger's tests stay in its source distribution.
"""

import os
import re
import runpy
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opsd_kernels.integrations import liger
from opsd_kernels.integrations.liger import (
    LigerFusedLinearJSD,
    LigerFusedLinearJSDLoss,
    fused_linear_jsd,
    fused_linear_jsd_loss,
)
from opsd_kernels.testing import Outcome, assert_no_worse, assert_on_target, assert_same_bits

ROOT = Path(__file__).resolve().parent.parent.parent
N, V, H_S, H_T = 23, 67, 12, 20
WEIGHTS = [(0.5, 0.5), (0.3, 1.7), (0.0, 1.0), (1.0, 0.0)]


def tensors(
    dtype: torch.dtype = torch.float32, ignore_index: int = -100, teacher_rows: int = V
) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(5)

    def draw(*shape: int, width: float = 1.0) -> Tensor:
        return (width * torch.randn(*shape, generator=gen)).to(dtype)

    made = {
        "student_input": draw(N, H_S), "student_weight": draw(V, H_S),
        "teacher_input": draw(N, H_T), "teacher_weight": draw(teacher_rows, H_T),
        "true_labels": torch.randint(V, (N,), generator=gen),
        "student_bias": draw(V), "teacher_bias": draw(teacher_rows),
    }  # fmt: skip
    made["true_labels"][[2, 11, 12]] = ignore_index
    return made


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * torch.where(log_a > -torch.inf, log_a - log_b, 0.0)).sum(-1)


def dense(
    made: dict[str, Tensor],
    beta: float,
    temperature: float,
    hard: float,
    soft: float,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (loss, soft loss, hard loss) from whole logits by their definition."""
    s = made["student_input"] @ made["student_weight"].T + made.get("student_bias", 0.0)
    t = (made["teacher_input"] @ made["teacher_weight"].T + made.get("teacher_bias", 0.0)).detach()[
        :, : s.shape[1]
    ]
    log_q, log_p = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    if beta in (0, 1):
        divergence = kl(log_p, log_q) if beta == 0 else kl(log_q, log_p)
    else:
        log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
        divergence = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    counts = made["true_labels"] != ignore_index
    soft_loss = torch.where(counts, divergence, 0.0).sum() / counts.sum().clamp(min=1)
    hard_loss = F.cross_entropy(
        s, made["true_labels"], ignore_index=ignore_index, reduction="sum"
    ) / counts.sum().clamp(min=1)
    return hard * hard_loss + soft * soft_loss, soft_loss, hard_loss


def outcome(
    loss_of, made: dict[str, Tensor], names=("student_input", "student_weight", "student_bias"), dtype=None
) -> Outcome:
    """Return `loss_of(tensors)` and the gradients under an upstream gradient of 3."""
    made = {k: x.to(dtype) if dtype is not None and x.is_floating_point() else x for k, x in made.items()}
    leaves = {k: made[k].clone().requires_grad_() for k in names if k in made}
    result = loss_of({**made, **leaves})
    loss = result[0] if isinstance(result, tuple) else result
    grads = torch.autograd.grad(loss, list(leaves.values()), torch.full_like(loss, 3.0))
    parts = torch.stack(result).detach() if isinstance(result, tuple) else loss.detach()
    return Outcome(
        parts, **dict(zip(["student_hidden", "student_weight", "student_bias"], grads, strict=False))
    )


def check(ours, reference, made) -> None:
    truth, plain = outcome(reference, made, dtype=torch.float64), outcome(reference, made)
    assert all(value.abs().max() > 0 for _, value in truth.named())
    assert_no_worse(outcome(ours, made), plain, truth)


# ---------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("hard, soft", WEIGHTS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("ignore_index", [-100, 42])
def test_chunked_loss(beta, temperature, hard, soft, ignore_index):
    """Loss, soft loss, hard loss and three gradients, over the parameters of Liger's own grid."""
    loss = LigerFusedLinearJSDLoss(hard, soft, beta, ignore_index, temperature, True, 1024, True)
    check(
        lambda made: loss(*made.values()),
        lambda made: dense(made, beta, temperature, hard, soft, ignore_index),
        tensors(ignore_index=ignore_index),
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hard, soft", WEIGHTS)
def test_chunked_loss_alone_is_a_tensor(hard, soft, bias):
    made = tensors()
    if not bias:
        made.pop("student_bias"), made.pop("teacher_bias")
    check(
        lambda made: fused_linear_jsd_loss(*made.values(), weight_hard_loss=hard, weight_soft_loss=soft),
        lambda m: dense(m, 0.5, 1.0, hard, soft)[0],
        made,
    )


def bias_free(made: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: x for k, x in made.items() if not k.endswith("bias")}


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("beta, temperature", [(0.5, 1.0), (0.1, 2.0), (0.0, 1.0), (1.0, 1.0)])
def test_kernel_loss(beta, temperature, labelled):
    loss = LigerFusedLinearJSD(beta, 42, temperature, torch.float32)

    def ours(made):
        labels = made["true_labels"] if labelled else None
        heads = [made[k] for k in ("student_input", "student_weight", "teacher_input", "teacher_weight")]
        assert torch.equal(loss(*heads, labels), fused_linear_jsd(*heads, labels, beta, 42, temperature))
        return loss(*heads, labels)

    made = bias_free(tensors(ignore_index=42))
    everything = {
        **made,
        "true_labels": made["true_labels"] if labelled else torch.zeros(N, dtype=torch.int64),
    }
    check(
        ours,
        lambda m: dense({**m, "true_labels": everything["true_labels"]}, beta, temperature, 0.0, 1.0, 42)[0],
        made,
    )


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("hard, soft, temperature", [(0.2, 0.8, 1.0), (0.5, 0.5, 2.0), (0.0, 1.0, 2.0)])
def test_is_ligers(beta, hard, soft, temperature):
    """Both take the constructor's and the call's arguments in Liger's order."""
    theirs = pytest.importorskip(
        "liger_kernel.chunked_loss", reason="liger-kernel is not installed"
    ).LigerFusedLinearJSDLoss
    settings = (hard, soft, beta, -100, temperature, False, 8, True)
    got, expected = (
        outcome(lambda m, made=made: made(*settings)(*m.values()), tensors())
        for made in (LigerFusedLinearJSDLoss, theirs)
    )
    assert_on_target(got, expected, "fp32_logits")


# ---------------------------------------------------------------- where Liger errs, and what a term costs


def test_padded_teacher_vocabulary_takes_no_probability():
    """Liger gives each token outside the student's vocabulary the logit 0."""
    made = tensors(teacher_rows=V + 5)
    check(lambda m: fused_linear_jsd_loss(*m.values()), lambda m: dense(m, 0.5, 1.0, 0.5, 0.5)[0], made)


def test_a_token_that_the_teacher_excludes_is_no_nan():
    made = tensors()
    made["teacher_bias"][7] = -torch.inf
    truth = outcome(lambda m: dense(m, 0.0, 1.0, 0.5, 0.5)[0], made, dtype=torch.float64)
    assert all(value.isfinite().all() for _, value in truth.named())
    check(
        lambda m: fused_linear_jsd_loss(*m.values(), beta=0.0),
        lambda m: dense(m, 0.0, 1.0, 0.5, 0.5)[0],
        made,
    )


def test_second_backward_gives_the_same_gradients():
    made = bias_free(tensors())
    heads = {k: x.requires_grad_(k.startswith("student")) for k, x in made.items() if k != "true_labels"}
    for loss in (
        fused_linear_jsd(*heads.values()),
        fused_linear_jsd_loss(*heads.values(), made["true_labels"]),
    ):
        first, second = (
            torch.autograd.grad(
                3 * loss, (heads["student_input"], heads["student_weight"]), retain_graph=True
            )
            for _ in range(2)
        )
        for a, b in zip(first, second, strict=True):
            assert_same_bits(a, b)


def test_ignored_rows_may_hold_anything_and_nothing_valid_is_zero():
    made = tensors()
    ignored = made["true_labels"] == -100
    expected = fused_linear_jsd_loss(*made.values())
    made["student_input"][ignored], made["teacher_input"][ignored] = torch.nan, torch.inf
    assert_same_bits(fused_linear_jsd_loss(*made.values()), expected)
    made["true_labels"][:] = -100
    student = made["student_input"].requires_grad_()
    loss = fused_linear_jsd_loss(*made.values(), temperature=2.0)
    loss.backward()
    assert loss == 0 and (student.grad == 0).all()


def test_batches_of_sequences_need_not_be_flattened():
    made = tensors()
    shaped = {
        k: x[: N - 1].unflatten(0, (2, 11)) if k in ("student_input", "teacher_input", "true_labels") else x
        for k, x in made.items()
    }
    flat = {
        k: x[: N - 1] if k in ("student_input", "teacher_input", "true_labels") else x
        for k, x in made.items()
    }
    assert_same_bits(fused_linear_jsd_loss(*shaped.values()), fused_linear_jsd_loss(*flat.values()))


@pytest.mark.parametrize(
    "hard, soft, temperature, report, expected",
    [
        (0.5, 0.5, 1.0, False, [("linear_policy_divergence", True)]),
        (0.5, 0.5, 1.0, True, [("linear_policy_divergence", True)]),
        (0.5, 0.5, 2.0, False, [("linear_divergence", True), ("linear_logprobs", True)]),
        (0.0, 1.0, 1.0, False, [("linear_divergence", True)]),
        (1.0, 0.0, 1.0, False, [("linear_logprobs", True)]),
        (0.0, 1.0, 1.0, True, [("linear_divergence", True), ("linear_logprobs", False)]),
        (1.0, 0.0, 1.0, True, [("linear_divergence", False), ("linear_logprobs", True)]),
        (0.0, 0.0, 1.0, False, [("linear_divergence", True)]),
    ],
)
def test_a_term_that_nobody_needs_is_not_computed(monkeypatch, hard, soft, temperature, report, expected):
    """Record the ops that run, and whether they need gradients."""
    seen = []
    for name in ("linear_divergence", "linear_logprobs", "linear_policy_divergence"):
        op = getattr(liger, name)
        monkeypatch.setattr(
            liger,
            name,
            lambda *a, name=name, op=op, **k: (seen.append((name, torch.is_grad_enabled())), op(*a, **k))[1],
        )
    made = tensors()
    made["student_weight"].requires_grad_()
    result = LigerFusedLinearJSDLoss(hard, soft, temperature=temperature, return_soft_hard_loss=report)(
        *made.values()
    )
    assert seen == expected
    loss = result[0] if report else result
    assert loss.requires_grad and not (report and (result[1].requires_grad or result[2].requires_grad))


@pytest.mark.parametrize(
    "made, match",
    [
        (lambda: LigerFusedLinearJSDLoss(beta=1.5), r"beta: expected a number in \[0, 1\], got 1.5"),
        (lambda: LigerFusedLinearJSD(jsd_beta=-0.1), "jsd_beta: expected"),
        (lambda: LigerFusedLinearJSD(temperature=0.0), "temperature: expected"),
        (lambda: LigerFusedLinearJSDLoss(temperature=0.0), "temperature: expected"),
    ],
)
def test_errors_name_the_argument(made, match):
    with pytest.raises(ValueError, match=match):
        made()


@pytest.mark.parametrize("name", ["LigerFusedLinearJSDLoss", "LigerFusedLinearJSD"])
def test_signatures_are_ligers(name):
    import inspect

    module = {
        "LigerFusedLinearJSDLoss": "liger_kernel.chunked_loss.jsd_loss",
        "LigerFusedLinearJSD": "liger_kernel.transformers.fused_linear_jsd",
    }[name]
    theirs = getattr(pytest.importorskip(module, reason="liger-kernel is not installed"), name)
    for method in ("__init__", "forward"):
        ours, expected = (
            inspect.signature(getattr(kind, method)).parameters for kind in (getattr(liger, name), theirs)
        )
        assert list(ours) == list(expected)
        assert all(ours[k].default == p.default for k, p in expected.items() if p.default is not p.empty)


# ---------------------------------------------------------------- Liger's own tests

SUITES = ("test/chunked_loss/test_jsd_loss.py", "test/transformers/test_fused_linear_jsd.py")
# One of the two shapes of the larger tests: 40 times the work of the other.
LARGE = "1024-4096"


@pytest.fixture(scope="session")
def liger_source(tmp_path_factory) -> Path:
    """Liger's source distribution: the directory in LIGER_SOURCE, or a download by pip."""
    if util.find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is not installed")
    if given := os.environ.get("LIGER_SOURCE"):
        return Path(given)
    version, place = metadata.version("liger_kernel"), tmp_path_factory.mktemp("liger")
    what = [
        "--no-deps",
        "--no-build-isolation",
        "--no-binary",
        ":all:",
        "--retries",
        "1",
        "--timeout",
        "10",
        f"liger-kernel=={version}",
    ]
    try:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", *what, "-d", str(place)],
            check=True,
            capture_output=True,
            timeout=90,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(
            f"no source distribution of liger-kernel {version}: pip download failed ({type(error).__name__})"
        )
    subprocess.run(["tar", "xzf", str(next(place.glob("*.tar.gz"))), "-C", str(place)], check=True)
    return next(path for path in place.iterdir() if path.is_dir())


def run_ligers(source: Path, selection: str, **env: str) -> subprocess.CompletedProcess:
    paths = [str(Path(__file__).parent), str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONDONTWRITEBYTECODE": "1",
        **env,
    }
    how = ["-q", "-rfE", "-p", "liger_redirect", "-p", "no:cacheprovider", "-o", "addopts=", "-k", selection]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *how, *SUITES],
        cwd=source,
        env=env,
        capture_output=True,
        text=True,
        timeout=570,
    )


def counts(result: subprocess.CompletedProcess) -> dict[str, int]:
    return {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|error)", result.stdout)}


@pytest.mark.slow
def test_ligers_own_tests_pass(liger_source):
    """All tests that need no GPU: 126 with LIGER_LARGE=1, else 82, without the larger shape."""
    large = os.environ.get("LIGER_LARGE") == "1"
    result = run_ligers(liger_source, "test" if large else f"not {LARGE}")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert counts(result)["passed"] == (126 if large else 82) or metadata.version("liger_kernel") != "0.8.5"
    assert int(re.search(r"calls of the shims' ops: (\d+)", result.stdout)[1]) >= counts(result)["passed"]


@pytest.mark.slow
def test_ligers_own_tests_find_a_planted_mistake(liger_source):
    """A shim with beta in place of 1 - beta fails Liger's tests where beta is not 1/2."""
    result = run_ligers(
        liger_source,
        "test_correctness and dtype1 and ((47 and 0.8) or (423 and 0.1))",
        LIGER_REDIRECT_PLANT="beta",
    )
    assert result.returncode == 1, result.stdout[-3000:] + result.stderr[-2000:]
    assert (
        counts(result)["failed"] == 6 and counts(result)["passed"] <= 1
    )  # that with every label ignored passes


# ---------------------------------------------------------------- the page and the example


def test_the_page_runs_and_only_the_import_changes():
    pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    (block,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "integrations-liger.md").read_text(), re.DOTALL
    )
    assert len(block.strip().splitlines()) <= 10
    before = re.sub(r"^# instead of: (from .*)\nfrom .*$", r"\1", block, flags=re.MULTILINE)
    assert "opsd" in block and "opsd" not in before
    results = []
    for code in (block, before):
        made = bias_free(tensors())
        session = dict(
            zip(
                ["student_hidden", "student_head", "teacher_hidden", "teacher_head", "labels"],
                made.values(),
                strict=True,
            )
        )
        leaves = [session["student_hidden"].requires_grad_(), session["student_head"].requires_grad_()]
        exec(code, session)
        results.append(Outcome(session["loss"].detach(), *(leaf.grad for leaf in leaves)))
    assert_on_target(*results, "fp32_logits")


def test_the_example_runs(capsys):
    with torch.random.fork_rng():
        runpy.run_path(str(ROOT / "examples" / "liger_shim.py"), run_name="__main__")
    first, *_, last = (float(x) for x in re.findall(r"divergence (\S+)", capsys.readouterr().out))
    assert last < first / 2
