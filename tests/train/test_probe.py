"""The gap against its expectation, the law against known lines, and the errors of `opsd probe`."""

import dataclasses
import json
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from opsd_kernels import cli
from opsd_kernels.train.config import ConfigError, TrainConfig
from opsd_kernels.train.records.log import Progress
from opsd_kernels.train.sampling import evaluate
from opsd_kernels.train.sampling.rollout import Sampler
from opsd_kernels.train.studies import probe
from opsd_kernels.train.studies.probe import (
    Point,
    fit,
    load_laws,
    measure_context,
    save_laws,
    with_context,
)
from opsd_kernels.train.teacher import make_teacher
from opsd_kernels.train.types import Prompt, Rollout, Verdict


class FakeTask:
    def __init__(self, problems):
        self.held_out = range(problems)

    def env(self, problem, key):
        return SimpleNamespace(prompt=lambda: Prompt(problem, str(problem)))


class FakeSampler:
    """A sampler that is correct with probability p[problem] without a context, q[problem] with one."""

    def __init__(self, p, q, feedback="wrong"):
        self.p, self.q, self.feedback, self.rng, self.asked = p, q, feedback, np.random.default_rng(0), []

    def fitting(self, rollouts, contexts, again=False):
        return list(contexts)

    def sample(self, model, task, requests, *key):
        self.asked.append(len(requests))
        return [self._rollout(request) for request in requests]

    def _rollout(self, request):
        shown = request.context is not None
        right = self.rng.random() < (self.q if shown else self.p)[request.prompt.problem]
        return Rollout(
            request.prompt,
            request.group,
            request.sample,
            (1,),
            (2,),
            "text",
            Verdict(1.0) if right else Verdict(0.0, self.feedback),
        )


class FakeTeacher:
    @contextmanager
    def using(self):
        yield None


def fake_probe(p, q, samples, **settings):
    config = TrainConfig(group_size=8, **settings)
    told = None if config.feedback == "none" else config.feedback
    return measure_context(FakeSampler(p, q, told), None, FakeTeacher(), FakeTask(len(p)), config, samples)


P, Q = np.linspace(0.02, 0.6, 500), np.linspace(0.9, 0.3, 500)
CLOSE = 0.025  # four standard errors of 4000 answers
ROUNDING = 1e-9


def test_a_second_try_of_failures_gains_what_it_should():
    found = fake_probe(P, Q, 4000, feedback="wrong", siblings=False)
    assert found.answered == pytest.approx((1 - P).mean(), abs=CLOSE)
    assert found.student.value == pytest.approx(P.mean(), abs=CLOSE)
    assert found.second_try.value == pytest.approx((P * (2 - P)).mean(), abs=CLOSE)  # .18 above the student
    assert found.teacher.value == pytest.approx((P + (1 - P) * Q).mean(), abs=CLOSE)
    assert found.gap.value == pytest.approx(((1 - P) * (Q - P)).mean(), abs=CLOSE)
    assert (
        found.gap.value == pytest.approx(found.teacher.value - found.second_try.value)
        and found.gap.low < found.gap.value < found.gap.high
    )


def test_a_second_try_behind_siblings_gains_nothing():
    """A sibling is shown for correct and wrong answers, so drawing again changes nothing on average."""
    found = fake_probe(P, Q, 4000, feedback="none")
    shown = 1 - (1 - P) ** 7
    assert found.answered == pytest.approx(shown.mean(), abs=CLOSE)
    assert found.second_try.value == pytest.approx(P.mean(), abs=CLOSE)
    assert found.gap.value == pytest.approx((shown * (Q - P)).mean(), abs=CLOSE)


def test_a_context_that_adds_nothing_has_no_gap_but_a_plain_one():
    found = fake_probe(P, P, 4000, feedback="wrong", siblings=False)
    assert abs(found.gap.value) < CLOSE < 0.1 < found.plain_gap.value


