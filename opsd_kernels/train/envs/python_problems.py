"""The problems of `python`: templates of one-line functions, and the constants in them.

Each topic has a template of which no problem is trained on; of the others every fifth problem, by its
constants, is held out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any

import numpy as np

from opsd_kernels.train import seeds

# Problems that a template gives; tests of a problem with random inputs, and those of them in its prompt.
PER_TEMPLATE, DRAWN, SHOWN = 16, 5, 2
WORDS = "red blue cat dog sun moon one two left right north south apple stone river cloud".split()
LETTERS = "aeiorstn"
# Streams of random numbers.
CONSTANTS, INPUTS = 71, 72


@dataclass(frozen=True)
class Template:
    """A family of problems: `returns` and `code` have the constants {a}, {b} (integers), {v}, {w} (words)."""

    topic: str
    returns: str
    code: str
    held_out: bool = False


@dataclass(frozen=True)
class Problem:
    """One problem: what f(x) returns, a right answer, and its tests."""

    topic: str
    returns: str
    solution: str
    tests: tuple[str, ...]  # `assert f(...) == ...`, the first SHOWN of them for the prompt
    held_out: bool


TEMPLATES = (
    Template("arithmetic", "x times {a} plus {b}", "x * {a} + {b}"),
    Template("arithmetic", "x minus {a}, multiplied by {b}", "(x - {a}) * {b}"),
    Template("arithmetic", "the remainder of x divided by {a}, plus {b}", "x % {a} + {b}"),
    Template("arithmetic", "{a} times the square of x, minus {b}", "{a} * x ** 2 - {b}"),
    Template("arithmetic", "x divided by {a}, rounded down, plus {b}", "x // {a} + {b}"),
    Template("arithmetic", "the absolute value of x minus {a}, plus {b}", "abs(x - {a}) + {b}"),
    Template("arithmetic", "{a} minus x, multiplied by {b}", "({a} - x) * {b}", held_out=True),
    Template("strings", "the string x repeated {a} times, followed by {v!r}", "x * {a} + {v!r}"),
    Template("strings", "the first {a} characters of the string x in upper case", "x[:{a}].upper()"),
    Template("strings", "the string x without its first {a} characters", "x[{a}:]"),
    Template("strings", "how often {l!r} occurs in the string x, plus {a}", "x.count({l!r}) + {a}"),
    Template("strings", "the string x with every {l!r} replaced by {w!r}", "x.replace({l!r}, {w!r})"),
    Template("strings", "the string {v!r}, followed by the string x reversed", "{v!r} + x[::-1]"),
    Template("strings", "the string x between {v!r} and {w!r}", "{v!r} + x + {w!r}", held_out=True),
    Template("lists", "the sum of the list x plus {a}", "sum(x) + {a}"),
    Template(
        "lists", "the list of the items of the list x that are greater than {a}", "[i for i in x if i > {a}]"
    ),
    Template("lists", "the list of the items of the list x, each multiplied by {a}", "[i * {a} for i in x]"),
    Template("lists", "the list x followed by the numbers {a} and {b}", "x + [{a}, {b}]"),
    Template("lists", "how many items of the list x are equal to {a}", "x.count({a})"),
    Template("lists", "the first {a} items of the sorted list x", "sorted(x)[:{a}]"),
    Template("lists", "the length of the list x times {a}", "len(x) * {a}", held_out=True),
    Template(
        "dictionaries",
        "the value of the key {v!r} in the dictionary x, or {a} if it is missing",
        "x.get({v!r}, {a})",
    ),
    Template("dictionaries", "the sum of the values of the dictionary x plus {a}", "sum(x.values()) + {a}"),
    Template(
        "dictionaries",
        "the list of the keys of the dictionary x whose value is greater than {a}",
        "[k for k in x if x[k] > {a}]",
    ),
    Template("dictionaries", "the number of keys in the dictionary x times {a}", "len(x) * {a}"),
    Template(
        "dictionaries",
        "the dictionary x with {a} added to each value",
        "{{k: n + {a} for k, n in x.items()}}",
    ),
    Template("dictionaries", "whether the key {v!r} is in the dictionary x", "{v!r} in x", held_out=True),
    Template("conditions", "{v!r} if x is greater than {a}, otherwise {w!r}", "{v!r} if x > {a} else {w!r}"),
    Template("conditions", "x if x is smaller than {a}, otherwise {a}", "min(x, {a})"),
    Template(
        "conditions", "x times {a} if x is even, otherwise x plus {b}", "x * {a} if x % 2 == 0 else x + {b}"
    ),
    Template("conditions", "True if x is divisible by {a}, otherwise False", "x % {a} == 0"),
    Template("conditions", "{b} if x is negative, otherwise x plus {a}", "{b} if x < 0 else x + {a}"),
    Template("conditions", "True if x is greater than {a}, otherwise False", "x > {a}", held_out=True),
)


@functools.cache
def problems() -> tuple[Problem, ...]:
    """Return all problems, of which no two are the same question."""
    made: list[Problem] = []
    for number, template in enumerate(TEMPLATES):
        questions: dict[str, Problem] = {}
        attempt = 0
        while len(questions) < PER_TEMPLATE:
            problem = _problem(template, number, attempt, template.held_out or len(questions) % 5 == 4)
            questions.setdefault(problem.returns, problem)
            attempt += 1
        made += questions.values()
    return tuple(made)


def _problem(template: Template, number: int, attempt: int, held_out: bool) -> Problem:
    draws = np.random.default_rng(int(seeds.mix(CONSTANTS, number, attempt)))
    a, b = (int(n) for n in draws.choice(np.arange(2, 20), 2, replace=False))
    v, w = (str(word) for word in draws.choice(WORDS, 2, replace=False))
    chosen: dict[str, Any] = {"a": a, "b": b, "v": v, "w": w, "l": str(draws.choice(list(LETTERS)))}
    code = template.code.format(**chosen)
    solution = f"def f(x):\n    return {code}"
    function = compiled(code)
    inputs = _inputs(template.topic, chosen, int(seeds.mix(INPUTS, number, attempt)))
    tests = tuple(f"assert f({x!r}) == {function(x)!r}" for x in inputs)
    return Problem(template.topic, template.returns.format(**chosen), solution, tests, held_out)


def compiled(code: str) -> Callable[[Any], Any]:
    """Return f(x) of a template's own code, which runs here; a model's code runs in the sandbox alone."""
    scope: dict[str, Any] = {}
    exec(f"def f(x):\n    return {code}", scope)
    return scope["f"]


def _inputs(topic: str, chosen: dict[str, Any], key: int) -> Sequence[Any]:
    """Return different inputs: drawn ones, the first SHOWN of them for the prompt, and the edges.

    With the edges the answers to two problems of a template differ on some input.
    """
    draws, a = np.random.default_rng(key), chosen["a"]
    makers: dict[str, tuple[Callable[[], Any], list[Any]]] = {
        "arithmetic": (lambda: int(draws.integers(-30, 60)), [0, -1, 100]),
        "conditions": (lambda: _number(draws, a), list(range(-3, 21))),
        "strings": (lambda: _text(draws), ["", chosen["l"] * 3, chosen["v"], ascii_lowercase]),
        "lists": (lambda: _numbers(draws, a), [[], [a], [a - 1, a, a + 1], list(range(24, 0, -1))]),
        "dictionaries": (
            lambda: _entries(draws, chosen),
            [{}, {chosen["v"]: a}, {"p": a - 1, "q": a, "r": a + 1}],
        ),
    }
    make, edges = makers[topic]
    found: list[Any] = []
    while len(found) < DRAWN:
        value = make()
        if value not in found:
            found.append(value)
    return [*found, *(edge for edge in edges if edge not in found)]


def _number(draws: np.random.Generator, a: int) -> int:
    return a * int(draws.integers(-2, 5)) if draws.random() < 0.3 else int(draws.integers(-30, 60))


def _text(draws: np.random.Generator) -> str:
    return "".join(str(word) for word in draws.choice(WORDS, int(draws.integers(1, 4))))


def _numbers(draws: np.random.Generator, a: int) -> list[int]:
    numbers = [int(n) for n in draws.integers(-5, 30, int(draws.integers(2, 6)))]
    return [*numbers, a] if draws.random() < 0.5 else numbers


def _entries(draws: np.random.Generator, chosen: dict[str, Any]) -> dict[str, int]:
    keys = [str(word) for word in draws.choice(WORDS, int(draws.integers(1, 4)), replace=False)]
    keys += [chosen["v"]] if draws.random() < 0.5 and chosen["v"] not in keys else []
    return {key: int(draws.integers(0, 40)) for key in keys}
