"""The report of a run: samples, the page (in a browser where there is one), TensorBoard, curves."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from opsd_kernels.cli import app
from opsd_kernels.train.loop import train
from opsd_kernels.train.records import charts, report_page
from opsd_kernels.train.records.log import Scalars, offset_after, read_metrics
from opsd_kernels.train.records.report import Record, read_run
from opsd_kernels.train.records.samples import DIGITS

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
HOSTILE = (
    "</pre><script>document.title = 'owned'</script>"
    "<img src=x onerror=\"document.title='owned'\"> & \u202e\ud800"
)


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    train(config, out)
    return out


@pytest.fixture
def hostile(run):
    """Return the run with answers and feedback that inject HTML."""
    record = read_run(run)
    line = {
        **record.samples[-1],
        "feedback": HOSTILE,
        "teacher_view": HOSTILE,
        "prompt": HOSTILE,
        "tokens": [HOSTILE, "<eos>"],
        "gap": [-2.0, None],
    }
    return Record(HOSTILE, {**record.config, "model": HOSTILE}, record.metrics, [line], record.facts, True)


def test_samples_tell_what_the_teacher_saw(run, config):
    lines = read_metrics(run / "samples.jsonl")
    steps = [1, *range(config.samples_every, config.steps + 1, config.samples_every)]
    assert [line["step"] for line in lines] == [step for step in steps for _ in range(config.samples_kept)]
    for line in lines:
        assert (line["feedback"] is None) == (line["reward"] == 1)
        if line["feedback"] is not None:
            assert line["prompt"] in line["teacher_view"] and line["feedback"] in line["teacher_view"]
        assert (line["gap"] is None) == (line["teacher_view"] is None)
        assert line["gap"] is None or len(line["gap"]) == len(line["tokens"])
        assert "".join(line["tokens"]).removesuffix("<eos>") == line["answer"].replace(" ", "")


def test_the_gaps_are_those_of_the_metrics(config, tmp_path):
    """With every rollout kept, the mean over their tokens is the metric of the step."""
    train(type(config)(**{**vars(config), "steps": 1, "samples_kept": 100}), tmp_path / "out")
    gaps = [gap for line in read_metrics(tmp_path / "out" / "samples.jsonl") for gap in line["gap"] or ()]
    mean = read_metrics(tmp_path / "out" / "metrics.jsonl")[0]["sampled_logprob_gap"]
    assert sum(gaps) / len(gaps) == pytest.approx(mean, abs=max(map(abs, gaps)) * 10.0 ** (1 - DIGITS))


def test_samples_can_be_left_out(config, tmp_path):
    train(type(config)(**{**vars(config), "steps": 1, "samples_kept": 0}), tmp_path / "out")
    assert (tmp_path / "out" / "samples.jsonl").read_text() == ""
    assert b"None were kept" in (tmp_path / "out" / "report.html").read_bytes()


def test_lines_after_a_checkpoint_are_cut(tmp_path):
    path = tmp_path / "samples.jsonl"
    assert offset_after(path, 3) == 0
    whole = '{"step": 1}\n{"step": 1}\n{"step": 3}\n'
    path.write_text(whole + '{"step": 4}\n{"step": 5, "pro')
    assert offset_after(path, 3) == len(whole)
    assert [line["step"] for line in read_metrics(path)] == [1, 1, 3, 4], (
        "half a line of a run in progress is not read"
    )


def test_the_page_holds_the_run(run, config):
    html = (run / "report.html").read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert f"<td class=number>{summary['held_out_accuracy_after']:.1%}</td>" in html
    assert "<td>samples_every</td><td>2</td><td>20</td>" in html and "<td>seed</td>" not in html, (
        "what differs from the defaults"
    )
    assert html.count("<article>") == (1 + config.steps // config.samples_every) * config.samples_kept
    assert html.count("<svg") == 7 and "<script" not in html and "http:" not in html and "https:" not in html


def test_hostile_text_stays_text(hostile):
    html = report_page.page(hostile).decode()
    assert "<script" not in html and "<img" not in html
    assert html.count("&lt;script&gt;") >= 6  # title, heading, prompt, token, feedback, teacher's view


def test_a_run_in_progress_has_a_page(run, tmp_path):
    started = tmp_path / "started"
    started.mkdir()
    shutil.copy(run / "config.json", started)
    assert "unfinished, step 0 of 8" in report_page.page(read_run(started)).decode()
    shutil.copytree(run / "checkpoint", started / "checkpoint")
    first = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[:5]
    (started / "metrics.jsonl").write_text("".join(first) + '{"step": 6, "rew')
    result = CliRunner().invoke(app, ["report", str(started), "--out", str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    html = (tmp_path / "page.html").read_text()
    probe = json.loads(first[3])["held_out_accuracy"]
    assert "unfinished, step 5 of 8" in html and "<th class=number>latest</th>" in html
    assert f"<td class=number>{probe:.1%}</td>" in html and "<td class=number>4</td>" in html
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_no_run_no_page(tmp_path):
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2 and "holds no config.json" in result.output


def browse(page: bytes, folder: Path, *flags: str) -> str:
    path = folder / "page.html"
    path.write_bytes(page)
    common = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--window-size=1100,1400",
    ]
    command = [BROWSER, *common, f"--user-data-dir={folder / 'profile'}", *flags, path.as_uri()]
    return subprocess.run(command, capture_output=True, timeout=120, check=True).stdout.decode()


needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="none of these is on the PATH: " + ", ".join(BROWSERS)
)


@needs_browser
def test_a_browser_shows_the_page(run, hostile, tmp_path):
    dom = browse(report_page.page(hostile), tmp_path, "--dump-dom")
    assert re.search(r"<title>[^<]*&lt;script&gt;document.title = 'owned'", dom), (
        "the title is the run's, and no script has changed it"
    )
    assert "<script" not in dom and "<img" not in dom
    dom = browse((run / "report.html").read_bytes(), tmp_path, "--dump-dom")
    assert "Before and after" in dom and "<td>held-out accuracy</td>" in dom and dom.count("<polyline") > 8
    sample = read_metrics(run / "samples.jsonl")[-1]
    assert f"<pre>{sample['prompt']}</pre>" in dom


@needs_browser
def test_a_browser_draws_it_in_light_and_dark(run, tmp_path):
    from matplotlib.image import imread

    page, pictures = (run / "report.html").read_bytes(), []
    for scheme in (0, 1):  # dark, light
        shot = tmp_path / f"{scheme}.png"
        browse(page, tmp_path, f"--screenshot={shot}", f"--blink-settings=preferredColorScheme={scheme}")
        pictures.append(imread(shot)[..., :3])
    dark, light = pictures
    assert dark[2, 2].max() < 0.2 and light[2, 2].min() > 0.9, "the page's background"
    assert all(picture.std() > 0.03 for picture in pictures), "a blank page"


def test_tensorboard_after_a_kill_has_every_step_once(tmp_path):
    """A process writes steps 1 to 5 after a checkpoint at step 3; another one resumes from there."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = Scalars(tmp_path, True, 1)
    for step in range(1, 6):
        first.write({"step": step, "reward": float(step), "divergence_by_position": [1.0], "loss": None})
        if step == 3:
            first.flush()
    kept = accumulators.EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in kept.Scalars("reward")][:3] == [1, 2, 3], (
        "what a checkpoint counts on is in the file"
    )
    first.close()
    second = Scalars(tmp_path, True, 4)
    for step in range(4, 8):
        second.write({"step": step, "reward": 10.0 * step})
    second.close()
    events = accumulators.EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["reward"]
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
        (5, 50),
        (6, 60),
        (7, 70),
    ]


