"""The warm start: made once, cached atomically, stopped at the target accuracy."""

import dataclasses
import io

import pytest
import torch
from rich.console import Console

from opsd_kernels.testing import assert_same_bits
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.models import pretrained, tiny, warmstart
from opsd_kernels.train.records.log import Progress
from opsd_kernels.train.sampling.rollout import Request


@pytest.fixture
def progress():
    return Progress(Console(file=io.StringIO()))


def test_made_once_and_the_same_again(config, task, progress, tmp_path):
    """The weights are those of `config.threads` threads, whatever the caller set."""
    first = warmstart.base_model(config, task, progress)
    assert (
        "supervised warm start" in progress.console.file.getvalue()
        or "cached" in progress.console.file.getvalue()
    )
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert warmstart.base_model(config, task, progress) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads + 1)
    again = warmstart.base_model(dataclasses.replace(config, cache_dir=str(tmp_path)), task, progress)
    assert torch.get_num_threads() == config.threads + 1
    torch.set_num_threads(before)
    assert again.name == first.name and again != first
    for a, b in zip(
        pretrained.load_pretrained(again, config)[0].parameters(),
        pretrained.load_pretrained(first, config)[0].parameters(),
        strict=True,
    ):
        assert_same_bits(a.detach(), b.detach())


def test_the_key_follows_what_decides_the_weights(config, monkeypatch):
    folder = warmstart.cache_folder(config)
    for changes in ({"warm_seed": 1}, {"tiny_layers": 2}, {"warm_accuracy": 0.5}, {"threads": 2}):
        assert warmstart.cache_folder(dataclasses.replace(config, **changes)) != folder
    for changes in ({"seed": 1}, {"steps": 1}, {"feedback": "marks"}, {"learning_rate": 1.0}):
        assert warmstart.cache_folder(dataclasses.replace(config, **changes)) == folder


def test_without_cache_dir_the_environment_decides(monkeypatch, tmp_path):
    monkeypatch.setenv("OPSD_CACHE", str(tmp_path))
    assert warmstart.cache_folder(TrainConfig()).parent == tmp_path / "warmstart"


def test_a_crash_leaves_no_cache(config, task, progress, tmp_path, monkeypatch):
    config = dataclasses.replace(config, cache_dir=str(tmp_path))

    def failing(*_):
        raise MemoryError("the power went")

    monkeypatch.setattr(warmstart, "settings", failing)
    key = tmp_path / "warmstart" / "key"
    monkeypatch.setattr(warmstart, "cache_folder", lambda _: key)
    with pytest.raises(MemoryError):
        warmstart.base_model(config, task, progress)
    assert not key.exists()


def test_not_getting_there_is_an_error(config, task, progress, tmp_path):
    config = dataclasses.replace(config, cache_dir=str(tmp_path), warm_accuracy=0.99, warm_max_steps=25)
    with pytest.raises(
        RuntimeError, match=r"expected held-out accuracy 0.99 within warm_max_steps=25, got 0\.\d+"
    ):
        warmstart.base_model(config, task, progress)


def test_success_probability_is_what_sampling_finds(config, task, encoder, sampler):
    """A model that is correct one time in ten by construction: the head prefers digits, then the end."""
    model = tiny.build_model(config, encoder.tokenizer)
    trainer = warmstart.WarmStart(config, task, encoder, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = __import__("numpy").random.default_rng(0)
    for _ in range(60):
        trainer._step(optimizer, generator)
    problems, samples = task.held_out[:200], 30
    exact = trainer.success_probability(problems)
    asked = [
        Request(task.env(problem, 0).prompt(), group, sample)
        for group, problem in enumerate(problems)
        for sample in range(samples)
    ]
    found = sum(rollout.verdict.success for rollout in sampler.sample(model.eval(), task, asked, 0)) / len(
        asked
    )
    deviation = (exact * (1 - exact) / len(asked)) ** 0.5
    assert exact > 0.0005
    assert abs(found - exact) <= 5 * deviation
