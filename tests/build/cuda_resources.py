"""Compile the CUDA kernels for GPUs that need not be present, with warnings as errors.

Prints a line for each kernel: registers, stack, spills, shared memory.

python tests/build/cuda_resources.py > tests/build/cuda_resources.tsv
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "emulation"))
from build_emulated import build_script

HEADER = ("kernel", "type", "architecture", "registers", "stack", "spill", "shared")
KINDS = (
    "reverse_kl",
    "forward_kl",
    "jsd",
    "skew_reverse_kl",
    "skew_forward_kl",
    "tvd",
    "mixed_kl",
)  # spec.Kind
# Every type and every architecture; a pair takes 30 s of a core. sass_budget.py reads those of 90a and 100a.
COMPILED = (
    *(("float32", "90a"), ("bfloat16", "90a"), ("float16", "90a")),
    *(("float32", "100a"), ("bfloat16", "100a"), ("bfloat16", "80")),
)
ENTRY = re.compile(r"(stats|dot|grad|fused)_kernelI\w*?Lb([01])(?:ELNS_4KindE(\d))?E")


def compile_kernels(name: str, macros: list[str], architecture: str, folder: Path) -> str:
    """What ptxas says of the kernels of one type; the object goes to `folder`, with its launches."""
    script = build_script()
    target = [
        f"-arch=sm_{architecture}",
        "-lineinfo",  # for sass_budget.py; the code stays the same
        "-Xcompiler",
        "-fPIC,-fvisibility=hidden",
        "-c",
        "-o",
        str(folder / f"{name}_{architecture}.o"),
    ]
    command = [
        script.nvcc(),
        *script.CUDA_FLAGS,
        *target,
        *macros,
        "-Xptxas",
        "-v",
        str(script.CSRC / "cuda" / "rows.cu"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}, sm_{architecture}:\n{done.stderr[-4000:]}")
    return done.stderr


def label(mangled: str) -> str:
    """`grad jsd plain` of a mangled name."""
    sweep, plain, kind = ENTRY.search(mangled).groups()
    return " ".join(
        filter(None, (sweep, KINDS[int(kind)] if kind else "", "plain" if plain == "1" else "general"))
    )


def resources(name: str, macros: list[str], architecture: str, folder: Path) -> list[tuple[str, ...]]:
    rows, entry, spill = [], None, (0, 0)
    for line in compile_kernels(name, macros, architecture, folder).splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            entry = label(found[1])
        elif found := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            spill = found[1], str(int(found[2]) + int(found[3]))
        elif found := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            rows.append(
                (
                    entry,
                    name.removeprefix("cuda_"),
                    architecture,
                    found[1],
                    *spill,
                    shared[1] if shared else "0",
                )
            )
    return sorted(rows)


def every_kernel(folder: Path) -> list[tuple[str, ...]]:
    """Return the lines of all kernels, of the types and architectures in COMPILED."""
    macros = dict(build_script().cuda_kernels())
    jobs = [(f"cuda_{name}", macros[f"cuda_{name}"], architecture) for name, architecture in COMPILED]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [row for rows in pool.map(lambda job: resources(*job, folder), jobs) for row in rows]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for row in [HEADER, *every_kernel(Path(folder))]:
            print("\t".join(row))


if __name__ == "__main__":
    main()
