"""Check the contents of wheels and source distributions; with --torch, run them beside that torch.

python tests/build/check_dist.py dist/opsd_kernels-*
python tests/build/check_dist.py --torch 'torch==2.10.*' dist/opsd_kernels-*.whl
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

PACKAGE = (
    "__init__.py",
    "py.typed",
    "cli.py",
    "tested_versions.json",
    "gpu_checks.json",
    "_rows/triton_rows.py",
)
SOURCES = (
    "setup.py",
    "pyproject.toml",
    "LICENSE",
    "csrc/registration.cpp",
    "csrc/ops.h",
    "csrc/cuda/rows.cu",
    "csrc/cpu/rows.cpp",
    "opsd_kernels/__init__.py",
)
LIBRARY = "opsd_kernels/_C.abi3.so"
# A hard case in fp32 and one in bf16, forward and backward through the compiled kernels, with the gates of
# tests/unit/test_op.py.
SMOKE = """
import torch, opsd_kernels
from opsd_kernels import linear_divergence
from opsd_kernels._rows import backends, extension
from opsd_kernels.testing.reference import linear_divergence_reference
from opsd_kernels.testing import assert_no_worse, assert_on_target, evaluate, hard_case, plain_outcomes
assert extension.load() is None, extension.load()
assert backends.explain("cpu")["cpp"] is None, backends.explain("cpu")
options = {"divergence": "jsd", "beta": 0.25}
case = hard_case(67, 1003, 48, torch.float32, largest_logit=40.0)
truth = evaluate(linear_divergence_reference, case.double(), **options)
found = evaluate(linear_divergence, case, backend="cpp", **options)
assert_no_worse(found, plain_outcomes(case, **options), truth)
case = hard_case(67, 1003, 64, torch.bfloat16, largest_logit=8.0)
truth = evaluate(linear_divergence_reference, case.double(), logits_dtype=torch.float32, **options)
found = evaluate(linear_divergence, case, backend="cpp", logits_dtype=torch.float32, **options)
assert_on_target(found, truth, "fp32_logits")
print(f"smoke test passed: torch {torch.__version__}, {extension.capability()}, {opsd_kernels.__file__}")
"""


def names(dist: Path) -> list[str]:
    """Return the files of an archive; of a source distribution, below its one folder."""
    if dist.suffix == ".whl":
        return zipfile.ZipFile(dist).namelist()
    with tarfile.open(dist) as archive:
        return [member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()]


def problems(dist: Path) -> list[str]:
    """Return what an archive lacks, and what it holds that it should not."""
    held = set(names(dist))
    if dist.suffix != ".whl":
        return [f"{name} is missing" for name in SOURCES if name not in held] + [
            f"{name} is a binary" for name in sorted(held) if name.endswith(".so")
        ]
    found = [
        f"{name} is missing"
        for name in (*(f"opsd_kernels/{name}" for name in PACKAGE), LIBRARY)
        if name not in held
    ]
    found += [
        f"{name} is not of the package"
        for name in sorted(held)
        if not name.startswith(("opsd_kernels/", "opsd_kernels-"))
    ]
    found += [
        f"{name} is a library that belongs to torch or to the system"
        for name in sorted(held)
        if ".so" in name and not name.startswith("opsd_kernels/_")
    ]
    python, abi, platform = dist.stem.split("-")[-3:]
    if (python, abi) != ("cp310", "abi3"):
        found.append(f"expected the tags cp310-abi3, got {python}-{abi}")
    if platform.startswith("linux"):
        found.append(f"expected a manylinux tag, got {platform}: auditwheel has not repaired it")
    return found


def install_and_run(dist: Path, torch: str) -> None:
    """Install beside `torch` in a fresh environment and run `opsd doctor` and the smoke test there.

    Raises CalledProcessError.
    """
    with tempfile.TemporaryDirectory() as folder:  # and not the repository, whose package would be imported
        venv.create(Path(folder) / "venv", with_pip=True)
        bin = Path(folder) / "venv" / "bin"
        pip = [bin / "python", "-m", "pip", "install", "-q"]
        isolation = [] if dist.suffix == ".whl" else ["--no-build-isolation"]
        steps = [
            [*pip, "setuptools>=77", "wheel", "numpy", torch],
            [*pip, *isolation, f"{dist.resolve()}[cli]"],
            [bin / "opsd", "doctor"],
            [bin / "python", "-c", SMOKE],
        ]
        for step in steps:
            subprocess.run(list(map(str, step)), cwd=folder, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dists", nargs="+", type=Path)
    parser.add_argument("--torch", help="what pip installs first, such as torch==2.10.*")
    arguments = parser.parse_args()
    found = [f"{dist.name}: {problem}" for dist in arguments.dists for problem in problems(dist)]
    if found:
        sys.exit("\n".join(found))
    print(f"contents: {', '.join(dist.name for dist in arguments.dists)}", flush=True)
    for dist in arguments.dists if arguments.torch else ():
        print(f"==> {dist.name} beside {arguments.torch}, Python {sys.version.split()[0]}", flush=True)
        try:
            install_and_run(dist, arguments.torch)
        except subprocess.CalledProcessError as error:
            sys.exit(
                f"{dist.name}: {Path(error.cmd[0]).name} {' '.join(error.cmd[1:3])} "
                f"failed with status {error.returncode}"
            )


if __name__ == "__main__":
    main()
