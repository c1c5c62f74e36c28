"""The `opsd` command as a user meets it: output, exit codes, and one clean line for each mistake."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import opsd_kernels
from opsd_kernels import cli, doctor, env
from opsd_kernels._core import planner
from opsd_kernels._rows import backends
from opsd_kernels.train import commands, loop
from opsd_kernels.train.types import NonFiniteLoss, RunDirectoryError, TrainingInterrupted


def opsd(*arguments: str):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def run_opsd(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "opsd_kernels", *arguments]
    package = str(Path(opsd_kernels.__file__).parent.parent)
    environment = {**os.environ, **variables, "PYTHONPATH": package}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)


def test_version():
    result = opsd("--version")
    assert (result.exit_code, result.stdout) == (0, f"opsd_kernels {opsd_kernels.__version__}\n")


def test_help_lists_the_commands_that_exist_and_leaves_slow_libraries_alone():
    slow = ("transformers", "matplotlib", "triton", "tensorboard")
    code = (
        "import sys\nfrom opsd_kernels.cli import main\ntry:\n    main()\nfinally:\n"
        f"    print([m for m in {slow} if m in sys.modules], file=sys.stderr)"
    )
    package = str(Path(opsd_kernels.__file__).parent.parent)
    result = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, cwd=package, timeout=120
    )
    assert (result.returncode, result.stderr) == (0, "[]\n")
    assert re.findall(r"^  (\w+)  +[A-Z]", result.stdout, re.MULTILINE) == [
        "train",
        "report",
        "reproduce",
        "probe",
        "discover",
        "plan",
        "doctor",
        "bench",
    ]


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["trian"], ["trian", "train"]),
        (["plan", "--vocap", "10"], ["--vocap", "--vocab"]),
        (["plan", "--dtype", "int8"], ["--dtype", "bfloat16", "'int8'"]),
        (["plan", "--workspace", "lots"], ["--workspace", "256MiB", "'lots'"]),
        (["plan", "--workspace", "1KiB"], ["workspace_bytes", "1024"]),
        (["plan", "-N", "-3"], ["N", "-3"]),
        (["plan", "--hidden", "0"], ["--hidden", "1"]),
        (["plan", "--teacher-hidden", "0"], ["--teacher-hidden", "1"]),
        (["plan", "--factor", "nan"], ["--factor", "positive", "nan"]),
        (["plan", "--factor", "0"], ["--factor", "positive", "0.0"]),
        (["plan", "--gradient-tolerance", "1.5"], ["--gradient-tolerance", "1"]),
        (["plan", "--workspace", "9" * 400], ["--workspace", "256MiB"]),
        (["bench", "--threads", "0"], ["--threads", "1"]),
        (["bench", "--threads", str(2**31)], ["--threads", "4096"]),
        (["plan", "--device", "tpu"], ["--device", "'tpu'"]),
        (["train", "--set", "lerning_rate=1"], ["lerning_rate", "learning_rate"]),
        (["train", "--set", "steps=many"], ["steps", "many"]),
        (["train", "--set", "steps"], ["key=value", "steps"]),
        (["train", "gone.yaml"], ["gone.yaml"]),
        (["train", "--resume"], ["--out"]),
    ],
)
def test_a_mistake_gets_a_line_that_names_it_and_exit_code_2(monkeypatch, tmp_path, arguments, names):
    monkeypatch.chdir(tmp_path)
    result = opsd(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr and all(name in result.stderr for name in names), result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_ends_the_process_with_code_2(tmp_path):
    result = run_opsd("plan", "--dtype", "int8", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("opsd: error: --dtype") and "Traceback" not in result.stderr


def test_plan_prints_the_planners_numbers():
    options = [
        "-N",
        2048,
        "-V",
        32000,
        "--hidden",
        512,
        "--teacher-hidden",
        256,
        "--dtype",
        "fp32",
        "--two-heads",
        "--frozen",
        "--workspace",
        "64MiB",
    ]
    result = opsd("plan", *options, "--json")
    fields = {"shared_head": False, "trainable_head": False, "workspace_bytes": 64 << 20}
    expected = planner.plan(2048, 32000, 512, 256, cli.parse_dtype("float32"), **fields).as_dict()
    assert json.loads(result.stdout) == expected
    table = opsd("plan", *options).stdout
    assert str(expected["rows"]) in table and cli.readable("peak_bytes", expected["peak_bytes"]) in table


def test_plan_of_a_part_of_the_vocabulary():
    sizes = ["-N", 1024, "-V", 8000, "--hidden", 512, "--json"]
    fields = json.loads(opsd("plan", *sizes, "--teacher-vocab", 32000).stdout)
    told = {"shared_head": False, "heads": ("whole", "sliced")}
    assert fields == planner.plan(1024, 8000, 512, **told).as_dict()
    whole = json.loads(opsd("plan", *sizes, "--two-heads").stdout)
    assert fields["scratch_bytes"] == whole["scratch_bytes"] + 8000 * 512 * 2 + (2 << 20)
    for wrong, says in (
        (["--teacher-vocab", 7999], "at least --vocab, 8000"),
        (["--vocab-ranks", 2], "no --v"),
    ):
        result = opsd("plan", *sizes, "--teacher-vocab", 32000, *wrong)
        assert result.exit_code != 0 and says in " ".join(result.output.split())


def test_plan_of_heads_in_other_forms():
    sizes = ["-N", 1024, "-V", 32000, "--hidden", 512, "--frozen", "--json"]
    fields = json.loads(opsd("plan", *sizes, "--student-head", "quantised").stdout)
    told = {"trainable_head": False, "heads": ("quantised", "whole")}
    assert fields == planner.plan(1024, 32000, 512, **told).as_dict()
    whole = json.loads(opsd("plan", *sizes).stdout)
    assert fields["scratch_bytes"] == whole["scratch_bytes"] + (8 << 20) + (2 << 20)
    other = ["--two-heads", "--dtype", "fp32", "--teacher-head", "quantised", "--teacher-dtype", "bf16"]
    told = {"trainable_head": False, "shared_head": False, "heads": ("whole", "quantised")}
    expected = planner.plan(1024, 32000, 512, None, torch.float32, teacher_dtype=torch.bfloat16, **told)
    assert json.loads(opsd("plan", *sizes, *other).stdout) == expected.as_dict()
    for wrong, says in ((["--teacher-head", "packed"], "'sliced'"), (["--teacher-dtype", "int8"], "'int8'")):
        result = opsd("plan", *sizes, *wrong)
        assert result.exit_code != 0 and says in " ".join(result.output.split())


def test_plan_predicts_the_time_of_the_row_kernels():
    printed = " ".join(opsd("plan", "--device", "cuda", "--divergence", "jsd").stdout.split())
    assert "triton row kernels, H200" in printed and "of the copy bandwidth, bound by" in printed
    assert "H200" not in opsd("plan").stdout


@pytest.mark.parametrize(
    "text, value", [("1024", 1024), ("256MiB", 256 << 20), ("1.5 GiB", 3 << 29), ("2kb", 2000)]
)
def test_byte_sizes(text, value):
    assert cli.parse_bytes(text) == value


def test_doctor_tells_every_backend_with_its_reason(monkeypatch):
    monkeypatch.setenv("OPSD_BACKEND", "tirton")
    result = opsd("doctor")
    words = " ".join(result.stdout.split())
    assert result.exit_code == 0
    for name, reason in backends.explain("cpu").items():
        assert name in words and (reason or "usable").split()[0] in words
    assert all(variable.name in words for variable in env.VARIABLES) and "'tirton'" in words


@pytest.mark.parametrize(
    "variable, value, getter",
    [("OPSD_BACKEND", "tirton", env.BACKEND.get), ("OPSD_WORKSPACE_BYTES", "1GiB", env.workspace_bytes)],
)
def test_environment_errors_name_the_variable(monkeypatch, variable, value, getter):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"{variable}: expected .*'{value}'"):
        getter()
    monkeypatch.setenv(variable, "")
    assert getter() is None


NEEDS_TYPER = (
    "opsd: error: the command line needs typer: pip install 'opsd_kernels[cli]' (or [train] for opsd train)\n"
)


def test_without_typer_the_command_names_the_extra(tmp_path):
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(\"No module named 'typer'\", name='typer')")
    package = str(Path(opsd_kernels.__file__).parent.parent)
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {package!r}]; from opsd_kernels.cli import main"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr == NEEDS_TYPER


BARE = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("typer", "rich", "click", "transformers", "triton"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import importlib.util
find = importlib.util.find_spec
hidden = ("typer", "rich", "transformers", "triton")
importlib.util.find_spec = lambda name, package=None: None if name in hidden else find(name, package)
from opsd_kernels.__main__ import main
main()
"""


