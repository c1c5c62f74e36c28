"""The CUDA kernels compile for every architecture without a GPU and without a warning.

None spills, and their resources equal cuda_resources.tsv.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths, library_paths

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cuda_resources
import sass_budget

TABLE = Path(__file__).with_name("cuda_resources.tsv")
TABLE_MADE_BY = "13.0"  # of nvcc; another allocates other registers
SOURCES = cuda_resources.build_script().CSRC / "cuda"

pytestmark = [pytest.mark.build, pytest.mark.slow]


def nvcc_version() -> str:
    script = cuda_resources.build_script()
    if script.nvcc() is None:
        pytest.skip("nvcc is not there")
    printed = subprocess.run([script.nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", printed)[1]


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> Path:
    nvcc_version()
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture(scope="module")
def measured(objects) -> list[tuple[str, ...]]:
    return cuda_resources.every_kernel(objects)


def test_every_kernel_is_there(measured):
    """Three sweeps of each kind in two forms. Statistics: plain for four sets of sums, general for all."""
    kernels = 3 * len(cuda_resources.KINDS) * 2 + 4 + 1
    script = cuda_resources.build_script()
    types, architectures = ({row[column] for row in measured} for column in (1, 2))
    assert types == set(script.CUDA_TYPES) and architectures == set(script.CUDA_ARCHITECTURES)
    pairs = len(cuda_resources.COMPILED)
    assert len(measured) == len({row[:3] for row in measured}) == pairs * kernels


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
    assert not changed, (
        "python tests/build/cuda_resources.py > tests/build/cuda_resources.tsv, and say why:\n"
        + "\n".join(map("\t".join, changed[:40]))
    )


def test_instructions_are_those_of_the_table(measured, objects):
    """Count in the objects that were compiled for `measured`."""
    if nvcc_version() != TABLE_MADE_BY:
        pytest.skip(f"the table was made by nvcc {TABLE_MADE_BY}, this is {nvcc_version()}")
    assert measured
    found = sass_budget.cuda_rows(list(sass_budget.TYPES), list(sass_budget.ARCHITECTURES), objects)
    changed = sass_budget.changes(found, "cuda")
    assert not changed, "python tests/build/sass_budget.py --write, and say why:\n" + "\n".join(changed[:40])


def test_the_library_links_and_asks_torch_for_its_stable_interface_alone(measured, objects):
    """Link against the toolkit's static runtime, as setup.py does.

    libtorch_cuda is absent here; the library needs one function of it.
    """
    script = cuda_resources.build_script()
    home, built = script.cuda_home(), [str(objects / f"{name}_90a.o") for name, _ in script.cuda_kernels()]
    for source, name, flags in script.cuda_plain():
        built.append(str(objects / f"{name}.o"))
        includes = [part for path in include_paths() for part in ("-isystem", path)]
        subprocess.run(
            [
                "g++",
                *script.FLAGS,
                "-fPIC",
                *flags,
                *includes,
                "-c",
                str(script.CSRC / source),
                "-o",
                built[-1],
            ],
            check=True,
        )
    library = objects / "_cuda.abi3.so"
    folders = [f"-L{path}" for path in (home / "lib64", home / "lib", *library_paths())]
    subprocess.run(
        [
            "g++",
            "-shared",
            *built,
            "-o",
            str(library),
            *folders,
            "-ltorch_cpu",
            "-lcudart_static",
            "-lrt",
            "-ldl",
            "-lpthread",
        ],
        check=True,
    )
    printed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    of_torch = {name for name in re.findall(r" U (\w+)", printed) if "torch" in name}
    assert "aoti_torch_get_current_cuda_stream" in of_torch
    assert not [name for name in of_torch if not name.startswith(("aoti_torch_", "torch_"))], (
        "C++ symbols of torch differ from version to version"
    )


def test_the_sources_stay_small():
    lines = sum(len(path.read_text().splitlines()) for path in SOURCES.iterdir())
    assert lines <= 1440  # 1030 before rows of a near and of a far teacher had loops of their own
