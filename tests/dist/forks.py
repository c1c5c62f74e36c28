"""Forks ranks from one process that has imported what they need, which takes seconds per process otherwise.

The process of the tests cannot fork them, as autograd has started its threads there. Forked ranks share one
order of sets; the processes of test_launchers (test_train_ranks.py) do not.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn


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
    except BaseException:  # the launcher shows the log of a rank that failed
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


def main() -> None:
    """Answer requests, one a line, until stdin ends. Only answers go to the stdout of the start."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import transformers
    from transformers import Qwen3ForCausalLM  # noqa: F401 - imported late otherwise, in each rank

    import opsd_kernels.train.loop  # noqa: F401

    transformers.utils.logging.disable_progress_bar()
    for line in sys.stdin:
        request = json.loads(line)
        module = importlib.import_module(request["module"])
        children = [start(module, arguments, log) for arguments, log in request["ranks"]]
        answers.write(json.dumps(ended(children, request["timeout_s"])) + "\n")
        answers.flush()
    os._exit(0)  # torch takes seconds to shut down


if __name__ == "__main__":
    main()
