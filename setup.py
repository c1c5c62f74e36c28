"""Builds the C++ extension where a C++20 compiler works, and the CUDA kernels where torch has CUDA and nvcc is found; installs without what cannot be built,
saying so. Metadata: pyproject.toml.

Both libraries use LibTorch's stable ABI and no Python API: one build serves torch >= 2.10 and any Python. They are two so that the CPU's loads under any torch.
OPSD_BUILD_CUDA=1 makes a failure to build the CUDA kernels an error, 0 leaves them out. Nothing asks for a visible GPU.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
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


# Machine code for the generations that are measured or compiled for in the tests, and PTX for those to come.
CUDA_ARCHITECTURES = ("80", "90a", "100a")
GENCODE = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHITECTURES] + ["-gencode=arch=compute_100,code=compute_100"]
CUDA_FLAGS = ["-std=c++20", "-O3", "-Werror", "all-warnings", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
CPU_TORCH = "this torch was built without CUDA"
CUDA_TYPES = {"float32": "float", "bfloat16": "BFloat16", "float16": "Half"}


def cuda_kernels() -> list[tuple[str, list[str]]]:
    """(object name, macros) of the kernels: rows.cu once per type of buffer."""
    return [(f"cuda_{name}", [f"-DOPSD_IN={cpp}", f"-DOPSD_RUN=run_{name}"]) for name, cpp in CUDA_TYPES.items()]


def nvcc() -> str | None:
    """CUDA_HOME's, else the one on the PATH. (torch's own CUDA_HOME is None under a torch without CUDA.)"""
    home = os.environ.get("CUDA_HOME")
    return shutil.which(os.path.join(home, "bin", "nvcc") if home else "nvcc") or shutil.which("nvcc")


def cuda_home() -> Path:
    """The toolkit behind nvcc, which may be a script that calls another."""
    printed = subprocess.run([nvcc(), "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=True).stderr
    return Path(re.search(r"^#\$ TOP=(.+)$", printed, re.MULTILINE)[1]).resolve()


def no_cuda_build() -> str | None:
    """Why the CUDA kernels are not built here; None if they are."""
    if os.environ.get("OPSD_BUILD_CUDA", "auto") == "0":
        return "OPSD_BUILD_CUDA=0"
    import torch

    if torch.version.cuda is None:
        return CPU_TORCH
    return None if nvcc() else "nvcc is not there (CUDA_HOME or PATH)"


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
    """Compiles what changed, in parallel. What cannot be built is left out, with the reason, unless OPSD_BUILD_CUDA=1 asked for it."""

    def build_extension(self, ext: Extension) -> None:
        cuda = ext.name.endswith("_cuda")
        built, target = ROOT / "opsd_kernels" / f"{ext.name.rpartition('.')[2]}.abi3.so", Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        if built.exists() and built.stat().st_mtime > newest_source():
            if target != built:
                shutil.copy2(built, target)
            return
        for stale in (built, target):
            stale.unlink(missing_ok=True)
        compiler = self.compiler.compiler_so_cxx[0]
        reason = unsupported(compiler) or (no_cuda_build() if cuda else None)
        try:
            if reason is None:
                self.build_cuda(target) if cuda else self.build_cpu(target)
        except Exception as error:  # distutils raises a different class for each way in which a compiler can fail; the compiler has said more above
            reason = f"{'nvcc' if cuda else compiler!r} failed ({type(error).__name__}); `python setup.py build_ext --inplace` shows how"
        if reason is None or (cuda and reason == CPU_TORCH and os.environ.get("OPSD_BUILD_CUDA") != "1"):
            return
        if cuda and os.environ.get("OPSD_BUILD_CUDA") == "1":
            raise RuntimeError(f"OPSD_BUILD_CUDA=1: {reason}")
        what = "CUDA kernels (Triton serves GPUs)" if cuda else "C++ extension (slower on CPU)"
        print(f"opsd_kernels: installed without its {what}: {reason}", file=sys.stderr)

    def build_cpu(self, target: Path) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda job: self.compile_one(*job), jobs()))
        self.link(target, objects, ["torch_cpu"])

    def build_cuda(self, target: Path) -> None:
        home = cuda_home()
        plain = [("cuda/binding.cpp", "cuda_binding"), ("registration.cpp", "cuda_registration")]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            kernels = pool.map(lambda job: self.compile_cuda(*job), cuda_kernels())
            rest = pool.map(lambda job: self.compile_one(*job, ["-DOPSD_CUDA", f"-I{home / 'include'}"]), plain)
            objects = [*kernels, *rest]
        self.link(target, objects, ["torch_cpu", "torch_cuda", "cudart_static", "rt", "dl", "pthread"], [str(home / "lib64"), str(home / "lib")])

    def link(self, target: Path, objects: list[str], libraries: list[str], folders: list[str] | None = None) -> None:
        from torch.utils.cpp_extension import library_paths

        self.compiler.link_shared_object(objects, str(target), libraries=libraries, library_dirs=[*library_paths(), *(folders or [])], target_lang="c++")

    def compile_one(self, source: str, name: str, flags: list[str]) -> str:
        """The object file, kept under build/ with a name that depends on the command."""
        from torch.utils.cpp_extension import include_paths

        command = [*FLAGS, *flags, *(flag for path in include_paths() for flag in ("-isystem", path))]
        key = repr((self.compiler.executables, os.environ.get("CXX"), command))
        done = object_path(name, key)
        if not done.exists() or done.stat().st_mtime < newest_source():
            (made,) = self.compiler.compile([os.path.relpath(CSRC / source)], output_dir=str(done.parent), extra_postargs=command)
            os.replace(made, done)
        return str(done)

    def compile_cuda(self, name: str, macros: list[str]) -> str:
        command = [nvcc(), *CUDA_FLAGS, *GENCODE, "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", str(len(GENCODE)), *macros]
        done = object_path(name, repr(command))
        if not done.exists() or done.stat().st_mtime < newest_source():
            done.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([*command, "-c", str(CSRC / "cuda" / "rows.cu"), "-o", str(done)], check=True)
        return str(done)


def object_path(name: str, key: str) -> Path:
    return ROOT / "build" / "objects" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}" / "done.o"


FILES = sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob("*") if path.is_file())


def extension(name: str) -> Extension:
    """`depends` puts the sources into source distributions; what is compiled how is said by jobs() and cuda_kernels()."""
    return Extension(f"opsd_kernels.{name}", sources=["csrc/registration.cpp"], depends=FILES, py_limited_api=True, optional=True)


if __name__ == "__main__":  # the tests import what is above
    if int(setuptools.__version__.split(".")[0]) < 77:  # older ones stop at pyproject.toml's license with a page of schema
        sys.exit(f"opsd_kernels: setuptools >= 77 is needed, got {setuptools.__version__}: pip install -U setuptools")
    setup(
        ext_modules=[extension("_C"), extension("_cuda")],
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
