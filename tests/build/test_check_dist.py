"""The check of what a release holds, on planted archives. `.ci/wheels.sh` runs it on real ones."""

import importlib.util
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("check_dist.py")
WHEEL = "opsd_kernels-0.1.0-cp310-abi3-manylinux_2_28_x86_64.whl"


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("check_dist", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_wheel(folder: Path, names: list[str], name: str = WHEEL) -> Path:
    with zipfile.ZipFile(folder / name, "w") as archive:
        for held in names:
            archive.writestr(held, "")
    return folder / name


def good_names(check) -> list[str]:
    return [
        *(f"opsd_kernels/{name}" for name in check.PACKAGE),
        check.LIBRARY,
        "opsd_kernels-0.1.0.dist-info/METADATA",
    ]


def test_a_good_wheel_has_no_problem(check, tmp_path):
    assert check.problems(make_wheel(tmp_path, good_names(check))) == []


@pytest.mark.parametrize(
    "add, drop, name, says",
    [
        ([], "opsd_kernels/_C.abi3.so", WHEEL, "opsd_kernels/_C.abi3.so is missing"),
        ([], "opsd_kernels/tested_versions.json", WHEEL, "opsd_kernels/tested_versions.json is missing"),
        (["tests/conftest.py"], None, WHEEL, "tests/conftest.py is not of the package"),
        (["opsd_kernels.libs/libgomp-1.so.1"], None, WHEEL, "opsd_kernels.libs/libgomp-1.so.1 is a library"),
        (
            ["opsd_kernels.libs/libtorch_cpu-1.so"],
            None,
            WHEEL,
            "opsd_kernels.libs/libtorch_cpu-1.so is a library",
        ),
        ([], None, WHEEL.replace("manylinux_2_28", "linux"), "expected a manylinux tag"),
        (
            [],
            None,
            WHEEL.replace("cp310-abi3", "cp311-cp311"),
            "expected the tags cp310-abi3, got cp311-cp311",
        ),
    ],
)
def test_a_bad_wheel_is_found(check, tmp_path, add, drop, name, says):
    names = [held for held in [*good_names(check), *add] if held != drop]
    assert any(problem.startswith(says) for problem in check.problems(make_wheel(tmp_path, names, name)))


def test_a_source_distribution_needs_the_sources_and_no_binary(check, tmp_path):
    (tmp_path / "empty").write_text("")
    with tarfile.open(tmp_path / "opsd_kernels-0.1.0.tar.gz", "w:gz") as archive:
        for name in (*check.SOURCES[1:], "opsd_kernels/_C.abi3.so"):
            archive.add(tmp_path / "empty", f"opsd_kernels-0.1.0/{name}")
    assert check.problems(tmp_path / "opsd_kernels-0.1.0.tar.gz") == [
        "setup.py is missing",
        "opsd_kernels/_C.abi3.so is a binary",
    ]


def test_the_script_of_the_workflow_is_a_shell_script():
    script = ROOT / ".ci" / "wheels.sh"
    subprocess.run(["bash", "-n", script], check=True)
    told = subprocess.run(["bash", script], capture_output=True, text=True)
    assert told.returncode == 2 and ".ci/wheels.sh all" in told.stderr
