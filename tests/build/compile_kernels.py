"""Compiles the Triton row kernels for GPUs that need not be present, and prints a JSON line for each: what it is, its registers, its stack, its vector loads.

python tests/build/compile_kernels.py 0 1     # shard 0 of 1: all; add --table for a summary
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from opsd_kernels.kernels import triton_launch, triton_rows
from opsd_kernels.spec import Kind

TYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDE_V = 151936


@dataclass(frozen=True)
class Variant:
    arch: int
    kernel: str
    dtype: str
    kind: int
    form: str = "linear"  # "pair"; "linear": the linear difference; "capped": the other difference, with softcaps and biases; "mixed": that with a mix
    metrics: bool = False
    narrowed: bool = False
    clip: bool = False
    policy: bool = False
    aligned: bool = True
    V: int = WIDE_V


def variants() -> list[Variant]:
    """On sm_90 every kernel, kind and 16- or 32-bit type; elsewhere, and for what is rare, the fused kernels, which hold all the others."""
    found = []
    for dtype in ("bf16", "fp32"):
        base = Variant(90, "fused", dtype, 0)
        for kind in range(len(Kind)):
            fused = replace(base, kind=kind)
            found += [fused, replace(fused, form="capped", metrics=True), replace(fused, kernel="grad")]
            found += [replace(fused, kernel="stats" if kind < Kind.JSD else "dot")]
            metrics = (dtype == "fp32") == (kind % 2 == 0)
            found += [replace(fused, arch=arch, form="capped" if metrics else "linear", metrics=metrics) for arch in (80, 100)]
        jsd = replace(base, kind=int(Kind.JSD))
        found += [replace(jsd, kernel="stats"), replace(jsd, kernel="stats", metrics=True), replace(jsd, V=1000)]
        found += [replace(jsd, arch=arch, form="pair", metrics=True, aligned=False) for arch in (80, 90, 100)]
    found += options(base)
    found += [replace(jsd, kernel=kernel, narrowed=True) for kernel in ("grad", "fused")]
    found += [replace(jsd, dtype="fp16", form="pair", metrics=True), replace(jsd, dtype="fp64", form="pair", metrics=True)]
    return found


def options(base: Variant) -> list[Variant]:
    """Entry clip, policy and mix: all of them for every kind where the kernels hold most, and each by itself."""
    found = []
    for kind in range(len(Kind)):
        every = replace(base, kind=kind, form="mixed", metrics=True, clip=True, policy=True)
        found += [replace(every, arch=arch, dtype=dtype) for arch, dtype in ((80, "fp32"), (90, "bf16"), (100, "bf16" if kind % 2 else "fp32"))]
        found += [replace(base, kind=kind, clip=True, kernel="dot"), replace(base, kind=kind, clip=True, policy=True, dtype="fp32", kernel="grad")]
    jsd = replace(base, kind=int(Kind.JSD))
    found += [replace(jsd, arch=arch, policy=True) for arch in (80, 90, 100)]
    return [*found, replace(jsd, form="mixed", kernel="stats", metrics=True), replace(jsd, policy=True, narrowed=True), replace(jsd, clip=True, aligned=False)]


def constants(variant: Variant, BLOCK_V: int, num_warps: int) -> dict[str, object]:
    modes = {
        "pair": triton_launch.PLAIN,
        "linear": triton_launch.LINEAR,
        "capped": triton_launch.DIFFERENCE,
        "mixed": triton_launch.DIFFERENCE_MIXED,
    }
    capped = variant.form in ("capped", "mixed")
    flags = {"KIND": variant.kind, "METRICS": variant.metrics, "MODE": modes[variant.form].value, "CAP_S": capped, "CAP_T": capped}
    flags |= {"CLIP": variant.clip, "HAS_POLICY": variant.policy, "NARROWED": variant.narrowed}
    absent = ([] if capped else ["BiasS", "BiasT"]) + ([] if variant.policy else ["Policy", "Labels"])
    PACK = triton_launch.pack(variant.aligned, TYPES[variant.dtype], BLOCK_V, num_warps)
    return {**flags, "BLOCK_V": BLOCK_V, "PACK": PACK, **dict.fromkeys(absent)}


def source(variant: Variant, BLOCK_V: int, num_warps: int) -> ASTSource:
    """The kernel as `_launch` would specialise it: divisible by 16, or not, where a stride or V is concerned."""
    kernel = triton_rows.KERNELS[variant.kernel]
    given = constants(variant, BLOCK_V, num_warps)
    logits, wide = variant.dtype, "fp64" if variant.dtype == "fp64" else "fp32"
    pointers = {"S": logits, "T": logits, "Labels": "i64", "G": "bf16" if variant.narrowed else logits}
    signature, constexprs, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in given:
            signature[name], constexprs[name] = "constexpr", given[name]
            continue
        number = name == "V" or name.startswith("stride")
        scalar = "i32" if number else "fp64"
        signature[name] = scalar if number or name[0].islower() else "*" + pointers.get(name, wide)
        if signature[name] != "fp64" and (variant.aligned or not number):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}


def measure(variant: Variant) -> dict[str, object]:
    BLOCK_V, num_warps = triton_launch.config(variant.V, TYPES[variant.dtype])
    options = {"num_warps": num_warps, **triton_launch.COMPILER_OPTIONS}
    compiled = triton.compile(source(variant, BLOCK_V, num_warps), target=GPUTarget("cuda", variant.arch, 32), options=options)
    loads = len(re.findall(r"ld\.global(?:\.\w+)*\.v4", compiled.asm["ptx"]))
    return {**asdict(variant), **resources(compiled.asm["cubin"]), "vector_loads": loads}


def print_table(rows: list[dict]) -> None:
    worst: dict[tuple, int] = {}
    for row in rows:
        key = (
            row["arch"],
            row["dtype"],
            row["kernel"],
            "metrics" if row["metrics"] else "",
            "" if row["aligned"] else "unaligned",
            "clip" * row["clip"],
            "policy" * row["policy"],
        )
        worst[key] = max(worst.get(key, 0), row["REG"])
    for key, registers in sorted(worst.items()):
        print(*key, registers)


if __name__ == "__main__":
    shard, shards = int(sys.argv[1]), int(sys.argv[2])
    measured = []
    for variant in variants()[shard::shards]:
        measured.append(measure(variant))
        if "--table" not in sys.argv:
            print(json.dumps(measured[-1]), flush=True)
    if "--table" in sys.argv:
        print_table(measured)
