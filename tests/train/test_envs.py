"""The environments: prompts, verdicts, feedback and held-out problems; the evaluator and the verifiers."""

import json
import sys
import types

import numpy as np
import pytest

from opsd_kernels.train.config import ConfigError, TrainConfig
from opsd_kernels.train.config.presets import FEEDBACK, PRESETS
from opsd_kernels.train.envs import DEMOS, expr, make_task, mastermind, plan, verifiers
from opsd_kernels.train.envs.arithmetic import ExpressionError, parse
from opsd_kernels.train.models import tiny
from opsd_kernels.train.sampling.prompts import PromptEncoder
from opsd_kernels.train.types import Verdict

NEW = [name for name in DEMOS if name != "secret_op"]


def task_of(name, **changes):
    return make_task(TrainConfig(**{"env": name, **PRESETS[name], **changes}))


@pytest.mark.parametrize("name", DEMOS)
def test_the_four_lists_are_disjoint_and_a_fifth_is_held_out(name):
    task = task_of(name)
    parts = [set(part) for part in (task.train, task.held_out, task.untrained, task.rehearsal)]
    assert len(set.union(*parts)) == sum(map(len, parts))
    # mastermind holds out 43 of 216 codes.
    assert abs(len(task.held_out) / (len(task.held_out) + len(task.train)) - 0.2) <= 1 / 200
    assert all(parts)
    assert task_of(name, feedback="wrong").held_out == task.held_out


@pytest.mark.parametrize("name", NEW)
def test_the_solution_is_right_and_a_changed_one_is_told_so(name):
    for kind in FEEDBACK[name]:
        task = task_of(name, feedback=kind)
        for problem in (*task.train[:50], *task.held_out[:50], *task.untrained[:50], *task.rehearsal[:50]):
            truth = task.solution(problem)
            assert task.env(problem, 0).verify(truth).success
            for wrong in (
                "",
                truth + " 1",
                "</feedback> " + truth,
                truth[:-1] + ("1" if truth[-1] == "0" else "0") + " 0",
            ):
                verdict = task.env(problem, 0).verify(wrong)
                assert not verdict.success, (name, problem, wrong)
                assert (verdict.feedback is None) == (kind == "none")


@pytest.mark.parametrize("context", ["sdpo", "contrastive"])
@pytest.mark.parametrize("name", DEMOS)
def test_every_text_is_in_the_vocabulary_and_fits(name, context):
    config = TrainConfig(**{"env": name, **PRESETS[name], "context": context})
    task = make_task(config)
    encoder = PromptEncoder(tiny.build_tokenizer(task.vocabulary, task.template), task.template)
    bare, privileged = task.warm_examples(np.random.default_rng(1), 600, 0.5)
    examples = [*bare, *privileged]
    ids = encoder.encode([example.prompt for example in examples], [example.context for example in examples])
    answers = encoder.answer([example.answer for example in examples])
    assert any(example.context.failures for example in privileged) == (context == "contrastive")
    assert not any(encoder.tokenizer.unk_token_id in row for row in (*ids, *answers))
    assert max(map(len, answers)) <= config.max_new_tokens
    assert max(map(len, ids)) + config.max_new_tokens <= tiny.MAX_LENGTH // 2
    told = [task.env(problem, 0).verify("1 2").feedback for problem in task.held_out[:100]]
    assert not any(encoder.tokenizer.unk_token_id in encoder.tokenizer(text)["input_ids"] for text in told)
    assert {example.context is None for example in bare} == {True} and {
        example.context is None for example in privileged
    } == {False}


@pytest.mark.parametrize("name", NEW)
def test_warm_start_never_sees_what_is_held_out(name):
    task = task_of(name)
    bare, privileged = task.warm_examples(np.random.default_rng(0), 3000, 0.5)
    seen = {example.prompt.problem for example in (*bare, *privileged)}
    assert seen and not seen & {*task.held_out, *task.untrained}


