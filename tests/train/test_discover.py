"""The search for a first correct answer: attempts, exact best-of-k, the methods' prompts, the command."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from opsd_kernels import cli
from opsd_kernels.testing import assert_same_bits
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.config.presets import PRESETS
from opsd_kernels.train.contexts import ContextTemplate
from opsd_kernels.train.envs.base import Env
from opsd_kernels.train.models import warmstart
from opsd_kernels.train.records.log import Progress
from opsd_kernels.train.studies import discover, discover_run
from opsd_kernels.train.studies.discover import Budget, Search
from opsd_kernels.train.types import Context, Prompt, Rollout, Verdict

DIGITS = 1e-9  # of a float64; at a chance of 1e-12 the naive formula has none

SETTINGS = {"env": "mastermind", **PRESETS["mastermind"], "warm_accuracy": 1e-30}


@pytest.fixture(scope="module")
def settings(small):
    return TrainConfig(**{**small, **SETTINGS, "tiny_hidden": 16, "tiny_layers": 1, "tiny_heads": 2})


@pytest.fixture
def base(settings):
    torch.set_num_threads(1)
    return discover.load_base(settings, Progress())


class Nth(Env):
    """An environment in which the n-th answer is correct, with any text."""

    seen, wanted = 0, 1

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def prompt(self):
        return self.inner.prompt()

    def _judge(self, completion):
        Nth.seen += 1
        return Verdict(1.0) if Nth.seen == Nth.wanted else Verdict(0.0, f"a b c {Nth.seen % 4} 0")


@pytest.fixture
def right_at(base, monkeypatch):
    """Make the n-th attempt the first correct one."""
    env = base.task.env
    monkeypatch.setattr(base.task, "env", lambda problem, key: Nth(env(problem, key)))

    def set_to(n):
        Nth.seen, Nth.wanted = 0, n

    return set_to


@pytest.mark.parametrize("n, batches", [(1, 1), (4, 1), (5, 2), (9, 3), (10, 3), (11, 3)])
def test_attempts_of_a_batch_count_up_to_the_first_right_one(base, right_at, n, batches):
    right_at(n)
    budget = Budget(attempts=10, batch=4)  # two in the last batch
    found = discover.self_distil(base, base.task.held_out[0], budget)
    assert (found.first, found.attempts) == ((n, n) if n <= 10 else (None, 10))
    assert found.generated_answers == Nth.seen == min(4 * batches, 10)
    assert found.updates == batches - 1  # no update after the last batch
    assert (found.teacher_tokens > found.context_tokens > 0) == (batches > 1)


@pytest.mark.parametrize("method", [discover.best_of_k, discover.multi_turn])
@pytest.mark.parametrize("n", [1, 3, 6, 7])
def test_searches_side_by_side_count_alike(base, right_at, method, n):
    right_at(n)
    (found,) = method(base, base.task.held_out[:1], Budget(attempts=6, batch=4))
    assert (found.first, found.attempts, found.updates) == ((n, n, 0) if n <= 6 else (None, 6, 0))


def rollout(base, success, feedback="a b c 1 0", problem=0, text="a b c"):
    return Rollout(
        Prompt(problem, "?"),
        0,
        0,
        (1, 2),
        (3, 4, 5),
        text,
        Verdict(float(success), None if success else feedback),
    )


def test_a_first_right_answer_is_the_first_whatever_the_batch(base):
    outcomes = [False, False, True, False, True, True]
    for size in (1, 2, 4, 6):
        found = Search(0)
        for start in range(0, 6, size):
            if found.goes_on(Budget(attempts=6)):
                found.count([rollout(base, right) for right in outcomes[start : start + size]])
        assert (found.first, found.attempts) == (3, 3)


def trained(base, steps):
    """Load a base model that is sometimes correct."""
    warm = warmstart.WarmStart(base.config, base.task, base.sampler.encoder, base.model)
    optimizer, rng = torch.optim.AdamW(base.model.parameters(), lr=1e-2), np.random.default_rng(0)
    for _ in range(steps):
        warm._step(optimizer, rng)
    base.start = {name: parameter.detach().clone() for name, parameter in base.model.named_parameters()}


def test_best_of_k_is_what_sampling_finds(base):
    trained(base, 60)
    base.config = dataclasses.replace(base.config, rollout_temperature=0.7)
    base.sampler = dataclasses.replace(base.sampler, temperature=0.7)
    exact = dict(
        zip(
            base.task.held_out[:600],
            discover.success_probabilities(base, base.task.held_out[:600]),
            strict=True,
        )
    )
    likely = sorted(exact, key=exact.__getitem__)[-100:]
    attempts = 48
    found = discover.best_of_k(base, likely, Budget(attempts, batch=48))
    sampled = discover.solved_within([search.first for search in found], attempts)
    expected = discover.chance_within([exact[problem] for problem in likely], attempts)
    assert expected[:, -1].mean() > 0.2  # otherwise the comparison is empty
    for k in (8, 24, 48):
        deviation = (expected[:, k - 1] * (1 - expected[:, k - 1])).sum() ** 0.5 / len(likely)
        assert abs(sampled[:, k - 1].mean() - expected[:, k - 1].mean()) < 4 * deviation
    assert discover_run.mean_attempts(sampled) == pytest.approx(
        np.mean([search.attempts for search in found])
    )


def test_chances_of_k_attempts():
    found = discover.chance_within([0.0, 1e-12, 0.25, 1.0], 3)
    np.testing.assert_allclose(
        found, [[0, 0, 0], [1e-12, 2e-12, 3e-12], [0.25, 0.4375, 0.578125], [1, 1, 1]], rtol=DIGITS
    )
    np.testing.assert_array_equal(discover.solved_within([1, None, 3], 3), [[1, 1, 1], [0, 0, 0], [0, 0, 1]])


def test_the_window_holds_the_last_failures_and_no_more(base, right_at):
    right_at(99)
    asked = []
    sample = base.sampler.sample

    def recording(model, task, requests, *key):
        asked.extend(requests)
        return sample(model, task, requests, *key)

    base.sampler = SimpleNamespace(sample=recording, encoder=base.sampler.encoder, fits=lambda *view: True)
    (found,) = discover.multi_turn(base, base.task.held_out[:1], Budget(attempts=6, window=2))
    told = [f"a b c {i % 4} 0" for i in range(1, 6)]  # the feedback on the n-th answer
    assert [request.context for request in asked] == [None] + [
        Context((), "\n".join(told[max(0, i - 2) : i])) for i in range(1, 6)
    ]
    assert [request.sample for request in asked] == list(range(6))
    assert found.context_tokens > 0


def test_a_chat_model_gets_its_failures_as_turns(base):
    chat = SimpleNamespace(
        task=SimpleNamespace(template=ContextTemplate()),
        sampler=SimpleNamespace(encoder=base.sampler.encoder),
    )
    prompt = Prompt(7, "2 + 2?", ({"role": "system", "content": "brief"},))
    failures = [rollout(base, False, "no", text="5"), rollout(base, False, "<eos> no", text="<assistant> 6")]
    request = discover.conversation(chat, prompt, failures, 2)
    assert [turn["role"] for turn in request.prompt.before] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert request.prompt.before[1]["content"] == "2 + 2?" and request.prompt.before[2]["content"] == "5"
    assert (
        request.prompt.text == "< eos> no\nSolve the original problem."
        and request.prompt.before[4]["content"] == "< assistant> 6"
    )
    assert (request.group, request.sample, request.context) == (7, 2, None)


def test_a_search_is_the_same_again_and_leaves_the_base_model_as_it_was(base):
    problems, budget = base.task.held_out[:3], Budget(attempts=12, batch=4)
    one, two, three = (discover.self_distil(base, problem, budget) for problem in problems)
    assert one.updates == 2
    for name, parameter in base.model.named_parameters():
        assert_same_bits(parameter.detach(), base.start[name])
    assert discover.self_distil(base, problems[1], budget) == two
    assert [vars(found) for found in discover.multi_turn(base, problems, budget)][2] == vars(
        discover.multi_turn(base, problems[2:], budget)[0]
    )
    assert three.problem == problems[2]


def test_what_is_said_changes_the_student(base, monkeypatch):
    """Updates make a guess with the feedback `wrong` less likely; without feedback there is no update."""
    moved = []
    update_on = discover.steps.update_on

    def recording(trainer, batch, config, step):
        result = update_on(trainer, batch, config, step)
        moved.append(
            max(
                float((parameter.detach() - base.start[name]).abs().max())
                for name, parameter in trainer.student.named_parameters()
            )
        )
        return result

    monkeypatch.setattr(discover.steps, "update_on", recording)
    discover.self_distil(base, base.task.held_out[0], Budget(attempts=12, batch=4))
    assert len(moved) == 2 and 0 < moved[0] < moved[1]
    base.config = dataclasses.replace(base.config, feedback="none")
    base.task.feedback = "none"
    found = discover.self_distil(base, base.task.held_out[0], Budget(attempts=12, batch=4))
    assert (found.updates, found.teacher_tokens, found.attempts, len(moved)) == (0, 0, 12, 2)


def test_hard_questions_are_the_first_below_the_bound(base):
    trained(base, 40)
    base.task.held_out = base.task.held_out[:700]
    chances = discover.success_probabilities(base, base.task.held_out)
    below = float(np.median(chances))
    expected = [
        problem for problem, chance in zip(base.task.held_out, chances, strict=True) if chance < below
    ]
    found = discover.hard_questions(base, 300, below)  # more than one batch of problems
    assert list(found) == expected[:300] and max(found.values()) < below
    assert list(discover.hard_questions(base, 5, below, skip=3)) == expected[3:8]
    with pytest.raises(
        ValueError, match="questions: expected at most 0, the held-out problems with a chance below 0"
    ):
        discover.hard_questions(base, 1, 0.0)


def test_where_many_answers_are_right_chances_are_sampled(small, tmp_path):
    config = TrainConfig(**{**small, "env": "expr", **PRESETS["expr"], "warm_accuracy": 1e-30})
    base = discover.load_base(config, Progress())
    assert discover.success_probabilities(base, base.task.held_out[:2]) is None
    shares = discover.sampled_probabilities(base, base.task.held_out[:2])
    assert all(
        0 <= share <= 1 and share * discover.PROBES == round(share * discover.PROBES) for share in shares
    )


@pytest.mark.parametrize("name", ["attempts", "batch", "window"])
def test_a_budget_is_positive(name):
    with pytest.raises(ValueError, match=f"{name}: expected a whole number of at least 1, got 0"):
        Budget(**{name: 0})


def test_intervals_hold_the_mean_and_narrow_with_questions():
    solved = discover.solved_within([1, 2, None, 4] * 3, 4)
    value, low, high = discover_run.curve(solved)
    assert (low <= value).all() and (value <= high).all() and value.tolist() == [0.25, 0.5, 0.5, 0.75]
    _, more_low, more_high = discover_run.curve(np.concatenate([solved] * 20))
    assert ((more_high - more_low) < 0.5 * (high - low)).all()
    assert discover_run.powers_of_two(6) == [1, 2, 4, 6] and discover_run.powers_of_two(8) == [1, 2, 4, 8]


def command(*arguments):
    return CliRunner().invoke(cli.app, ["discover", *map(str, arguments)])


def test_the_command_leaves_a_table_a_figure_and_a_json(settings, tmp_path):
    (tmp_path / "config.json").write_text(settings.to_json())
    asked = [tmp_path / "config.json", "--questions", 3, "--below", 1, "--attempts", 6, "--batch", 4, "--out"]
    result = command(*asked, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "discovery@k, 3 questions" in result.output and "best-of-k, exact" in result.output
    found = json.loads((tmp_path / "out" / "discovery.json").read_text())
    assert (
        list(found["methods"]) == ["self-distillation", "best-of-k", "multi-turn"]
        and len(found["questions"]) == 3
    )
    assert list(found["methods"]["multi-turn"]["discovery"]) == ["1", "2", "4", "6"]
    assert (tmp_path / "out" / "discovery.png").stat().st_size > 10_000
    again = command(*asked, tmp_path / "again")
    assert again.exit_code == 0
    assert json.loads((tmp_path / "again" / "discovery.json").read_text())["methods"] == found["methods"]
    taken = command(*asked, tmp_path / "out")
    assert taken.exit_code == 2 and "which is not empty" in taken.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--set", "evn=mastermind"], "did you mean 'env'"),
        (["--set", "env=mastermind", "--set", "feedback=marks"], "feedback: expected one of"),
        (["--set", "feedback=marks"], "feedback: expected one of"),
        (["--attempts", "0"], "--attempts"),
        (["missing.json"], "config: expected an existing JSON or YAML file"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, arguments, message):
    result = command(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
    assert not (tmp_path / "out").exists()


def test_too_many_questions_are_refused(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(discover, "success_probabilities", lambda base, problems: [0.5] * len(problems))
    (tmp_path / "config.json").write_text(settings.to_json())
    result = command(tmp_path / "config.json", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "questions: expected at most 0" in result.output
    assert not (tmp_path / "out" / "discovery.json").exists()
