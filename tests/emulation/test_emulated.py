"""The row contract on the CUDA kernels, which the emulator (emulator.h) runs on a CPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
DEVICES = {"streaming": "80:166912", "one block": "90:232448", "clusters": "90:9216"}

pytestmark = [pytest.mark.build, pytest.mark.slow]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """Build the library in a subprocess, so that this process loads no part of the emulator."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("emulated")
    built = subprocess.run(
        [sys.executable, HERE / "build_emulated.py", folder], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr[-6000:]
    return folder / "opsd_emulated.so"


def test_the_contract_holds_on_every_device(library):
    """Run on three devices: no clusters, one row per block, and eight blocks for the longest rows.

    The third device has so little shared memory that a long row takes a whole cluster.
    """
    started = {}
    for name, device in DEVICES.items():
        environment = os.environ | {"OPSD_EMULATED_LIBRARY": str(library), "OPSD_EMULATED_DEVICE": device}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            HERE / "rows_emulated.py",
        ]
        started[name] = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=HERE.parent.parent,
        )
    for name, process in started.items():
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, f"{name}:\n{output[-6000:]}"
        assert " passed" in output
