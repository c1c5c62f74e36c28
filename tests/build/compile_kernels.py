"""Compile the Triton kernels for GPUs that need not be present.

python tests/build/compile_kernels.py --sample # a JSON line for each variant that the slow tests compile
python tests/build/compile_kernels.py --check  # all variants: how they differ from the tables
python tests/build/compile_kernels.py --write  # all variants: triton_registers.tsv and sass_budget.tsv

The tables hold for the kernels whose digest is in the first line of triton_registers.tsv, and for one version
of Triton. --check and --write take five minutes of a core.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "helpers"))
import sass_budget
from covering import covering
from sass_loops import disassemble

from opsd_kernels._rows import contract, triton_launch, triton_rows
from opsd_kernels._rows.triton_columns import COLUMN_KERNELS
from opsd_kernels.spec import Divergence, Kind
from opsd_kernels.train.studies.digest import module_hash

# The cache knows a kernel by its text: its binary may have the lines and paths of another checkout.
triton.knobs.compilation.always_compile = True

TYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDE_V = 151936
TABLE = Path(__file__).with_name("triton_registers.tsv")
# Registers and bytes of stack and spills per thread, bytes of shared memory per block, 16-byte loads in PTX.
USED = ("REG", "STACK", "LOCAL", "shared", "vector_loads")
MODULES = ("columns", "kernels", "launch", "math", "statistics", "tiles")


@dataclass(frozen=True)
class Variant:
    arch: int
    kernel: str
    dtype: str
    kind: int
    # "pair"; "linear": the linear difference; "capped": the other difference, with softcaps and biases;
    # "mixed": "capped" with a mix and with temperatures of rows; of the column norms, "scaled": with a scale
    # of the rows, or "plain"
    form: str = "linear"
    metrics: bool = False
    narrowed: bool = False
    clip: bool = False
    policy: bool = False
    aligned: bool = True
    V: int = WIDE_V


def variants() -> list[Variant]:
    """Return every kernel, kind and 16- or 32-bit type on sm_90, and elsewhere the fused kernels.

    Rare options are compiled into the fused kernels alone, which hold all the others: `options` has those of
    sm_80.
    """
    found = []
    for dtype in ("bf16", "fp32"):
        base = Variant(90, "fused", dtype, 0)
        for kind in range(len(Kind)):
            fused = replace(base, kind=kind)
            found += [fused, replace(fused, form="capped", metrics=True), replace(fused, kernel="grad")]
            found += [replace(fused, kernel="stats" if Divergence(Kind(kind)).one_sweep else "dot")]
            found += [replace(fused, arch=100)]
        jsd = replace(base, kind=int(Kind.JSD))
        found += [
            replace(jsd, kernel="stats"),
            replace(jsd, kernel="stats", metrics=True),
            replace(jsd, V=1000),
            replace(base, metrics=True),
            replace(jsd, metrics=True),
        ]
        found += [replace(jsd, arch=arch, form="pair", metrics=True, aligned=False) for arch in (80, 90, 100)]
    found += options(base)
    found += column_variants()
    found += [replace(jsd, kernel=kernel, narrowed=True) for kernel in ("grad", "fused")]
    found += [
        replace(jsd, dtype="fp16", form="pair", metrics=True),
        replace(jsd, dtype="fp64", form="pair", metrics=True),
    ]
    return found


def sample() -> list[Variant]:
    """Return variants that hold every two values that meet in any variant, but for those of the kind.

    Every kind is there. The fused kernels, a third of these, hold what the others do.
    """
    every = variants()
    names = [field.name for field in fields(Variant)]
    return [every[n] for n in covering(list(map(asdict, every)), [("kind", name) for name in names])]


def options(base: Variant) -> list[Variant]:
    """Return variants with entry clip, policy and mix.

    All of them for every kind where the kernels hold most, and each by itself.
    """
    found = []
    for kind in range(len(Kind)):
        every = replace(base, kind=kind, form="mixed", metrics=True, clip=True, policy=True)
        found += [
            replace(every, arch=arch, dtype=dtype)
            for arch, dtype in ((80, "fp32"), (90, "bf16"), (100, "bf16" if kind % 2 else "fp32"))
        ]
        found += [
            replace(base, kind=kind, clip=True, kernel="dot"),
            replace(base, kind=kind, clip=True, policy=True, dtype="fp32", kernel="grad"),
        ]
    jsd = replace(base, kind=int(Kind.JSD))
    found += [replace(jsd, arch=arch, policy=True) for arch in (80, 90, 100)]
    return [
        *found,
        replace(jsd, form="mixed", kernel="stats", metrics=True),
        replace(jsd, policy=True, narrowed=True),
        replace(jsd, clip=True, aligned=False),
    ]


def column_variants() -> list[Variant]:
    """Return the kernels of the columns, which know no divergence: kind 0."""
    found = [
        Variant(arch, kernel, dtype, 0, form)
        for arch in (80, 90, 100)
        for dtype in ("bf16", "fp32")
        for kernel, form in (("norms", "scaled"), ("gather", "plain"))
    ]
    base = Variant(90, "norms", "bf16", 0, "plain")
    found += [base, replace(base, form="scaled", aligned=False)]
    return found + [replace(variant, dtype=dtype) for variant in found[4:6] for dtype in ("fp16", "fp64")]


def column_source(variant: Variant) -> tuple[ASTSource, int, int]:
    """Return the kernel as triton_rows would specialise it, its warps, and 0 for the rows' PACK."""
    BLOCK = triton_launch.column_block(TYPES[variant.dtype])
    given: dict[str, object] = {"HEIGHT": triton_launch.COLUMN_HEIGHT, "BLOCK": BLOCK}
    if variant.form == "plain":
        given["Scale"] = None
    pointers = {"G": variant.dtype, "Out": variant.dtype, "Columns": "i64"}
    return specialised(variant, given, pointers, unknown=("n", "rows", "K")), triton_launch.COLUMN_WARPS, 0


