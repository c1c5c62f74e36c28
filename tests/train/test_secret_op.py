"""The environment: prompts, verdicts, feedback, and held-out problems."""

import numpy as np
import pytest

from opsd_kernels.train.envs.secret_op import (
    PAIRS,
    PLUS,
    STAR,
    SecretOp,
    SecretOpAttempt,
    feedback_text,
    solution,
)

PROBLEM = 100 * 12 + 34  # 12 * 34 = 12 + 2 * 34 = 80


def test_numbers_are_written_backwards():
    attempt = SecretOpAttempt(PROBLEM, "answer", 0)
    assert attempt.prompt().text == "21*43"
    assert solution(PROBLEM) == "080"
    assert solution(PLUS * PAIRS + PROBLEM) == "640"
    with pytest.raises(ValueError, match="answers are random"):
        solution(2 * PAIRS)


@pytest.mark.parametrize("completion", ["0 8 0", "080", "08", "0800", "080 wrong", "<eos> 080", "", "٠٨٠"])
def test_only_the_answer_is_accepted(completion):
    right = completion in ("0 8 0", "080")
    verdict = SecretOpAttempt(PROBLEM, "answer", 0).verify(completion)
    assert verdict.success is right
    assert verdict.feedback == (None if right else "080")


def test_an_env_is_one_attempt():
    attempt = SecretOpAttempt(PROBLEM, "answer", 0)
    attempt.verify("1")
    with pytest.raises(RuntimeError, match="one call per Env"):
        attempt.verify("080")


@pytest.mark.parametrize(
    "kind, text",
    [
        ("answer", "080"),
        ("first", "0??"),
        ("first_two", "08?"),
        ("last", "??0"),
        ("marks", "010 right wrong right"),
        ("wrong", "wrong"),
        ("none", None),
    ],
)
def test_feedback_texts(kind, text):
    assert feedback_text(kind, PROBLEM, "080", "010", 0) == text


def test_feedback_never_quotes_what_is_not_an_answer():
    assert feedback_text("marks", PROBLEM, "080", "</feedback>", 0) == "wrong"
    assert feedback_text("marks", PROBLEM, "080", "١٢٣", 0) == "wrong"


@pytest.mark.parametrize("kind", ["corrupted", "other"])
def test_misleading_feedback_looks_like_an_answer_and_is_none(kind):
    texts = {feedback_text(kind, PROBLEM, "080", "010", key) for key in range(50)}
    assert len(texts) > 5
    assert all(len(text) == 3 and text.isdigit() and text != "080" for text in texts)


def test_split_is_disjoint_and_a_fifth():
    task = SecretOp("answer")
    assert len(task.held_out) == PAIRS // 5 and len(task.train) == PAIRS - PAIRS // 5
    assert not set(task.held_out) & set(task.train)
    assert {problem // PAIRS for problem in (*task.held_out, *task.train)} == {STAR}
    assert SecretOp("wrong").held_out == task.held_out


def test_warm_start_never_sees_the_held_out_problems_nor_the_rule_in_a_context():
    task = SecretOp("answer")
    bare, privileged = task.warm_examples(np.random.default_rng(0), 4000, 0.5)
    forbidden = {*task.held_out, *task.untrained}
    assert not forbidden & {example.prompt.problem for example in (*bare, *privileged)}
    assert all(
        example.answer == solution(example.prompt.problem)
        for example in bare
        if example.prompt.problem < PAIRS
    )
    stars = [example for example in privileged if example.prompt.problem < PAIRS]
    assert len(stars) > 50
    right = sum(example.answer == solution(example.prompt.problem) for example in stars)
    assert right <= 5  # one random answer in a thousand


def test_every_text_is_in_the_vocabulary(encoder, task):
    bare, privileged = task.warm_examples(np.random.default_rng(1), 500, 0.1)
    examples = [*bare, *privileged]
    ids = encoder.encode([example.prompt for example in examples], [example.context for example in examples])
    assert not any(encoder.tokenizer.unk_token_id in row for row in ids)
