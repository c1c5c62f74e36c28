"""Compile the CUDA kernels for GPUs that need not be present, with warnings as errors.

Counted for each kernel: registers, stack, spills, shared memory.

python tests/build/cuda_resources.py --check  # all kernels: how they differ from the tables
python tests/build/cuda_resources.py --write  # all kernels: cuda_resources.tsv and sass_budget.tsv

The tables hold for the sources whose digest (setup.py) is in the first line of cuda_resources.tsv, and for
one version of nvcc. --check and --write take five minutes of a core.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "emulation"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "helpers"))
from build_emulated import build_script
from covering import covering

TABLE = Path(__file__).with_name("cuda_resources.tsv")
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


def nvcc_version() -> str | None:
    """Return "13.0"; None without nvcc."""
    script = build_script()
    if script.nvcc() is None:
        return None
    printed = subprocess.run([script.nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", printed)[1]


def compile_for(architecture: str, source: Path, made: Path, *flags: str) -> str:
    """Compile to `made`, a cubin or an object with the launches, and return what ptxas says."""
    script = build_script()
    # -lineinfo: for sass_budget.py; the code stays the same
    kind = ["-cubin"] if made.suffix == ".cubin" else ["-c", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    target = [f"-arch=sm_{architecture}", "-lineinfo", *kind, "-o", str(made)]
    command = [script.nvcc(), *script.CUDA_FLAGS, *target, *flags, "-Xptxas", "-v", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{source.name}, sm_{architecture}:\n{done.stderr[-4000:]}")
    return done.stderr


def compile_kernels(name: str, macros: list[str], architecture: str, folder: Path) -> str:
    """Compile all kernels of one type; the object goes to `folder`."""
    source = build_script().CSRC / "cuda" / "rows.cu"
    return compile_for(architecture, source, folder / f"{name}_{architecture}.o", *macros)


def label(mangled: str) -> str:
    """`grad jsd plain` of a mangled name."""
    sweep, plain, kind = ENTRY.search(mangled).groups()
    return " ".join(
        filter(None, (sweep, KINDS[int(kind)] if kind else "", "plain" if plain == "1" else "general"))
    )


def resources(said: str, type: str, architecture: str) -> list[tuple[str, ...]]:
    """Return the table's rows from what ptxas said."""
    rows, entry, spill = [], None, (0, 0)
    for line in said.splitlines():
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
                    type,
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

    def rows(pair: tuple[str, str]) -> list[tuple[str, ...]]:
        type, architecture = pair
        said = compile_kernels(f"cuda_{type}", macros[f"cuda_{type}"], architecture, folder)
        return resources(said, type, architecture)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [row for found in pool.map(rows, COMPILED) for row in found]


@dataclass(frozen=True)
class Table:
    """cuda_resources.tsv: the version of nvcc, the digest of the sources, a row for each kernel."""

    nvcc: str
    sources: str
    rows: list[tuple[str, ...]]


def read_table() -> Table:
    head, header, *lines = TABLE.read_text().splitlines()
    found = re.fullmatch(r"# nvcc (\S+), sources (\w+)", head)
    assert found and tuple(header.split("\t")) == HEADER, f"{TABLE.name}: {head}"
    return Table(found[1], found[2], [tuple(line.split("\t")) for line in lines])


# ---------------------------------------------------------------- some kernels


def sample() -> dict[tuple[str, str], list[str]]:
    """Return kernels of every type and architecture.

    Every sweep and form is there for each of these, and every kind of every sweep for one of them.
    """
    every = read_table().rows
    names = ("sweep", "kind", "form", "target")
    cases = [dict(zip(names, (*row[0].split(), row[1:3]), strict=True)) for row in every]
    found: dict[tuple[str, str], list[str]] = {}
    for n in covering(cases, apart=[("target", "kind")]):
        found.setdefault(every[n][1:3], []).append(every[n][0])
    return found


def compile_sample(folder: Path) -> list[tuple[str, ...]]:
    """Return the table's rows of the sample; a cubin for each type and architecture goes to `folder`."""
    script, rows = build_script(), []
    for (type, architecture), kernels in sample().items():
        named = (kernel.split() for kernel in kernels)
        made = [
            f"{sweep}_kernel<{script.CUDA_TYPES[type]}, {str(form == 'plain').lower()}, Kind::{kind.upper()}>"
            for sweep, kind, form in named
        ]
        addresses = ", ".join(f"reinterpret_cast<const void*>({name})" for name in made)
        source = folder / f"{type}_{architecture}.cu"
        source.write_text(
            f'#include "rows.cuh"\nnamespace opsd::cuda {{ const void* sample[] = {{{addresses}}}; }}\n'
        )
        said = compile_for(architecture, source, source.with_suffix(".cubin"), f"-I{script.CSRC / 'cuda'}")
        rows += resources(said, type, architecture)
    return rows


def write_tables() -> None:
    import sass_budget  # which imports this module

    with tempfile.TemporaryDirectory() as folder:
        rows = every_kernel(Path(folder))
        lines = sass_budget.cuda_rows(list(sass_budget.TYPES), list(sass_budget.ARCHITECTURES), Path(folder))
    head = f"# nvcc {nvcc_version()}, sources {build_script().cuda_sources()}"
    TABLE.write_text("\n".join([head, *map("\t".join, [HEADER, *rows]), ""]))
    sass_budget.write(lines, "cuda")


def changes() -> list[str]:
    """Return how all kernels differ from the tables."""
    import sass_budget

    with tempfile.TemporaryDirectory() as folder:
        changed = set(every_kernel(Path(folder))) ^ set(read_table().rows)
        lines = sass_budget.cuda_rows(list(sass_budget.TYPES), list(sass_budget.ARCHITECTURES), Path(folder))
    return [*map("\t".join, sorted(changed)), *sass_budget.changes(lines, "cuda")]


def main() -> None:
    if sys.argv[1:] == ["--write"]:
        write_tables()
    elif sys.argv[1:] == ["--check"]:
        sys.exit("\n".join(changes()) or 0)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
