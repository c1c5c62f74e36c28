"""The CUDA kernels compile for every architecture without a GPU and without a warning.

None spills. cuda_resources.py --write has compiled all of them for its tables; the slow tests compile a
sample.
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

SCRIPT = cuda_resources.build_script()
SOURCES = SCRIPT.CSRC / "cuda"
MENDED_BY = "look at what changed and why, then: python tests/build/cuda_resources.py --write"

pytestmark = pytest.mark.build


# ---------------------------------------------------------------- the table


def test_the_table_is_of_these_sources():
    table = cuda_resources.read_table()
    assert table.sources == SCRIPT.cuda_sources(), f"the kernels have changed; {MENDED_BY}"
    lines = {tuple(row[:4]) for row in sass_budget.read_table() if row[0] == "cuda"}
    counted = set(filter(None, map(budget_key, table.rows)))
    # Not every other kernel has a loop over whole vectors.
    vectors = {key for key in counted if re.fullmatch(r"(fused|grad) \w+ plain", key[1])}
    assert len(vectors) == 4 * 2 * len(cuda_resources.KINDS) and vectors <= lines <= counted, MENDED_BY


def budget_key(row: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the first cells of a kernel's lines in sass_budget.py's table, which has some types alone."""
    kernel, type, architecture = row[:3]
    if type not in sass_budget.TYPES or architecture.rstrip("a") not in sass_budget.ARCHITECTURES:
        return None
    return ("cuda", kernel, sass_budget.TYPES[type][0], architecture.rstrip("a"))


def test_every_kernel_is_there():
    """Three sweeps of each kind in two forms. Statistics: plain for four sets of sums, general for all."""
    rows = cuda_resources.read_table().rows
    kernels = 3 * len(cuda_resources.KINDS) * 2 + 4 + 1
    types, architectures = ({row[column] for row in rows} for column in (1, 2))
    assert types == set(SCRIPT.CUDA_TYPES) and architectures == set(SCRIPT.CUDA_ARCHITECTURES)
    pairs = len(cuda_resources.COMPILED)
    assert len(rows) == len({row[:3] for row in rows}) == pairs * kernels


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    if cuda_resources.nvcc_version() is None:
        pytest.skip("nvcc is not there")
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture(scope="module")
def sample(folder) -> list[tuple[str, ...]]:
    return cuda_resources.compile_sample(folder)


@pytest.fixture(params=["table", pytest.param("sample", marks=pytest.mark.slow)])
def measured(request) -> list[tuple[str, ...]]:
    """All kernels under the table's version of nvcc, then some under the installed one."""
    if request.param == "table":
        return cuda_resources.read_table().rows
    return request.getfixturevalue("sample")


def test_no_kernel_spills(measured):
    spilled = [row for row in measured if row[4] != "0" or row[5] != "0"]
    assert not spilled, "\n".join(map("\t".join, spilled))


def test_two_blocks_fit_on_a_multiprocessor(measured):
    """65536 registers, blocks of at most 256 threads."""
    greedy = [row for row in measured if int(row[3]) > 128]
    assert not greedy, "\n".join(map("\t".join, greedy))


# ---------------------------------------------------------------- compiled here


@pytest.mark.slow
def test_resources_and_instructions_are_those_of_the_tables(sample, folder):
    table, version = cuda_resources.read_table(), cuda_resources.nvcc_version()
    if version != table.nvcc:
        pytest.skip(f"the table was made by nvcc {table.nvcc}, this is {version}")
    chosen = {(kernel, *pair) for pair, kernels in cuda_resources.sample().items() for kernel in kernels}
    assert {row[:3] for row in sample} == chosen
    assert {row[1:3] for row in sample} == set(cuda_resources.COMPILED)
    lines = [
        line
        for type, architecture in cuda_resources.COMPILED
        if type in sass_budget.TYPES and architecture.rstrip("a") in sass_budget.ARCHITECTURES
        for line in sass_budget.of_binary(
            folder / f"{type}_{architecture}.cubin", type, architecture.rstrip("a")
        )
    ]
    assert lines
    changed = ["\t".join(row) for row in sorted(set(sample) - set(table.rows))]
    changed += sass_budget.changes(lines, "cuda", set(filter(None, map(budget_key, sample))))
    assert not changed, MENDED_BY + "\n" + "\n".join(changed[:40])


@pytest.mark.slow
def test_the_library_links_and_asks_torch_for_its_stable_interface_alone(folder):
    """Link against the toolkit's static runtime, as setup.py does, with the kernels of one type as PTX.

    libtorch_cuda is absent here; the library needs one function of it.
    """
    (name, macros), *others = SCRIPT.cuda_kernels()
    built = [folder / f"{name}.o"]
    command = [SCRIPT.nvcc(), *SCRIPT.CUDA_FLAGS, "-gencode=arch=compute_90a,code=compute_90a"]
    command += ["-Xcompiler", "-fPIC,-fvisibility=hidden", *macros]
    subprocess.run([*command, "-c", SOURCES / "rows.cu", "-o", built[0]], check=True)
    includes = [part for path in include_paths() for part in ("-isystem", path)]
    for source, name, flags in SCRIPT.cuda_plain():
        built.append(folder / f"{name}.o")
        command = ["g++", *SCRIPT.FLAGS, "-fPIC", *flags, *includes]
        subprocess.run([*command, "-c", SCRIPT.CSRC / source, "-o", built[-1]], check=True)
    library, home = folder / "_cuda.abi3.so", SCRIPT.cuda_home()
    folders = [f"-L{path}" for path in (home / "lib64", home / "lib", *library_paths())]
    libraries = ["-ltorch_cpu", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    subprocess.run(["g++", "-shared", *built, "-o", library, *folders, *libraries], check=True)
    printed = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    names = set(re.findall(r" U (\w+)", printed))
    runs = sorted(re.search(r"run_\w+?\d+", name)[0] for name in names if "opsd" in name)
    expected = sorted(macros[1].rpartition("=")[2] for _, macros in others)
    assert runs == expected, "the library lacks other functions than the kernels of the other types"
    of_torch = {name for name in names if "torch" in name}
    assert "aoti_torch_get_current_cuda_stream" in of_torch
    assert not [name for name in of_torch if not name.startswith(("aoti_torch_", "torch_"))], (
        "C++ symbols of torch differ from version to version"
    )


def test_the_sources_stay_small():
    lines = sum(len(path.read_text().splitlines()) for path in SOURCES.iterdir())
    assert lines <= 1440  # 1030 before rows of a near and of a far teacher had loops of their own
