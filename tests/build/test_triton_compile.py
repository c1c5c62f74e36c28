"""The Triton kernels compile for sm_80, sm_90 and sm_100 without a GPU.

None spills, and aligned rows are read 16 bytes at a time. Kept columns are read one entry at a time.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
SCRIPT = Path(__file__).resolve().parent / "compile_kernels.py"
ROOT = SCRIPT.parent.parent.parent
SHARDS = 2

pytestmark = [pytest.mark.build, pytest.mark.slow]


def start(*command: object) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def compiled():
    started = [start(SCRIPT, shard, SHARDS) for shard in range(SHARDS)]
    rows = []
    for process in started:
        output, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors[-6000:]
        rows += [json.loads(line) for line in output.splitlines()]
    return rows


def test_every_kernel_kind_and_architecture_is_there(compiled):
    seen = {(row["arch"], row["kernel"], row["kind"]) for row in compiled}
    assert {(arch, "fused", kind) for arch in (80, 90, 100) for kind in range(7)} <= seen
    assert {(90, "grad", kind) for kind in range(7)} | {(90, "dot", kind) for kind in range(2, 6)} | {
        (90, "stats", kind) for kind in (0, 1, 2, 6)
    } <= seen
    assert {(arch, kernel, 0) for arch in (80, 90, 100) for kernel in ("norms", "gather")} <= seen
    options = {
        (row["arch"], row["kind"])
        for row in compiled
        if row["kernel"] == "fused" and row["clip"] and row["policy"] and row["form"] == "mixed"
    }
    assert options == {(arch, kind) for arch in (80, 90, 100) for kind in range(7)}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compile_kernels", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_resources_are_those_of_the_table(compiled, script):
    """Compare under the Triton version that wrote the table; the tests below cover the others.

    Look at a change, then write it: compile_kernels.py --write. Names of kernels after it: these alone.
    """
    version, table = script.read_table()
    if version != triton.__version__:
        pytest.skip(f"the table is of triton {version}, this is {triton.__version__}")
    found = {script.key(row): tuple(row[name] for name in script.USED) for row in compiled}
    changed = [
        f"{' '.join(key)}: {table.get(key)} -> {found.get(key)}"
        for key in sorted(table.keys() | found.keys())
        if table.get(key) != found.get(key)
    ]
    assert not changed, (
        f"{', '.join(script.USED)} differ from {script.TABLE.name} "
        "(python tests/build/compile_kernels.py --write):\n" + "\n".join(changed)
    )


def test_instructions_are_those_of_the_table(compiled, script):
    version, _ = script.read_table()
    if version != triton.__version__:
        pytest.skip(f"the table is of triton {version}, this is {triton.__version__}")
    changed = script.sass_budget.changes([line for row in compiled for line in row["sweeps"]], "triton")
    assert not changed, "python tests/build/sass_budget.py --write, and say why:\n" + "\n".join(changed[:40])


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


def test_the_launches_bind_their_arguments():
    process = start(SCRIPT.with_name("bind_kernels.py"))
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-6000:]
    names = [line.split()[0] for line in output.splitlines()]
    sweeps = ["_row_fused_kernel", "_row_stats_kernel", "_row_dot_kernel", "_row_grad_kernel"]
    assert names == [*sweeps, "_column_norms_kernel", "_gather_columns_kernel"] * 3
