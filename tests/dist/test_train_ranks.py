"""The trainer on several ranks against one process: metrics, weights, and checkpoints that do not know how many ranks wrote them."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from opsd_kernels.testing import assert_no_worse
from opsd_kernels.train import loop
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.log import read_metrics

SMALL = {
    "tiny_hidden": 16, "tiny_layers": 1, "tiny_heads": 2, "warm_accuracy": 2e-4, "warm_batch": 32, "warm_max_steps": 200, "tensorboard": False,
    "steps": 6, "prompts_per_step": 4, "group_size": 3, "micro_batch": 3, "rehearsal_prompts": 3,
    "eval_samples": 13, "probe_samples": 6, "eval_every": 4, "checkpoint_every": 2, "backend": "torch",
}  # fmt: skip
TIMES = ("seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Its loss reads whole sequences, its batch is used twice, and half of it is a policy gradient."""
    cache = str(tmp_path_factory.mktemp("cache"))
    return TrainConfig(**SMALL, cache_dir=cache, updates_per_batch=2, policy_weight=0.5, token_weights="MeanOne(PrefixDiscrepancy(0.5))")


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """Two runs of one process, the second with other micro-batches: as far apart as the order of sums makes two runs."""
    folder = tmp_path_factory.mktemp("alone")
    loop.train(config, folder / "run")
    loop.train(dataclasses.replace(config, micro_batch=5), folder / "cut")
    return folder


def final(out):
    """(lines of metrics without their times, weights)."""
    lines = [{name: value for name, value in line.items() if name not in TIMES} for line in read_metrics(out / "metrics.jsonl")]
    (newest,) = sorted((out / "checkpoint").iterdir())[-1:]
    return lines, load_file(newest / "model.safetensors")


def assert_same_run(out, alone):
    (lines, weights), (expected, truth), (otherwise, cut) = final(out), final(alone / "run"), final(alone / "cut")
    assert [line.keys() for line in lines] == [line.keys() for line in expected]
    for name in expected[0]:
        values = [torch.tensor([line[name] for line in run], dtype=torch.float64) for run in (lines, otherwise, expected) if is_number(run[0][name])]
        if values:
            assert_no_worse(*values)
    for name, weight in truth.items():
        assert_no_worse(weights[name], cut[name], weight)


def is_number(value):
    return isinstance(value, (int, float))


def write(config, folder):
    path = folder / "config.json"
    path.write_text(config.to_json())
    return path


@pytest.mark.slow
def test_torchrun(config, alone, tmp_path):
    out = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "opsd_kernels", "train"]
    done = subprocess.run([*launcher, str(write(config, tmp_path)), "--out", str(out)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("before: held out accuracy") == 1, "rank 0 alone speaks"
    assert json.loads((out / "summary.json").read_text())["steps"] == config.steps
    assert_same_run(out, alone)


@pytest.mark.slow
def test_four_ranks_stopped_in_the_middle_go_on_as_two(launching, config, alone, tmp_path):
    out, path = tmp_path / "run", str(write(config, tmp_path))
    for world, how, folder in ((4, "interrupt", tmp_path / "a"), (2, "resume", tmp_path / "b")):
        folder.mkdir()
        results = launching.launch("train_ranks.py", world, folder, path, str(out), how)
        if how == "interrupt":
            assert all("stopped after step 3 of 6" in result["interrupted"] for result in results)
        else:
            assert all(result["held_out_accuracy_after"] == results[0]["held_out_accuracy_after"] for result in results)
    assert_same_run(out, alone)