def constants(variant: Variant, BLOCK_V: int, num_warps: int) -> dict[str, object]:
    modes = {
        "pair": triton_launch.PLAIN,
        "linear": triton_launch.LINEAR,
        "capped": triton_launch.DIFFERENCE,
        "mixed": triton_launch.DIFFERENCE_MIXED,
    }
    capped = variant.form in ("capped", "mixed")
    flags = {
        "KIND": variant.kind,
        "METRICS": variant.metrics,
        "MODE": modes[variant.form].value,
        "CAP_S": capped,
        "CAP_T": capped,
    }
    flags |= {"CLIP": variant.clip, "HAS_POLICY": variant.policy, "NARROWED": variant.narrowed}
    absent = ([] if capped else ["BiasS", "BiasT"]) + ([] if variant.policy else ["Policy", "Labels"])
    absent += [] if variant.form == "mixed" else ["TemperatureS", "TemperatureT"]
    PACK = triton_launch.pack(variant.aligned, TYPES[variant.dtype], BLOCK_V, num_warps)
    return {**flags, "BLOCK_V": BLOCK_V, "PACK": PACK, **dict.fromkeys(absent)}


def row_source(variant: Variant) -> tuple[ASTSource, int, int]:
    """Return the kernel as `_launch` would specialise it, its warps and its PACK."""
    BLOCK_V, num_warps = triton_launch.config(variant.V, TYPES[variant.dtype])
    logits = variant.dtype
    pointers = {"S": logits, "T": logits, "Labels": "i64", "G": "bf16" if variant.narrowed else logits}
    given = constants(variant, BLOCK_V, num_warps)
    return specialised(variant, given, pointers), num_warps, given["PACK"]


def specialised(
    variant: Variant, given: dict[str, object], pointers: dict[str, str], unknown: tuple[str, ...] = ()
) -> ASTSource:
    """Return a kernel whose strides and V are divisible by 16, or not.

    `unknown` are the integers that it is not specialised for.
    """
    kernel = triton_rows.KERNELS[variant.kernel]
    wide = "fp64" if variant.dtype == "fp64" else "fp32"
    signature, constexprs, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in given:
            signature[name], constexprs[name] = "constexpr", given[name]
            continue
        number = name == "V" or name in unknown or name.startswith("stride")
        scalar = "i32" if number else "fp64"
        signature[name] = scalar if number or name[0].islower() else "*" + pointers.get(name, wide)
        if signature[name] != "fp64" and name not in unknown and (variant.aligned or not number):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}


def budgeted(variant: Variant) -> bool:
    """True if sass_budget.py counts the instructions of a variant: the common ones of its table."""
    rare = variant.narrowed or variant.clip or variant.policy or not variant.aligned or variant.V != WIDE_V
    common = variant.kernel not in COLUMN_KERNELS and variant.form in ("linear", "capped") and not rare
    return common and variant.dtype in ("bf16", "fp32") and variant.arch in (90, 100)


def label(variant: Variant) -> str:
    """Return a variant's name in sass_budget.py's table."""
    metrics = "metrics" if variant.metrics else ""
    return " ".join(filter(None, (variant.kernel, Kind(variant.kind).name.lower(), variant.form, metrics)))


