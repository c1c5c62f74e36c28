"""Measure the gaps of a context, and fit the laws that predict the improvement from them (arXiv:2605.30070).

The gap is the accuracy of the self-teacher with the context minus that of a second try: the student answers
again, without a context, wherever the teacher would. A second try alone raises the accuracy, by E[p (1 - p)]
if correct answers have no context and wrong ones are drawn again.

The consensus gap (`measures`) asks for an answer that all contexts of a problem agree on, token by token.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats
from transformers import PreTrainedModel

from opsd_kernels import report_json
from opsd_kernels.train import loop
from opsd_kernels.train.config import TrainConfig, load_config
from opsd_kernels.train.config.settings import WHERE_NOT_WHAT, field_types
from opsd_kernels.train.config.values import check_key, expect, parse_value
from opsd_kernels.train.envs.base import Task
from opsd_kernels.train.models import pretrained
from opsd_kernels.train.records.durable import write_file
from opsd_kernels.train.records.log import Progress
from opsd_kernels.train.sampling import evaluate
from opsd_kernels.train.sampling.prompts import PromptEncoder
from opsd_kernels.train.sampling.rollout import Request, Sampler, make_engine
from opsd_kernels.train.session import reproducible
from opsd_kernels.train.studies.measures import measure_consensus
from opsd_kernels.train.studies.statistics import LEVEL, Estimate, estimate
from opsd_kernels.train.task import checked_task
from opsd_kernels.train.teacher import Teacher, make_teacher
from opsd_kernels.train.types import Context, Rollout

# The keys that differ between the runs of a law.
VIEW = ("context", "feedback", "siblings", "successes", "failures", "control")
SEEDS = ("seed", "warm_seed")
WATCHING = tuple("eval_every eval_samples probe_samples checkpoint_every samples_every samples_kept".split())
SCHEMA = 2
# What a law may predict from: the paper's measure, and the one that was chosen on `secret_op`.
MEASURES = ("gap", "consensus_gap")
# Squares below are rounding errors: accuracies are multiples of one answer in thousands.
SAME = 1e-12


def context_name(config: TrainConfig) -> str:
    """Return a short name: `answer`, `siblings`, `siblings + last`, `contrastive 2+1 (unrelated)`."""
    counts = {
        "none": "nothing",
        "sdpo": "siblings" if config.siblings else "",
        "positive": f"positive {config.successes}",
        "contrastive": f"contrastive {config.successes}+{config.failures}",
        "failure": f"failure {config.failures}",
    }
    told = config.feedback if config.context != "none" and config.feedback != "none" else ""
    control = f" ({config.control})" if config.control != "none" else ""
    return " + ".join(filter(None, (counts[config.context], told))) + control


def with_context(config: TrainConfig, text: str) -> TrainConfig:
    """Apply a kind of feedback, settings of the context, or both.

    Examples of `text`: `last`, `none,siblings=true`, `context=contrastive,failures=2`.
    """
    first, *others = text.split(",")
    values = {}
    for pair in (first if "=" in first else f"feedback={first}", *others):
        key, equals, value = (part.strip() for part in pair.partition("="))
        expect(bool(equals), "context", "a kind of feedback, then KEY=VALUE after commas", text)
        check_key(key, VIEW)
        values[key] = parse_value(value, field_types()[key])
    return dataclasses.replace(config, **values)


@dataclass(frozen=True)
class Probe:
    """Accuracies over held-out problems, each with its bootstrap interval over problems."""

    context: str
    answered: float  # share of the rollouts that the teacher answers again
    student: Estimate
    teacher: Estimate  # evaluate.self_teacher_accuracy
    second_try: Estimate
    gap: Estimate  # teacher - second try
    plain_gap: Estimate  # teacher - student
    # Of measures.ConsensusProbe; None for a model that cannot be asked.
    consensus: Estimate | None = None
    consensus_gap: Estimate | None = None

    def measured(self, measure: str) -> float | None:
        """Return the value of one of MEASURES."""
        found: Estimate | None = getattr(self, measure)
        return None if found is None else found.value


@dataclass(frozen=True)
class KeepingSampler(Sampler):
    """A sampler that answers a question it has answered before from memory.

    The student's attempts, and most of its second tries, are the same for several contexts.
    """

    kept: dict[tuple[Any, ...], list[tuple[int, ...]]] = field(default_factory=dict)

    def _generate(
        self,
        model: PreTrainedModel,
        prompts: list[tuple[int, ...]],
        requests: Sequence[Request],
        key: tuple[int, ...],
    ) -> list[tuple[int, ...]]:
        places = tuple((request.group, request.sample) for request in requests)
        asked = (id(model), tuple(prompts), places, key)
        if asked not in self.kept:
            self.kept[asked] = super()._generate(model, prompts, requests, key)
        return self.kept[asked]


class Recorder:
    """A sampler that records requests, rollouts and keys."""

    def __init__(self, sampler: Sampler):
        self.sampler = sampler
        self.calls: list[tuple[Sequence[Request], list[Rollout], tuple[int, ...]]] = []

    def sample(
        self, model: PreTrainedModel, task: Task, requests: Sequence[Request], *key: int
    ) -> list[Rollout]:
        rollouts = self.sampler.sample(model, task, requests, *key)
        self.calls.append((requests, rollouts, key))
        return rollouts

    def fitting(
        self, rollouts: Sequence[Rollout], contexts: Sequence[Context | None], again: bool = False
    ) -> list[Context | None]:
        return self.sampler.fitting(rollouts, contexts, again)


def measure_context(
    sampler: Sampler,
    student: PreTrainedModel,
    teacher: Teacher,
    task: Task,
    config: TrainConfig,
    samples: int,
) -> Probe:
    """Measure one context on about `samples` rollouts, equally many of each problem."""
    recorder, groups, problems = Recorder(sampler), max(1, samples // config.group_size), len(task.held_out)
    if groups > problems:
        groups -= groups % problems
    evaluate.self_teacher_accuracy(recorder, student, teacher, task, config, groups * config.group_size)
    (_, attempts, _), (asked, answers, key) = recorder.calls
    # With the teacher's random numbers, so that equal draws of both cancel.
    again = sampler.sample(
        student, task, [Request(request.prompt, request.group, request.sample) for request in asked], *key
    )
    place = {(rollout.group, rollout.sample): i for i, rollout in enumerate(attempts)}
    # (B, 3): student, teacher, second try.
    right = np.repeat([[float(rollout.verdict.success)] for rollout in attempts], 3, axis=1)
    for column, drawn in ((1, answers), (2, again)):
        for rollout in drawn:
            right[place[rollout.group, rollout.sample], column] = rollout.verdict.success
    _, problem_B = np.unique([rollout.prompt.problem for rollout in attempts], return_inverse=True)
    alone, taught, twice = (
        np.bincount(problem_B, right[:, column]) / np.bincount(problem_B) for column in range(3)
    )
    estimates = [estimate(values) for values in (alone, taught, twice, taught - twice, taught - alone)]
    return Probe(context_name(config), len(asked) / len(attempts), *estimates)


def measure_contexts(configs: Sequence[TrainConfig], samples: int | None, progress: Progress) -> list[Probe]:
    """Return one probe per configuration, of the base model of its run; `samples` None means `eval_samples`.

    Consecutive configurations share a model if they can.
    """
    probes: list[Probe] = []
    loaded: tuple[Sampler, PreTrainedModel, Teacher] | None = None
    key: tuple[dict[str, Any], bool] | None = None
    for config in configs:
        pretrained.check_machine(config)
        task = checked_task(config)
        wanted = (
            {name: value for name, value in asdict(config).items() if name not in VIEW},
            config.shows_peers,
        )
        with reproducible(config):
            if loaded is None or wanted != key:
                loaded, key = _load(config, task, progress), wanted
            count = samples or config.eval_samples
            probe = measure_context(*loaded, task, config, count)
            agreed = measure_consensus(*loaded, task, config, count)
        if agreed is not None:
            probe = dataclasses.replace(probe, consensus=agreed.accuracy, consensus_gap=agreed.gap)
        probes.append(probe)
    return probes


def _load(config: TrainConfig, task: Task, progress: Progress) -> tuple[Sampler, PreTrainedModel, Teacher]:
    model, tokenizer = pretrained.load_student(loop.base_of(config, task, progress), None, config)
    teacher = make_teacher(model, config, loop.external_teacher(config, task, tokenizer, progress))
    encoder, vocab = PromptEncoder(tokenizer, task.template), pretrained.vocabulary(tokenizer)
    sampler = KeepingSampler(
        encoder,
        config.max_new_tokens,
        config.rollout_temperature,
        config.rollout_batch,
        vocab,
        make_engine(config),
        longest=pretrained.context_length(model.config, teacher.model.config),
    )
    return sampler, model, teacher


@dataclass(frozen=True)
class Point:
    """A context: its measure before training and the improvement in held-out accuracy. Means over `runs`."""

    context: str
    gap: float
    improvement: float
    runs: int = 1


@dataclass(frozen=True)
class Law:
    """The line improvement = slope * gap + intercept, by least squares over contexts."""

    points: tuple[Point, ...]
    slope: float
    intercept: float
    r2: float
    scatter: float  # standard deviation of the residuals, n - 2 degrees of freedom
    left_out: tuple[float, ...]  # the prediction for each point by the line through the others
    settings: dict[str, Any] = field(default_factory=dict)  # common to all runs
    measure: str = "gap"  # one of MEASURES, the points' `gap`

    @property
    def error(self) -> float:
        """Return the root mean square error on contexts that were left out of the fit."""
        return float(np.sqrt(np.mean((coordinates(self.points)[1] - self.left_out) ** 2)))

    @property
    def spread(self) -> float:
        """Return the same error of a prediction by the mean of the other contexts."""
        _, gains = coordinates(self.points)
        return float(np.std(gains) * len(gains) / (len(gains) - 1))

    def predict(self, gap: float) -> Estimate:
        """Predict the improvement of one more context, with its 95 % prediction interval."""
        gaps, _ = coordinates(self.points)
        value = self.slope * gap + self.intercept
        varied, far = float(np.sum((gaps - gaps.mean()) ** 2)), (gap - gaps.mean()) ** 2
        # Equal gaps give no information about a different one.
        lever = far / varied if varied > SAME else 0.0 if far < SAME else np.inf
        wide = stats.t.ppf((1 + LEVEL) / 2, len(gaps) - 2) * self.scatter * np.sqrt(1 + 1 / len(gaps) + lever)
        return Estimate(value, float(value - wide), float(value + wide), len(gaps))

    def inside(self, gap: float) -> bool:
        return min(point.gap for point in self.points) <= gap <= max(point.gap for point in self.points)


def save_laws(path: Path, laws: Sequence[Law]) -> None:
    """Write laws of the same runs, each by its own measure, as one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [{**asdict(law), "error": law.error, "spread": law.spread} for law in laws]
    write_file(path, report_json.dumps({"schema": SCHEMA, "kind": "law", "laws": records}))


