"""Build the C++ and the CUDA kernels, each of them only where its tools are found.

C++ needs torch and a C++20 compiler; CUDA needs, besides these, a torch with CUDA and nvcc. Metadata:
pyproject.toml, and opsd_kernels/version.py. A wheel without the C++ kernels is a pure one and its version
ends in LABEL, because installers show the version and hide the output of a build. Both libraries use
LibTorch's stable ABI and no Python API: one build serves torch >= 2.10 and any Python. They are two
libraries so that the CPU one loads under any torch. OPSD_BUILD_CPU and OPSD_BUILD_CUDA: 1 turns a failure
to build these kernels into an error, 0 leaves them out; OPSD_CUDA_ARCHITECTURES names the GPUs. No GPU needs
to be visible.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
VERSION = runpy.run_path(str(ROOT / "opsd_kernels" / "version.py"))["__version__"]
LABEL = "without.cpp.kernels"
WHEEL = not {"dist_info", "bdist_wheel", "editable_wheel"}.isdisjoint(
    sys.argv
)  # what build front ends call; an sdist's version has no label
X86 = platform.machine().lower() in ("x86_64", "amd64")

FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
KERNEL_FLAGS = [
    "-ffp-contract=off"
]  # contraction would let the compiler choose where to round; the kernels say fma where they mean it
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]


def jobs() -> list[tuple[str, str, list[str]]]:
    """Return (source, object name, flags) of every translation unit, the slow ones first.

    rows.cpp, columns.cpp and topk.cpp are compiled once per instruction set.
    """
    levels = {"baseline": ["-DOPSD_BASELINE"]}
    if X86:
        levels = {"avx512": AVX512, "avx2": AVX2, **levels}
    kernels = [
        (f"cpu/{stem}.cpp", f"{stem}_{name}", [*KERNEL_FLAGS, f"-DOPSD_CAPABILITY={name}", *flags])
        for stem in ("rows", "columns", "topk")
        for name, flags in levels.items()
    ]
    x86 = ["-DOPSD_X86"] if X86 else []
    if X86:
        kernels += [("cpu/gemm.cpp", "gemm", AVX512), ("cpu/gemm_fp32.cpp", "gemm_fp32", AVX512)]
    plain = [
        (source, Path(source).stem, x86)
        for source in (
            "cpu/binding.cpp",
            "cpu/gemm_binding.cpp",
            "cpu/columns_binding.cpp",
            "cpu/topk_binding.cpp",
            "cpu/dispatch.cpp",
            "registration.cpp",
        )
    ]
    return [*kernels, *plain]


# Machine code for the generations that are measured or compiled for in the tests, and PTX for those to come.
CUDA_ARCHITECTURES = ("80", "90a", "100a")
PTX = "-gencode=arch=compute_100,code=compute_100"
CUDA_FLAGS = ["-std=c++20", "-O3", "-Werror", "all-warnings", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
CPU_TORCH = "this torch was built without CUDA"
CUDA_TYPES = {"float32": "float", "bfloat16": "BFloat16", "float16": "Half"}


def cuda_kernels() -> list[tuple[str, list[str]]]:
    """(object name, macros) of the kernels: rows.cu once per type of buffer."""
    return [
        (f"cuda_{name}", [f"-DOPSD_IN={cpp}", f"-DOPSD_RUN=run_{name}"]) for name, cpp in CUDA_TYPES.items()
    ]


def gencode() -> list[str]:
    """Return nvcc's targets: those of OPSD_CUDA_ARCHITECTURES, else all of the above."""
    named = [
        part.strip() for part in os.environ.get("OPSD_CUDA_ARCHITECTURES", "").split(",") if part.strip()
    ]
    for part in named:
        if not re.fullmatch(r"\d{2,3}[af]?", part):
            sys.exit(
                "opsd_kernels: OPSD_CUDA_ARCHITECTURES: expected numbers as in sm_90a, separated by commas, "
                f"got {part!r}"
            )
    targets = [f"-gencode=arch=compute_{part},code=sm_{part}" for part in named or CUDA_ARCHITECTURES]
    return targets if named else [*targets, PTX]


def cuda_plain() -> list[tuple[str, str, list[str]]]:
    """Return (source, object name, flags) of what the host's compiler makes of the CUDA library."""
    flags = ["-DOPSD_CUDA", f'-DOPSD_SOURCES="{cuda_sources()}"', f"-I{cuda_home() / 'include'}"]
    return [("cuda/binding.cpp", "cuda_binding", flags), ("registration.cpp", "cuda_registration", flags)]