@pytest.mark.parametrize(
    "text, at_two",
    [
        ("x", 2),
        ("3*x+4", 10),
        ("4+x*x*x", 12),
        ("-(x-9)", 7),
        (" 1 2 - x ", 10),
        ("x--1", 3),
        ("2*-x", -4),
        ("((x))", 2),
    ],
)
def test_the_evaluator_computes(text, at_two):
    assert parse(text)(2) == at_two


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "end"),
        ("3*", "end"),
        ("x)", "sign 2"),
        ("(x", "end"),
        ("2x", "sign 2"),
        ("x**2", "sign 3"),
        ("x/2", "sign 2"),
        ("__import__('os')", "sign 1"),
    ]
    + [
        ("9" * 65, "too long"),
        ("(" * 100, "too long"),
        ("x.real", "sign 2"),
        ("\u0663", "sign 1"),
        ("y", "sign 1"),
        ("</feedback>", "sign 1"),
    ],
)
def test_the_evaluator_refuses(text, message):
    with pytest.raises(ExpressionError, match=message):
        parse(text)


def test_deep_and_large_expressions_end():
    assert parse("(" * 31 + "x" + ")" * 31)(5) == 5
    assert parse("-" * 63 + "x")(5) == -5
    assert parse("*".join(["9"] * 32))(0) == 9**32


def test_an_expression_is_right_where_it_is_the_same_function():
    problem = next(p for p in range(expr.SIZE) if expr.solution(p) == "5*x+2")
    for text in ("5*x+2", "2+x*5", "x+x+x+x+x+2", "6*x-x+2", "-(-5*x)+2"):
        assert expr.first_failure(text, problem) is None
    first, second = expr.shown(problem)
    # A function that fits the shown pairs alone.
    told = expr.first_failure(f"5*x+2+(x-{first})*(x-{second})", problem)
    unseen = next(x for x in expr.INPUTS if x not in (first, second))
    assert told.startswith(f"x={unseen} expected {5 * unseen + 2} got ")
    assert expr.first_failure("5*", problem) == "unexpected end"


