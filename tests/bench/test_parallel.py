"""The projection of docs/scaling.md against numbers computed by hand, and the script behind its constants."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from opsd_kernels import cli, plan
from opsd_kernels.bench import parallel
from opsd_kernels.bench.pages.scaling import assumptions
from opsd_kernels.bench.pages.scaling.measured import measured_half
from opsd_kernels.bench.pages.scaling.report import REPORT, Measured
from opsd_kernels.bench.parallel import Link, LMHead, Machine, project
from opsd_kernels.bench.shapes import Setting, make_case

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "parallel.py"
HEAD = LMHead("made up", 1024, 32000)
# Round numbers, so that a reader can follow: 1 TFLOP/s; 1 ms and 1 GB/s, 2 ms and 2 GB/s, 4 ms and 4 GB/s.
MACHINE = Machine(1e12, Link(1e-3, 1e9), Link(2e-3, 2e9), Link(4e-3, 4e9))


@pytest.fixture(scope="module")
def scripts():
    """Imports modules of benchmarks/, whose scripts import each other by name."""
    sys.path.insert(0, str(SCRIPT.parent))
    yield importlib.import_module
    sys.path.remove(str(SCRIPT.parent))
    for name in [name for name in sys.modules if re.fullmatch("parallel(_[a-z]+)?", name)]:
        del sys.modules[name]


def test_a_projection_by_hand():
    made = project(HEAD, 20000, 4, 2, MACHINE, 1.25)
    assert (made.own_tokens, made.own_vocab) == (10000, 8000)
    chunks = plan(10000, 8000, 1024, device_type="cuda", workspace_bytes=1 << 30)
    assert made.plan == chunks and chunks.chunks > 1
    assert made.gemms == 4 * 2 * 10000 * 1024 * 8000 / 1e12  # 0.65536 s
    assert made.rest == made.gemms / 4
    assert made.gather_bytes == 8 * 4 * 10000 * 3 and made.gathers == chunks.chunks
    assert made.gather == chunks.chunks * 1e-3 + 960_000 / 1e9
    assert made.reduce_bytes == 1028 * 4 * 10000 * 2 * 3 / 4 and made.reduces == 4 * chunks.chunks
    assert made.reduce == 4 * chunks.chunks * 2e-3 + 61_680_000 / 2e9
    assert made.data_bytes == 8000 * 1024 * 2 and made.data == 4e-3 + 16_384_000 / 4e9
    assert made.seconds == made.gemms + made.rest + (made.gather + made.reduce + made.data)
    hidden, wide = 2 * 10000 * 1024 * 2, chunks.rows * 1024 * 2
    assert made.memory == 8000 * 1024 * 2 + hidden + chunks.peak_bytes + wide


def test_one_rank_sends_nothing():
    made = project(HEAD, 4096, 1, 1, MACHINE, 1.0)
    assert made.exchange == 0 and made.rest == 0 and made.wide_bytes == 0
    assert made.seconds == 4 * 2 * 4096 * 1024 * 32000 / 1e12


def test_the_slowest_rank_counts():
    made = project(LMHead("ragged", 64, 1001), 1001, 4, 3, MACHINE, 1.0)
    assert (made.own_vocab, made.own_tokens) == (251, 334)


def test_two_sweeps_two_heads_and_no_labels():
    plain, other = (
        project(HEAD, 4096, 2, 1, MACHINE, 1.0, **how)
        for how in ({}, {"one_sweep": False, "shared_head": False, "labels": False})
    )
    assert other.gather_bytes * 8 == plain.gather_bytes * 11 and other.gathers == 2 * other.plan.chunks
    assert other.reduce_bytes * 1028 == plain.reduce_bytes * 1024 and other.reduces == other.plan.chunks
    assert other.weight_bytes == 2 * plain.weight_bytes
    assert other.wide_bytes == 0  # its gradients are held in fp32 as it is


@pytest.mark.parametrize(
    "wrong, says",
    [({"tokens": 0}, "tokens"), ({"data_ranks": 0}, "data_ranks"), ({"overhead": 0.9}, "overhead")],
)
def test_errors_name_the_argument(wrong, says):
    arguments = {"tokens": 8, "vocab_ranks": 1, "data_ranks": 1, "machine": MACHINE, "overhead": 1.0, **wrong}
    with pytest.raises(ValueError, match=f"^{says}: expected"):
        project(HEAD, **arguments)


def test_at_the_crossover_both_ways_exchange_alike():
    machine = Machine(1.0, Link(0, 3e9), Link(0, 5e9), Link(0, 7e9))  # without latencies
    tokens = round(parallel.crossover_tokens(HEAD, 8, machine))
    ways = project(HEAD, tokens, 8, 1, machine, 1.0), project(HEAD, tokens, 1, 8, machine, 1.0)
    assert abs(ways[0].exchange / ways[1].exchange - 1) < 1 / tokens
    equal = Machine(1.0, *[Link(0, 1e9)] * 3)
    assert (
        abs(parallel.crossover_tokens(LMHead("large", 1 << 16, 1 << 17), 2, equal) / (1 << 16) - 1) < 1e-3
    )  # V / 2


def test_data_ranks_leave_a_node_by_all_adapters_that_they_have_there():
    share = assumptions.REACHED.value
    assert assumptions.gpus(2, 4).data == assumptions.gpus(8, 1).gather == assumptions.INSIDE
    assert [assumptions.gpus(ranks, 64 // ranks).data.bandwidth / share for ranks in (1, 2, 4, 8)] == [
        400e9,
        200e9,
        100e9,
        50e9,
    ]
    with pytest.raises(ValueError, match="vocab_ranks: expected a divisor of 8"):
        assumptions.gpus(3, 1)


def test_a_line_is_found_again():
    link = Link(2e-4, 1.5e9)
    found, off = parallel.fit_link([(x, link.seconds(1, x)) for x in (1e3, 1e5, 1e7)])
    assert abs(found.latency / link.latency - 1) + abs(found.bandwidth / link.bandwidth - 1) + off < 1e-9
    assert parallel.fit_link([(1e3, 1e-3), (1e6, 2e-3), (1e7, 1e-2)])[1] > 0.01
    with pytest.raises(ValueError, match="two sizes"):
        parallel.fit_link([(1e3, 1e-3)] * 2)


def test_what_is_sent_is_what_the_projection_counts(scripts):
    for found in scripts("parallel_shards").exchanges(2):
        one_sweep, H, statistics = found["divergence"] == "reverse_kl", found["H"], found["statistics"]
        narrow = found["dtype"] == "bfloat16"
        kinds = [kind for kind, _ in found["per_row"]]
        sent = {
            kind: sum(numbers for at, numbers in found["per_row"] if at == kind)
            for kind in ("gather", "reduce")
        }
        assert found["chunks"] > 1
        assert sent["gather"] == parallel.gathered_numbers(one_sweep, statistics)
        assert sent["reduce"] == parallel.reduced_numbers(H, found["labels"], narrow, statistics)
        assert (kinds.count("gather"), kinds.count("reduce")) == parallel.chunk_calls(
            one_sweep, found["labels"], narrow, statistics
        )


def test_a_wrong_shard_gets_no_number(scripts, monkeypatch):
    groups, setting = scripts("parallel_groups"), Setting(8, 32, 501)
    gate = groups.Gate(setting)
    gate.errors(groups.emulated(gate.case, "reverse_kl", 3))
    # Each rank's own part in place of the sum.
    monkeypatch.setattr(groups.VocabShard, "sum_hidden_grad", lambda shard, dh: dh.mul_(shard.group.size()))
    with pytest.raises(AssertionError, match="student_hidden"):
        scripts("parallel_shards").shard_rows(setting, ranks_list=(1, 2, 3), rounds=3)


def test_an_error_in_one_rank_reaches_the_caller(scripts, monkeypatch):
    def fails(shard, dh):
        if shard.rank == 1:
            raise RuntimeError("planted")

    groups = scripts("parallel_groups")
    monkeypatch.setattr(groups.VocabShard, "sum_hidden_grad", fails)
    with pytest.raises(RuntimeError, match="planted"):
        groups.emulated(make_case(Setting(8, 32, 501)), "reverse_kl", 3)


def test_the_script_measures(tmp_path):
    path = tmp_path / "some-cpu" / REPORT
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    report = json.loads(path.read_text())
    assert {"kind", "machine", "versions", "commit", "command", "date"} <= report.keys() and report[
        "kind"
    ] == "parallel"
    assert {row["provider"] for row in report["rows"]} == {"gemms", "op", "group", "added"}
    assert all("ms" in row and "reason" not in row for row in report["rows"])
    assert set(report["links"]) == {"gather", "reduce", "data"} and len(report["runs"]) == 1
    measured = Measured(path)
    assert (
        measured.predicted(report["runs"][0], "vocabulary").data_bytes
        == 0
        < measured.predicted(report["runs"][0], "data").data_bytes
    )
    half = measured_half(measured)
    assert "benchmarks/parallel.py --quick" in half and report["commit"][:12] in half


def test_the_worked_cell_adds_up():
    """The arithmetic of the committed page, repeated from its text."""
    text = (ROOT / "docs" / "scaling.md").read_text().replace(",", "")
    found = re.search(
        r"GEMMs: (\d+) x 2 x (\d+) x (\d+) x (\d+) = (\S+) TFLOP over (\S+) TFLOP/s: (\S+) ms", text
    )
    passes, tokens, H, V, tflop, rate, ms = map(float, found.groups())
    assert abs(passes * 2 * tokens * H * V / 1e12 - tflop) < 0.01 and abs(1e3 * tflop / rate - ms) < 0.02
    parts, total = re.search(r"Together (.*?) = \*\*(\S+) ms", text).groups()
    assert abs(sum(float(part) for part in parts.split(" + ")) - float(total)) < 0.01
    options, chunks, rows = re.search(r"`opsd (plan [^`]*)`: (\d+) chunks of (\d+) rows", text).groups()
    made = json.loads(CliRunner().invoke(cli.app, [*options.split(), "--json"]).output)
    assert (made["chunks"], made["rows"], made["tokens"], made["flops"]) == (
        int(chunks),
        int(rows),
        tokens,
        passes * 2 * tokens * H * V,
    )
    sizes, whole = re.search(r"Memory: (.*?): \*\*(\S+) GiB", text).groups()
    assert abs(sum(float(size) for size in re.findall(r"(\S+) GiB", sizes)) - float(whole)) < 0.01


def test_opsd_plan_of_a_rank_is_that_of_its_share():
    options = ["plan", "-N", "20001", "-V", "128256", "--hidden", "8192", "--device", "cuda", "--json"]
    result = CliRunner().invoke(cli.app, [*options, "--vocab-ranks", "16", "--data-ranks", "2"])
    assert (
        result.exit_code == 0
        and json.loads(result.output) == plan(10001, 8016, 8192, device_type="cuda").as_dict()
    )
    result = CliRunner().invoke(cli.app, [*options, "--vocab-ranks", "0"])
    assert result.exit_code != 0


def report_with(tmp_path, **ratios):
    """Return the committed report with other ratios, each with a quartile range of `spread`."""
    found = sorted((ROOT / "benchmarks" / "results").glob(f"*/{REPORT}"))[0]
    report = json.loads(found.read_text())
    for row in report["rows"]:
        if row["provider"] in ("op", "group"):
            middle, half = ratios[row["provider"]], ratios["spread"] / 2
            row["ratio"] = {"median": middle, "q1": middle - half, "q3": middle + half, "n": 5}
            row.pop("noise", None)
            row |= {"noise": "the machine was too noisy"} if half else {}
    path = tmp_path / REPORT
    path.write_text(json.dumps(report))
    return Measured(path)


def test_a_group_costs_at_least_what_one_rank_does(tmp_path):
    quiet = report_with(tmp_path, op=1.04, group=1.07, spread=0.0)
    assert (quiet.overhead(1), quiet.overhead(8)) == (1.04, 1.07) and quiet.warning == ""
    assert report_with(tmp_path, op=1.04, group=1.02, spread=0.0).overhead(8) == 1.04
    # A ratio below 1 is noise.
    assert report_with(tmp_path, op=0.97, group=0.98, spread=0.0).overhead(8) == 1.0


def test_a_busy_machine_is_named(tmp_path):
    busy = report_with(tmp_path, op=1.04, group=1.07, spread=0.6)
    assert "too busy" in busy.warning and "5 of the 5 ratios" in busy.warning
