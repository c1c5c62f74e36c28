"""The environment and verifier `python`, and their sandbox: limits, isolation, a worker that dies."""

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from opsd_kernels.train.config import ConfigError, TrainConfig, load_config
from opsd_kernels.train.config.presets import FEEDBACK, PRESETS
from opsd_kernels.train.envs import make_task, python, python_problems, python_tests, sandbox
from opsd_kernels.train.envs.python_problems import SHOWN, TEMPLATES, problems
from opsd_kernels.train.envs.sandbox import Limits, Sandbox, SandboxError
from opsd_kernels.train.types import Verdict

pytest.importorskip("pydantic_monty")
RIGHT = "def f(x):\n    return x * 3 + 1"
TESTS = ["assert f(2) == 7", "assert f(0) == 1"]


def task_of(**changes):
    return make_task(TrainConfig(**{"env": "python", **PRESETS["python"], **changes}))


@pytest.fixture
def small():
    """A sandbox of its own, with short limits."""
    box = Sandbox(Limits(seconds=0.1, memory=4_000_000, recursion=50))
    yield box
    box.close()


def workers():
    """Return the process ids of the running pydantic-monty workers of this process, as Linux lists them."""
    children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    pids = [int(pid) for file in children for pid in file.read_text().split()]
    # A killed one that was not reaped has no command line.
    return [pid for pid in pids if "monty" in Path(f"/proc/{pid}/cmdline").read_text()]


# Problems