def coordinates(points: Sequence[Point]) -> tuple[np.ndarray, np.ndarray]:
    """Return the gaps and the improvements."""
    return np.array([point.gap for point in points]), np.array([point.improvement for point in points])


def line(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit (slope, intercept, R^2) along the last axis. For constant x the slope and R^2 are zero."""
    from_x, from_y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    varied, shared, risen = np.sum(from_x**2, -1), np.sum(from_x * from_y, -1), np.sum(from_y**2, -1)
    slope = np.divide(shared, varied, out=np.zeros_like(shared), where=varied > SAME)
    explained = np.divide(slope * shared, risen, out=np.zeros_like(shared), where=risen > SAME)
    return slope, y.mean(-1) - slope * x.mean(-1), explained


def by_context(runs: Sequence[Point]) -> list[Point]:
    """Merge the runs of each context into one point."""
    groups: dict[str, list[Point]] = {}
    for run in runs:
        groups.setdefault(run.context, []).append(run)
    return [_mean(group) for group in groups.values()]


def _mean(group: Sequence[Point]) -> Point:
    counts = [point.runs for point in group]
    gap, improvement = (
        float(np.average([getattr(point, name) for point in group], weights=counts))
        for name in ("gap", "improvement")
    )
    return Point(group[0].context, gap, improvement, sum(counts))


def fit(runs: Sequence[Point], settings: dict[str, Any] | None = None, measure: str = "gap") -> Law:
    """Fit the law. Raises ValueError for fewer than three contexts, since a line fits any two."""
    points = by_context(runs)
    if len(points) < 3:
        names = ", ".join(point.context for point in points)
        raise ValueError(f"fit: expected runs of at least 3 contexts, got {len(points)}: {names}")
    gaps, gains = coordinates(points)
    slope, intercept, r2 = map(float, line(gaps, gains))
    scatter = np.sqrt(np.sum((gains - slope * gaps - intercept) ** 2) / (len(points) - 2))
    left_out = []
    for i, gap in enumerate(gaps):
        rise, start, _ = line(np.delete(gaps, i), np.delete(gains, i))
        left_out.append(float(rise * gap + start))
    return Law(tuple(points), slope, intercept, r2, float(scatter), tuple(left_out), settings or {}, measure)


def load_laws(path: Path) -> list[Law]:
    """Fit the laws of a file anew from their points. Raises ValueError for a file of another kind."""
    try:
        data = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"law: expected a JSON file that a fit wrote, got {path}: {error}") from error
    if not isinstance(data, dict) or (data.get("kind"), data.get("schema")) != ("law", SCHEMA):
        raise ValueError(
            "law: expected a file of opsd probe --fit or of opsd reproduce law (fits/law.json), "
            f"got {path}, which is another"
        )
    return [
        fit([Point(**point) for point in law["points"]], law["settings"], law["measure"])
        for law in data["laws"]
    ]


def common_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that the runs of one law must share."""
    return {
        name: value
        for name, value in asdict(config).items()
        if name not in (*VIEW, *SEEDS, *WATCHING, *WHERE_NOT_WHAT)
    }


def differences(settings: dict[str, Any], others: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {value!r}, {others[name]!r}"
        for name, value in settings.items()
        if name in others and others[name] != value
    ]


def fit_runs(folders: Sequence[Path], samples: int | None, progress: Progress) -> list[Law]:
    """Fit a law by each measure to finished runs of `opsd train`, which are probed on their base models.

    Raises ValueError for a directory without a finished run, and for runs that differ in more than context
    and seeds.
    """
    configs = []
    for folder in folders:
        if not (folder / "summary.json").is_file() or not (folder / "config.json").is_file():
            raise ValueError(
                f"fit: expected directories of finished runs, with config.json and summary.json, got {folder}"
            )
        configs.append(load_config(folder / "config.json"))
        differ = differences(common_settings(configs[0]), common_settings(configs[-1]))
        if differ:
            raise ValueError(
                f"fit: expected runs that differ in context and seeds alone, got {folders[0]} and {folder} "
                f"with {'; '.join(differ)}"
            )
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    gains = [
        summary["held_out_accuracy_after"] - summary["held_out_accuracy_before"] for summary in summaries
    ]
    probes = measure_contexts(configs, samples, progress)
    laws = []
    for measure in MEASURES:
        values = [probe.measured(measure) for probe in probes]
        points = [
            Point(probe.context, value, gain)
            for probe, value, gain in zip(probes, values, gains, strict=True)
            if value is not None
        ]
        # A law of some of the runs could not be compared with the other.
        if len(points) == len(probes):
            laws.append(fit(points, common_settings(configs[0]) if configs else {}, measure))
    return laws


def probe_command(
    configs: Sequence[TrainConfig], samples: int | None, law_file: Path | None, out: Path | None
) -> None:
    """`opsd probe`: print a table of the contexts, with the laws' predictions if there are laws."""
    progress, laws = Progress(), load_laws(law_file) if law_file else []
    probes = measure_contexts(configs, samples, progress)
    show_probes(progress.console, probes, laws)
    for difference in differences(laws[0].settings, common_settings(configs[0])) if laws else ():
        progress.say(f"the law's runs differ from this configuration in {difference}")
    if out is not None:
        record = {
            "schema": SCHEMA,
            "kind": "probes",
            "probes": [asdict(probe) for probe in probes],
            "predictions": [
                {
                    law.measure: asdict(law.predict(value))
                    for law in laws
                    if (value := probe.measured(law.measure)) is not None
                }
                for probe in probes
            ],
        }
        write_file(out, report_json.dumps(record))


def show_probes(console: Console, probes: Sequence[Probe], laws: Sequence[Law]) -> None:
    """Print a table for each measure, so that a terminal of 80 columns has room."""
    shown = {"gap": ("student", "teacher", "second_try"), "consensus_gap": ("consensus",)}
    by_measure, beyond = {law.measure: law for law in laws}, False
    for measure, accuracies in shown.items():
        law, names = by_measure.get(measure), (*accuracies, measure)
        table = Table(title=f"{spoken(measure)} before training [95 % over problems]")
        for column in ("context", *map(spoken, names), *(["predicted improvement [95 %]"] if law else [])):
            table.add_column(column)
        for probe in probes:
            cells = [str(getattr(probe, name) or "not measured") for name in names]
            value = probe.measured(measure)
            if law is not None and value is not None:
                outside = not law.inside(value)
                cells.append(f"{law.predict(value)}{' *' if outside else ''}")
                beyond |= outside
            table.add_row(probe.context, *cells)
        console.print(table)
    if beyond:
        console.print("* beyond the gaps that the law was fitted on", markup=False)


def spoken(name: str) -> str:
    """Write a field of Probe in words."""
    return "self-teacher" if name == "teacher" else name.replace("_", " ")


def fit_command(folders: Sequence[Path], samples: int | None, out: Path | None) -> None:
    """`opsd probe --fit`: fit the laws of finished runs, print their tables and write a file for `--law`."""
    progress = Progress()
    laws = fit_runs(folders, samples, progress)
    for law in laws:
        measure = spoken(law.measure)
        table = Table(title=f"the law by the {measure}, by context")
        for column in ("context", "runs", measure, "improvement", "as predicted by the others"):
            table.add_column(column)
        for point, left in zip(law.points, law.left_out, strict=True):
            table.add_row(
                point.context, str(point.runs), f"{point.gap:.3f}", f"{point.improvement:.3f}", f"{left:.3f}"
            )
        progress.console.print(table)
        progress.say(f"improvement = {law.slope:.3f} {measure} {law.intercept:+.3f}, R^2 {law.r2:.3f}")
        progress.say(
            f"error on a context that was left out {law.error:.3f}, without the {measure} {law.spread:.3f} "
            "(root mean square)"
        )
    if out is not None:
        save_laws(out, laws)
