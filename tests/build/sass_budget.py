"""Count the machine instructions that the row kernels spend on an entry, without a GPU.

A row sweep is bound by memory only while it issues few enough instructions. This script disassembles the
compiled kernels, finds their loops over entries in the control flow, and prints the instructions of an
iteration over the entries that it handles.

python tests/build/sass_budget.py            # all kernels, minutes
python tests/build/sass_budget.py --backend cuda --types bfloat16 --architectures 90
python tests/build/sass_budget.py --binary rows.cubin --types bfloat16    # compiled with -lineinfo
python tests/build/sass_budget.py --against COMMIT    # both commits side by side

compile_kernels.py --write and cuda_resources.py --write write its table, each the lines of its backend.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cuda_resources
from sass_loops import CLASSES, Instruction, Loop, disassemble, loops_over_entries

ROOT = Path(__file__).resolve().parent.parent.parent
TABLE = ROOT / "opsd_kernels" / "_rows" / "sass_budget.tsv"  # sweep_times.py reads it
HEADER = (
    *("backend", "kernel", "type", "arch", "sweep", "entries"),
    *("each", "issued", "cold", *CLASSES, "read", "written", "code"),
)
TYPES = {"bfloat16": ("bf16", 2), "float32": ("fp32", 4)}
ARCHITECTURES = ("90", "100")
# Functions, and branches to calls, of rows with a teacher far away, which are not the rule.
RARE = re.compile(r"\b_?far_|if \([\w.]*\bfar\)")
# The sweep for the value, which fused kernels of the plain KLs need under an entry clip alone.
VALUE, ONE_SWEEP = ("value", "value_sweep", "_row_dot"), re.compile("fused (reverse|forward|mixed)_kl")


def rows_of(
    backend: str, kernel: str, type: str, arch: str, code: list[Instruction], biases: bool = False
) -> Iterator[list[str]]:
    """Yield the table's lines of one kernel, a line for each sweep.

    Columns, all but the first ones per entry: `sweep` is the function that holds the loop, with " metrics"
    where those have a loop of their own. `entries` are those of one thread in one iteration. `each` counts
    the instructions in line, `issued` those on the longest path, `cold` those that the compiler laid out
    elsewhere. The mix is that of `each`. `read` and `written` are bytes of device memory in vectors; Triton
    reads fp32 `biases` so too. `code` counts the whole kernel's instructions.
    """
    short, itemsize = TYPES[type]
    sweeps: dict[str, list[Loop]] = {}
    for loop in loops_over_entries(code, 2 * (itemsize + 4 * biases)):
        clipped = loop.sweep in VALUE and ONE_SWEEP.match(kernel)
        if not clipped and not RARE.search(" ".join((*loop.names, loop.where))):
            sweeps.setdefault(loop.sweep, []).append(loop)
    for sweep, found in sweeps.items():
        most = max(loop.entries for loop in found)  # a loop over what is left of a row takes fewer at a time
        # The gradient in the logits' own type comes before one in a narrower type, which is not in vectors.
        found = [loop for loop in found if loop.entries == most]
        found.sort(key=lambda loop: (loop.written, loop.hot))
        chosen = {sweep: found[-1]}
        if len(found) > 1 and any("metrics" in loop.where for loop in found):  # they come on top of the sums
            chosen = {sweep: found[0], f"{sweep} metrics": found[-1]}
        for name, loop in chosen.items():
            counts = [
                f"{n / loop.entries:.1f}"
                for n in (loop.hot, loop.issued, loop.cold, *loop.mix, loop.read, loop.written)
            ]
            yield [backend, kernel, short, arch, name, str(loop.entries), *counts, str(len(code))]


def of_binary(path: Path, type: str, arch: str) -> list[list[str]]:
    """Return the lines of every CUDA kernel in a cubin, or in an object that holds one."""
    return [
        row
        for name, code in disassemble(path)
        for row in rows_of("cuda", cuda_resources.label(name), type, arch, code)
    ]


def cuda_rows(types: list[str], architectures: list[str], folder: Path) -> list[list[str]]:
    """Return the rows of the CUDA kernels. Objects that lie in `folder` are not compiled again."""
    script = cuda_resources.build_script()
    jobs = [
        (name, macros, arch)
        for name, macros in script.cuda_kernels()
        if name.removeprefix("cuda_") in types
        for arch in script.CUDA_ARCHITECTURES
        if arch.rstrip("a") in architectures
    ]

    def rows(job: tuple[str, list[str], str]) -> list[list[str]]:
        name, macros, arch = job
        built = folder / f"{name}_{arch}.o"
        if not built.exists():
            cuda_resources.compile_kernels(name, macros, arch, folder)
        return of_binary(built, name.removeprefix("cuda_"), arch.rstrip("a"))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [row for found in pool.map(rows, jobs) for row in found]


def triton_rows(types: list[str], architectures: list[str]) -> list[list[str]]:
    """Return the rows of the Triton kernels that compile_kernels.py compiles without rare options."""
    import compile_kernels

    names = [TYPES[type][0] for type in types]
    chosen = [
        variant
        for variant in compile_kernels.variants()
        if compile_kernels.budgeted(variant) and variant.dtype in names and str(variant.arch) in architectures
    ]
    return [row for variant in chosen for row in compile_kernels.measure(variant)["sweeps"]]


def every_row(arguments: argparse.Namespace, folder: Path) -> list[list[str]]:
    if arguments.binary:
        return of_binary(arguments.binary, arguments.types[0], arguments.architectures[0])
    found = []
    if arguments.backend != "triton":
        found += cuda_rows(arguments.types, arguments.architectures, folder)
    if arguments.backend != "cuda":
        found += triton_rows(arguments.types, arguments.architectures)
    return sorted(found)


def read_table() -> list[list[str]]:
    return [line.split("\t") for line in TABLE.read_text().splitlines()[1:]]


def changes(rows: list[list[str]], backend: str, keys: set[tuple[str, ...]] | None = None) -> list[str]:
    """Return the lines of a backend that are not in the table, and those of the table that are not there.

    `keys`: the first four cells of the kernels that were counted; None stands for all of the backend.
    """
    table = {tuple(row) for row in read_table() if row[0] == backend}
    now, before = {tuple(row) for row in rows}, {row for row in table if keys is None or row[:4] in keys}
    return [("now    " if row in now else "before ") + "\t".join(row) for row in sorted(now ^ before)]


def write(rows: list[list[str]], backend: str) -> None:
    """Replace the table's lines of a backend."""
    kept = [row for row in read_table() if row[0] != backend]
    TABLE.write_text("".join("\t".join(line) + "\n" for line in [list(HEADER), *sorted(kept + rows)]))


