"""Builds the C++ extension where a C++20 compiler works, and installs without it, saying so, where none does. Metadata: pyproject.toml.

The extension uses LibTorch's stable ABI and no Python API: one library serves torch >= 2.10 and any Python.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
X86 = platform.machine().lower() in ("x86_64", "amd64")

FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
KERNEL_FLAGS = ["-ffp-contract=off"]  # contraction would let the compiler choose where to round; the kernels say fma where they mean it
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]


def jobs() -> list[tuple[str, str, list[str]]]:
    """(source, object name, flags) of every translation unit, the slow ones first; rows.cpp once per instruction set."""
    levels = {"baseline": ["-DOPSD_BASELINE"]}
    if X86:
        levels = {"avx512": AVX512, "avx2": AVX2, **levels}
    kernels = [("cpu/rows.cpp", f"rows_{name}", [*KERNEL_FLAGS, f"-DOPSD_CAPABILITY={name}", *flags]) for name, flags in levels.items()]
    plain = [(source, Path(source).stem, []) for source in ("cpu/binding.cpp", "registration.cpp")]
    return [*kernels, *plain, ("cpu/dispatch.cpp", "dispatch", ["-DOPSD_X86"] if X86 else [])]


def newest_source() -> float:
    return max(path.stat().st_mtime for path in [ROOT / "setup.py", *CSRC.rglob("*")] if path.is_file())


def unsupported() -> str | None:
    if os.name == "nt":
        return "it needs GCC or Clang"
    try:
        import torch
    except ImportError:
        return "torch is not installed in this environment (pip install --no-build-isolation)"
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    return None if version >= (2, 10) else f"torch >= 2.10 is needed, got {torch.__version__}"


class BuildExtension(build_ext):
    """Compiles what changed, in parallel, and never fails the installation."""

    def build_extension(self, ext: Extension) -> None:
        built, target = ROOT / "opsd_kernels" / "_C.abi3.so", Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        if built.exists() and built.stat().st_mtime > newest_source():
            if target != built:
                shutil.copy2(built, target)
            return
        built.unlink(missing_ok=True)
        reason = unsupported()
        try:
            if reason is None:
                self.compile_and_link(target)
        except Exception:  # distutils raises a different class for each way in which a compiler can be missing or fail
            reason = self.complaint()
        if reason is not None:
            print(f"opsd_kernels: installed without its C++ extension (slower on CPU): {reason}", file=sys.stderr)

    def complaint(self) -> str:
        compiler = self.compiler.executables.get("compiler_so_cxx") or self.compiler.compiler_so_cxx
        name = compiler[0]
        if shutil.which(name) is None:
            return f"no C++ compiler, {name!r} is not there (CXX names one)"
        return f"{name!r} failed; `python setup.py build_ext --inplace` shows how"

    def compile_and_link(self, target: Path) -> None:
        from torch.utils.cpp_extension import include_paths, library_paths

        includes = [flag for path in include_paths() for flag in ("-isystem", path)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda job: self.compile_one(*job, includes), jobs()))
        self.compiler.link_shared_object(objects, str(target), libraries=["torch_cpu"], library_dirs=library_paths(), target_lang="c++")

    def compile_one(self, source: str, name: str, flags: list[str], includes: list[str]) -> str:
        """The object file, kept under build/ with a name that depends on the command."""
        command = [*FLAGS, *flags, *includes]
        key = hashlib.sha256(repr((self.compiler.executables, os.environ.get("CXX"), command)).encode()).hexdigest()[:12]
        folder = ROOT / "build" / "objects" / f"{name}-{key}"
        done = folder / "done.o"
        if not done.exists() or done.stat().st_mtime < newest_source():
            (made,) = self.compiler.compile([os.path.relpath(CSRC / source)], output_dir=str(folder), extra_postargs=command)
            os.replace(made, done)
        return str(done)


setup(
    ext_modules=[Extension("opsd_kernels._C", sources=[], py_limited_api=True, optional=True)],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