def sweeps(variant: Variant, cubin: bytes) -> list[list[str]]:
    """Return the rows of sass_budget.py's table."""
    type = str(TYPES[variant.dtype]).removeprefix("torch.")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        ((_, code),) = disassemble(Path(file.name))
    biases = variant.form == "capped"
    return list(sass_budget.rows_of("triton", label(variant), type, str(variant.arch), code, biases))


def budget_key(variant: Variant) -> tuple[str, ...]:
    """Return the first cells of a variant's rows in sass_budget.py's table."""
    return ("triton", label(variant), variant.dtype, str(variant.arch))


def measure(variant: Variant) -> dict[str, object]:
    source, num_warps, PACK = (column_source if variant.kernel in COLUMN_KERNELS else row_source)(variant)
    options = {"num_warps": num_warps, **triton_launch.compiler_options(TYPES[variant.dtype], PACK)}
    compiled = triton.compile(source, target=GPUTarget("cuda", variant.arch, 32), options=options)
    loads = len(re.findall(r"ld\.global(?:\.\w+)*\.v4", compiled.asm["ptx"]))
    return {
        **asdict(variant),
        **resources(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "vector_loads": loads,
        "sweeps": sweeps(variant, compiled.asm["cubin"]) if budgeted(variant) else [],
    }


def key(row: dict[str, object]) -> tuple[str, ...]:
    """A variant as the table names it."""
    return tuple(str(row[field.name]) for field in fields(Variant))


def used(row: dict[str, object]) -> tuple[int, ...]:
    return tuple(int(str(row[name])) for name in USED)


def digest() -> str:
    """Return the digest of what decides the kernels' code beside Triton: comments and docstrings do not.

    The modules that hold the kernels, and what they take from contract.py and spec.
    """
    folder = Path(triton_rows.__file__).parent
    parts = [module_hash(folder / f"triton_{name}.py") for name in MODULES]
    numbers = [[(one.name, int(one)) for one in names] for names in (contract.Column, Kind)]
    taken = repr((parts, numbers, contract.SPREAD_LIMIT, contract.GAP_BOUNDS))
    return hashlib.sha256(taken.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Table:
    """triton_registers.tsv: the version of Triton, the digest of the kernels, what each variant uses."""

    triton: str
    kernels: str
    used: dict[tuple[str, ...], tuple[int, ...]]


def read_table() -> Table:
    head, _, *lines = TABLE.read_text().splitlines()
    cells = [line.split("\t") for line in lines]
    found = re.fullmatch(r"# triton (\S+), kernels (\w+)", head)
    assert found, f"{TABLE.name}: {head}"
    width = len(USED)
    return Table(found[1], found[2], {tuple(row[:-width]): tuple(map(int, row[-width:])) for row in cells})


def measure_all() -> list[dict[str, object]]:
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(measure, variants()))


def changes(rows: list[dict[str, object]], whole: bool) -> list[str]:
    """Return what the variants use and the tables do not say; of `whole` tables also lines of no variant."""
    table, now = read_table().used, {key(row): used(row) for row in rows}
    names = table.keys() | now.keys() if whole else now.keys()
    found = [
        f"{' '.join(name)}: {table.get(name)} -> {now.get(name)}"
        for name in sorted(names)
        if table.get(name) != now.get(name)
    ]
    chosen = [Variant(**{field.name: row[field.name] for field in fields(Variant)}) for row in rows]
    keys = {budget_key(variant) for variant in chosen if budgeted(variant)}
    lines = [line for row in rows for line in row["sweeps"]]
    return found + sass_budget.changes(lines, "triton", None if whole else keys)


def write_tables(rows: list[dict[str, object]]) -> None:
    head = f"# triton {triton.__version__}, kernels {digest()}"
    names = "\t".join([*(field.name for field in fields(Variant)), *USED])
    lines = sorted("\t".join([*key(row), *map(str, used(row))]) for row in rows)
    TABLE.write_text("\n".join([head, names, *lines, ""]))
    sass_budget.write([line for row in rows for line in row["sweeps"]], "triton")


def main() -> None:
    if sys.argv[1:] == ["--sample"]:
        for variant in sample():
            print(json.dumps(measure(variant)), flush=True)
    elif sys.argv[1:] == ["--write"]:
        write_tables(measure_all())
    elif sys.argv[1:] == ["--check"]:
        found = changes(measure_all(), whole=True)
        sys.exit("\n".join(found) if found else 0)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