def of_commit(commit: str, words: list[str]) -> list[list[str]]:
    """Return the rows of another commit's kernels, counted by this commit's scripts.

    Of commits before the table only those of the CUDA kernels: their compile_kernels.py does not count.
    """
    here = Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        build = Path(folder, "tests", "build")
        if not (build / "sass_budget.py").exists():
            words = [*words, "--backend", "cuda"]
        for name in ("sass_budget.py", "sass_loops.py", "cuda_resources.py"):
            (build / name).write_text((here / name).read_text())
        printed = subprocess.run(
            [sys.executable, str(build / "sass_budget.py"), *words],
            env={**os.environ, "PYTHONPATH": folder, "TRITON_ALWAYS_COMPILE": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
    return [line.split("\t") for line in printed.splitlines()[1:]]


def totals(rows: list[list[str]]) -> dict[tuple[str, ...], tuple[float, float]]:
    """Return the instructions of an entry over all sweeps of each kernel, without and with metrics.

    Both are the same where metrics have no loop of their own.
    """
    sums: dict[tuple[str, ...], tuple[float, float]] = {}
    sweeps = {(*row[:4], row[4]): float(row[6]) for row in rows}
    for (*key, sweep), each in sweeps.items():
        if not sweep.endswith(" metrics"):
            plain, metrics = sums.get(tuple(key), (0.0, 0.0))
            sums[tuple(key)] = plain + each, metrics + sweeps.get((*key, f"{sweep} metrics"), each)
    return sums


def side_by_side(before: list[list[str]], now: list[list[str]]) -> list[list[str]]:
    """Return a line for each kernel of both commits, with the ratio of their instructions per entry."""
    old, new = totals(before), totals(now)
    lines = [[*HEADER[:4], "before", "now", "ratio", "with metrics"]]
    for key in sorted(old.keys() & new.keys()):
        plain, metrics = new[key]
        lines.append(
            [
                *key,
                *(f"{n:.1f}" for n in (old[key][0], plain)),
                f"{plain / old[key][0]:.2f}",
                f"{metrics:.1f}",
            ]
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--backend", choices=("cuda", "triton"))
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--binary", type=Path, help="a cubin or an object with one, compiled with -lineinfo")
    parser.add_argument("--against", metavar="COMMIT", help="print this and another commit's sums")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = every_row(arguments, Path(folder))
    if arguments.against:
        words = ["--types", *arguments.types, "--architectures", *arguments.architectures]
        words += ["--backend", arguments.backend] if arguments.backend else []
        lines = side_by_side(of_commit(arguments.against, words), rows)
    else:
        lines = [list(HEADER), *rows]
    print("\n".join("\t".join(line) for line in lines))


if __name__ == "__main__":
    main()