def run_bare(*arguments: str) -> subprocess.CompletedProcess:
    """`opsd` where only torch and numpy are installed."""
    package = str(Path(opsd_kernels.__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-c", BARE, *arguments], capture_output=True, text=True, cwd=package, timeout=120
    )


def test_doctor_runs_on_the_bare_package():
    result = run_bare("doctor")
    assert (result.returncode, result.stderr) == (0, "")
    assert all(variable.name in result.stdout for variable in env.VARIABLES)
    assert re.search(r"^  torch +\d", result.stdout, re.MULTILINE) and re.search(
        r"^  triton +triton is not installed$", result.stdout, re.MULTILINE
    )
    assert [line for line in result.stdout.splitlines() if line and line[0] != " "] == [
        section.title for section in doctor.sections()
    ]


def test_other_commands_name_the_extra_on_the_bare_package():
    result = run_bare("plan")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == NEEDS_TYPER


def test_resume_command_can_be_typed(monkeypatch):
    monkeypatch.setattr(commands.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", [".venv/bin/opsd"])
    assert commands.resume_command(Path("runs/my run")) == ".venv/bin/opsd train --out 'runs/my run' --resume"


def test_run_directories_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = commands.new_run_directory("secret_op")
    first.mkdir(parents=True)
    assert commands.new_run_directory("secret_op") != first and first.parent == Path("runs")


@pytest.mark.parametrize(
    "error, code, words",
    [
        (TrainingInterrupted("stopped after step 3"), 130, ["stopped after step 3", "--out runs/a --resume"]),
        (TrainingInterrupted("stopped", signal.SIGTERM), 143, ["stopped", "--out runs/a --resume"]),
        (KeyboardInterrupt(), 130, ["the last checkpoint counts", "--out runs/a --resume"]),
        (NonFiniteLoss("step 4, rows 1 and 2"), 2, ["opsd: error: step 4, rows 1 and 2"]),
        (RunDirectoryError("out: not empty"), 2, ["opsd: error: out: not empty"]),
    ],
)
def test_a_run_that_ends_early_says_how_and_what_to_do(monkeypatch, tmp_path, error, code, words):
    def stop(config, out, resume):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "train", stop)
    result = opsd("train", "--out", "runs/a")
    assert result.exit_code == code
    assert all(word in result.stderr for word in words)


def test_settings_come_from_file_then_overrides_and_on_resume_from_the_run(monkeypatch, tmp_path):
    seen = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        loop, "train", lambda config, out, resume: seen.append((config.steps, config.seed, out, resume))
    )
    Path("my.yaml").write_text("steps: 7\nseed: 1\n")
    Path("run").mkdir()
    Path("run/config.json").write_text('{"steps": 9, "seed": 2}')
    assert opsd("train", "my.yaml", "--set", "seed=5", "--out", "a").exit_code == 0
    assert opsd("train", "--out", "run", "--resume").exit_code == 0
    assert seen == [(7, 5, Path("a"), False), (9, 2, Path("run"), True)]


def test_a_plan_of_no_tokens_has_no_shares():
    shown = opsd("plan", "-N", 0, "--device", "cuda")
    assert shown.exit_code == 0 and "%" not in shown.stdout
