"""`opsd bench` from the command line."""

import json

import pytest
from typer.testing import CliRunner

from opsd_kernels import cli
from opsd_kernels.bench import command, runner
from opsd_kernels.bench.measure import context
from opsd_kernels.bench.report.results import load
from opsd_kernels.bench.suites import step

TINY = "N=64,H=32,V=501"
QUICK = ("--quick", "--device", "cpu")
TWO_PROVIDERS = ("--provider", "opsd", "--provider", "torch")


def opsd(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setitem(context.EFFORT, ("cpu", True), ((3, 3), 0.1))


SLOWER = ("memory", "scaling", "step", "accuracy")
TIMED = [name for name in runner.SUITES if name not in SLOWER]


@pytest.mark.slow
@pytest.mark.parametrize("suite", TIMED)
def test_a_suite_prints_and_writes(suite, tmp_path):
    file = tmp_path / "a.json"
    result = opsd("bench", "--suite", suite, *QUICK, "--shape", TINY, *TWO_PROVIDERS, "--json", file)
    assert result.exit_code == 0, result.output
    report = load(file)
    measured = [row for row in report.rows if row.reason is None]
    assert measured and {row.suite for row in report.rows} == {suite}
    assert all(row.ms.median > 0 for row in measured)
    assert not [row.reason for row in report.rows if row.reason and "no number" in row.reason]
    output = result.output.replace("\n", " ")
    assert report.commit[:12] in output and report.machine["name"].split(",")[0] in output


# Each size costs a process. Plain PyTorch runs out of memory at the second, the op not at the third.
SHAPES = {"memory": ("--shape", TINY), "scaling": ("--shape", "N=512,H=32,V=8001")}


@pytest.mark.slow
@pytest.mark.usefixtures("forked_peaks")
@pytest.mark.parametrize("suite", SLOWER)
def test_the_slower_suites(suite, tmp_path, monkeypatch):
    monkeypatch.setitem(step.MODELS, ("cpu", True), step.Model(64, 501, 1, 2, 4, 4))
    file, shape = tmp_path / "a.json", SHAPES.get(suite, ())
    result = opsd("bench", "--suite", suite, *QUICK, *shape, *TWO_PROVIDERS, "--json", file)
    assert result.exit_code == 0, result.output
    rows = load(file).rows
    assert [row for row in rows if row.reason is None]
    if suite == "scaling":
        walked = [(row.provider, row.N) for row in rows if row.reason is None]
        assert walked == [("torch", 512), ("opsd", 512), ("opsd", 2048), ("opsd", 8192)]


def test_plots_and_compare(tmp_path):
    pytest.importorskip("matplotlib")
    a, b, plots = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "plots"
    arguments = ("--suite", "ratios", *QUICK, "--shape", TINY, "--provider", "opsd")
    assert opsd("bench", *arguments, "--json", a, "--plots", plots).exit_code == 0
    assert sorted(path.name for path in plots.iterdir()) == ["latency.png", "roofline.png"]
    data = json.loads(a.read_text())
    for row in data["rows"]:
        row["gradient_error"] = 9.0 if row["provider"] == "opsd" else None
    b.write_text(json.dumps(data))
    assert opsd("bench", "compare", a, a).exit_code == 0
    result = opsd("bench", "compare", a, b)
    assert result.exit_code == 1 and "less exact" in result.output.replace("\n", " ")


def test_the_recorded_command_leaves_the_files_out():
    given = ["--suite", "ratios", "--json", "a.json", "--quick", "--plots=b"]
    assert command.without_outputs(given) == ["--suite", "ratios", "--quick"]


def test_profile_writes_a_trace_and_a_table(tmp_path):
    result = opsd("bench", "--profile", tmp_path, "--device", "cpu", "--shape", TINY)
    assert result.exit_code == 0, result.output
    assert [path.suffixes for path in tmp_path.iterdir()] == [[".json", ".gz"]]
    assert "GEMMs" in result.output and "Where a step goes" in result.output


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("--suite", "nothing"), "suite: expected one of 'ratios'"),
        (("--provider", "unknown"), "provider: expected one of"),
        (("--dtype", "int8"), "dtype: expected one of"),
        (("--shape", "large"), "shape: expected one of"),
        (("compare", "/nowhere/a.json", "/nowhere/b.json"), "No such file"),
    ],
)
def test_a_mistake_is_one_line(arguments, says):
    result = (
        opsd("bench", "--device", "cpu", *arguments)
        if arguments[0] != "compare"
        else opsd("bench", *arguments)
    )
    assert result.exit_code == 2 and says in result.output and len(result.output.strip().splitlines()) == 1
