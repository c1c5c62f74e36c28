"""Forward+backward on a CPU as a ratio to the bare GEMMs, and beside the peers. Behind the correctness gate; variants interleaved in one process; medians.

python benchmarks/cpu_ratios.py                      # the table of the README: N=1024, H=1024, V=32000, trainable head, two threads
python benchmarks/cpu_ratios.py --frozen --json out.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from opsd_kernels import linear_divergence, plan

DIVERGENCES = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}  # TRL's and Liger's beta
TARGETS = {("float32", "shared"): 1.10, ("bfloat16", "shared"): 1.22, ("bfloat16", "two heads"): 1.70, ("float32", "two heads"): 1.10}


@dataclass
class Problem:
    """Student and teacher of one call. Logits have a standard deviation of about 4, so rows are peaked; the teacher is the student, moved by its context."""

    N: int
    H: int
    V: int
    dtype: torch.dtype
    shared: bool
    frozen: bool
    student: torch.Tensor = field(init=False)
    weight: torch.Tensor = field(init=False)
    teacher: torch.Tensor = field(init=False)
    teacher_weight: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        weight, student = normal(self.V, self.H) / self.H**0.5 * 4, normal(self.N, self.H)
        teacher_weight = weight + 0.05 * normal(self.V, self.H)
        self.weight = weight.to(self.dtype).requires_grad_(not self.frozen)
        self.student = student.to(self.dtype).requires_grad_()
        self.teacher = (student + 0.1 * normal(self.N, self.H)).to(self.dtype)
        self.teacher_weight = self.weight.detach() if self.shared else teacher_weight.to(self.dtype)

    def step(self, loss: Callable[[], torch.Tensor]) -> float:
        """Forward and backward; the loss."""
        self.student.grad = self.weight.grad = None
        value = loss()
        value.backward()
        return float(value.detach())


def bare_gemms(problem: Problem, rows: int) -> Callable[[], None]:
    """The GEMMs that no implementation can avoid, in the library's own form, over the same chunks and into buffers allocated and touched before."""
    h, t, W, Wt = (x.detach() for x in (problem.student, problem.teacher, problem.weight, problem.teacher_weight))
    S = torch.ones(rows, problem.V, dtype=problem.dtype)
    dh, dW = torch.ones_like(h), torch.ones_like(W)

    def run() -> None:
        for start in range(0, problem.N, rows):
            chunk = slice(start, start + rows)
            C = h[chunk].shape[0]
            torch.mm(t[chunk], Wt.t(), out=S[:C])
            torch.mm(h[chunk], W.t(), out=S[:C])
            torch.mm(S[:C], W, out=dh[chunk])
            if not problem.frozen:
                dW.addmm_(S[:C].t(), h[chunk])

    return run


def ours(problem: Problem, divergence: str) -> Callable[[], torch.Tensor]:
    return lambda: linear_divergence(problem.student, problem.weight, problem.teacher, problem.teacher_weight, divergence=divergence)


def plain(problem: Problem, divergence: str, dtype: torch.dtype | None = None) -> Callable[[], torch.Tensor]:
    """What a user writes in PyTorch; logits upcast to fp32 as every trainer does."""

    def run() -> torch.Tensor:
        heads = (problem.student, problem.weight, problem.teacher, problem.teacher_weight)
        h, W, t, Wt = (x if dtype is None else x.to(dtype) for x in heads)
        with torch.no_grad():
            log_p = (t @ Wt.t()).to(dtype or torch.float32).log_softmax(-1)
        log_q = (h @ W.t()).to(dtype or torch.float32).log_softmax(-1)
        if divergence == "reverse_kl":
            return torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
        if divergence == "forward_kl":
            return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=log_q.dtype))
        return 0.5 * sum(torch.nn.functional.kl_div(log_m, x, log_target=True, reduction="batchmean") for x in (log_p, log_q))

    return run


def trl(problem: Problem, divergence: str) -> Callable[[], torch.Tensor]:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    beta = DIVERGENCES[divergence]
    heads = (problem.student, problem.weight, None, problem.teacher, problem.teacher_weight, None)
    return lambda: ChunkedDivergenceFunction.apply(*heads, beta)[0].mean()


def liger(problem: Problem, divergence: str) -> Callable[[], torch.Tensor]:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=DIVERGENCES[divergence], compiled=False)
    labels = torch.zeros(problem.N, dtype=torch.int64)
    heads = (problem.student, problem.weight, problem.teacher, problem.teacher_weight)
    return lambda: module(*heads, labels)


