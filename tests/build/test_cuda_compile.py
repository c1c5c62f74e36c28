"""The CUDA kernels compile for every architecture without a GPU and without a warning, none spills, and what they take is what cuda_resources.tsv says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cuda_resources

TABLE = Path(__file__).with_name("cuda_resources.tsv")
TABLE_MADE_BY = "13.0"  # of nvcc; another allocates other registers
SOURCES = cuda_resources.ROOT / "csrc" / "cuda"

pytestmark = [pytest.mark.build, pytest.mark.slow]


def nvcc_version() -> str:
    script = cuda_resources.build_script()
    if script.nvcc() is None:
        pytest.skip("nvcc is not there")
    printed = subprocess.run([script.nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", printed)[1]


@pytest.fixture(scope="module")
def measured() -> list[tuple[str, ...]]:
    nvcc_version()
    return cuda_resources.every_kernel()


def test_every_kernel_is_there(measured):
    kinds = len(cuda_resources.KINDS)
    types = {(row[1], row[2]) for row in measured}
    assert len(types) == 9 and len(measured) == len({row[:3] for row in measured}) == 9 * 2 * (1 + 3 * kinds)


def test_no_kernel_spills(measured):
    spilled = [row for row in measured if row[4] != "0" or row[5] != "0"]
    assert not spilled, "\n".join(map("\t".join, spilled))


def test_two_blocks_fit_on_a_multiprocessor(measured):
    """65536 registers, blocks of at most 256 threads."""
    greedy = [row for row in measured if int(row[3]) > 128]
    assert not greedy, "\n".join(map("\t".join, greedy))


def test_resources_are_those_of_the_table(measured):
    if nvcc_version() != TABLE_MADE_BY:
        pytest.skip(f"the table was made by nvcc {TABLE_MADE_BY}, this is {nvcc_version()}")
    table = [tuple(line.split("\t")) for line in TABLE.read_text().splitlines()]
    assert table[0] == cuda_resources.HEADER
    changed = sorted(set(measured) ^ set(table[1:]))
    assert not changed, "python tests/build/cuda_resources.py > tests/build/cuda_resources.tsv, and say why:\n" + "\n".join(map("\t".join, changed[:40]))


def test_the_sources_stay_small():
    lines = sum(len(path.read_text().splitlines()) for path in SOURCES.iterdir())
    assert lines <= 1200
