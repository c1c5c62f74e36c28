"""Forks processes from one that has imported what they need, which takes seconds per process otherwise.

The process of the tests cannot fork them, as autograd and OpenMP have started their threads there. Forks
share one order of sets; the processes of test_launchers (test_train_ranks.py) do not.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

HERE = Path(__file__).parent


class Forks:
    """A process with `imported`, a module, that runs functions `main` of modules in forks until `end`.

    `folders` are searched for modules after those of the package and of the helpers.
    """

    def __init__(self, imported: str, *folders: Path, **environment: str) -> None:
        paths = os.pathsep.join(str(path) for path in (HERE.parents[1], HERE, *folders))
        self.process = subprocess.Popen(
            [sys.executable, __file__, imported],
            env={**os.environ, "PYTHONPATH": paths, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, module: str, children: Sequence[tuple[Sequence[str], str]], timeout_s: float) -> list[int]:
        """Run `main` of a module once for each (arguments, file for the output); return the exit codes.

        All run at once. A signal is a negative code; those that outlast the time are killed.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([module, children, timeout_s]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the process that forks ended with {self.process.wait()}"
        return json.loads(answer)

    def end(self) -> None:
        self.process.communicate(timeout=10)


def start(module: ModuleType, arguments: Sequence[str], log: str) -> int:
    """Run `module.main(*arguments)` in a child with its output in `log`; return the process id."""
    child = os.fork()
    return child or run(module, arguments, log)


def run(module: ModuleType, arguments: Sequence[str], log: str) -> NoReturn:
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(output, stream)
        module.main(*arguments)
        code = 0
    except BaseException:  # who asked shows the log of a child that failed
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(children: Sequence[int], timeout_s: float) -> list[int]:
    """Return exit codes, negative for a signal. Children that outlast the time are killed."""
    end, codes = time.monotonic() + timeout_s, dict.fromkeys(children)
    while None in codes.values():
        left = [child for child, code in codes.items() if code is None]
        if time.monotonic() > end:
            for child in left:
                os.kill(child, signal.SIGKILL)
        for child in left:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return [codes[child] for child in children]


def main(imported: str) -> None:
    """Answer requests, one a line, until stdin ends. Only answers go to the stdout of the start."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    importlib.import_module(imported)
    # A fork has none of the threads, but their locks.
    tasks = Path("/proc/self/task")
    threads = len(list(tasks.iterdir())) if tasks.exists() else threading.active_count()
    assert threads == 1, f"{imported} started threads: {threads}"
    for line in sys.stdin:
        module, children, timeout_s = json.loads(line)
        loaded = importlib.import_module(module)
        started = [start(loaded, arguments, log) for arguments, log in children]
        answers.write(json.dumps(ended(started, timeout_s)) + "\n")
        answers.flush()
    os._exit(0)  # torch takes seconds to shut down


if __name__ == "__main__":
    main(*sys.argv[1:])