def test_intervals_are_over_problems_which_weigh_the_same():
    """Three problems with equal answers within each: 8 answers carry no more information than one."""
    sampler = FakeSampler([0.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    found = measure_context(
        sampler, None, FakeTeacher(), FakeTask(3), TrainConfig(group_size=8, siblings=False), 100
    )
    assert sampler.asked == [96, 32, 32]  # whole rounds; the four groups of the first problem failed
    assert found.student.value == pytest.approx(2 / 3) and (
        found.student.low,
        found.student.high,
        found.student.count,
    ) == (0, 1, 3)
    assert found.gap.value == pytest.approx(1 / 3)


def test_agrees_with_the_trainers_own_measurement(config, task, sampler, model):
    teacher = make_teacher(model, config)
    found = measure_context(sampler, model, teacher, task, config, 60)
    assert found.teacher.value == pytest.approx(
        evaluate.self_teacher_accuracy(sampler, model, teacher, task, config, 60)
    )
    nothing = measure_context(sampler, model, teacher, task, dataclasses.replace(config, context="none"), 60)
    assert nothing.answered == 1 and (nothing.gap.value, nothing.gap.low, nothing.gap.high) == (0, 0, 0)


def test_contexts_share_what_the_student_answers(config, monkeypatch):
    """With the results of each context alone: the attempts are equal, and second tries without siblings."""
    views = [with_context(config, f"{kind},siblings=false") for kind in ("answer", "wrong")]
    generated = []
    generate = Sampler._generate
    monkeypatch.setattr(
        Sampler, "_generate", lambda self, *args: generated.append(1) or generate(self, *args)
    )
    apart = [found for view in views for found in probe.measure_contexts([view], 24, Progress())]
    alone = len(generated)
    assert probe.measure_contexts(views, 24, Progress()) == apart
    assert len(generated) - alone < alone * 3 / 4


def noisy(rng, count, slope=0.8, intercept=-0.1, noise=0.05):
    gaps = rng.uniform(-0.2, 0.7, count)
    return [
        Point(str(i), gap, slope * gap + intercept + noise * rng.standard_normal())
        for i, gap in enumerate(gaps.tolist())
    ]


def test_fit_of_a_line_without_noise():
    law = fit(noisy(np.random.default_rng(0), 6, noise=0))
    assert (law.slope, law.intercept, law.r2) == pytest.approx(
        (0.8, -0.1, 1.0)
    ) and law.scatter == pytest.approx(0, abs=ROUNDING)
    assert law.error == pytest.approx(0, abs=ROUNDING) and law.predict(0.3).value == pytest.approx(0.14)


def test_fit_and_left_out_contexts_by_hand():
    points = noisy(np.random.default_rng(1), 9)
    law, gaps, gains = (
        fit(points),
        np.array([p.gap for p in points]),
        np.array([p.improvement for p in points]),
    )
    peer = stats.linregress(gaps, gains)
    assert (law.slope, law.intercept, law.r2) == pytest.approx((peer.slope, peer.intercept, peer.rvalue**2))
    by_hand = [np.polyval(np.polyfit(np.delete(gaps, i), np.delete(gains, i), 1), gaps[i]) for i in range(9)]
    assert law.left_out == pytest.approx(by_hand)
    assert law.error == pytest.approx(np.sqrt(np.mean((gains - by_hand) ** 2)))
    means = [np.delete(gains, i).mean() for i in range(9)]
    assert law.spread == pytest.approx(np.sqrt(np.mean((gains - means) ** 2)))


def test_the_interval_covers_one_more_context():
    """Of 1000 laws over eight contexts, the intervals of 950 +- 7 contain the ninth.

    Without the new point's own scatter it would be about 560, with 1.96 for t about 905.
    """
    rng, held = np.random.default_rng(2), 0
    for _ in range(1000):
        *known, new = noisy(rng, 9)
        interval = fit(known).predict(new.gap)
        held += interval.low <= new.improvement <= interval.high
    assert 925 <= held <= 975


def test_runs_of_a_context_become_a_point():
    runs = [Point("a", 0.1, 0.0, 3), Point("b", 0.2, 0.3), Point("a", 0.5, 0.4), Point("c", 0.4, 0.1)]
    law = fit(runs)
    assert [(p.context, p.runs) for p in law.points] == [("a", 4), ("b", 1), ("c", 1)]
    assert (law.points[0].gap, law.points[0].improvement) == pytest.approx((0.2, 0.1))


def test_too_few_contexts():
    with pytest.raises(ValueError, match=r"runs of at least 3 contexts, got 2: a, b"):
        fit([Point("a", 0.1, 0.0), Point("b", 0.2, 0.3), Point("a", 0.1, 0.4)])


def test_gaps_that_are_all_the_same():
    law = fit([Point(name, 0.1, gain) for name, gain in (("a", 0.0), ("b", 0.3), ("c", 0.6))])
    assert (
        (law.slope, law.r2) == (0, 0)
        and law.intercept == pytest.approx(0.3)
        and law.error == pytest.approx(law.spread)
    )
    assert np.isfinite(law.predict(0.1).high) and np.isinf(law.predict(0.2).high)


def test_law_files(tmp_path):
    rng = np.random.default_rng(3)
    laws = [fit(noisy(rng, 5), {"steps": 8}, measure) for measure in probe.MEASURES]
    save_laws(tmp_path / "deeper" / "law.json", laws)
    assert load_laws(tmp_path / "deeper" / "law.json") == laws
    (tmp_path / "other.json").write_text('{"schema": 1, "paper": "law"}')
    with pytest.raises(
        ValueError, match=r"law: expected a file of opsd probe --fit .*other\.json, which is another"
    ):
        load_laws(tmp_path / "other.json")
    (tmp_path / "text").write_text("steps")
    with pytest.raises(ValueError, match="law: expected a JSON file that a fit wrote"):
        load_laws(tmp_path / "text")


@pytest.mark.parametrize(
    "text, settings, name",
    [
        ("last", {"feedback": "last", "siblings": True}, "siblings + last"),
        ("last,siblings=false", {"feedback": "last", "siblings": False}, "last"),
        ("none", {"feedback": "none"}, "siblings"),
        (
            "context=contrastive,feedback=none,control=unrelated",
            {"context": "contrastive", "control": "unrelated"},
            "contrastive 2+1 (unrelated)",
        ),
        ("context=none", {"context": "none"}, "nothing"),
    ],
)
def test_contexts_as_text(text, settings, name):
    config = with_context(TrainConfig(), text)
    assert {key: getattr(config, key) for key in settings} == settings and probe.context_name(config) == name


@pytest.mark.parametrize(
    "text, message",
    [
        ("lasst", "feedback: expected one of .* did you mean 'last'"),
        ("last,sibling=true", "unknown config key 'sibling'; did you mean 'siblings'"),
        ("last,steps=3", "unknown config key 'steps'"),
        ("last,siblings", "context: expected a kind of feedback, then KEY=VALUE"),
    ],
)
def test_contexts_that_are_none(text, message):
    with pytest.raises(ConfigError, match=message):
        with_context(TrainConfig(), text)


def finished(folder, config, before, after):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json())
    (folder / "summary.json").write_text(
        json.dumps({"held_out_accuracy_before": before, "held_out_accuracy_after": after})
    )
    return folder


def test_fit_to_runs(config, tmp_path, monkeypatch):
    gaps = {"answer": 0.6, "first": 0.2, "wrong": 0.0}
    gains = {"answer": (0.2, 0.7, 0.8), "first": (0.2, 0.4), "wrong": (0.2, 0.1)}
    runs = []
    for kind, (before, *after) in gains.items():
        for seed, value in enumerate(after):
            settings = dataclasses.replace(config, feedback=kind, siblings=False, seed=seed, warm_seed=seed)
            runs.append(finished(tmp_path / f"{kind}{seed}", settings, before, value))

    def fake(configs, samples, progress):
        return [
            SimpleNamespace(
                context=probe.context_name(one),
                measured=lambda name, gap=gaps[one.feedback]: {"gap": gap, "consensus_gap": agreed(gap)}[
                    name
                ],
            )
            for one in configs
        ]

    def agreed(gap):
        return 1 - gap

    monkeypatch.setattr(probe, "measure_contexts", fake)
    law, other = probe.fit_runs(runs, None, Progress())
    assert (law.measure, other.measure) == probe.MEASURES
    assert [point.gap for point in other.points] == pytest.approx([0.4, 0.8, 1.0])
    assert other.slope == pytest.approx(-law.slope) and other.r2 == pytest.approx(law.r2)
    assert [dataclasses.astuple(point) for point in law.points] == [
        ("answer", 0.6, pytest.approx(0.55), 2),
        ("first", 0.2, pytest.approx(0.2), 1),
        ("wrong", 0.0, pytest.approx(-0.1), 1),
    ]
    assert law.settings["steps"] == 8 and not {
        "feedback",
        "seed",
        "warm_seed",
        "eval_samples",
        "cache_dir",
    } & set(law.settings)
    longer = finished(tmp_path / "longer", dataclasses.replace(config, steps=9), 0.2, 0.3)
    with pytest.raises(ValueError, match="differ in context and seeds alone, got .* with steps: 8, 9"):
        probe.fit_runs([*runs, longer], None, Progress())


def opsd(*arguments):
    return CliRunner().invoke(cli.app, ["probe", *map(str, arguments)])


def settings(small):
    return [word for key, value in small.items() for word in ("--set", f"{key}={value}")]


def test_fit_then_predict_from_the_command_line(small, config, tmp_path):
    runs = [
        finished(tmp_path / kind, dataclasses.replace(config, feedback=kind, siblings=siblings), 0.2, after)
        for kind, siblings, after in (
            ("answer", False, 0.7),
            ("last", True, 0.3),
            ("none", True, 0.2),
            ("corrupted", False, 0.1),
        )
    ]
    law = tmp_path / "law.json"
    done = opsd("--fit", *runs, "--samples", 600, "--out", law)
    assert done.exit_code == 0, done.output
    assert "siblings + last" in done.output and "left out" in done.output
    assert [len(one.points) for one in load_laws(law)] == [4, 4]
    out = tmp_path / "probes.json"
    contexts = ["--context", "first,siblings=false", "--context", "none"]
    done = opsd(
        *settings(small), "--set", "learning_rate=0.1", *contexts, "--samples", 60, "--law", law, "--out", out
    )
    assert done.exit_code == 0, done.output
    assert "the law's runs differ from this configuration in learning_rate: 0.0005, 0.1" in done.output
    record = json.loads(out.read_text())
    assert [one["context"] for one in record["probes"]] == ["first", "siblings"]
    for one in load_laws(law):
        predicted = one.predict(record["probes"][0][one.measure]["value"])
        assert record["predictions"][0][one.measure] == pytest.approx(dataclasses.asdict(predicted))
    for title in ("gap before training", "consensus gap before training"):
        assert title in done.output
    assert done.output.count("predicted") == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--context", "lasst"], "feedback: expected one of answer"),
        (["--set", "stepps=3"], "unknown config key 'stepps'; did you mean 'steps'"),
        (["--fit", "--context", "last"], "--fit: expected directories of runs alone"),
        (
            ["--fit", "nowhere"],
            "fit: expected directories of finished runs, with config.json and summary.json, got nowhere",
        ),
        (["--fit"], "fit: expected runs of at least 3 contexts, got 0"),
        (["a.json", "b.json"], "CONFIG: expected one file, got 2"),
        (["--law", "nowhere.json"], "nowhere.json"),
    ],
)
def test_errors_are_one_line(arguments, message):
    done = opsd(*arguments)
    assert (
        done.exit_code == 2
        and done.stderr.startswith("opsd: error: ")
        and message in done.stderr
        and done.stderr.count("\n") == 1
    )
