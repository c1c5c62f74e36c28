"""Results of `pip install .`: with build isolation, without it, and where the C++ kernels cannot be built."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from opsd_kernels.version import __version__

ROOT = Path(__file__).resolve().parents[2]
LABELLED = f"{__version__}+without.cpp.kernels"
NO_COMPILER = {"CXX": "/nonexistent/c++"}
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler"
)


def run(*command: object, cwd: Path, check: bool = True, **variables: str) -> subprocess.CompletedProcess:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OPSD_"))
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**environment, "PWD": str(cwd), "OPSD_BUILD_CUDA": "0", **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


@pytest.fixture(scope="session")
def wheelhouse(tmp_path_factory):
    """setuptools, which an isolated build installs."""
    folder = tmp_path_factory.mktemp("wheelhouse")
    done = run(
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "-d",
        folder,
        "setuptools>=77",
        cwd=folder,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"an isolated build needs a package index: {done.stderr.strip().splitlines()[-1]}")
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}


@pytest.fixture
def fresh(tmp_path):
    """Return the Python of a new environment.

    It sees torch, pip and setuptools of this one behind its own packages.
    """
    venv.create(tmp_path / "fresh")
    (site,) = (tmp_path / "fresh" / "lib").glob("python*/site-packages")
    (site / "here.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return tmp_path / "fresh" / "bin" / "python"


@pytest.fixture
def sources(checkout):
    """Return a copy of the checkout with its compiled objects.

    The build reuses them if compiler, torch and sources are the same, and else compiles for a minute or two.
    """
    if (ROOT / "build" / "objects").is_dir():
        shutil.copytree(ROOT / "build" / "objects", checkout / "build" / "objects")
    return checkout


def install(python: Path, sources: Path, *options: str, **variables: str) -> str:
    """Return the last line that pip prints.

    The fresh environment must not replace the opsd_kernels of this one.
    """
    command = [
        python,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--ignore-installed",
        "--disable-pip-version-check",
        *options,
        ".",
    ]
    return run(*command, cwd=sources, **variables).stdout.strip().splitlines()[-1]


CALL = """
import torch, opsd_kernels
from opsd_kernels._rows import extension
h, w = torch.ones(2, 3, requires_grad=True), torch.eye(4, 3)
for _ in range(2):
    opsd_kernels.linear_divergence(h, w, -h.detach(), w).backward()