def cuda_sources() -> str:
    """Return a digest of the flags and sources of the CUDA kernels, without comments and blanks.

    opsd_kernels/gpu_checks.json holds it for the kernels that passed on a GPU.
    """
    digest = hashlib.sha256(repr(CUDA_FLAGS).encode())
    for path in sorted(CSRC.rglob("*")):
        if path.is_file() and CSRC / "cpu" not in path.parents:
            code = re.sub(r"//[^\n]*", "", path.read_text())
            digest.update(f"{path.relative_to(CSRC)} {' '.join(code.split())}".encode())
    return digest.hexdigest()[:12]


def nvcc() -> str | None:
    """CUDA_HOME's, else the one on the PATH. (torch's own CUDA_HOME is None under a torch without CUDA.)"""
    home = os.environ.get("CUDA_HOME")
    return shutil.which(os.path.join(home, "bin", "nvcc") if home else "nvcc") or shutil.which("nvcc")


def cuda_home() -> Path:
    """The toolkit behind nvcc, which may be a script that calls another."""
    printed = subprocess.run(
        [nvcc(), "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=True
    ).stderr
    return Path(re.search(r"^#\$ TOP=(.+)$", printed, re.MULTILINE)[1]).resolve()


# ---------------------------------------------------------------- what can be built here


class Torch(NamedTuple):
    """An installed torch, which need not be importable in the process that builds."""

    home: str
    version: str
    cuda: str | None

    @property
    def include(self) -> str:
        return os.path.join(self.home, "include")

    @property
    def lib(self) -> str:
        return os.path.join(self.home, "lib")


LOOK_FOR_TORCH = """
import importlib.util, json, os, runpy
spec = importlib.util.find_spec("torch")
if spec and spec.origin:
    home = os.path.dirname(spec.origin)
    version = runpy.run_path(os.path.join(home, "version.py"))
    print(json.dumps([home, str(version["__version__"]), version.get("cuda")]))
"""


def interpreters() -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (Python, environment variables) to ask for torch, the likeliest one first.

    An isolated pip build runs the Python that it installs into, behind a PYTHONPATH that hides its packages.
    uv and `build` run the Python of another virtual environment and do not tell which one they install into.
    It is the .venv here, or first on the PATH behind theirs; and if it is neither, the headers of any
    torch >= 2.10 make the same library.
    """
    bare = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")
    }
    yield sys.executable, dict(os.environ)
    yield sys.executable, bare
    here = [os.path.join(folder, ".venv", "bin") for folder in (ROOT, os.environ.get("PWD", ROOT))]
    for folder in dict.fromkeys([*here, *os.environ.get("PATH", "").split(os.pathsep)]):
        python = next(
            (
                path
                for path in (os.path.join(folder, name) for name in ("python3", "python"))
                if os.path.isabs(path) and os.path.exists(path)
            ),
            None,
        )
        if python and python != sys.executable:
            yield python, bare


@cache
def find_torch() -> Torch | None:
    for python, environment in interpreters():
        try:
            done = subprocess.run(
                [python, "-c", LOOK_FOR_TORCH], env=environment, capture_output=True, text=True, timeout=60
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0 and done.stdout.strip():
            return Torch(*json.loads(done.stdout.splitlines()[-1]))
    return None


# With templates of C++20, an include of each kind, and a symbol to link.
PROBE = """
#include <concepts>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
template <std::floating_point T> constexpr T twice(T x) { return x + x; }
static_assert(twice(1.0f) == 2.0f);
STABLE_TORCH_LIBRARY_FRAGMENT(opsd_probe, m) { m.def("probe() -> ()"); }
"""


def wish(variable: str) -> str:
    value = os.environ.get(variable, "").strip() or "auto"
    if value not in ("auto", "0", "1"):
        sys.exit(f"opsd_kernels: {variable}: expected one of 'auto', '0', '1', got {value!r}")
    return value


def no_cpu_build() -> str | None:
    """Return why the C++ kernels are not built; None if they can be, or exist and are up to date.

    Ends the build if there is a reason and OPSD_BUILD_CPU=1.
    """
    if wish("OPSD_BUILD_CPU") == "0":
        return "OPSD_BUILD_CPU=0"
    reason = None if up_to_date(in_place("_C")) else unsupported()
    if reason and wish("OPSD_BUILD_CPU") == "1":
        sys.exit(f"opsd_kernels: OPSD_BUILD_CPU=1: {reason}")
    return reason


@cache
def unsupported() -> str | None:
    """Why C++ against torch's headers cannot be compiled here; None if a small program could."""
    from distutils.ccompiler import new_compiler  # setuptools brings them along, once it is imported
    from distutils.sysconfig import customize_compiler

    if os.name == "nt":
        return "it needs GCC or Clang"
    torch = find_torch()
    if torch is None:
        return "no torch was found (install torch >= 2.10 first, in the same environment)"
    if tuple(int(part) for part in re.findall(r"\d+", torch.version)[:2]) < (2, 10):
        return f"torch >= 2.10 is needed, got {torch.version} in {torch.home}"
    compiler = new_compiler()
    customize_compiler(compiler)
    command = compiler.compiler_so_cxx
    if not shutil.which(command[0]):
        return f"no C++ compiler, {command[0]!r} is not there (CXX names one)"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE)
        flags = [*FLAGS, *(AVX512 if X86 else []), "-O0", "-shared", "-fPIC", "-isystem", torch.include]
        done = subprocess.run(
            [*command, *flags, source, "-o", f"{folder}/probe.so", f"-L{torch.lib}", "-ltorch_cpu"],
            capture_output=True,
            text=True,
        )
    if done.returncode == 0:
        return None
    said = [
        line.replace(f"{folder}/", "") for line in done.stderr.splitlines() if "error" in line.lower()
    ] or ["it said nothing"]
    return (
        f"{shlex.join(command[:1])} cannot compile a small C++20 program against the headers of "
        f"torch {torch.version}: {said[0].strip()}"
    )


