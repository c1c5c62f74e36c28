"""Build the CUDA sources for the emulator into `opsd_emulated.so`.

Its operators, in the namespace `opsd_emulated`, run the kernels on a CPU.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
# The last two are false alarms about packs that are not loaded.
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
WARNINGS += ["-Wno-unknown-pragmas", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
FLAGS = [
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-U_FORTIFY_SOURCE",
    *WARNINGS,
    "-DOPSD_EMULATED",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]


def build_script() -> ModuleType:
    """Load setup.py as a module: it lists the kernels and finds CUDA."""
    spec = importlib.util.spec_from_file_location("build_script", CSRC.parent / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(folder: Path, compiler: str = "g++") -> Path:
    """Compile the library into `folder` and return its path."""
    script = build_script()
    includes = [
        f"-I{CSRC / 'cuda'}",
        f"-I{HERE}",
        *(
            part
            for path in (script.cuda_home() / "include", *include_paths())
            for part in ("-isystem", str(path))
        ),
    ]
    kernels = [("cuda/rows.cu", name, [*macros, "-x", "c++"]) for name, macros in script.cuda_kernels()]
    plain = [
        (source, Path(source).stem, [])
        for source in ("cuda/binding.cpp", "registration.cpp", HERE / "emulator.cpp")
    ]

    def compile_one(job: tuple[str | Path, str, list[str]]) -> str:
        source, name, flags = job
        done = str(folder / f"{name}.o")
        subprocess.run(
            [compiler, *FLAGS, *includes, *flags, "-c", str(CSRC / source), "-o", done], check=True
        )
        return done

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*kernels, *plain]))
    library = folder / "opsd_emulated.so"
    subprocess.run(
        [
            compiler,
            "-shared",
            *objects,
            "-o",
            str(library),
            *(f"-L{path}" for path in library_paths()),
            "-ltorch_cpu",
        ],
        check=True,
    )
    return library


if __name__ == "__main__":
    torch.ops.load_library(build(Path(sys.argv[1])))
