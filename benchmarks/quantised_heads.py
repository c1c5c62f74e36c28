"""What a quantised frozen head costs: in error near the teacher, and in time on this CPU.

    python benchmarks/quantised_heads.py errors      # on SmolLM2-135M, whose head `make test-all` installs
    python benchmarks/quantised_heads.py times [float32 bfloat16]

Errors are those of the quantisation: of the op on the quantised head against float64 on the head itself.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import QuantizedHead, linear_divergence
from opsd_kernels.bench.measure.captured import WITHOUT_CAPTURE, head, missing
from opsd_kernels.testing import relative_error
from opsd_kernels.testing.reference import linear_divergence_reference

ROWS = Path(__file__).parent.parent / "tests" / "captured" / "smollm2-135m.safetensors"
SHARES = (1.0, 0.1, 0.01)  # of the way from the student's hidden states to the teacher's
N, H, V = 1024, 1024, 32000
REPEATS = 3


def quantise(weight: Tensor, dtype: torch.dtype, block: tuple[int, int], largest: float) -> QuantizedHead:
    """Quantise by the largest magnitude of each block."""
    (rows, columns), (b, c) = weight.shape, block
    padded = weight.new_zeros(-(-rows // b) * b, -(-columns // c) * c)
    padded[:rows, :columns] = weight.abs()
    scales = padded.unflatten(1, (-1, c)).unflatten(0, (-1, b)).amax((1, 3)).clamp(min=1e-12) / largest
    entries = scales.repeat_interleave(b, 0)[:rows].repeat_interleave(c, 1)[:, :columns]
    values = weight / entries
    values = values.round() if dtype == torch.int8 else values
    return QuantizedHead(values.clamp(-largest, largest).to(dtype), scales, None, block)


def forms(weight: Tensor) -> dict[str, QuantizedHead]:
    """Return a head (V, H) of fp32 in each form."""
    row, float8 = (1, weight.shape[1]), torch.float8_e4m3fn
    return {
        "int8, row": quantise(weight, torch.int8, row, 127),
        "float8_e4m3fn, block 128 x 128": quantise(weight, float8, (128, 128), 448),
        "float8_e4m3fn, row": quantise(weight, float8, row, 448),
        "float8_e5m2, row": quantise(weight, torch.float8_e5m2, row, 57344),
        "int4, groups of 32": quantise(weight, torch.int8, (1, 32), 7),
    }


def outcome(op: Callable[..., Any], student: Tensor, own: Any, teacher: Tensor, other: Any) -> list[Tensor]:
    leaf = student.clone().requires_grad_()
    loss = op(leaf, own, teacher, other)
    return [loss.detach(), torch.autograd.grad(loss, leaf)[0]]


def errors() -> None:
    """Print a table of relative errors of loss and gradient."""
    from safetensors.torch import load_file

    assert (reason := missing(WITHOUT_CAPTURE)) is None, reason
    rows, weight = load_file(ROWS), head().float()
    student, hinted = rows["student_hidden"].float(), rows["teacher_hidden"].float()
    dense, held = weight.double(), forms(weight)
    print("| head | " + " | ".join(f"{share:g} of the gap" for share in SHARES) + " |")
    print("| --- " * (1 + len(SHARES)) + "|")
    truths = []
    for share in SHARES:
        teacher = student + share * (hinted - student)
        exact = student.double(), dense, teacher.double(), dense
        truths.append((teacher, outcome(linear_divergence_reference, *exact)))
    print("| KL, nats | " + " | ".join(f"{truth[0]:.2g}" for _, truth in truths) + " |")
    for name, quantised in held.items():
        for both in (True, False):
            cells = []
            for teacher, truth in truths:
                ours = outcome(linear_divergence, student, quantised if both else weight, teacher, quantised)
                cells.append(
                    " / ".join(f"{relative_error(a, b):.2g}" for a, b in zip(ours, truth, strict=True))
                )
            print(f"| {name}, {'both sides' if both else 'teacher alone'} | " + " | ".join(cells) + " |")


def times(names: list[str]) -> None:
    """Print the time of forward and backward over that with a plain head, in turn."""
    gen = torch.Generator().manual_seed(0)
    weights = [torch.randn(V, H, generator=gen) / H**0.5 for _ in range(2)]
    print(f"N={N} H={H} V={V}, {torch.get_num_threads()} threads")
    for name in names:
        dtype = getattr(torch, name)
        hidden = [torch.randn(N, H, generator=gen).to(dtype) for _ in range(2)]
        own, plain = (weight.to(dtype) for weight in weights)
        held = forms(plain.float())
        other = torch.bfloat16 if dtype == torch.float32 else torch.float32
        alone = {"plain": plain, **held, f"{other}": plain.to(other)}
        compare(f"{name}, teacher's head", {form: (own, each) for form, each in alone.items()}, hidden)
        both = {"plain": plain, **held}
        compare(f"{name}, frozen head of both", {form: (each, each) for form, each in both.items()}, hidden)


def compare(what: str, heads: dict[str, tuple[Any, Any]], hidden: list[Tensor]) -> None:
    """Print the times of one call per pair of heads. Values are checked before."""
    student, teacher = hidden
    for form, (own, other) in heads.items():
        dense = [x.dequantize(student.dtype) if isinstance(x, QuantizedHead) else x for x in (own, other)]
        dense[1] = dense[0] if own is other else dense[1]
        want = outcome(linear_divergence, student, dense[0], teacher, dense[1])
        ours = outcome(linear_divergence, student, own, teacher, other)
        assert all(relative_error(a, b) < 0.02 for a, b in zip(ours, want, strict=True)), form
    # Of one thread processor time, which other load on the machine hardly changes.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best = dict.fromkeys(heads, float("inf"))
    for _ in range(REPEATS):
        for form, (own, other) in heads.items():
            start = clock()
            outcome(linear_divergence, student, own, teacher, other)
            best[form] = min(best[form], clock() - start)
    for form, seconds in best.items():
        print(f"{what}: {form}: {seconds / best['plain']:.2f} ({seconds:.2f} s)", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["times"]:
        times(sys.argv[2:] or ["float32", "bfloat16"])
    else:
        errors()