def no_cuda_build() -> str | None:
    """Why the CUDA kernels are not built here; None if they are."""
    if wish("OPSD_BUILD_CUDA") == "0":
        return "OPSD_BUILD_CUDA=0"
    reason = no_cpu_build()  # the library of the CPU registers what that of CUDA implements
    if reason is None and find_torch() and find_torch().cuda is None:
        return CPU_TORCH
    return reason or unsupported() or (None if nvcc() else "nvcc is not there (CUDA_HOME or PATH)")


@cache
def newest_source() -> float:
    return max(path.stat().st_mtime for path in [ROOT / "setup.py", *CSRC.rglob("*")] if path.is_file())


def in_place(name: str) -> Path:
    return ROOT / "opsd_kernels" / f"{name}.abi3.so"


def up_to_date(library: Path) -> bool:
    return library.exists() and library.stat().st_mtime > newest_source()


# ---------------------------------------------------------------- building it


def tell(what: str, reason: str) -> None:
    print(f"opsd_kernels: installed without its {what}: {reason}", file=sys.stderr)


class BuildExtension(build_ext):
    """Compile the changed sources, in parallel.

    A checkout leaves out kernels that cannot be built and prints the reason; a wheel holds the kernels that
    its metadata announced.
    """

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        built, target = in_place(name), Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        if up_to_date(built) and not (name == "_C" and no_cpu_build()):
            if target != built:
                shutil.copy2(built, target)
            return
        for stale in (built, target):
            stale.unlink(missing_ok=True)
        self.make_cuda(target) if name == "_cuda" else self.make_cpu(target)

    def make_cpu(self, target: Path) -> None:
        reason = no_cpu_build()
        if reason:
            tell("C++ kernels (slower on CPU)", reason)
            return
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda job: self.compile_one(*job), jobs()))
            self.link(target, objects, ["torch_cpu"])
        # distutils raises a different class for each way in which a compiler can fail; the compiler's own
        # output above says more
        except Exception as error:
            reason = (
                f"{self.compiler.compiler_so_cxx[0]!r} failed ({type(error).__name__}); it says why above"
            )
            if WHEEL or wish("OPSD_BUILD_CPU") == "1":
                sys.exit(
                    f"opsd_kernels: the C++ kernels were not built: {reason}. "
                    "OPSD_BUILD_CPU=0 installs without them (slower on CPU)."
                )
            tell("C++ kernels (slower on CPU)", reason)

    def make_cuda(self, target: Path) -> None:
        reason = no_cuda_build()
        try:
            if reason is None:
                self.build_cuda(target)
        except Exception as error:
            reason = f"nvcc failed ({type(error).__name__}); `python setup.py build_ext --inplace` shows how"
        if reason and wish("OPSD_BUILD_CUDA") == "1":
            sys.exit(f"opsd_kernels: OPSD_BUILD_CUDA=1: {reason}")
        if reason not in (None, CPU_TORCH, "OPSD_BUILD_CUDA=0", no_cpu_build()):
            tell("CUDA kernels (Triton serves GPUs)", reason)

    def build_cuda(self, target: Path) -> None:
        home = cuda_home()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            kernels = pool.map(lambda job: self.compile_cuda(*job), cuda_kernels())
            rest = pool.map(lambda job: self.compile_one(*job), cuda_plain())
            objects = [*kernels, *rest]
        self.link(
            target,
            objects,
            ["torch_cpu", "torch_cuda", "cudart_static", "rt", "dl", "pthread"],
            [str(home / "lib64"), str(home / "lib")],
        )

    def link(
        self, target: Path, objects: list[str], libraries: list[str], folders: list[str] | None = None
    ) -> None:
        self.compiler.link_shared_object(
            objects,
            str(target),
            libraries=libraries,
            library_dirs=[find_torch().lib, *(folders or [])],
            target_lang="c++",
        )

    def compile_one(self, source: str, name: str, flags: list[str]) -> str:
        """The object file, kept under build/ with a name that depends on the command."""
        command = [*FLAGS, *flags, "-isystem", find_torch().include]
        done = object_path(name, repr((self.compiler.executables, os.environ.get("CXX"), command)))
        if not done.exists() or done.stat().st_mtime < newest_source():
            strict = (
                [] if WHEEL else ["-Werror"]
            )  # a compiler that warns of something new must not stop an installation
            (made,) = self.compiler.compile(
                [os.path.relpath(CSRC / source)],
                output_dir=str(done.parent),
                extra_postargs=[*command, *strict],
            )
            os.replace(made, done)
        return str(done)

    def compile_cuda(self, name: str, macros: list[str]) -> str:
        targets = gencode()
        threads = ["--threads", str(len(targets))]
        command = [
            nvcc(),
            *CUDA_FLAGS,
            *targets,
            "-Xcompiler",
            "-fPIC,-fvisibility=hidden",
            *threads,
            *macros,
        ]
        done = object_path(name, repr(command))
        if not done.exists() or done.stat().st_mtime < newest_source():
            done.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([*command, "-c", str(CSRC / "cuda" / "rows.cu"), "-o", str(done)], check=True)
        return str(done)


