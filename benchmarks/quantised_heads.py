"""Print what a quantised frozen head costs in error near the teacher, as relative errors of loss / gradient.

    python benchmarks/quantised_heads.py      # on SmolLM2-135M, whose head `make test-all` installs

Errors are those of the quantisation: of the op on the quantised head against float64 on the head itself. For
its time see `opsd bench --suite heads`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from opsd_kernels import QuantizedHead, linear_divergence
from opsd_kernels.bench.measure.captured import WITHOUT_CAPTURE, head, missing
from opsd_kernels.testing import relative_error
from opsd_kernels.testing.heads import quantise
from opsd_kernels.testing.reference import linear_divergence_reference

ROWS = Path(__file__).parent.parent / "tests" / "captured" / "smollm2-135m.safetensors"
SHARES = (1.0, 0.1, 0.01)  # of the way from the student's hidden states to the teacher's
FORMS: dict[str, dict[str, Any]] = {
    "int8, row": {"dtype": torch.int8},
    "float8_e4m3fn, block 128 x 128": {"dtype": torch.float8_e4m3fn, "block": (128, 128)},
    "float8_e4m3fn, row": {"dtype": torch.float8_e4m3fn},
    "float8_e5m2, row": {"dtype": torch.float8_e5m2},
    "int4, groups of 32": {"dtype": torch.int8, "block": (1, 32), "bits": 4},
}


def outcome(op: Callable[..., Any], student: Tensor, own: Any, teacher: Tensor, other: Any) -> list[Tensor]:
    leaf = student.clone().requires_grad_()
    loss = op(leaf, own, teacher, other)
    return [loss.detach(), torch.autograd.grad(loss, leaf)[0]]


def main() -> None:
    assert (reason := missing(WITHOUT_CAPTURE)) is None, reason
    rows, weight = load_file(ROWS), head().float()
    student, hinted = rows["student_hidden"].float(), rows["teacher_hidden"].float()
    dense = weight.double()
    print("| head | " + " | ".join(f"{share:g} of the gap" for share in SHARES) + " |")
    print("| --- " * (1 + len(SHARES)) + "|")
    truths = []
    for share in SHARES:
        teacher = student + share * (hinted - student)
        exact = student.double(), dense, teacher.double(), dense
        truths.append((teacher, outcome(linear_divergence_reference, *exact)))
    print("| KL, nats | " + " | ".join(f"{truth[0]:.2g}" for _, truth in truths) + " |")
    for name, how in FORMS.items():
        values, scales, block = quantise(weight, **how)
        quantised = QuantizedHead(values, scales, None, block)
        for both in (True, False):
            cells = []
            for teacher, truth in truths:
                ours = outcome(linear_divergence, student, quantised if both else weight, teacher, quantised)
                cells.append(
                    " / ".join(f"{relative_error(a, b):.2g}" for a, b in zip(ours, truth, strict=True))
                )
            print(f"| {name}, {'both sides' if both else 'teacher alone'} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
