"""`jsonl`: the user's own prompts, one JSON object per line, scored by a verifier.

    {"prompt": "What is 2 + 2?", "answer": "4"}
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "..."}],
     "answer": "...", "feedback": "...", "split": "held_out"}

`feedback` is shown after a failure without feedback from the verifier. `split` is `train`, `held_out`,
`untrained` or `rehearsal`; a fifth of the rows without one is held out, by their place in the file.
`tests`, for verifier=python, are Python statements such as "assert f(3) == 24". An optional key may be null.
The verifier receives the whole row, with any other keys.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opsd_kernels.train.config import ConfigError, TrainConfig
from opsd_kernels.train.config.presets import RUN_FEEDBACK
from opsd_kernels.train.contexts import ContextTemplate
from opsd_kernels.train.envs import python_tests
from opsd_kernels.train.envs.base import Env, Task, held_out_fifth
from opsd_kernels.train.envs.rows import Fault, error_of, quoted, read
from opsd_kernels.train.envs.verifiers import MAX_FEEDBACK, READABLE, Verifier, resolve
from opsd_kernels.train.types import Messages, Prompt, Verdict

KINDS = ("text", "answer", "none")
SPLITS = ("train", "held_out", "untrained", "rehearsal")
SPLIT_KEY = 90
# For each prompt None, or what was expected of it and what came.
PromptCheck = Callable[[Sequence[Prompt]], Sequence[tuple[str, str] | None]]


class JsonlAttempt(Env):
    """One attempt at the prompt of one row."""

    def __init__(self, task: Jsonl, problem: int):
        super().__init__()
        self.task, self.problem = task, problem

    def prompt(self) -> Prompt:
        return self.task.prompt(self.problem)

    def _judge(self, completion: str) -> Verdict:
        row = self.task.rows[self.problem]
        try:
            verdict = self.task.verifier(completion, row)
        except Exception as error:
            raise RuntimeError(
                f"verifier: expected a verdict on an answer to {self.task.place(self.problem)}, "
                f"got {type(error).__name__}: {error}"
            ) from error
        if verdict.success or self.task.feedback == "none":
            return Verdict(verdict.reward)
        if self.task.feedback == "answer":
            return Verdict(verdict.reward, f"The correct answer is {row['answer']}")
        if self.task.feedback in RUN_FEEDBACK:
            return verdict
        # A row's feedback is about its problem and precedes that of a built-in verifier.
        texts = (row.get("feedback"), verdict.feedback)
        first, second = texts if self.task.built_in else texts[::-1]
        told = first or second
        return Verdict(verdict.reward, None if told is None else told[:MAX_FEEDBACK])


class Jsonl(Task):
    """The task of a data file.

    Raises ConfigError that names every wrong row with file and line, `check` being asked about the prompts.
    """

    template = ContextTemplate()

    def __init__(self, config: TrainConfig, check: PromptCheck | None = None):
        self.feedback, self.built_in = config.feedback, ":" not in config.verifier
        self.verifier: Verifier = resolve(config.verifier, config.feedback)
        self.path = Path(str(config.data))
        needs_answer = (self.built_in and config.verifier != "python") or config.feedback == "answer"
        values, faults = read(self.path)
        self.rows: list[dict[str, Any]] = []
        self.lines: list[int] = []
        for line, row in values:
            fault = _fault(row, config.verifier, needs_answer)
            if fault is not None:
                faults.append(Fault(line, *fault))
            else:
                self.lines.append(line)
                self.rows.append(row)
        if check is not None:
            complaints = check([self.prompt(problem) for problem in range(len(self.rows))])
            faults += [
                Fault(line, *told)
                for line, told in zip(self.lines, complaints, strict=True)
                if told is not None
            ]
        if faults:
            raise error_of(self.path, faults)
        self._split()

    def _split(self) -> None:
        places: dict[str | None, list[int]] = {split: [] for split in (None, *SPLITS)}
        for problem, row in enumerate(self.rows):
            places[row.get("split")].append(problem)
        train, held_out = held_out_fifth(places[None], SPLIT_KEY)
        self.train, self.held_out = places["train"] + train, places["held_out"] + held_out
        self.untrained, self.rehearsal = places["untrained"], places["rehearsal"]
        for split in ("train", "held_out"):
            if not getattr(self, split):
                raise ConfigError(
                    "data: expected at least one row to train on and one held out "
                    f"(five rows without a split are enough), got no {split} row"
                )

    def prompt(self, problem: int) -> Prompt:
        before, text = _turns(self.rows[problem]["prompt"])
        return Prompt(problem, text, before)

    def place(self, problem: int) -> str:
        return f"{self.path}, line {self.lines[problem]}"

    def env(self, problem: int, key: int) -> Env:
        return JsonlAttempt(self, problem)

    def fingerprint(self) -> str:
        """Return a hash of the rows and their order, whatever the file's encoding and white space."""
        text = json.dumps(self.rows, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _fault(row: Any, verifier: str, needs_answer: bool) -> tuple[str, str] | None:
    """Return what was expected of a row and what came, or None for a row without a fault."""
    tested = verifier == "python"
    needed = ["prompt", *["answer"] * needs_answer, *["tests"] * tested]
    if not isinstance(row, dict):
        return f"an object with {' and '.join(needed)}", quoted(row)
    missing = [key for key in needed if key not in row]
    if missing:
        return f"an object with {' and '.join(needed)}", f"none of {', '.join(missing)}"
    if row.get("split") is not None and row["split"] not in SPLITS:
        return f"a split among {', '.join(SPLITS)}", quoted(row["split"])
    if tested and not python_tests.readable(row["tests"]):
        return "tests that are a list of Python statements, for verifier=python", quoted(row["tests"])
    if not isinstance(row.get("feedback"), str | None):
        return "a feedback that is a text or null", quoted(row["feedback"])
    try:
        before, text = _turns(row["prompt"])
    except ValueError:
        return "a prompt that is a text or a list of turns ending with the user's", quoted(row["prompt"])
    if not text.strip():
        return "a prompt with a text", quoted(row["prompt"])
    shown = {
        "prompt": "\n".join([*(turn["content"] for turn in before), text]),
        "feedback": row.get("feedback"),
    }
    if needs_answer:
        # A bool is an int, and its text would be Python's.
        if not isinstance(row["answer"], str | int | float) or isinstance(row["answer"], bool):
            return "an answer that is a text or a number", quoted(row["answer"])
        answer = shown["answer"] = str(row["answer"])
        if not answer.strip():
            return "an answer with a text", quoted(row["answer"])
        readable, wanted = READABLE.get(verifier, (lambda answer: True, ""))
        if not readable(answer):
            return f"an answer that is {wanted}, for verifier={verifier}", quoted(row["answer"])
    for key, value in shown.items():
        if value is not None and not _is_unicode(value):
            return f"Unicode in the {key}", f"half of a surrogate pair in {quoted(row[key])}"
    return None


def _is_unicode(text: str) -> bool:
    """True without a lone surrogate, which JSON can escape and no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _turns(prompt: Any) -> tuple[Messages, str]:
    """Split a prompt into earlier turns and the text of the last one, which the context is added to.

    Raises ValueError for anything but a text, or turns of texts of which the last is the user's.
    """
    if isinstance(prompt, str):
        return (), prompt
    if not isinstance(prompt, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in prompt
    ):
        raise ValueError("not a list of turns")
    turns = tuple({"role": turn["role"], "content": turn["content"]} for turn in prompt)
    if not turns or turns[-1]["role"] != "user":
        raise ValueError("the last turn is not the user's")
    return turns[:-1], turns[-1]["content"]