class BuildPython(build_py):
    """Write the reason into a wheel without C++ kernels.

    The warning of the first call shows it (opsd_kernels/_rows/extension.py).
    """

    def run(self) -> None:
        super().run()
        if not self.editable_mode and not self.distribution.ext_modules:
            Path(self.build_lib, "opsd_kernels", "without_cpp_kernels.txt").write_text(no_cpu_build())


def object_path(name: str, key: str) -> Path:
    return ROOT / "build" / "objects" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}" / "done.o"


FILES = sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob("*") if path.is_file())


def extension(name: str) -> Extension:
    """Describe one library; jobs() and cuda_kernels() list its sources and their flags.

    `depends` puts the sources into source distributions.
    """
    return Extension(
        f"opsd_kernels.{name}",
        sources=["csrc/registration.cpp"],
        depends=FILES,
        py_limited_api=True,
        optional=True,
    )


def main() -> None:
    # older ones stop at pyproject.toml's license with a page of schema
    if int(setuptools.__version__.split(".")[0]) < 77:
        sys.exit(
            f"opsd_kernels: setuptools >= 77 is needed, got {setuptools.__version__}: "
            "pip install -U setuptools"
        )
    reason = no_cpu_build() if WHEEL else None
    if reason and wish("OPSD_BUILD_CUDA") == "1":
        sys.exit(f"opsd_kernels: OPSD_BUILD_CUDA=1: {reason}")
    if reason and "dist_info" not in sys.argv:
        tell("C++ kernels (slower on CPU)", reason)
    if reason and "editable_wheel" in sys.argv:
        for name in ("_C", "_cuda"):  # code of yesterday
            in_place(name).unlink(missing_ok=True)
    setup(
        version=f"{VERSION}+{LABEL}" if reason else VERSION,
        ext_modules=[] if reason else [extension("_C"), extension("_cuda")],
        cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


if __name__ == "__main__":  # the tests import what is above
    main()
