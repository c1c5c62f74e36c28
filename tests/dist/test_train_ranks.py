"""The trainer on several ranks against one process, sharded or not: metrics, weights, checkpoints."""

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config

from opsd_kernels.testing import assert_no_worse
from opsd_kernels.train import loop
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.contexts import ContextTemplate
from opsd_kernels.train.models import tiny
from opsd_kernels.train.records.log import read_metrics

HERE = Path(__file__).parent
SMALL = {
    "tensorboard": False, "steps": 4, "prompts_per_step": 4, "group_size": 3, "micro_batch": 3,
    "rehearsal_prompts": 3,
    "eval_samples": 13, "probe_samples": 6, "eval_every": 2, "checkpoint_every": 2, "backend": "torch",
}  # fmt: skip
TINY = {
    "tiny_hidden": 16,
    "tiny_layers": 1,
    "tiny_heads": 2,
    "warm_accuracy": 2e-4,
    "warm_batch": 32,
    "warm_max_steps": 200,
}
TIMES = ("seconds", "tokens_per_second")
CUT = (5, 1)  # micro-batches, which round otherwise; of four ranks each has a row or two


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Make models with random weights and tied embeddings, and questions with a lenient verifier."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny.build_tokenizer((*"0123456789+-*", "right", "wrong"), ContextTemplate())
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    ends = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    for name, seed in (("student", 3), ("teacher", 4)):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=len(tokenizer),
            max_position_embeddings=256,
            initializer_range=0.3,
            tie_word_embeddings=True,
            **shape,
            **ends,
        )
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    splits = ["train"] * 12 + ["held_out"] * 5 + ["untrained"] * 3 + ["rehearsal"] * 4
    rows = [
        {"prompt": f"{i} + {7 * i}", "feedback": f"wrong {8 * i}", "split": split}
        for i, split in enumerate(splits, 10)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        patch.setenv("PYTHONPATH", str(HERE))
        paths = {"model": str(folder / "student"), "data": str(folder / "rows.jsonl")}
        yield {**SMALL, **paths, "env": "jsonl", "feedback": "text", "verifier": "train_ranks:even"}


@pytest.fixture(scope="module")
def config(settings):
    """Return settings with weights over whole sequences, two updates per batch and half a policy gradient."""
    return TrainConfig(
        **settings, updates_per_batch=2, policy_weight=0.5, token_weights="MeanOne(PrefixDiscrepancy(0.5))"
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Make two runs of one process that differ in their micro-batches.

    Their difference is that of the order of sums.
    """
    made = {}

    def runs(config):
        config = dataclasses.replace(config, shard="none")
        if config not in made:
            made[config] = tmp_path_factory.mktemp("alone")
            loop.train(config, made[config] / "run")
            for rows in CUT:
                loop.train(dataclasses.replace(config, micro_batch=rows), made[config] / f"cut {rows}")
        return made[config]

    return runs


def final(out):
    """Return (lines of metrics without their times, the trained weights)."""
    lines = [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in read_metrics(out / "metrics.jsonl")
    ]
    newest = max((out / "checkpoint").iterdir())
    return lines, load_file(next(newest.glob("*model.safetensors")))


def assert_same_run(out, alone):
    """Compare with a run in one process. Its own error is that of the run in other micro-batches."""
    (lines, weights), (expected, truth) = final(out), final(alone / "run")
    cut = [final(alone / f"cut {rows}") for rows in CUT]
    assert [line.keys() for line in lines] == [line.keys() for line in expected]
    for name in expected[0]:
        runs = [[line[name] for line in run] for run in (lines, *(run for run, _ in cut), expected)]
        # Null where a step distils nothing.
        places = [[value is None for value in run] for run in runs]
        assert places[0] == places[-1], name
        if all(is_number(value) or value is None for value in runs[-1]):
            of_ranks, *otherwise, wanted = (
                torch.tensor([v for v in run if v is not None], dtype=torch.float64) for run in runs
            )
            assert_no_worse(of_ranks, farthest(otherwise, wanted), wanted)
    assert weights.keys() == truth.keys()
    for name, weight in truth.items():
        assert_no_worse(weights[name], farthest([run[name] for _, run in cut], weight), weight)


def farthest(runs, truth):
    """Return the values that are farthest from the truth, entry by entry."""
    runs = torch.stack(runs)
    return runs.gather(0, (runs - truth).abs().argmax(0, keepdim=True))[0]


def is_number(value):
    return isinstance(value, (int, float))


def files(out):
    """Return the file, name, dtype and shape of every tensor of the newest checkpoint."""
    newest = max((out / "checkpoint").iterdir())
    return {
        (file.name, name): (t.dtype, t.shape)
        for file in newest.glob("*.safetensors")
        for name, t in load_file(file).items()
    }


def write(config, folder):
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(config.to_json())
    return str(path)


def start(launching, world, folder, *jobs, group=240.0, **options):
    """Return each rank's report on each job, a (configuration, run directory, how).

    `group` is the time-out of the default process group in seconds.
    """
    listed = [(write(config, folder / str(i)), str(out), how) for i, (config, out, how) in enumerate(jobs)]
    return launching.launch("train_ranks.py", world, folder, json.dumps(listed), str(group), **options)


def test_some_answers_are_right(config, alone):
    """Otherwise the policy gradient of all these runs would be zero."""
    lines = read_metrics(alone(config) / "run" / "metrics.jsonl")
    assert all(0 < line["reward"] < 1 for line in lines) and all(
        0 < line["samples_in_loss"] for line in lines
    )


@pytest.mark.slow
@pytest.mark.parametrize("shard, launcher", [
    ("none", ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")),
    # --multi_gpu starts several processes, which share the CPU without a GPU. `--cpu` starts one.
    ("fsdp", ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")),
], ids=["torchrun", "accelerate"])  # fmt: skip
def test_launchers(config, alone, tmp_path, shard, launcher):
    pytest.importorskip(launcher[0].partition(".")[0])
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        *launcher,
        "-m",
        "opsd_kernels",
        "train",
        write(config, tmp_path),
        "--set",
        f"shard={shard}",
        "--out",
        str(out),
    ]
    path = os.pathsep.join(map(str, (HERE, HERE.parent / "helpers", HERE.parents[1])))
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("before: held out accuracy") == 1, "rank 0 alone speaks"
    assert json.loads((out / "summary.json").read_text())["steps"] == config.steps
    assert_same_run(out, alone(config))


def sharded(config):
    return dataclasses.replace(config, shard="fsdp")


@pytest.fixture(scope="module")
def lonely(config):
    """Two answers and one rehearsed per step: one of four ranks samples nothing, some have no micro-batch."""
    return dataclasses.replace(config, prompts_per_step=1, group_size=2, rehearsal_prompts=1, steps=2)


@pytest.fixture(scope="module")
def sparse(settings):
    """Of four answers a step, one per rank, those without a correct sibling have no token in the loss."""
    few = {"prompts_per_step": 2, "group_size": 2, "rehearsal_prompts": 0, "steps": 4, "feedback": "none"}
    return TrainConfig(**settings | few)


@pytest.fixture(scope="module")
def on_four(launching, config, lonely, sparse, tmp_path_factory):
    """Return (folder, reports): two interrupted runs, and runs with too few tokens; sharded and not."""
    folder = tmp_path_factory.mktemp("four")
    stopped = [(sharded(config), folder / "sharded", "interrupt"), (config, folder / "replicas", "interrupt")]
    whole = [(sharded(lonely), folder / "lonely", "train"), (lonely, folder / "lonely replicas", "train")]
    whole += [(sharded(sparse), folder / "sparse", "train"), (sparse, folder / "sparse replicas", "train")]
    return folder, start(launching, 4, folder, *stopped, *whole)


@pytest.mark.slow
def test_a_rank_without_a_micro_batch(on_four, lonely, alone):
    for name in ("lonely", "lonely replicas"):
        assert_same_run(on_four[0] / name, alone(lonely))


@pytest.mark.slow
def test_a_rank_without_a_token(on_four, sparse, alone):
    lines = read_metrics(alone(sparse) / "run" / "metrics.jsonl")
    assert any(0 < line["samples_in_loss"] < 1 for line in lines)
    for name in ("sparse", "sparse replicas"):
        assert_same_run(on_four[0] / name, alone(sparse))


@pytest.mark.slow
def test_ranks_hold_their_part(on_four):
    """A rank holds its part of weights, moments, teacher and reference, padded to whole rows."""
    folder, results = on_four
    whole = sum(
        t.numel() * t.element_size()
        for t in load_file(folder / "sharded" / "checkpoint" / "step_000003" / "model.safetensors").values()
    )
    for part, times in (("model", 1), ("optimizer", 2), ("copies", 2)):
        held = [result[0]["bytes"][part] for result in results]
        assert sum(held) == times * whole and max(held) < 1.1 * sum(held) / 4, (part, held)


@pytest.mark.slow
def test_the_head_is_gathered_once_a_micro_batch(on_four):
    """The teacher's root is also gathered once per call; in the second step the op has many chunks."""
    _, results = on_four
    for result in results:
        one, many, _ = result[0]["gathers"]
        # Two updates, each on answers and on rehearsal.
        assert one == many == [[count, count + 1] for count in (1, 1, 1, 1)]


@pytest.fixture(scope="module")
def on_two(launching, on_four, config, settings, tmp_path_factory):
    """Return (folder, configurations by run, reports).

    The runs are resumed ones, whole ones with other teachers, and one whose first rank cannot write.
    """
    stopped, results = on_four
    assert all("stopped after step 3 of 4" in result[i]["interrupted"] for result in results for i in (0, 1))
    folder = tmp_path_factory.mktemp("two")
    for name in ("sharded", "replicas"):
        shutil.copytree(stopped / name, folder / name)
    short = TrainConfig(**settings | {"steps": 2}, shard="fsdp")
    runs = {
        "sharded": sharded(config),
        "replicas": config,
        "external": dataclasses.replace(
            short, teacher="external", teacher_model=settings["model"].replace("student", "teacher")
        ),
        "live": dataclasses.replace(short, teacher="live", max_grad_norm=0.01),
    }
    if importlib.util.find_spec("peft"):
        runs["adapter"] = dataclasses.replace(
            short, teacher="adapter_off", lora_rank=3, gradient_checkpointing=True
        )
    jobs = [
        (run, folder / name, "resume" if name in ("sharded", "replicas") else "train")
        for name, run in runs.items()
    ]
    return folder, runs, start(launching, 2, folder, *jobs, (sharded(config), folder / "full", "full"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sharded", "replicas", "external", "live", "adapter"])
def test_two_ranks(on_two, alone, name):
    """The first two runs were stopped before their last step, on four ranks."""
    folder, runs, told = on_two
    if name == "adapter":
        pytest.importorskip("peft")
    assert_same_run(folder / name, alone(runs[name]))
    assert files(folder / name) == files(alone(runs[name]) / "run")
    # The embedding and the head are one weight, stored under one name.
    assert not any("lm_head" in key for _, key in files(folder / name))
    place = list(runs).index(name)
    assert told[0][place]["held_out_accuracy_after"] == told[1][place]["held_out_accuracy_after"]


@pytest.mark.slow
def test_a_sharded_run_goes_on_in_one_process(on_four, config, alone, tmp_path):
    shutil.copytree(on_four[0] / "sharded", tmp_path / "run")
    loop.train(config, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", alone(config))


@pytest.mark.slow
def test_no_rank_waits_for_the_one_that_cannot_write(on_two):
    assert all("No space left" in result[-1]["error"] for result in on_two[2])


@pytest.mark.slow
def test_ranks_wait_for_a_save_longer_than_their_time_out(launching, settings, tmp_path):
    """Six seconds, four in the process group and in the configuration."""
    config = TrainConfig(**settings | {"steps": 1}, collective_timeout=4.0)
    jobs = [(config, tmp_path / "replicas", "slow"), (sharded(config), tmp_path / "sharded", "slow")]
    for report in start(launching, 2, tmp_path, *jobs, group=4.0):
        assert [run["steps"] for run in report] == [1, 1]


@pytest.mark.slow
def test_ranks_in_bf16_go_on_as_if_nothing_happened(launching, settings, tmp_path):
    """The masters are saved and restored from their shards; all ranks stop with the signal of one."""
    config = TrainConfig(**settings, dtype="bfloat16", shard="fsdp", learning_rate=1e-6, lr_warmup_steps=0)
    jobs = [(tmp_path / "whole", "train"), (tmp_path / "part", "stop"), (tmp_path / "part", "resume")]
    reports = start(launching, 2, tmp_path, *((config, *job) for job in jobs))
    assert {report[1]["number"] for report in reports} == {signal.SIGTERM}
    whole, part = (max((tmp_path / run / "checkpoint").iterdir()) for run in ("whole", "part"))
    for name in ("model", "teacher", "optimizer"):
        assert (whole / f"{name}.safetensors").read_bytes() == (part / f"{name}.safetensors").read_bytes()
    moved, weights = load_file(whole / "optimizer.safetensors"), load_file(whole / "model.safetensors")
    start_weights = load_file(Path(settings["model"]) / "model.safetensors")
    distances = {}
    for name, weight in weights.items():
        master = moved[f"master/{name}"]
        assert weight.dtype == torch.bfloat16 and master.to(torch.bfloat16).equal(weight)
        distances[name] = (master - start_weights[name].to(torch.bfloat16).float()).abs()
        assert 5e-7 < distances[name].max() < 5e-6, name
    # Four steps of at most 1e-6, which nearly all entries take; a norm has 8, whose gradients change sign.
    assert torch.cat([distance.flatten() for distance in distances.values()]).gt(5e-7).float().mean() > 0.7


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "fsdp"])
def test_a_rank_that_is_killed_does_not_hang_the_others(launching, tmp_path, shard):
    """The first step follows the warm start of a tiny model, which the first rank makes alone."""
    config = TrainConfig(**SMALL, **TINY, cache_dir=str(tmp_path), updates_per_batch=2, shard=shard)
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)rank 0 ended with .*rank 1 ended with -9"):
        start(launching, 2, tmp_path, (config, tmp_path / "run", "die"), timeout_s=200)
    assert time.monotonic() - began < 180, "the others waited for their time-out"
