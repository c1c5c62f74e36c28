"""Compile the Triton kernels for GPUs that need not be present.

Prints a JSON line for each kernel: its variant, registers, stack and vector loads.

python tests/build/compile_kernels.py 0 1     # shard 0 of 1: all
python tests/build/compile_kernels.py --write # triton_registers.tsv, the table of test_triton_compile.py
python tests/build/compile_kernels.py --write norms gather # its lines of these kernels alone
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent))
import sass_budget
from sass_loops import disassemble

from opsd_kernels._rows import triton_launch, triton_rows
from opsd_kernels._rows.triton_columns import COLUMN_KERNELS
from opsd_kernels.spec import Divergence, Kind

# The cache knows a kernel by its text: its binary may have the lines and paths of another checkout.
triton.knobs.compilation.always_compile = True

TYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDE_V = 151936
TABLE = Path(__file__).with_name("triton_registers.tsv")
USED = (
    "REG",
    "STACK",
    "LOCAL",
    "shared",
)  # registers and bytes of stack and spills per thread, bytes of shared memory per block


@dataclass(frozen=True)
class Variant:
    arch: int
    kernel: str
    dtype: str
    kind: int
    # "pair"; "linear": the linear difference; "capped": the other difference, with softcaps and biases;
    # "mixed": "capped" with a mix; of the column norms, "scaled": with a scale of the rows, or "plain"
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


def sweeps(variant: Variant, cubin: bytes) -> list[list[str]]:
    """Return the rows of sass_budget.py's table."""
    type = str(TYPES[variant.dtype]).removeprefix("torch.")
    metrics = "metrics" if variant.metrics else ""
    label = " ".join(filter(None, (variant.kernel, Kind(variant.kind).name.lower(), variant.form, metrics)))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        ((_, code),) = disassemble(Path(file.name))
    return list(sass_budget.rows_of("triton", label, type, str(variant.arch), code, variant.form == "capped"))


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


def read_table() -> tuple[str, dict[tuple[str, ...], tuple[int, ...]]]:
    """(version of Triton, what each variant uses)."""
    version, _, *lines = TABLE.read_text().splitlines()
    cells = [line.split("\t") for line in lines]
    return version.removeprefix("# triton "), {
        tuple(row[: -len(USED)]): tuple(map(int, row[-len(USED) :])) for row in cells
    }


def write_table(kernels: list[str]) -> None:
    """Write the table, or of some kernels the lines."""
    version, found = read_table() if kernels else (triton.__version__, {})
    if version != triton.__version__:
        sys.exit(f"the table is of triton {version}, this is {triton.__version__}: write all of it")
    found = {name: used for name, used in found.items() if name[1] not in kernels}
    rows = map(measure, (variant for variant in variants() if not kernels or variant.kernel in kernels))
    found |= {key(row): tuple(row[name] for name in USED) for row in rows}
    head = f"# triton {version}", "\t".join([*(field.name for field in fields(Variant)), *USED])
    lines = sorted("\t".join([*name, *map(str, used)]) for name, used in found.items())
    TABLE.write_text("\n".join([*head, *lines, ""]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write_table(sys.argv[2:])
    else:
        shard, shards = map(int, sys.argv[1:])
        for chosen in variants()[shard::shards]:
            print(json.dumps(measure(chosen)), flush=True)
