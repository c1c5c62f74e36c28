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
    x86 = ["-DOPSD_X86"] if X86 else []
    if X86:
        kernels.append(("cpu/gemm.cpp", "gemm", AVX512))
    plain = [(source, Path(source).stem, x86) for source in ("cpu/binding.cpp", "cpu/gemm_binding.cpp", "cpu/dispatch.cpp", "registration.cpp")]
    return [*kernels, *plain]


def newest_source() -> float:
    return max(path.stat().st_mtime for path in [ROOT / "setup.py", *CSRC.rglob("*")] if path.is_file())


def unsupported(compiler: str) -> str | None:
    if os.name == "nt":
        return "it needs GCC or Clang"
    try:
        import torch
    except ImportError:
        return "torch is not installed in this environment (pip install --no-build-isolation)"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        return f"torch >= 2.10 is needed, got {torch.__version__}"
    return None if shutil.which(compiler) else f"no C++ compiler, {compiler!r} is not there (CXX names one)"


class BuildExtension(build_ext):
    """Compiles what changed, in parallel, and never fails the installation."""

    def build_extension(self, ext: Extension) -> None:
        built, target = ROOT / "opsd_kernels" / "_C.abi3.so", Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        if built.exists() and built.stat().st_mtime > newest_source():
            if target != built:
                shutil.copy2(built, target)
            return
        for stale in (built, target):
            stale.unlink(missing_ok=True)
        compiler = self.compiler.compiler_so_cxx[0]
        reason = unsupported(compiler)
        try:
            if reason is None:
                self.compile_and_link(target)
        except Exception as error:  # distutils raises a different class for each way in which a compiler can fail; the compiler has said more above
            reason = f"{compiler!r} failed ({type(error).__name__}); `python setup.py build_ext --inplace` shows how"
        if reason is not None:
            print(f"opsd_kernels: installed without its C++ extension (slower on CPU): {reason}", file=sys.stderr)

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


FILES = sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob("*") if path.is_file())

setup(
    # `depends` puts the headers into source distributions; what is compiled how is said by jobs().
    ext_modules=[Extension("opsd_kernels._C", sources=[f for f in FILES if f.endswith(".cpp")], depends=FILES, py_limited_api=True, optional=True)],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
