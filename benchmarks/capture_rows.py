"""Capture hidden states of SmolLM2-135M-Instruct for tests/test_captured.py.

    python benchmarks/capture_rows.py --out FILE [--rows 1024]

The recipe is opsd_kernels/bench/measure/captured.py. Prints the mean reverse KL, and writes two bf16 matrices
and the sampled tokens. `opsd bench --suite sparse` captures its own rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.torch import save_file

from opsd_kernels.bench.measure import captured
from opsd_kernels.spec import Divergence
from opsd_kernels.testing.reference import reference_divergence

OUT = Path(__file__).resolve().parent.parent / "tests" / "captured" / "smollm2-135m.safetensors"
ROWS = 256  # of OUT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--rows", type=int, default=ROWS)
    options = parser.parse_args()
    reason = captured.missing()
    if reason is not None:
        raise SystemExit(reason)
    found, head = captured.capture(options.rows), captured.head().double()
    student, teacher = (found[f"{side}_hidden"].double() @ head.T for side in ("student", "teacher"))
    kl = reference_divergence(student, teacher, Divergence.parse("reverse_kl"))
    print(f"{options.rows} rows, KL {kl.mean().item():.3f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(found, options.out)
    print(f"{options.out}: {options.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
