"""Fixtures: a trainer of 5 thousand parameters with a warm start of a second, made once per session."""

import os

import pytest

from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.envs import make_task
from opsd_kernels.train.models import tiny
from opsd_kernels.train.models.pretrained import vocabulary
from opsd_kernels.train.sampling.prompts import PromptEncoder
from opsd_kernels.train.sampling.rollout import Sampler

SMALL = {
    "threads": 1, "backend": "torch", "tensorboard": False,
    "tiny_hidden": 16, "tiny_layers": 1, "tiny_heads": 2,
    "warm_accuracy": 2e-4, "warm_batch": 32, "warm_max_steps": 200,
    "steps": 8, "prompts_per_step": 4, "group_size": 3, "micro_batch": 5,
    "eval_samples": 12, "probe_samples": 6, "eval_every": 4, "checkpoint_every": 2, "samples_every": 2,
}  # fmt: skip


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Return the settings of the smallest run that covers every feature."""
    return {**SMALL, "cache_dir": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    """Return a cache directory of all processes of this session, for a converted language model."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"


@pytest.fixture(scope="session")
def config(small):
    return TrainConfig(**small)


@pytest.fixture(scope="session")
def task(config):
    return make_task(config)


@pytest.fixture(scope="session")
def encoder(task):
    return PromptEncoder(tiny.build_tokenizer(task.vocabulary, task.template), task.template)


@pytest.fixture
def model(config, encoder):
    """Make a model with random weights, wide enough that answers differ."""
    model = tiny.build_model(config, encoder.tokenizer)
    model.lm_head.weight.data.mul_(20)
    return model.eval()


@pytest.fixture(scope="session")
def sampler(config, encoder):
    return Sampler(
        encoder,
        config.max_new_tokens,
        config.rollout_temperature,
        config.rollout_batch,
        vocabulary(encoder.tokenizer),
    )
