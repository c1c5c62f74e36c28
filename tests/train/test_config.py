"""The configuration: every mistake raises an error with the key, the expected and the given value."""

from pathlib import Path

import pytest

from opsd_kernels.train.config import ConfigError, TrainConfig, load_config
from opsd_kernels.train.config.presets import PRESETS


@pytest.mark.parametrize(
    "override, message",
    [
        ("learning_rat=1e-3", "unknown config key 'learning_rat'; did you mean 'learning_rate'?"),
        ("xyzzy=1", "unknown config key 'xyzzy'; the keys are env, model"),
        ("steps=many", "steps: expected a whole number, got 'many'"),
        ("steps=1.5", "steps: expected a whole number, got '1.5'"),
        ("steps=0", "steps: expected a number above 0, got 0"),
        ("siblings=maybe", "siblings: expected true or false, got 'maybe'"),
        ("learning_rate=nan", "learning_rate: expected a finite number, got nan"),
        ("teacher=emma", "teacher: expected one of ema, frozen, live, .*, got 'emma'; did you mean 'ema'?"),
        ("divergence=reverse", "divergence: expected one of reverse_kl"),
        ("backend=tritn", "backend: expected null or one of .*did you mean 'triton'?"),
        ("beta=1", "beta: expected a number strictly between 0 and 1, got 1"),
        ("ema_rate=2", r"ema_rate: expected null or a number in \(0, 1\], got 2"),
        ("gradient_tolerance=1", r"gradient_tolerance: expected null or a number in \[0, 1\), got 1"),
        ("gradient_tolerance=-0.1", r"gradient_tolerance: expected null or a number in \[0, 1\), got -0.1"),
        ("tiny_hidden=50", "tiny_hidden: expected a multiple of 2"),
        ("feedback=mark", "feedback: expected one of answer, .*did you mean 'marks'?"),
        ("teacher=external", "teacher_model: expected a model exactly if teacher is external, got None"),
        ("teacher_model=tiny", "teacher_model: expected a model exactly if"),
        ("teacher=adapter_off", "lora_rank: expected a number above 0 for teacher=adapter_off"),
        ("control=unrelated", "control: expected none unless context is positive"),
        ("env=jsonl", "data: expected a JSONL file"),
        ("policy_weight=1.5", r"policy_weight: expected a number in \[0, 1\]"),
        ("topk=0", "topk: expected null or a number above 0"),
        ("rollout_engine=vllm", "device: expected cuda for rollout_engine=vllm"),
        (
            "token_weights=FirstFractions(0.3)",
            "token_weights: expected one of .*, got 'FirstFractions'; did you mean 'FirstFraction'?",
        ),
        ("token_weights=FirstFraction(3)", r"token_weights: p: expected a share in \(0, 1\]"),
        (
            "token_weights=__import__('os').system('x')",
            "token_weights: expected a weighting, a number or a product",
        ),
        ("token_weights=1 +", "token_weights: expected a product of weightings"),
        ("steps", "override: expected key=value, got 'steps'"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


def test_overrides_take_the_keys_own_type():
    config = load_config(
        None,
        [
            "model=7",
            "steps=12",
            "learning_rate=1",
            "siblings=false",
            "ema_rate=none",
            "ema_rate=0.5",
            "cache_dir=null",
        ],
    )
    assert (
        config.model,
        config.steps,
        config.learning_rate,
        config.siblings,
        config.ema_rate,
        config.cache_dir,
    ) == ("7", 12, 1, False, 0.5, None)


@pytest.mark.parametrize("env", [env for env in PRESETS if env != "jsonl"])
def test_an_environment_brings_its_settings_and_the_user_wins(env):
    assert all(
        getattr(load_config(None, [f"env={env}"]), key) == value for key, value in PRESETS[env].items()
    )
    assert load_config(None, [f"env={env}", "max_new_tokens=40"]).max_new_tokens == 40
    with pytest.raises(ConfigError, match="feedback: expected one of"):
        load_config(None, [f"env={env}", "feedback=text"])


def test_a_context_there_must_be():
    with pytest.raises(ConfigError, match="siblings: expected true when feedback is 'none'"):
        load_config(None, ["feedback=none", "siblings=false"])


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_files_go_in_and_out(tmp_path, suffix):
    written = load_config(None, ["steps=3", "feedback=marks"])
    path = tmp_path / f"config{suffix}"
    path.write_text(written.to_json())  # JSON is YAML
    assert load_config(path) == written
    assert load_config(path, ["steps=4"]).steps == 4


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1]", "a mapping"),
        ("{", "valid JSON"),
        ('{"step": 1}', "did you mean 'steps'"),
        ('{"steps": true}', "steps: expected a whole number, got True"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="config: expected an existing JSON or YAML file"):
        load_config(tmp_path / "none.json")


def test_teacher_rate_follows_the_feedback():
    assert TrainConfig(ema_rate=None).teacher_rate == 0.01
    assert TrainConfig(ema_rate=None, feedback="none").teacher_rate == 0.05
    assert TrainConfig(ema_rate=0.2).teacher_rate == 0.2


def test_differences_ignore_where_a_run_keeps_its_things():
    assert TrainConfig(cache_dir="a").differences(TrainConfig(cache_dir="b", tensorboard=False)) == []
    assert TrainConfig(seed=1).differences(TrainConfig()) == ["seed: 1 here, 0 there"]


def test_every_key_is_documented():
    page = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "trainer-settings.md").read_text()
    assert [name for name in TrainConfig.__dataclass_fields__ if f"`{name}`" not in page] == []