print(opsd_kernels.__file__, extension.load(), sep="\\n")
"""
CALLS_IN = 6  # the line of the call


def installed(python: Path) -> tuple[str | None, str, str]:
    """(why there are no C++ kernels, the tag of the wheel, what two calls write to stderr)"""
    prefix = python.parents[1]
    done = run(python, "-c", CALL, cwd=prefix)
    path, reason = done.stdout.splitlines()
    assert Path(path).is_relative_to(prefix)
    (wheel,) = prefix.glob("lib/python*/site-packages/opsd_kernels-*.dist-info/WHEEL")
    return (
        (None if reason == "None" else reason),
        re.search(r"^Tag: (.+)$", wheel.read_text(), re.MULTILINE)[1],
        done.stderr,
    )


# ---------------------------------------------------------------- two fresh environments


@needs_compiler
@pytest.mark.slow
def test_pip_install_without_isolation_builds_the_kernels(fresh, sources):
    last = install(fresh, sources, "--no-build-isolation", PIP_NO_INDEX="1")
    assert last == f"Successfully installed opsd_kernels-{__version__}"
    reason, tag, stderr = installed(fresh)
    assert (reason, stderr) == (None, "")
    assert tag.startswith("cp310-abi3-")


@needs_compiler
@pytest.mark.slow
def test_without_a_compiler_pip_the_wheel_and_the_first_call_say_so_and_the_command_mends_it(
    fresh, sources, wheelhouse
):
    assert (
        install(fresh, sources, **wheelhouse, **NO_COMPILER)
        == f"Successfully installed opsd_kernels-{LABELLED}"
    )
    reason, tag, stderr = installed(fresh)
    assert "/nonexistent/c++" in reason and tag == "py3-none-any"
    assert stderr.count("SlowBackendWarning") == 1 and f"<string>:{CALLS_IN}:" in stderr and reason in stderr
    assert reason in run(fresh.parent / "opsd", "doctor", cwd=sources.parent, COLUMNS="300").stdout

    command = re.search(r"To build them: (.+) \(OPSD_BACKEND", stderr)[1]
    run("sh", "-c", command, cwd=sources.parent, **wheelhouse)
    reason, tag, stderr = installed(fresh)  # of an isolated build
    assert (reason, stderr) == (None, "") and tag.startswith("cp310-abi3-")


# ---------------------------------------------------------------- what a wheel is called, and what it holds


def wheel(sources: Path, python: Path | str = sys.executable, **variables: str) -> tuple[Path, str]:
    """The wheel that the build backend makes, and what it says."""
    shutil.rmtree(sources / "dist", ignore_errors=True)
    said = run(python, "setup.py", "--quiet", "bdist_wheel", cwd=sources, **variables).stderr
    (made,) = (sources / "dist").glob("*.whl")
    return made, said


def fake_torch(folder: Path, version: str) -> dict[str, str]:
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").touch()
    (folder / "torch" / "version.py").write_text(f"__version__ = {version!r}\ncuda = None\n")
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize("why", ["no compiler", "a compiler without C++20", "an old torch", "not wanted"])
def test_a_wheel_without_kernels_says_so_in_its_name(sources, tmp_path, why):
    old = tmp_path / "old_c++"
    old.write_text('#!/bin/sh\necho "error: unrecognized option -std=c++20" >&2\nexit 1\n')
    old.chmod(0o755)
    variables, said = {
        "no compiler": (NO_COMPILER, "'/nonexistent/c++' is not there"),
        "a compiler without C++20": ({"CXX": shlex.quote(str(old))}, "unrecognized option -std=c++20"),
        "an old torch": (fake_torch(tmp_path / "old", "2.9.1+cpu"), "torch >= 2.10 is needed, got 2.9.1"),
        "not wanted": ({"OPSD_BUILD_CPU": "0"}, "OPSD_BUILD_CPU=0"),
    }[why]
    made, stderr = wheel(sources, **variables)
    assert made.name == f"opsd_kernels-{LABELLED}-py3-none-any.whl"
    assert said in stderr
    with zipfile.ZipFile(made) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        assert said in archive.read("opsd_kernels/without_cpp_kernels.txt").decode()


@needs_compiler
def test_a_wheel_with_kernels_holds_them_and_no_excuse(sources):
    wheel(sources, **NO_COMPILER)  # leaves its note under build/
    made, stderr = wheel(sources)
    assert re.fullmatch(rf"opsd_kernels-{re.escape(__version__)}-cp310-abi3-\w+\.whl", made.name)
    with zipfile.ZipFile(made) as archive:
        assert (
            "opsd_kernels/_C.abi3.so" in archive.namelist()
            and "opsd_kernels/without_cpp_kernels.txt" not in archive.namelist()
        )
    assert "without" not in stderr


@needs_compiler
def test_kernels_that_fail_after_the_metadata_promised_them_are_an_error(checkout):
    (checkout / "c++").write_text('#!/bin/sh\ncase "$*" in *probe.cpp*) exec g++ "$@";; esac\nexit 1\n')
    (checkout / "c++").chmod(0o755)
    compiler = shlex.quote(str(checkout / "c++"))
    done = run(sys.executable, "setup.py", "-q", "bdist_wheel", cwd=checkout, check=False, CXX=compiler)
    assert done.returncode != 0 and not (checkout / "dist").exists()
    assert "OPSD_BUILD_CPU=0 installs without them" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"OPSD_BUILD_CPU": "1"}, "OPSD_BUILD_CPU=1: no C++ compiler"),
        ({"OPSD_BUILD_CPU": "yes"}, "got 'yes'"),
    ],
)
def test_kernels_that_were_asked_for_or_misspelt_are_an_error(checkout, variables, words):
    done = run(
        sys.executable, "setup.py", "-q", "bdist_wheel", cwd=checkout, check=False, **NO_COMPILER, **variables
    )
    assert done.returncode != 0 and words in done.stderr.splitlines()[-1]


def test_a_source_distribution_is_plain_and_complete(checkout):
    """What is missing here need not be missing where it is built."""
    run(sys.executable, "setup.py", "-q", "sdist", cwd=checkout, **NO_COMPILER)
    (made,) = (checkout / "dist").iterdir()
    assert made.name == f"opsd_kernels-{__version__}.tar.gz"
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(checkout.parent)
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()} <= names
    unpacked = checkout.parent / f"opsd_kernels-{__version__}"
    assert wheel(unpacked, **NO_COMPILER)[0].name.startswith(f"opsd_kernels-{LABELLED}-")


# ---------------------------------------------------------------- which torch


@pytest.fixture
def found(monkeypatch, checkout):
    """Where a build finds torch that runs `python` under this PATH."""

    def look(python: Path, *path: Path) -> str | None:
        script = runpy.run_path(str(checkout / "setup.py"))
        monkeypatch.setattr(sys, "executable", str(python))
        monkeypatch.setenv("PATH", os.pathsep.join(map(str, path)))
        monkeypatch.setenv("PWD", str(checkout))
        torch = script["find_torch"]()
        return torch and torch.home

    return look


def test_torch_is_found_where_another_environment_builds(found, fresh, checkout, tmp_path):
    """As uv and `build` do. What pip does is above."""
    venv.create(tmp_path / "builds")
    builds, here = tmp_path / "builds" / "bin", str(Path(torch.__file__).parent)
    assert found(builds / "python", builds) is None
    assert found(builds / "python", builds, fresh.parent) == here
    shutil.move(tmp_path / "fresh", checkout / ".venv")
    assert found(builds / "python", builds) == here


def test_the_torch_of_the_environment_comes_first(found, fresh, tmp_path):
    old = fake_torch(tmp_path / "old", "2.9.1")["PYTHONPATH"]
    venv.create(tmp_path / "other")
    (site,) = (tmp_path / "other" / "lib").glob("python*/site-packages")
    (site / "old.pth").write_text(f"{old}\n")
    assert found(fresh, tmp_path / "other" / "bin") == str(Path(torch.__file__).parent)
    assert found(tmp_path / "other" / "bin" / "python", fresh.parent) == f"{old}/torch"


# ---------------------------------------------------------------- the CUDA kernels


def test_the_architectures_are_chosen_by_a_variable(monkeypatch, checkout):
    script = runpy.run_path(str(checkout / "setup.py"))
    assert script["gencode"]() == [
        *(f"-gencode=arch=compute_{number},code=sm_{number}" for number in ("80", "90a", "100a")),
        "-gencode=arch=compute_100,code=compute_100",
    ]
    monkeypatch.setenv("OPSD_CUDA_ARCHITECTURES", "90a, 120")
    assert script["gencode"]() == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
    ]
    monkeypatch.setenv("OPSD_CUDA_ARCHITECTURES", "sm_90a")
    with pytest.raises(SystemExit, match="expected numbers as in sm_90a, separated by commas, got 'sm_90a'"):
        script["gencode"]()


def test_the_digest_of_the_cuda_kernels_is_of_their_code(checkout):
    """It tells whether a check on a GPU was one of these kernels: a comment may change, a number may not."""
    script = runpy.run_path(str(checkout / "setup.py"))
    before, source = script["cuda_sources"](), checkout / "csrc" / "cuda" / "launch.h"
    assert re.fullmatch(r"[0-9a-f]{12}", before)
    text = source.read_text()
    source.write_text(f"// another comment\n\n{text}")
    (checkout / "csrc" / "cpu" / "rows.cpp").write_text("")
    assert script["cuda_sources"]() == before
    source.write_text(text.replace("256", "128", 1))
    assert text != source.read_text() and script["cuda_sources"]() != before
