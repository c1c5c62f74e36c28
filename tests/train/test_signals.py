"""Signals that stop a run: the state is saved after the step, and the exit code says which one came."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import opsd_kernels
from opsd_kernels.train import loop, session
from opsd_kernels.train.loop import train
from opsd_kernels.train.records.log import Progress, read_metrics
from opsd_kernels.train.types import TrainingInterrupted

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
STOP_AFTER = 3


def sending(number, times=1):
    """Wrap one_step to signal this process after the third step, which no checkpoint follows."""
    plain = loop.one_step

    def one_step(run):
        metrics = plain(run)
        if metrics["step"] == STOP_AFTER:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return metrics

    return one_step


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("times", [1, 3])
def test_a_signal_saves_after_the_step(config, tmp_path, monkeypatch, number, times):
    """Repeated at once, as torchrun and schedulers do, it is one request."""
    before = [signal.getsignal(each) for each in SIGNALS]
    monkeypatch.setattr(loop, "one_step", sending(number, times))
    with pytest.raises(TrainingInterrupted, match="stopped after step 3 of 8; the state is saved") as stopped:
        train(config, tmp_path / "run")
    assert stopped.value.number == number
    assert max(path.name for path in (tmp_path / "run/checkpoint").iterdir()) == "step_000003"
    assert [signal.getsignal(each) for each in SIGNALS] == before
    monkeypatch.undo()
    assert train(config, tmp_path / "run", resume=True)["steps"] == config.steps
    assert [line["step"] for line in read_metrics(tmp_path / "run/metrics.jsonl")] == list(range(1, 9))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_the_first_step_stops_at_once(config, tmp_path, monkeypatch, number):
    monkeypatch.setattr(loop, "measure", lambda *_: os.kill(os.getpid(), number))
    with pytest.raises(TrainingInterrupted, match="before a step was made; --resume continues") as stopped:
        train(config, tmp_path / "run")
    assert stopped.value.number == number
    assert pickle.loads(pickle.dumps(stopped.value)).number == number, "ranks send it to each other"


def test_a_second_ctrl_c_stops_at_once(monkeypatch):
    monkeypatch.setattr(session, "SAME_REQUEST_SECONDS", 0.0)
    with session.stop_signals(Progress()) as stop, stop.finishing_steps():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.number == signal.SIGTERM


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_the_callers_own_handler_stays(handler):
    """`nohup` ignores SIGHUP; a framework around the trainer may handle SIGTERM itself."""
    previous = signal.signal(signal.SIGHUP, handler)
    try:
        with session.stop_signals(Progress()) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.number == 0 and signal.getsignal(signal.SIGHUP) is handler
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.slow
def test_the_exit_code_of_the_command(small, tmp_path):
    """The process of `opsd train`, ended by SIGTERM in the midst of a long run."""
    out = tmp_path / "run"
    (tmp_path / "settings.json").write_text(json.dumps({**small, "steps": 5000, "checkpoint_every": 5000}))
    command = [
        sys.executable,
        "-m",
        "opsd_kernels",
        "train",
        str(tmp_path / "settings.json"),
        "--out",
        str(out),
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(opsd_kernels.__file__).parents[1])}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        log = out / "metrics.jsonl"
        while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 5):
            time.sleep(0.01)
        process.terminate()
        _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, told
    assert f"--out {out} --resume" in told
    last = read_metrics(log)[-1]["step"]
    assert (out / "checkpoint" / f"step_{last:06d}").is_dir(), "no step is lost"
