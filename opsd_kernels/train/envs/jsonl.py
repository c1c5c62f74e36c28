"""`jsonl`: the user's own prompts, one JSON object per line, scored by a verifier.

    {"prompt": "What is 2 + 2?", "answer": "4"}
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "..."}],
     "answer": "...", "feedback": "...", "split": "held_out"}

(The second object is one line in the file.) `feedback` is shown after a failure without feedback from the
verifier. `split` is `train`, `held_out`, `untrained` or `rehearsal`; a fifth of the rows without one is held
out, by their place in the file. The verifier receives the whole row, with any other keys.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opsd_kernels.train.config import ConfigError, TrainConfig
from opsd_kernels.train.contexts import ContextTemplate
from opsd_kernels.train.envs.base import Env, Task, held_out_fifth
from opsd_kernels.train.envs.verifiers import MAX_FEEDBACK, Verifier, resolve
from opsd_kernels.train.types import Messages, Prompt, Verdict

KINDS = ("text", "answer", "none")
SPLITS = ("train", "held_out", "untrained", "rehearsal")
SPLIT_KEY = 90


class JsonlAttempt(Env):
    """One attempt at the prompt of one row."""

    def __init__(self, task: Jsonl, problem: int):
        super().__init__()
        self.task, self.problem = task, problem

    def prompt(self) -> Prompt:
        before, text = _turns(self.task.rows[self.problem]["prompt"])
        return Prompt(self.problem, text, before)

    def _judge(self, completion: str) -> Verdict:
        row = self.task.rows[self.problem]
        verdict = self.task.verifier(completion, row)
        if verdict.success or self.task.feedback == "none":
            return Verdict(verdict.reward)
        if self.task.feedback == "answer":
            return Verdict(verdict.reward, f"The correct answer is {row['answer']}")
        # A row's feedback is about its problem and precedes that of a built-in verifier.
        texts = (row.get("feedback"), verdict.feedback)
        first, second = texts if self.task.built_in else texts[::-1]
        told = first or second
        return Verdict(verdict.reward, None if told is None else told[:MAX_FEEDBACK])


class Jsonl(Task):
    """The task of a data file. Raises ConfigError with the file and line of a wrong row."""

    template = ContextTemplate()

    def __init__(self, config: TrainConfig):
        self.feedback, self.built_in = config.feedback, ":" not in config.verifier
        self.verifier: Verifier = resolve(config.verifier)
        needed = ("prompt", "answer") if self.built_in or config.feedback == "answer" else ("prompt",)
        self.rows = read_rows(Path(str(config.data)), needed)
        parts: dict[str, list[int]] = {
            split: [i for i, row in enumerate(self.rows) if row.get("split") == split] for split in SPLITS
        }
        train, held_out = held_out_fifth(
            [i for i, row in enumerate(self.rows) if "split" not in row], SPLIT_KEY
        )
        self.train, self.held_out = parts["train"] + train, parts["held_out"] + held_out
        self.untrained, self.rehearsal = parts["untrained"], parts["rehearsal"]
        for split in ("train", "held_out"):
            if not getattr(self, split):
                raise ConfigError(
                    "data: expected at least one row to train on and one held out "
                    f"(five rows without a split are enough), got no {split} row"
                )

    def env(self, problem: int, key: int) -> Env:
        return JsonlAttempt(self, problem)


def read_rows(path: Path, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ConfigError(f"data: expected an existing JSONL file, got {str(path)!r}")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            rows.append(_row(line, f"{path}, line {number}", needed))
    return rows


def _row(line: str, where: str, needed: tuple[str, ...]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"data: expected a JSON object in {where}, got {error}") from error
    missing = [key for key in needed if key not in row] if isinstance(row, dict) else list(needed)
    if missing:
        raise ConfigError(
            f"data: expected an object with {' and '.join(needed)} in {where}, "
            f"got none of {', '.join(missing)}"
        )
    if row.get("split", "train") not in SPLITS:
        raise ConfigError(
            f"data: expected a split among {', '.join(SPLITS)} in {where}, got {row['split']!r}"
        )
    if not isinstance(row.get("feedback", ""), str):
        raise ConfigError(f"data: expected a feedback that is a text in {where}, got {row['feedback']!r}")
    try:
        _turns(row["prompt"])
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(
            f"data: expected a prompt that is a text or a list of turns ending with the user's in {where}, "
            f"got {row['prompt']!r}"
        ) from error
    return row


def _turns(prompt: Any) -> tuple[Messages, str]:
    """Split a prompt into earlier turns and the text of the last one, which the context is added to."""
    if isinstance(prompt, str):
        return (), prompt
    turns = tuple({"role": str(turn["role"]), "content": turn["content"]} for turn in prompt)
    if (
        not turns
        or turns[-1]["role"] != "user"
        or not all(isinstance(turn["content"], str) for turn in turns)
    ):
        raise ValueError("the last turn is not the user's")
    return turns[:-1], turns[-1]["content"]
