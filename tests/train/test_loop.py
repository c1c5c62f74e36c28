"""Whole runs in this process: the files, the errors, and a model from a directory."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats

from opsd_kernels.train import loop
from opsd_kernels.train.config import ConfigError, TrainConfig, load_config
from opsd_kernels.train.config.presets import PRESETS
from opsd_kernels.train.envs import make_task
from opsd_kernels.train.loop import train
from opsd_kernels.train.models import warmstart
from opsd_kernels.train.records.log import MetricsLog, read_metrics
from opsd_kernels.train.sampling import evaluate
from opsd_kernels.train.types import NonFiniteLoss, RunDirectoryError

LEFT = [
    "checkpoint",
    "config.json",
    "curves.png",
    "metrics.jsonl",
    "report.html",
    "samples.jsonl",
    "summary.json",
]
SUMMARY = [
    f"{name}_{when}"
    for name in ("held_out_accuracy", "self_teacher_accuracy", "untrained_skill")
    for when in ("before", "after")
]
MACHINE = {"seconds", "peak_memory_bytes"}
FACTS = {"steps", "held_out_gain_interval", *MACHINE}


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, train(config, out)


def test_a_run_leaves_what_it_promises(run, config):
    out, summary = run
    assert sorted(path.name for path in out.iterdir()) == LEFT
    assert json.loads((out / "summary.json").read_text()) == summary
    assert set(summary) == {*SUMMARY, *FACTS}
    low, high = summary["held_out_gain_interval"]
    gain = summary["held_out_accuracy_after"] - summary["held_out_accuracy_before"]
    assert -1 <= low < gain < high <= 1 and summary["peak_memory_bytes"] > 100 << 20
    assert load_config(out / "config.json") == config
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_interval_of_a_gain_is_newcombes():
    before, after = (stats.binomtest(count, 80).proportion_ci(method="wilson") for count in (48, 56))
    low, high = evaluate.gain_interval(48 / 80, 56 / 80, 80)
    assert low == pytest.approx(0.1 - math.hypot(0.7 - after.low, before.high - 0.6))
    assert high == pytest.approx(0.1 + math.hypot(after.high - 0.7, 0.6 - before.low))
    assert evaluate.gain_interval(0.0, 1.0, 10)[1] == pytest.approx(1.0)


def test_metrics_have_a_line_a_step(run, config):
    lines = read_metrics(run[0] / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, config.steps + 1))
    always = {
        "reward",
        "divergence",
        "divergence_p95",
        "student_entropy",
        "teacher_entropy",
        "sampled_logprob_gap",
        "top1_agreement",
        "tokens_in_loss",
    }
    always |= {
        "groups_with_success",
        "samples_with_demonstration",
        "samples_with_feedback",
        "tokens_per_second",
        "grad_norm",
        "learning_rate",
    }
    assert all(always <= set(line) for line in lines)
    assert all(line["divergence"] > 0 and 0 < line["tokens_in_loss"] <= 1 for line in lines)
    assert ["held_out_accuracy" in line for line in lines] == [
        line["step"] == config.eval_every for line in lines
    ]


def test_a_directory_is_never_overwritten(run, config, tmp_path):
    out, summary = run
    with pytest.raises(RunDirectoryError, match="not empty; --resume continues"):
        train(config, out)
    with pytest.raises(RunDirectoryError, match="seed: 1 here, 0 there"):
        train(dataclasses.replace(config, seed=1), out, resume=True)
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        train(config, tmp_path / "none", resume=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="holds no config.json"):
        train(config, tmp_path, resume=True)
    with pytest.raises(RunDirectoryError, match="got the file"):
        train(config, tmp_path / "notes.txt")
    assert train(config, out, resume=True) == summary, "a complete run is not run again"


def test_settings_of_the_process_come_back(config, tmp_path):
    torch.set_num_threads(2)
    with pytest.raises(ConfigError, match="model: expected 'tiny', .* or a Hugging Face model"):
        train(dataclasses.replace(config, model=str(tmp_path)), tmp_path / "out")
    assert torch.get_num_threads() == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"device": "cuda"}, "device: expected 'cpu'"),
        ({"backend": "cuda"}, "backend: expected one that is usable"),
    ],
)
def test_what_the_machine_lacks_claims_no_directory(config, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(dataclasses.replace(config, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_from_a_directory_takes_the_same_path(run, config, task, tmp_path, capsys):
    folder = warmstart.cache_folder(config)
    summary = train(dataclasses.replace(config, model=str(folder)), tmp_path / "out")
    whole = run[1]
    assert {k: v for k, v in summary.items() if k not in MACHINE} == {
        k: v for k, v in whole.items() if k not in MACHINE
    }


METHODS = [
    {"teacher": "frozen"},
    {"feedback": "marks", "divergence": "jsd", "teacher": "trust_region", "rehearsal_prompts": 0},
    {"feedback": "none", "reduction": "sequence_mean"},
    {
        "teacher": "live",
        "topk": 5,
        "token_weights": "MeanOne(PrefixDiscrepancy(0.5))",
        "updates_per_batch": 2,
    },
    {
        "teacher": "external",
        "teacher_model": "tiny",
        "context": "none",
        "objective": "sampled_token",
        "teacher_accuracy": 1e-3,
    },
    {"context": "failure", "feedback": "none", "control": "unrelated", "policy_weight": 0.5},
    {"policy_weight": 1.0, "rehearsal_prompts": 0},
]


@pytest.mark.parametrize("changes", METHODS, ids=lambda changes: " ".join(map(str, changes.values())))
def test_other_settings_run(config, tmp_path, changes):
    train(dataclasses.replace(config, **{**changes, "steps": 2, "checkpoint_every": 2}), tmp_path / "out")
    lines = read_metrics(tmp_path / "out" / "metrics.jsonl")
    if changes.get("policy_weight") == 1:
        assert all(line["divergence"] is None and line["student_entropy"] > 0 for line in lines)
    else:  # few successes, so without feedback few contexts, and steps without a loss
        assert all((line["divergence"] is None) == (line["samples_in_loss"] == 0) for line in lines)
        assert changes.get("feedback") == "none" or all(line["divergence"] > 0 for line in lines)
    rehearsed = changes.get("rehearsal_prompts", config.rehearsal_prompts) > 0
    assert all(("rehearsal_loss" in line) == (rehearsed and line["loss"] is not None) for line in lines)


@pytest.mark.parametrize("name", ["expr", "mastermind", "chain", "plan"])
def test_other_environments_run(config, tmp_path, name):
    settings = dataclasses.replace(
        config, **{"env": name, **PRESETS[name], "warm_accuracy": 1e-30, "steps": 1}
    )
    summary = train(settings, tmp_path / "out")
    assert set(summary) == {*SUMMARY, *FACTS}
    assert read_metrics(tmp_path / "out" / "metrics.jsonl")[0]["divergence"] > 0


def test_rehearsal_needs_something_to_rehearse(config, tmp_path, monkeypatch):
    task = make_task(config)
    task.rehearsal = []
    monkeypatch.setattr(loop, "checked_task", lambda _: task)
    with pytest.raises(
        ConfigError, match="rehearsal_prompts: expected 0, as secret_op has no problems to rehearse"
    ):
        train(config, tmp_path / "out")


def test_a_loss_that_is_not_finite_stops_after_saving(config, tmp_path):
    out = tmp_path / "out"
    train(dataclasses.replace(config, steps=2), out)
    (out / "summary.json").unlink()
    (out / "config.json").write_text(config.to_json())
    path = out / "checkpoint" / "step_000002" / "teacher.safetensors"
    poisoned = load_file(path)
    poisoned["lm_head.weight"][12] = torch.nan
    save_file(poisoned, path)
    with pytest.raises(NonFiniteLoss, match=r"step 3: .*rows: prompt \d+, sample 0, token 0.*saved in"):
        train(config, out, resume=True)
    assert (out / "checkpoint" / "step_000002" / "state.json").exists()
    assert len(read_metrics(out / "metrics.jsonl")) == 2


def test_the_log_is_cut_at_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write({"step": 1})
    offset = log.sync()
    log.write({"step": 2})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 3, "rew')  # torn by a kill
    log = MetricsLog(path, offset)
    log.write({"step": 2})
    log.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


def test_an_infinite_metric_is_null(tmp_path):
    """One at a token outside the loss does not end the run."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1, "divergence": math.inf, "divergence_by_position": [0.5, math.nan], "loss": 0.25})
    log.close()
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line == {"step": 1, "divergence": None, "divergence_by_position": [0.5, None], "loss": 0.25}


def test_defaults_are_the_promised_ones():
    config = TrainConfig()
    assert (config.env, config.device, config.divergence, config.teacher, config.siblings) == (
        "secret_op",
        "cpu",
        "reverse_kl",
        "ema",
        True,
    )
    assert config.feedback == "answer"