def test_problems_are_many_different_and_split_by_template_and_by_constants():
    task, made = task_of(), problems()
    assert len(made) >= 300 and len({problem.returns for problem in made}) == len(made)
    assert {problem.topic for problem in made} == {
        "arithmetic", "strings", "lists", "dictionaries", "conditions"
    }  # fmt: skip
    parts = [set(part) for part in (task.train, task.held_out, task.untrained, task.rehearsal)]
    assert len(set.union(*parts)) == sum(map(len, parts)) and all(parts)
    size = python_problems.PER_TEMPLATE
    shares = Counter(number // size for number in task.train)
    whole = [number for number, template in enumerate(TEMPLATES) if template.held_out]
    # Of a held-out template nothing is trained, of another one about four fifths.
    assert not any(shares[number] for number in whole) and len(whole) >= 5
    assert all(0.7 < shares[n] / size < 0.9 for n in range(len(TEMPLATES)) if n not in whole)


def test_the_solution_passes_in_the_sandbox_and_that_of_another_constant_does_not():
    made, size = problems(), python_problems.PER_TEMPLATE
    for first in range(0, len(made), size):
        for number in range(first, first + 2):
            tests = [python_tests.parse(test) for test in made[number].tests]
            assert python_tests.judge(made[number].solution, tests).passed, made[number]
            for other in range(first, first + size):
                assert other == number or not python_tests.judge(made[other].solution, tests).passed


def test_an_answer_that_knows_the_shown_tests_alone_is_wrong():
    task = task_of(feedback="test")
    for number in task.train[::40]:
        shown = {
            test.code[2:-1]: test.expected
            for test in map(python_tests.parse, problems()[number].tests[:SHOWN])
        }
        table = ", ".join(f"repr({given}): {wanted!r}" for given, wanted in shown.items())
        verdict = task.env(number, 0).verify(f"def f(x):\n    return {{{table}}}.get(repr(x))")
        assert not verdict.success and "got None" in verdict.feedback
        prompt = task.env(number, 0).prompt().text
        stated = [test.removeprefix("assert ") in prompt for test in problems()[number].tests]
        assert all(stated[:SHOWN]) and not any(stated[SHOWN:])


def test_each_kind_of_feedback():
    number = next(n for n, problem in enumerate(problems()) if problem.returns.startswith("x times"))
    problem = problems()[number]
    call = problem.tests[0].removeprefix("assert ").partition(" == ")
    broken, wrong = "def f(x):\n    y = 1\n    return x + z", "def f(x):\n    return None"
    told = {
        kind: [task_of(feedback=kind).env(number, 0).verify(text).feedback for text in (broken, wrong)]
        for kind in FEEDBACK["python"]
    }
    assert told["error"] == ["Line 3: NameError: name 'z' is not defined", "The code runs, but a test fails."]
    assert told["test"][0] == f"{call[0]}: expected {call[2]}, got NameError: name 'z' is not defined"
    assert told["test"][1] == f"{call[0]}: expected {call[2]}, got None"
    assert told["none"] == [None] * 2
    assert told["answer"] == [f"The code is wrong. A correct solution:\n{problem.solution}"] * 2
    assert told["wrong"] == ["The code is wrong."] * 2
    assert task_of().env(number, 0).verify(problem.solution) == Verdict(1.0)
    with pytest.raises(RuntimeError, match="one call per Env"):
        env = task_of().env(number, 0)
        env.verify("")
        env.verify("")


def test_the_untrained_skill_is_a_sum():
    task = task_of()
    prompt = task.env(python.SUMS + 47, 0).prompt()
    assert prompt.text.startswith("What is 4 plus 7?")
    assert task.env(python.SUMS + 47, 0).verify("11").success
    assert not task.env(python.SUMS + 47, 0).verify("It is 12").success


def test_round_is_that_of_cpython():
    values = [k / 1000 for k in range(-1005, 1006, 10)] + [2.5, 1e300, 5e-324, -0.001, 7, True]
    calls = [f"round({value!r}, {digits})" for value in values for digits in (0, 1, 2, 3, 300)]
    calls += ["round(2.5)", "round(-3.5)", "round(1250, -2)", "round(2.675, ndigits=2)", "round(2.675, None)"]
    _, found = sandbox.SHARED.run("", [f"[{', '.join(calls)}]"])
    assert found.value == [eval(call) for call in calls]


def test_an_error_of_round_is_that_of_the_answers_line():
    for wrong in ('round("a", 2)', "round(1.5, 'a')", 'round(float("nan"))'):
        _, result = sandbox.SHARED.run(f"def f(x):\n    y = 1\n    return {wrong}", ["f(1)"])
        assert result.error is not None and result.line == 3


# Tests and verdicts


@pytest.mark.parametrize(
    "completion, passed",
    [
        (RIGHT, True),
        (f"Here it is:\n```python\n{RIGHT}\n```\nIt works.", True),
        (f"```\n{RIGHT}", True),
        # The first block is the answer.
        (f"```\ndef f(x): return 0\n```\n```\n{RIGHT}\n```", False),
        (f"{RIGHT}\nHere it is.", False),
        ("f = lambda x: 3 * x + 1.0", True),
        ("", False),
        # Equality is judged outside of the sandbox.
        ("class A:\n    def __eq__(self, other): return True\ndef f(x): return A()", False),
        ("def f(x): return [x * 3 + 1]", False),
        ("def f(x): return str(x * 3 + 1)", False),
    ],
)  # fmt: skip
def test_verdicts(completion, passed):
    assert python_tests.judge(completion, [python_tests.parse(test) for test in TESTS]).passed == passed


def test_a_test_that_is_no_comparison_runs_in_the_sandbox():
    tests = [python_tests.parse(text) for text in ("y = f(1)", "assert y > 3", "assert abs(f(2) - 7) < 1e-6")]
    assert not any(test.compared for test in tests)
    assert python_tests.judge(RIGHT, tests).passed
    report = python_tests.judge("def f(x):\n    return x", tests)
    assert report.failed.startswith("assert y > 3: expected no error, got AssertionError")


@pytest.mark.parametrize(
    "value, expected, equal",
    [
        (1, 1.0, True), (True, 1, False), (0.1 + 0.2, 0.3, True), (10**400, 1.0, False), ([1], (1,), False),
        ([1, [2.0]], [1, [2]], True), ({"a": 1}, {"a": 1.0}, True), ({"a": 1}, {"b": 1}, False),
        ({1}, {1}, True), (None, 0, False), ("a", "a", True), ([1], [1, 2], False),
    ],
)  # fmt: skip
def test_equal_values(value, expected, equal):
    assert python_tests.same(value, expected) == equal


# The verifier of a data file

ROWS = [{"prompt": f"p{i}", "tests": TESTS, "answer": RIGHT, "split": None} for i in range(5)]


def data_task(tmp_path, rows, **changes):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    settings = {
        "env": "jsonl",
        "model": "somewhere",
        "data": str(path),
        "verifier": "python",
        "feedback": "text",
    }
    return make_task(TrainConfig(**{**settings, **changes}))


def test_the_verifier_gives_the_same_to_a_data_file(tmp_path):
    wrong = "def f(x):\n    return x"
    told = {
        kind: data_task(tmp_path, ROWS, feedback=kind).env(0, 0).verify(wrong).feedback
        for kind in FEEDBACK["jsonl"]
    }
    assert told == {
        "text": "f(2): expected 7, got 2", "test": "f(2): expected 7, got 2", "wrong": "The code is wrong.",
        "error": "The code runs, but a test fails.", "answer": f"The correct answer is {RIGHT}", "none": None,
    }  # fmt: skip
    assert data_task(tmp_path, ROWS).env(0, 0).verify(RIGHT) == Verdict(1.0)
    hinted = [{**row, "feedback": "think"} for row in ROWS]
    assert data_task(tmp_path, hinted).env(0, 0).verify(wrong).feedback == "think"
    bare = [{"prompt": "p", "tests": TESTS}] * 5
    assert data_task(tmp_path, bare, feedback="test").env(0, 0).verify(wrong).feedback.startswith("f(2)")


@pytest.mark.parametrize("tests", [None, [], "assert f(1)", [3], ["assert f("], [""]])
def test_bad_tests_are_named(tmp_path, tests):
    with pytest.raises(ConfigError, match=r"data: expected tests that are a list .* line 3"):
        data_task(tmp_path, [*ROWS[:2], {**ROWS[0], "tests": tests}, *ROWS[3:]])
    with pytest.raises(ConfigError, match="line 6, got none of tests"):
        data_task(tmp_path, [*ROWS, {"prompt": "p"}])


def test_settings_that_do_not_go_together():
    with pytest.raises(ConfigError, match="verifier: expected python for feedback=error"):
        load_config(None, ["env=jsonl", "data=x", "model=y", "feedback=error"])
    with pytest.raises(ConfigError, match="model: expected a language model for env=python.*'tiny'"):
        load_config(None, ["env=python", "model=tiny"])


# The sandbox


def test_programs_do_not_see_each_other_and_repeat(small):
    program = "import random, time\ny = 3"
    first = [small.run(program, ["random.random()", "time.time()"])[i].value for i in (1, 2)]
    assert [small.run(program, ["random.random()", "time.time()"])[i].value for i in (1, 2)] == first
    assert small.run("y")[0].error == "NameError: name 'y' is not defined"


@pytest.mark.parametrize(
    "program, error",
    [
        ("while True: pass", "TimeoutError: the time limit was exceeded"),
        ("while True: print('x' * 1000)", "TimeoutError: the time limit was exceeded"),
        ("x = 'a' * 10**7", "MemoryError: the memory limit was exceeded"),
        ("def f(): return f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("open('/etc/passwd')", "PermissionError: Permission denied: '/etc/passwd'"),
        ("import socket", "ModuleNotFoundError: No module named 'socket'"),
        ("\ud800", "SyntaxError: source code is not valid UTF-8 (contains lone surrogates)"),
    ],
)
def test_limits(small, program, error):
    began = time.monotonic()
    assert small.run(program)[0].error == error
    assert time.monotonic() - began < 5


def test_a_worker_that_is_killed_is_replaced(small):
    assert small.run("1 + 1")[0].value == 2
    sandbox.SHARED.close()
    mine = workers()
    assert mine
    for worker in mine:
        os.kill(worker, signal.SIGKILL)
    assert small.run("1 + 2")[0].value == 3
    assert set(workers()).isdisjoint(mine)


def test_a_worker_that_dies_twice_is_a_wrong_answer(small, monkeypatch):
    class Dies:
        def checkout(self, **options):
            raise_crash()

    def raise_crash():
        # Only the library can make the error: a worker that is killed under its program.
        with Sandbox._library().Monty(request_timeout=0.05) as pool, pool.checkout() as session:
            session.feed_run("while True: pass")

    monkeypatch.setattr(small, "_workers", Dies)
    (result,) = small.run("1 + 1")
    assert result.error.startswith("the interpreter stopped")


def test_a_sandbox_that_does_not_start_is_a_clear_error(monkeypatch):
    monkeypatch.setenv("MONTY_BIN", "/nowhere/monty")
    broken = Sandbox()
    with pytest.raises(SandboxError, match="expected a worker of pydantic-monty, got .*last checkpoint"):
        broken.run("1 + 1")
    monkeypatch.setattr(sandbox, "SHARED", broken)
    with pytest.raises(ConfigError, match="env: expected a pydantic-monty that runs .*opsd_kernels.python"):
        task_of()


def test_a_missing_sandbox_is_named_with_its_install(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"env: expected pydantic-monty.*pip install 'opsd_kernels\[python\]'"
    ):
        task_of()
    with pytest.raises(ConfigError, match="verifier: expected pydantic-monty"):
        data_task(tmp_path, ROWS)


ATOMS = (
    "x", "f", "1", "10**9", "'a'", "[]", "{}", "()", "None", "'/etc/passwd'", "'ab' * 10**8", "range(10**12)",
    "lambda: f()", "open", "print", "__builtins__", "().__class__", "globals()", "2**10000", "b'\\xff'",
)  # fmt: skip
SHAPES = (
    "{0} + {1}", "{0} * {1}", "[{0}] * {1}", "sum({0})", "list({0})", "str({0})", "repr({0})", "sorted({0})",
    "{0}({1})", "open({0}, 'w')", "{0}[{1}]", "{0} ** {1}", "(lambda x: {0})({1})", "[{0} for x in {1}]",
    "getattr({0}, {1})", "'%s' % {0}", "max({0}, {1})", "{0} if {1} else {0}",
)  # fmt: skip
STATEMENTS = (
    "x = {0}", "while {0}: x = {1}", "def f(x={0}): return {1}", "for x in {0}: print({1})", "import os\n{0}",
    "import {2}", "from {2} import *", "raise {0}", "assert {0}",
    "try:\n    {0}\nexcept BaseException:\n    {1}",
    "class A:\n    x = {0}\nA().x", "os.system('touch {3}')", "open('{3}', 'w').write('x')", "print({0})",
    "import pathlib\npathlib.Path('{3}').write_text('x')", "with open('{3}', 'a') as x: x.write('y')",
    "import time\ntime.sleep({0})", "f({0})", "x.append(x)", "exec({0})", "eval({0})", "del x", "{0}",
    "if x:",
)  # fmt: skip
MODULES = (
    "os sys socket subprocess ctypes threading asyncio pathlib shutil urllib.request http.client".split()
)


def snippet(draws, target):
    """Return a random program: expressions of the shapes above in a few statements."""

    def expression(depth):
        if depth == 0 or draws.random() < 0.4:
            return draws.choice(ATOMS)
        return draws.choice(SHAPES).format(expression(depth - 1), expression(depth - 1))

    return "\n".join(
        draws.choice(STATEMENTS).format(expression(2), expression(2), draws.choice(MODULES), target)
        for _ in range(draws.randint(1, 5))
    )


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_generated_snippets_end_within_their_limits_and_touch_nothing(small, count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draws, target = random.Random(count), tmp_path / "touched"
    slowest, errors = 0.0, 0
    for _ in range(count):
        program = snippet(draws, target)
        began = time.monotonic()
        errors += any(result.error is not None for result in small.run(program, ["f(3)"]))
        slowest = max(slowest, time.monotonic() - began)
    # Two calls of .1 s each; the rest is for a busy machine.
    assert slowest < 5 and errors > count / 2
    assert not list(tmp_path.iterdir())
    assert small.run("1 + 1")[0].value == 2
    sandbox.SHARED.close()
    opened = [os.readlink(file) for pid in workers() for file in Path(f"/proc/{pid}/fd").iterdir()]
    assert opened and not any(name.startswith("socket:") for name in opened)