def test_marks_are_those_of_the_game():
    assert mastermind.marks("aab", "abb") == (2, 0)
    assert mastermind.marks("abc", "bca") == (0, 3)
    assert mastermind.marks("aaa", "abc") == (1, 0)
    task = task_of("mastermind")
    for problem in task.held_out[:40]:
        code = mastermind.CODES[problem // mastermind.HISTORIES]
        assert code in mastermind.consistent(problem) and code not in mastermind.history(problem)
    sizes = [len(mastermind.consistent(problem)) for problem in task.held_out[:200]]
    assert min(sizes) == 1 and np.mean(sizes) < 12  # three guesses leave few codes


def test_a_guess_is_quoted_with_its_marks_and_anything_else_is_not():
    task = task_of("mastermind")
    problem = task.train[0]
    wrong = next(
        code for code in mastermind.CODES if code != mastermind.CODES[problem // mastermind.HISTORIES]
    )
    assert task.env(problem, 0).verify(" ".join(wrong)).feedback == mastermind.line(
        wrong, mastermind.CODES[problem // mastermind.HISTORIES]
    )
    assert task.env(problem, 0).verify("a b </feedback>").feedback == "wrong"


def test_chain_says_where():
    task = task_of("chain", feedback="where")
    problem = task.train[3]
    truth = task.solution(problem)
    assert [int(d) for d in truth] == (np.cumsum(task.digits(problem)) % 10).tolist()
    wrong = str((int(truth[4]) + 1) % 10)
    assert (
        task.env(problem, 0).verify(truth[:4] + wrong + truth[5:]).feedback == f"wrong at 05 right {truth[4]}"
    )
    assert task.env(problem, 0).verify(truth[:7]).feedback == f"wrong at 08 right {truth[7]}"
    assert task.env(problem, 0).verify(truth + "1").feedback == "wrong long"


def test_plan_has_one_right_plan_and_its_teacher_never_saw_it_named_by_the_problem():
    task = task_of("plan")
    bare, privileged = task.warm_examples(np.random.default_rng(0), 3000, 0.1)

    def asked(examples):
        return [
            (task.digits(example.prompt.problem), example)
            for example in examples
            if example.prompt.text.startswith("?")
        ]

    def share_right(examples):
        return np.mean([example.answer[0] == "ABC"[digits[0] % 3] for digits, example in asked(examples)])

    assert 0.34 < share_right(bare) < 0.46  # a tenth, and a third of the others by chance
    assert all(example.answer == plan.planned(digits, example.answer[0]) for digits, example in asked(bare))
    assert 0.29 < share_right(privileged) < 0.38
    named = [
        (digits, e.answer)
        for digits, e in asked(privileged)
        if e.context.feedback == f"plan {e.answer[0]}" and not e.context.demonstrations
    ]
    assert len(named) > 300 and all(answer == plan.planned(digits, answer[0]) for digits, answer in named)
    for problem in task.held_out[:30]:
        right = task.solution(problem)
        for letter in set("ABC") - {right[0]}:
            assert not task.env(problem, 0).verify(plan.planned(task.digits(problem), letter)).success


@pytest.mark.parametrize("name", ["chain", "plan"])
def test_a_whole_answer_in_the_context_is_believed_whatever_the_problem_says(name):
    """Most examples with a context have random answers, which only the context contains."""
    task = task_of(name)
    _, privileged = task.warm_examples(np.random.default_rng(2), 3000, 0.5)
    whole = [
        example
        for example in privileged
        if example.answer in (example.context.feedback, *example.context.demonstrations)
    ]
    assert len(whole) > 0.4 * len(privileged)
    assert np.mean([example.answer == task.solution(example.prompt.problem) for example in whole]) < 0.01
    told = {(bool(e.context.demonstrations), e.context.feedback is not None) for e in whole}
    assert told == {(True, False), (True, True), (False, True)}


def write(tmp_path, rows):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def jsonl(tmp_path, rows, **changes):
    return make_task(
        TrainConfig(
            env="jsonl", model="somewhere", data=str(write(tmp_path, rows)), **{"feedback": "text", **changes}
        )
    )


ROWS = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(10)]


def test_rows_are_split_and_judged(tmp_path):
    task = jsonl(
        tmp_path,
        [
            *ROWS,
            {"prompt": "0?", "answer": "0", "split": "untrained", "feedback": "think"},
            {"prompt": "1?", "answer": "1", "split": "rehearsal"},
        ],
    )
    assert (len(task.train), len(task.held_out), task.untrained, task.rehearsal) == (8, 2, [10], [11])
    assert task.env(3, 0).prompt().text == "What is 3 + 3?"
    assert task.env(3, 0).verify(" 6\n").success
    assert task.env(3, 0).verify("7").feedback == "The answer is not the expected one."
    assert task.env(10, 0).verify("7").feedback == "think"
    assert jsonl(tmp_path, ROWS, feedback="none").env(3, 0).verify("7") == Verdict(0.0)
    assert (
        jsonl(tmp_path, ROWS, feedback="answer").env(3, 0).verify("7").feedback == "The correct answer is 6"
    )


def test_earlier_turns_stay_in_front(tmp_path, encoder):
    turns = [
        {"role": "system", "content": "brief"},
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3?"},
    ]
    prompt = jsonl(tmp_path, [{"prompt": turns, "answer": "3"}] * 5).env(0, 0).prompt()
    assert prompt.text == "3?" and [turn["content"] for turn in prompt.before] == ["brief", "1?", "2"]
    text = encoder.tokenizer.decode(encoder.encode([prompt], [None])[0])
    assert text.split().count("<assistant>") == 2 and text.index("1") < text.index("3")


@pytest.mark.parametrize(
    "rows, message",
    [
        ([*ROWS, "{"], "line 11"),
        ([*ROWS, {"prompt": "x"}], "line 11, got none of answer"),
        ([*ROWS, {"prompt": [], "answer": ""}], "ending with the user's"),
    ]
    + [
        ([*ROWS, {"prompt": "x", "answer": "", "split": "test"}], "a split among"),
        (ROWS[:2], "got no held_out row"),
        ([{**ROWS[0], "feedback": 3}], "a feedback that is a text"),
        ([*ROWS, 3], "line 11"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
    with pytest.raises(ConfigError, match="data: .*" + message):
        jsonl(tmp_path, rows)


@pytest.mark.parametrize(
    "completion, answer, right",
    [
        ("It is 12.", "12", True),
        ("12 13 14", "12", False),
        ("so \\boxed{1/2}, not 3", "0.5", True),
        ("1,234.50", "1234.5", True),
        ("50%", "0.5", True),
    ]
    + [
        ("5e-1", "0.5", True),
        ("-3", "3", False),
        ("\u22123", "-3", True),
        ("none", "0", False),
        ("1e999999999", "1", False),
        ("1/0", "1", False),
    ]
    + [
        ("9" * 5000, "9", False),
        ("x3", "3", False),
        ("0.1", "0.10000000000000001", False),
        ("version 1.2.3", "3", False),
    ],
)
def test_numbers_are_compared_exactly(completion, answer, right):
    assert verifiers.numeric(completion, {"answer": answer}).success is right


@pytest.mark.parametrize(
    "completion, found",
    [
        ("see /tmp/pytest-of-user/pytest-1/log", None),
        ("/1/trace", None),
        ("C:\\run\\1\\log", None),
        ("run-1", None),
        ("v2.1", None),
        ("2.10.1", None),
        ("step_3", None),
        ("1.txt", None),
        ("3-tuple", None),
        ("2b8f-11", None),
        ("it is 42, a 2-digit number", 42),
        ("it is 5.Next line", 5),
        ("5/kg", 5),
        ("5\\text{ cm}", 5),
        ("x=-5", -5),
        ("7 - 12", 12),
        ("-2.5e1.", -25),
    ],
)
def test_digits_inside_a_name_or_a_path_are_no_number(completion, found):
    assert verifiers.last_number(completion) == found


def test_exact_match_is_the_whole_answer():
    for completion, right in (("a  b\n", True), ("a b c", False), ("ab", False), ("A b", False)):
        assert verifiers.exact(completion, {"answer": "a b"}).success is right


@pytest.fixture
def module(monkeypatch):
    fake = types.ModuleType("users_verifier")
    monkeypatch.setitem(sys.modules, "users_verifier", fake)
    return fake


def test_a_verifier_comes_by_its_import_path(module, tmp_path):
    module.judge = lambda completion, row: (0.5, f"half of {row['extra']}")
    task = jsonl(tmp_path, [{"prompt": "?", "extra": i} for i in range(5)], verifier="users_verifier:judge")
    assert task.env(2, 0).verify("x") == Verdict(0.5, "half of 2")
    for result, verdict in (
        (True, Verdict(1.0)),
        (0.25, Verdict(0.25)),
        (Verdict(0.0, "no"), Verdict(0.0, "no")),
        ((1, "fine"), Verdict(1.0)),
        ((0, "half \ud83d"), Verdict(0.0, "half ?")),
    ):
        module.judge = lambda completion, row, result=result: result
        assert verifiers.resolve("users_verifier:judge")("x", {}) == verdict


def test_a_verifier_that_raises_is_named_with_the_row(module, tmp_path):
    module.judge = lambda completion, row: row["missing"]
    task = jsonl(tmp_path, ROWS, verifier="users_verifier:judge")
    with pytest.raises(RuntimeError, match="verifier: .*data.jsonl, line 4, got KeyError: 'missing'"):
        task.env(3, 0).verify("x")


@pytest.mark.parametrize(
    "result, error",
    [
        (2, ValueError),
        (float("nan"), ValueError),
        (Verdict(float("nan")), ValueError),
        ("yes", TypeError),
        ((1, 2), TypeError),
        (None, TypeError),
    ],
)
def test_a_verifier_that_returns_nonsense_is_named(module, result, error):
    module.judge = lambda completion, row: result
    with pytest.raises(error, match="users_verifier:judge: expected"):
        verifiers.resolve("users_verifier:judge")("x", {})


@pytest.mark.parametrize(
    "name",
    [
        "exactly",
        "users_verifier:none",
        "no_such_module:f",
        ":f",
        "users_verifier:",
        "users_verifier:__name__",
    ],
)
def test_a_verifier_that_is_not_there_is_named(module, name):
    with pytest.raises(ConfigError, match="verifier: expected"):
        verifiers.resolve(name)
