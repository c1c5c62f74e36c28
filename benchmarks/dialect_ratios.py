"""What each dialect of the token loss costs on a CPU over the same call with a plain tensor of weights. Behind the correctness gate; interleaved; medians.

python benchmarks/dialect_ratios.py                  # N=1024 in four sequences, H=1024, V=32000, trainable shared head, two threads
python benchmarks/dialect_ratios.py --dtype bfloat16 --divergence jsd --repeats 15
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from cpu_ratios import DIVERGENCES, Problem, machine

from opsd_kernels import linear_divergence, weights
from opsd_kernels.objectives import OnPolicyDistillation, PolicyGradient, PPOClip, linear_policy_divergence
from opsd_kernels.reference import linear_divergence_reference
from opsd_kernels.testing import TARGETS

B = 4  # sequences
LIMITS = {"row weights": 1.05, "aligned sequence weights": 1.10, "GRPO mix": 1.05, "top-k": 1.60}
BASE = "tensor weights"


class Tokens:
    """Per-token inputs of a problem, (B, T)."""

    def __init__(self, problem: Problem) -> None:
        gen = torch.Generator().manual_seed(1)
        T = problem.N // B
        self.labels = torch.randint(problem.V, (B, T), generator=gen)
        self.old = -6 * torch.rand(B, T, generator=gen)
        self.advantages = torch.randn(B, 1, generator=gen)
        self.weights = 0.5 + torch.rand(B, T, generator=gen)


def dialects(problem: Problem, divergence: str) -> dict[str, tuple[str | None, Callable[..., torch.Tensor], dict]]:
    """name: (the limit it stands under, the op, its options)."""
    tokens = Tokens(problem)
    base = {"divergence": divergence, "labels": tokens.labels}
    ratio, gate = weights.ImportanceRatio(tokens.old), weights.EntropyGate("teacher", below=5.0)
    plain = {**base, "token_weights": tokens.weights}

    def mix(policy: object) -> dict:
        return {**plain, "policy": policy, "policy_weight": 0.3}

    return {
        BASE: (None, linear_divergence, plain),
        "ImportanceRatio": ("row weights", linear_divergence, {**base, "token_weights": ratio}),
        "EntropyGate": ("row weights", linear_divergence, {**base, "token_weights": gate}),
        "PrefixDiscrepancy": ("aligned sequence weights", linear_divergence, {**base, "token_weights": weights.PrefixDiscrepancy()}),
        "MeanOne(ImportanceRatio)": ("aligned sequence weights", linear_divergence, {**base, "token_weights": weights.MeanOne(ratio)}),
        "PrefixDiscrepancy, own pass": (None, linear_divergence, {**base, "token_weights": weights.PrefixDiscrepancy(), "workspace_bytes": 48 << 20}),
        "GRPO on policy": ("GRPO mix", linear_policy_divergence, mix(PPOClip(tokens.advantages))),
        "GRPO with old log-probs": ("GRPO mix", linear_policy_divergence, mix(PPOClip(tokens.advantages, tokens.old))),
        "REINFORCE": ("GRPO mix", linear_policy_divergence, mix(PolicyGradient(tokens.advantages))),
        "OPD mix": (None, linear_policy_divergence, mix(OnPolicyDistillation())),
        "top 20 of the student": ("top-k", linear_divergence, {**plain, "topk": 20}),
        "top 100 of the student": ("top-k", linear_divergence, {**plain, "topk": 100}),
        "top 100 of the teacher": ("top-k", linear_divergence, {**plain, "topk": 100, "topk_support": "teacher"}),
        "entry_clip": (None, linear_divergence, {**plain, "entry_clip": 0.05}),
        "token_clip": (None, linear_divergence, {**plain, "token_clip": 5.0}),
        "teacher_mix": (None, linear_divergence, {**plain, "teacher_mix": 0.3}),
        "statistics": (None, lambda *heads, **options: linear_divergence(*heads, **options, return_stats=True)[0], plain),
    }


def call(problem: Problem, op: Callable[..., torch.Tensor], options: dict) -> Callable[[], torch.Tensor]:
    shape = (B, problem.N // B, problem.H)
    return lambda: op(problem.student.view(shape), problem.weight, problem.teacher.view(shape), problem.teacher_weight, **options)


def step(problem: Problem, op: Callable[..., torch.Tensor], options: dict) -> Callable[[], float]:
    loss = call(problem, op, options)
    return lambda: problem.step(loss)


def reference_of(problem: Problem, options: dict) -> Callable[[], torch.Tensor]:
    """The dialect by its definition, in float64."""
    policy, share = options.get("policy"), options.get("policy_weight", 0.0)
    rest = {name: value for name, value in options.items() if name not in ("policy", "policy_weight")}

    def run() -> torch.Tensor:
        shape = (B, problem.N // B, problem.H)
        heads = (problem.student.double().view(shape), problem.weight.double(), problem.teacher.double().view(shape), problem.teacher_weight.double())
        loss, stats = linear_divergence_reference(*heads, **rest, return_stats=True)
        if policy is None:
            return loss
        logprob = (heads[0] @ heads[1].T).log_softmax(-1).gather(-1, options["labels"][..., None])[..., 0]
        mask = torch.ones(shape[:2], dtype=torch.bool)
        seen = type("Stats", (), {name: value.detach() for name, value in stats.items()})
        return (1 - share) * loss + share * policy(logprob, seen, mask).mean()

    return run


def gate(problem: Problem, divergence: str) -> None:
    """No time without a right gradient, of 64 tokens: within the default target of docs/numerics.md in bf16, within that of fp32 logits in fp32.

    A support is chosen by logits that bf16 has rounded: where the k-th and the next are that close, either is right, so top-k is judged in fp32 alone.
    """
    small = replace(problem, N=64)
    for name, (_, op, options) in dialects(small, divergence).items():
        if "topk" in options and problem.dtype == torch.bfloat16:
            continue
        small.step(reference_of(small, options))
        truth = small.student.grad.double()
        small.step(call(small, op, {key: value for key, value in options.items() if key != "workspace_bytes"}))
        error = float((small.student.grad.double() - truth).norm() / truth.norm())
        if not error <= TARGETS["default" if problem.dtype == torch.bfloat16 else "fp32_logits"]:
            raise SystemExit(f"{name}: gradient error {error:.2e}: no time is printed for a wrong kernel")


def warm_in_turn(variants: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each variant, in turn, each right after a run of its own that is not timed.

    Workspaces differ in size from variant to variant, and a virtual machine gives freed pages back: the first larger one pays up to 250 ms to have them again.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            run()
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def measure(problem: Problem, divergence: str, repeats: int) -> dict[str, object]:
    gate(problem, divergence)
    made = dialects(problem, divergence)
    variants = {name: step(problem, op, options) for name, (_, op, options) in made.items()}
    times = {name: statistics.median(values) for name, values in warm_in_turn(variants, repeats).items()}
    ratios = {name: value / times[BASE] for name, value in times.items()}
    dtype = str(problem.dtype).removeprefix("torch.")
    print(f"{dtype}, {divergence}: {BASE} {times[BASE]:.0f} ms")
    for name, ratio in ratios.items():
        limit = LIMITS.get(made[name][0])
        verdict = "" if limit is None else f"limit {limit:.2f} {'ok' if ratio <= limit else 'MISSED'}"
        print(f"    {name:28s} {ratio:5.2f}  {verdict}", flush=True)
    return {"dtype": dtype, "divergence": divergence, "ms": times, "ratio": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-N", type=int, default=1024)
    parser.add_argument("-H", type=int, default=1024)
    parser.add_argument("-V", type=int, default=32000)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--divergence", nargs="+", default=["reverse_kl", "jsd"], choices=list(DIVERGENCES))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for dtype in args.dtype:
        problem = Problem(args.N, args.H, args.V, getattr(torch, dtype), shared=True, frozen=False)
        rows += [measure(problem, divergence, args.repeats) for divergence in args.divergence]
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": machine(), "shape": {"N": args.N, "H": args.H, "V": args.V}, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
