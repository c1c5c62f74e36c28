"""One frozen TrainConfig. JSON and YAML in, JSON out; every error names the key, what was expected and what came."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsd_kernels import env as environment
from opsd_kernels.spec import KIND_NAMES

CHOICES: dict[str, tuple[str, ...]] = {
    "env": ("secret_op",),
    "feedback": ("answer", "first", "first_two", "last", "marks", "wrong", "corrupted", "other", "none"),
    "teacher": ("ema", "frozen"),
    "divergence": tuple(KIND_NAMES),
    "reduction": ("token_mean", "sequence_mean"),
    "device": ("cpu", "cuda"),
    "dtype": ("float32", "bfloat16"),
}
POSITIVE = (
    "steps prompts_per_step group_size rollout_temperature max_new_tokens rollout_batch distill_temperature learning_rate max_grad_norm micro_batch "
    "eval_every eval_samples probe_samples checkpoint_every threads tiny_hidden tiny_layers tiny_heads warm_batch warm_learning_rate warm_max_steps"
).split()
SHARES = ("beta", "warm_accuracy", "warm_operator_share")  # strictly between 0 and 1
NOT_NEGATIVE = ("seed", "warm_seed", "weight_decay", "lr_warmup_steps")
WHERE_NOT_WHAT = ("cache_dir", "tensorboard")  # a resumed run may differ in these


class ConfigError(ValueError):
    """A key or value that the configuration does not allow."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a run computes. The defaults learn on two CPU cores in minutes.

    `model` is "tiny" (made by a supervised warm start, cached) or the directory or name of a Hugging Face model.
    `ema_rate=None` takes SDPO's .01 where there is feedback and .05 where there is none (arXiv:2601.20802). The tiny model moves
    further in a step than a large one: with .01 its teacher forgot to read the context within 200 steps (accuracy .999 to .78, the student's .24 to .66;
    with .003 .995 and .74).
    `threads` and `backend` (None: the op's choice) are part of the numbers: another number of threads or another kernel rounds differently.
    """

    env: str = "secret_op"
    model: str = "tiny"
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    # rollouts
    steps: int = 200
    prompts_per_step: int = 64
    group_size: int = 4
    rollout_temperature: float = 1.0
    max_new_tokens: int = 4
    rollout_batch: int = 512
    # the teacher's view
    feedback: str = "answer"
    siblings: bool = True
    teacher: str = "ema"
    ema_rate: float | None = 0.003
    # objective
    divergence: str = "reverse_kl"
    beta: float = 0.5
    distill_temperature: float = 1.0
    reduction: str = "token_mean"
    backend: str | None = None
    # optimiser
    learning_rate: float = 5e-4
    lr_warmup_steps: int = 10
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    micro_batch: int = 256
    # watching
    eval_every: int = 50
    eval_samples: int = 2000
    probe_samples: int = 512
    checkpoint_every: int = 20
    tensorboard: bool = True
    cache_dir: str | None = None
    # the tiny base model and its warm start
    tiny_hidden: int = 96
    tiny_layers: int = 2
    tiny_heads: int = 4
    warm_seed: int = 0
    warm_accuracy: float = 0.22
    warm_operator_share: float = 0.07
    warm_batch: int = 128
    warm_learning_rate: float = 3e-3
    warm_max_steps: int = 6000

    def __post_init__(self) -> None:
        for field, kind in _field_types().items():
            _check_type(field, getattr(self, field), kind)
        for field, choices in CHOICES.items():
            _expect(getattr(self, field) in choices, field, "one of " + ", ".join(choices), getattr(self, field), _nearest(getattr(self, field), choices))
        for field in POSITIVE:
            _expect(getattr(self, field) > 0, field, "a number above 0", getattr(self, field))
        for field in NOT_NEGATIVE:
            _expect(getattr(self, field) >= 0, field, "a number of at least 0", getattr(self, field))
        for field in SHARES:
            _expect(0 < getattr(self, field) < 1, field, "a number strictly between 0 and 1", getattr(self, field))
        backends = environment.BACKEND.choices
        _expect(self.backend in (None, *backends), "backend", "null or one of " + ", ".join(backends), self.backend, _nearest(self.backend, backends))
        _expect(self.ema_rate is None or 0 < self.ema_rate <= 1, "ema_rate", "null or a number in (0, 1]", self.ema_rate)
        _expect(self.tiny_hidden % (2 * self.tiny_heads) == 0, "tiny_hidden", f"a multiple of 2 * tiny_heads = {2 * self.tiny_heads}", self.tiny_hidden)
        _expect(self.siblings or self.feedback != "none", "siblings", "true when feedback is 'none' (else no rollout has a context)", self.siblings)

    @property
    def teacher_rate(self) -> float:
        """The EMA rate a of `teacher <- (1-a) teacher + a student`."""
        if self.ema_rate is not None:
            return self.ema_rate
        return 0.05 if self.feedback == "none" else 0.01

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def differences(self, other: TrainConfig) -> list[str]:
        """`key: mine, theirs` for each key that decides the numbers and differs."""
        return [
            f"{name}: {getattr(self, name)!r} here, {getattr(other, name)!r} there"
            for name in _field_types()
            if name not in WHERE_NOT_WHAT and getattr(self, name) != getattr(other, name)
        ]


def load_config(path: str | Path | None = None, overrides: typing.Sequence[str] = ()) -> TrainConfig:
    """The defaults, then the file (JSON or YAML), then each `key=value` in order. Raises ConfigError."""
    values = _read(Path(path)) if path is not None else {}
    for key in values:
        _check_key(key)
    for override in overrides:
        key, equals, text = override.partition("=")
        _expect(bool(equals), "override", "key=value", override)
        _check_key(key.strip())
        values[key.strip()] = _parse(key.strip(), text.strip())
    return TrainConfig(**values)


def _read(path: Path) -> dict[str, Any]:
    _expect(path.is_file(), "config", "an existing JSON or YAML file", path)
    try:
        if path.suffix in (".yaml", ".yml"):
            values = _yaml().safe_load(path.read_text())
        else:
            values = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"config: expected valid JSON in {path} (YAML files end in .yaml), got {error}") from error
    _expect(isinstance(values, dict), "config", f"a mapping of keys to values in {path}", type(values).__name__)
    return values


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ConfigError("config: expected a JSON file, as PyYAML is not installed; got a YAML file") from error
    return yaml


def _field_types() -> dict[str, Any]:
    return typing.get_type_hints(TrainConfig)


def _check_key(key: str) -> None:
    known = tuple(_field_types())
    if key not in known:
        raise ConfigError(f"unknown config key {key!r}{_nearest(key, known)}; the keys are " + ", ".join(known))


def _nearest(name: Any, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _expect(condition: bool, key: str, expected: str, got: Any, hint: str = "") -> None:
    if not condition:
        raise ConfigError(f"{key}: expected {expected}, got {got!r}{hint}")


def _members(kind: Any) -> tuple[type, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _describe(kind: Any) -> str:
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a string", types.NoneType: "null"}
    return " or ".join(names[member] for member in _members(kind))


def _check_type(key: str, value: Any, kind: Any) -> None:
    members = _members(kind)
    right = type(value) in members or (float in members and type(value) is int)  # type(): a bool is no number here
    _expect(right and not (isinstance(value, float) and not math.isfinite(value)), key, _describe(kind), value)


def _parse(key: str, text: str) -> Any:
    """The value of `--set key=text`, read as the key's own type so that `model=7` stays a string."""
    members = _members(_field_types()[key])
    if types.NoneType in members and text.lower() in ("null", "none"):
        return None
    if str in members:
        return text
    if bool in members:
        return {"true": True, "false": False}.get(text.lower(), text)
    for number in (int, float):
        try:
            if number in members or (number is int and float in members):
                return number(text)
        except ValueError:
            continue
    return text
