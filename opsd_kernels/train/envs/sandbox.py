"""Run Python that a model wrote, in pydantic-monty: an interpreter of its own in worker processes.

Code there has no file, no network, no clock and a fixed seed, and limits on time, memory and recursion. Each
program gets a fresh session. A worker that dies is replaced.
"""

from __future__ import annotations

import atexit
import datetime
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opsd_kernels.train.config import ConfigError

INSTALL = "pip install 'opsd_kernels[python]'"
# Of the worker, beyond which it is killed: seconds for one call, and to wait for a free worker.
HANG_SECONDS, WAIT_SECONDS = 10.0, 60.0
# Characters of a message or a value that is shown.
MAX_SHOWN = 200
LIMIT_MESSAGES = {
    "TimeoutError": "TimeoutError: the time limit was exceeded",
    "MemoryError": "MemoryError: the memory limit was exceeded",
}
# Run before each program. pydantic-monty 1.4.0 scales to round: its round(2.675, 2) is 2.68 where CPython
# takes the nearer 2.67. Its formatting is exact. From 323 digits on a float is its own nearest.
PRELUDE = """
_round = round
def round(number, ndigits=None):
    rounded = _round(number, ndigits)
    if not isinstance(number, float) or ndigits is None or not 0 <= ndigits < 323 or number - number != 0:
        return rounded
    return float(f"{number:.{ndigits}f}")
"""
# A program that is repeated sees the same time and the same random numbers.
POLICY = {"datetime": datetime.datetime(2026, 1, 1), "sleep": "zero", "random_start": {"seed": 0}}


class SandboxError(RuntimeError):
    """No worker could be started. The run's checkpoints are intact; `--resume` continues it."""


@dataclass(frozen=True)
class Limits:
    """What one call in the sandbox may use: seconds, bytes of its heap, nested calls."""

    seconds: float = 0.5
    memory: int = 20_000_000
    recursion: int = 100


@dataclass(frozen=True)
class Result:
    """The value of a call, as a host object and as text, or the error with the answer's line, if known."""

    value: Any = None
    shown: str = ""
    error: str | None = None
    line: int | None = None


class Sandbox:
    """A pool of workers, started at the first program, in each process that uses it."""

    def __init__(self, limits: Limits | None = None):
        self.limits, self._pool, self._owner = limits or Limits(), None, 0

    def run(self, program: str, calls: Sequence[str] = ()) -> list[Result]:
        """Run the program and then each call in one session, up to the first error.

        Returns a result of the program and of each call that was made. A worker that dies under the program
        is an error of the program if the next one dies too; SandboxError is raised if no worker starts.
        """
        for last in (False, True):
            try:
                return self._attempt(program, calls)
            except self._library().MontyCrashedError as error:
                self.close()
                if last:
                    return [Result(error=f"the interpreter stopped: {_shortened(str(error))}")]
            except (OSError, TimeoutError, RuntimeError) as error:
                self.close()
                if last:
                    raise SandboxError(
                        f"sandbox: expected a worker of pydantic-monty, got {type(error).__name__}: {error}; "
                        "the last checkpoint of the run is intact"
                    ) from error
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Stop the workers; the next program starts new ones."""
        pool, self._pool = self._pool, None
        # A forked child must not stop its parent's workers.
        if pool is not None and self._owner == os.getpid():
            try:
                pool.__exit__(None, None, None)
            except (OSError, RuntimeError):
                # The pool is broken, and is replaced in any case.
                pass

    def _attempt(self, program: str, calls: Sequence[str]) -> list[Result]:
        results = []
        limits = {
            "max_feed_duration_secs": self.limits.seconds,
            "max_memory": self.limits.memory,
            "max_recursion_depth": self.limits.recursion,
            "max_total_sleep_secs": 0.0,
        }
        with self._workers().checkout(limits=limits, os_policy=POLICY) as session:
            session.feed_run(PRELUDE)
            for code in (program, *calls):
                results.append(self._fed(session, code))
                if results[-1].error is not None:
                    break
        return results

    def _fed(self, session: Any, code: str) -> Result:
        library = self._library()
        try:
            value = session.feed_run(code, print_callback=_discard)
            return Result(value, _shortened(repr(value)))
        except library.MontyCrashedError:
            raise
        except (library.MontySyntaxError, library.MontyRuntimeError) as error:
            # Frames of the program are of the feed after the prelude, and the innermost is the last.
            lines = [f.line for f in error.traceback() if f.filename.endswith(("-1>", "main.py"))]
            return Result(error=_message(error), line=lines[-1] if lines else None)
        except (library.MontyError, RecursionError, ValueError, OverflowError) as error:
            # A value that cannot leave the sandbox.
            return Result(error=_shortened(f"{type(error).__name__}: {error}"))

    def _workers(self) -> Any:
        if self._pool is None or self._owner != os.getpid():
            pool = self._library().Monty(
                max_processes=1, request_timeout=HANG_SECONDS, checkout_timeout=WAIT_SECONDS
            )
            self._pool, self._owner = pool.__enter__(), os.getpid()
        return self._pool

    @staticmethod
    def _library() -> Any:
        import pydantic_monty

        return pydantic_monty


def require(key: str = "env") -> None:
    """Raise ConfigError, with the settings' key, if the sandbox is missing or does not run."""
    if importlib.util.find_spec("pydantic_monty") is None:
        raise ConfigError(
            f"{key}: expected pydantic-monty, the sandbox of Python answers ({INSTALL}), got none"
        )
    try:
        value = SHARED.run("1 + 1")[0].value
    except (ImportError, SandboxError) as error:
        raise ConfigError(
            f"{key}: expected a pydantic-monty that runs ({INSTALL}), got {type(error).__name__}: {error}"
        ) from error
    if value != 2:
        raise ConfigError(f"{key}: expected 2 from 1 + 1 in pydantic-monty ({INSTALL}), got {value!r}")


def _discard(stream: str, text: str) -> None:
    """Drop what the program prints."""


def _message(error: Any) -> str:
    text = error.display("type-msg").strip().partition("\n")[0]
    kind = text.partition(":")[0]
    # The numbers in these two depend on the machine, and a resumed run must read the same text.
    return LIMIT_MESSAGES.get(kind) or _shortened(text)


def _shortened(text: str) -> str:
    # No tokenizer accepts a lone surrogate.
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


# The sandbox of the environments of this process.
SHARED = Sandbox()
atexit.register(SHARED.close)