def test_tensorboard_follows_a_run_and_its_resumption(config, tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings, out = type(config)(**{**vars(config), "steps": 4, "tensorboard": True}), tmp_path / "out"
    train(settings, out)
    (out / "summary.json").unlink()
    shutil.rmtree(out / "checkpoint" / "step_000004")
    train(settings, out, resume=True)  # from step 2
    events = accumulators.EventAccumulator(str(out / "tensorboard")).Reload()
    lines = read_metrics(out / "metrics.jsonl")
    assert set(events.Tags()["scalars"]) == {
        name for line in lines for name, value in line.items() if isinstance(value, (int, float))
    } - {"step"}
    for name in ("reward", "divergence", "seconds"):
        assert [(event.step, event.value) for event in events.Scalars(name)] == [
            (line["step"], float(np.float32(line[name]))) for line in lines
        ]


def test_ticks_are_round_and_inside():
    for low, high in ((0, 1), (-0.37, 0.02), (1, 200), (3.5512, 3.5548), (3e-7, 4e-6), (12345, 67890)):
        values, texts = zip(*charts.Scale.over([low, high], 0, 1).ticks(), strict=True)
        assert 3 <= len(values) <= 7 and low <= values[0] and values[-1] <= high
        assert len(set(texts)) == len(texts) and all(
            float(text.replace(",", "")) == pytest.approx(value)
            for value, text in zip(values, texts, strict=True)
        )


def test_thinned_curves_keep_their_spikes():
    points = [(step, math.sin(step / 500)) for step in range(10_000)]
    points[6789] = (6789, 40.0)
    kept = charts.thin(points)
    assert len(kept) <= charts.MOST_POINTS and (6789, 40.0) in kept and kept == sorted(kept)


def test_a_chart_of_nothing_or_of_one_point():
    assert "nothing yet" in charts.line_chart("empty", [("a", [])])
    assert "<circle" in charts.line_chart("one", [("a", [(1, 0.0)])])
