"""The Triton kernels compile for sm_80, sm_90 and sm_100 without a GPU.

None spills, and aligned rows are read 16 bytes at a time. Kept columns are read one entry at a time.

compile_kernels.py --write has compiled all variants for its tables; the slow tests compile a sample of them.
"""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parent))
import compile_kernels
import sass_budget
import triton

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MENDED_BY = "look at what changed and why, then: python tests/build/compile_kernels.py --write"

pytestmark = pytest.mark.build


def run(*command: object) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout.splitlines()


# ---------------------------------------------------------------- the tables


def test_the_table_is_of_these_kernels():
    table = compile_kernels.read_table()
    assert table.kernels == compile_kernels.digest(), f"the kernels have changed; {MENDED_BY}"
    variants = compile_kernels.variants()
    named = {compile_kernels.key(vars(variant)) for variant in variants}
    assert table.used.keys() == named, MENDED_BY
    counted = {
        compile_kernels.budget_key(variant) for variant in variants if compile_kernels.budgeted(variant)
    }
    lines = {tuple(row[:4]) for row in sass_budget.read_table() if row[0] == "triton"}
    assert lines == counted, MENDED_BY


def rows_of_the_table() -> list[dict]:
    """Return the lines as compile_kernels.py measured them."""
    types = {field.name: field.type for field in fields(compile_kernels.Variant)}
    cast = {"int": int, "bool": "True".__eq__, "str": str}
    return [
        {
            **{name: cast[types[name]](cell) for name, cell in zip(types, key, strict=True)},
            **dict(zip(compile_kernels.USED, used, strict=True)),
        }
        for key, used in compile_kernels.read_table().used.items()
    ]


@pytest.fixture(scope="module")
def sample() -> list[dict]:
    return [json.loads(line) for line in run(HERE / "compile_kernels.py", "--sample")]


@pytest.fixture(params=["table", pytest.param("sample", marks=pytest.mark.slow)])
def compiled(request) -> list[dict]:
    """All variants under the table's version of Triton, then some under the installed one."""
    return rows_of_the_table() if request.param == "table" else request.getfixturevalue("sample")


def test_every_kernel_kind_and_architecture_is_there():
    rows = rows_of_the_table()
    seen = {(row["arch"], row["kernel"], row["kind"]) for row in rows}
    assert {(arch, "fused", kind) for arch in (80, 90, 100) for kind in range(7)} <= seen
    assert {(90, "grad", kind) for kind in range(7)} | {(90, "dot", kind) for kind in range(2, 6)} | {
        (90, "stats", kind) for kind in (0, 1, 2, 6)
    } <= seen
    assert {(arch, kernel, 0) for arch in (80, 90, 100) for kernel in ("norms", "gather")} <= seen
    options = {
        (row["arch"], row["kind"])
        for row in rows
        if row["kernel"] == "fused" and row["clip"] and row["policy"] and row["form"] == "mixed"
    }
    assert options == {(arch, kind) for arch in (80, 90, 100) for kind in range(7)}


def test_no_kernel_spills(compiled):
    spilled = [row for row in compiled if row["STACK"] or row["LOCAL"]]
    assert not spilled, "\n".join(map(str, spilled))


def test_two_blocks_fit_on_a_multiprocessor(compiled):
    """65536 registers, blocks of at most 256 threads."""
    greedy = [row for row in compiled if row["REG"] > 128 and row["dtype"] != "fp64"]
    assert not greedy, "\n".join(map(str, greedy))


def test_aligned_rows_are_read_in_vectors(compiled):
    narrow = [
        row
        for row in compiled
        if row["aligned"] and row["dtype"] != "fp64" and row["kernel"] != "gather" and not row["vector_loads"]
    ]
    assert not narrow, "\n".join(map(str, narrow))
    assert not any(row["vector_loads"] for row in compiled if not row["aligned"])


# ---------------------------------------------------------------- compiled here


@pytest.mark.slow
def test_resources_and_instructions_are_those_of_the_tables(sample):
    """Under the version of Triton that wrote them; the tests above take the sample under any other."""
    table = compile_kernels.read_table()
    if table.triton != triton.__version__:
        pytest.skip(f"the table is of triton {table.triton}, this is {triton.__version__}")
    assert {row["kind"] for row in sample} == set(range(7))
    assert {row["kernel"] for row in sample} == {"fused", "stats", "dot", "grad", "norms", "gather"}
    changed = compile_kernels.changes(sample, whole=False)
    assert not changed, MENDED_BY + "\n" + "\n".join(changed[:40])


@pytest.mark.slow
def test_the_launches_bind_their_arguments():
    lines = [line.split() for line in run(HERE / "bind_kernels.py")]
    sweeps = ["_row_fused_kernel", "_row_stats_kernel", "_row_dot_kernel", "_row_grad_kernel"]
    columns = ["_column_norms_kernel", "_gather_columns_kernel"]
    assert [name for name, _ in lines] == [*sweeps, *columns] * 3
    compiled = [name for name, how in lines if how == "compiled"]
    assert compiled == [*sweeps, *columns, sweeps[0], *columns]