PEERS = {"plain PyTorch": plain, "TRL ChunkedDivergenceFunction": trl, "Liger chunked JSD": liger}


def gradient_errors(problem: Problem, divergence: str) -> tuple[float, float]:
    """Relative error of dh against float64 on the first rows: ours, and plain PyTorch's."""
    part = Problem(**{**{name: getattr(problem, name) for name in ("H", "V", "dtype", "shared", "frozen")}, "N": 64})
    part.step(plain(part, divergence, torch.float64))
    truth = part.student.grad.double()

    def error(loss: Callable[[], torch.Tensor]) -> float:
        part.step(loss)
        return float((part.student.grad.double() - truth).norm() / truth.norm())

    return error(ours(part, divergence)), error(plain(part, divergence))


def gate(problem: Problem, divergence: str) -> tuple[float, float]:
    """No time without a right gradient: 2 % in bf16 (docs/numerics.md), twice plain PyTorch in fp32."""
    mine, theirs = gradient_errors(problem, divergence)
    bound = 0.02 if problem.dtype == torch.bfloat16 else 2 * theirs + 1e-5
    if not mine <= bound:
        raise SystemExit(f"{divergence}: gradient error {mine:.2e} above {bound:.2e}: no time is printed for a wrong kernel")
    return mine, theirs


def interleaved(variants: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each variant, one of each in turn, after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def measure(problem: Problem, divergence: str, repeats: int, peers: list[str]) -> dict[str, object]:
    errors = gate(problem, divergence)
    rows = plan(problem.N, problem.V, problem.H, dtype=problem.dtype, shared_head=problem.shared, trainable_head=not problem.frozen).rows
    variants: dict[str, Callable[[], object]] = {"bare GEMMs": bare_gemms(problem, rows)}
    losses = {"opsd_kernels": ours(problem, divergence)}
    for name in peers:
        losses[name] = PEERS[name](problem, divergence)
    for name, loss in losses.items():
        variants[name] = lambda loss=loss: problem.step(loss)
    times = {name: statistics.median(values) for name, values in interleaved(variants, repeats).items()}
    bare = times["bare GEMMs"]
    dtype, head = str(problem.dtype).removeprefix("torch."), "shared" if problem.shared else "two heads"
    return {
        "dtype": dtype,
        "head": head,
        "frozen": problem.frozen,
        "divergence": divergence,
        "rows": rows,
        "ms": times,
        "ratio": {name: value / bare for name, value in times.items()},
        "gradient_error": {"opsd_kernels": errors[0], "plain PyTorch": errors[1]},
        "target": TARGETS[dtype, head],
    }


def show(row: dict[str, object]) -> None:
    cells = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in row["ratio"].items() if name != "bare GEMMs")
    fastest = min((value for name, value in row["ratio"].items() if name not in ("bare GEMMs", "opsd_kernels")), default=float("inf"))
    mine = row["ratio"]["opsd_kernels"]
    verdict = "ok" if mine <= row["target"] and mine < fastest else "MISSED"
    what = f"{row['dtype']:9s} {row['head']:10s} {row['divergence']:11s} bare {row['ms']['bare GEMMs']:6.0f} ms"
    print(f"{what}  {cells}  target {row['target']:.2f} {verdict}", flush=True)


def machine() -> dict[str, object]:
    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    packages = ("torch", "trl", "liger-kernel", "opsd_kernels")
    capability = torch.backends.cpu.get_cpu_capability()
    return {"processor": platform.processor() or platform.machine(), "capability": capability, "threads": torch.get_num_threads(), "commit": commit} | {
        package: version(package) for package in packages
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-N", type=int, default=1024)
    parser.add_argument("-H", type=int, default=1024)
    parser.add_argument("-V", type=int, default=32000)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--head", nargs="+", default=["shared", "two heads"], choices=["shared", "two heads"])
    parser.add_argument("--divergence", nargs="+", default=list(DIVERGENCES), choices=list(DIVERGENCES))
    parser.add_argument("--frozen", action="store_true", help="the head takes no gradient: three GEMMs")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for dtype in args.dtype:
        for head in args.head:
            problem = Problem(args.N, args.H, args.V, getattr(torch, dtype), head == "shared", args.frozen)
            for divergence in args.divergence:
                rows.append(measure(problem, divergence, args.repeats, [] if args.no_peers else list(PEERS)))
                show(rows[-1])
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": machine(), "shape": {"N": args.N, "H": args.H, "V": args.V}, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
