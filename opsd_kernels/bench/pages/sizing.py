"""The plans of docs/sizing.md: predictions for common models, on CUDA and in bf16."""

from __future__ import annotations

from typing import Any

from ..internals import plan
from ..report.tables import Table

# (description, options of `opsd plan`, arguments of `plan`)
EXAMPLES: list[tuple[str, str, dict[str, Any]]] = [
    (
        "Qwen3-0.6B, all weights",
        "-N 8192 -V 151936 --hidden 1024",
        {"N": 8192, "V": 151936, "H_student": 1024},
    ),
    (
        "the same, 4 x the tokens",
        "-N 32768 -V 151936 --hidden 1024",
        {"N": 32768, "V": 151936, "H_student": 1024},
    ),
    (
        "Qwen3-8B, all weights",
        "-N 8192 -V 151936 --hidden 4096",
        {"N": 8192, "V": 151936, "H_student": 4096},
    ),
    (
        "Qwen3-8B, LoRA",
        "-N 8192 -V 151936 --hidden 4096 --frozen",
        {"N": 8192, "V": 151936, "H_student": 4096, "trainable_head": False},
    ),
    (
        "Qwen3-0.6B in 256 MiB",
        "-N 8192 -V 151936 --hidden 1024 --workspace 256MiB",
        {"N": 8192, "V": 151936, "H_student": 1024, "workspace_bytes": 256 << 20},
    ),
    (
        "8B teaches 0.6B, two heads",
        "-N 8192 -V 151936 --hidden 1024 --teacher-hidden 4096 --two-heads",
        {"N": 8192, "V": 151936, "H_student": 1024, "H_teacher": 4096, "shared_head": False},
    ),
]
COLUMNS = [
    "",
    "command",
    "chunks x rows",
    "passes",
    "buffers MiB",
    "fp32 dW MiB",
    "gradients MiB",
    "vectors MiB",
    "peak MiB",
    "TFLOP",
]


def plans_block() -> str:
    """Return the table of EXAMPLES."""
    rows = []
    for what, options, arguments in EXAMPLES:
        made = plan(**arguments, device_type="cuda")
        sizes = (
            made.workspace_bytes,
            made.accumulator_bytes,
            made.gradient_bytes,
            made.vector_bytes,
            made.peak_bytes,
        )
        rows.append(
            [
                what,
                f"`opsd plan {options} --device cuda`",
                f"{made.chunks} x {made.rows}",
                str(made.passes),
                *(f"{value / 2**20:,.0f}" for value in sizes),
                f"{made.flops / 1e12:.1f}",
            ]
        )
    return Table("", COLUMNS, rows).markdown()
