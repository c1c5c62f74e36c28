"""Compare loss, statistics and gradients with those of another commit, bit for bit.

    python tests/same_bits.py COMMIT

Covers hard cases of every divergence, dialect, dtype and CPU backend. Checks the commit out into a temporary
worktree, which borrows this tree's C++ library, runs both in processes of their own, and exits with status 1
if a bit differs. For changes that must not change a number.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN = """
import sys, torch
from opsd_kernels import linear_divergence, linear_logprobs, linear_topk_divergence, objectives, weights
from opsd_kernels.spec import KIND_NAMES
from opsd_kernels.testing import evaluate, hard_case

torch.set_num_threads(2)
B, T, V, H = 3, 11, 307, 24
gen = torch.Generator().manual_seed(0)
old = -4 * torch.rand(B, T, generator=gen, dtype=torch.float64)
PPO = objectives.PPOClip(torch.randn(B, 1, generator=gen, dtype=torch.float64), old)
DIALECTS = {
    "plain": {}, "none": {"reduction": "none"}, "sequence mean": {"reduction": "sequence_mean"},
    "recompute": {"backward": "recompute"},
    "clips": {"entry_clip": 0.1, "token_clip": 0.5}, "mix": {"teacher_mix": 0.3},
    "transforms": {
        "temperature": 0.7, "teacher_temperature": 1.3, "student_softcap": 9.0, "student_logit_scale": 1.2
    },
    "row weights": {"token_weights": weights.ImportanceRatio(old)},
    "index weights": {"token_weights": weights.FirstFraction(0.5)},
    "sequence weights": {"token_weights": weights.PrefixDiscrepancy(0.5)},
    "sequence weights per token": {"token_weights": weights.PrefixDiscrepancy(0.5), "reduction": "none"},
    "top-k": {"topk": 4},
    "teacher's top-k": {
        "topk": 4, "topk_support": "teacher", "topk_tail": "renormalize", "backward": "recompute"
    },
    "fp32 logits": {"logits_dtype": torch.float32}, "16-bit logits": {"logits_dtype": "input"},
}


def named(prefix, outcome):
    for name in ("loss", "student_hidden", "student_weight", "student_bias"):
        value = getattr(outcome, name)
        if value is not None:
            yield f"{prefix}: {name}", value.detach()
    for name, value in vars(outcome.stats or ()).items() if outcome.stats is not None else ():
        if value is not None:
            yield f"{prefix}: stats.{name}", value


def results():
    ids = torch.rand(B, T, V, generator=gen).argsort(-1)[..., :6]
    logprobs = torch.randn(B, T, V, generator=gen).log_softmax(-1).gather(-1, ids)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for shared in (True, False):
            for frozen in (True, False):
                case = hard_case(
                    B * T, V, H, dtype, batch=B, shared_head=shared, frozen_head=frozen, largest_logit=8.0
                )
                for backend in ("torch", "cpp"):
                    how = {"backend": backend, "workspace_bytes": 120_000}
                    heads = f"{'shared' if shared else 'two'} {'frozen' if frozen else 'trainable'}"
                    where = f"{dtype} {heads} {backend}"
                    for kind in KIND_NAMES:
                        for dialect, options in DIALECTS.items():
                            outcome = evaluate(
                                linear_divergence, case, divergence=kind, return_stats=True, **options, **how
                            )
                            yield from named(f"{where} {kind} {dialect}", outcome)
                        policy = lambda *t, **o: objectives.linear_policy_divergence(
                            *t, policy=PPO, policy_weight=0.3, **o)
                        outcome = evaluate(policy, case, divergence=kind, **how)
                        yield from named(f"{where} {kind} policy", outcome)
                        listed = lambda h, W, t, Wt, teacher_bias=None, **o: linear_topk_divergence(
                            h, W, ids, logprobs, **o)
                        outcome = evaluate(listed, case, divergence=kind, **how)
                        yield from named(f"{where} {kind} listed", outcome)
                    logs = lambda h, W, t, Wt, student_bias=None, teacher_bias=None, labels=None, \\
                        token_weights=None, **o: linear_logprobs(h, W, labels, bias=student_bias, **o)
                    yield from named(f"{where} log-probs", evaluate(logs, case, **how))


torch.save(dict(results()), sys.argv[1])
"""


def run(tree: Path, out: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(tree), "OPSD_WORKSPACE_BYTES": ""}
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, str(out)], cwd=tree, env=environment, check=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("commit")
    commit = parser.parse_args().commit
    with tempfile.TemporaryDirectory() as folder:
        tree, before, after = (Path(folder) / name for name in ("tree", "before.pt", "after.pt"))
        subprocess.run(["git", "worktree", "add", "--detach", "-q", str(tree), commit], cwd=ROOT, check=True)
        try:
            for library in (ROOT / "opsd_kernels").glob("_C.*so"):
                shutil.copy(library, tree / "opsd_kernels")
            run(tree, before)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
        run(ROOT, after)
        differ, count = compare(before, after)
    print(f"{count} tensors, {len(differ)} differ from {commit}")
    sys.exit("\n".join(differ[:20]) if differ else 0)


def compare(before: Path, after: Path) -> tuple[list[str], int]:
    import torch

    old, new = torch.load(before), torch.load(after)
    differ = sorted(set(old) ^ set(new))
    for name in sorted(set(old) & set(new)):
        a, b = old[name], new[name]
        same = a.shape == b.shape and a.dtype == b.dtype
        if not (same and bool(((a == b) | (a.isnan() & b.isnan())).all())):
            differ.append(name)
    return differ, len(set(old) | set(new))


if __name__ == "__main__":
    main()
