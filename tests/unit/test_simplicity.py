"""Count the distinct functions, files and frames of the package that a bare call runs until its loss.

A reader follows all of them.
"""

import sys
from pathlib import Path

import torch

import opsd_kernels
from opsd_kernels import linear_divergence

PACKAGE = Path(opsd_kernels.__file__).parent
MOST_FUNCTIONS, MOST_FILES, MOST_FRAMES = 110, 18, 10  # they may only fall


def trace_call(run) -> tuple[set[tuple[str, str]], int]:
    """Return the (file, function) pairs of the package that `run` enters, and the deepest stack of them."""
    entered, depth, deepest = set(), 0, 0

    def profile(frame, event, _):
        nonlocal depth, deepest
        if not frame.f_code.co_filename.startswith(str(PACKAGE)) or frame.f_code.co_name.startswith("<"):
            return
        if event == "call":
            depth += 1
            deepest = max(deepest, depth)
            entered.add((str(Path(frame.f_code.co_filename).relative_to(PACKAGE)), frame.f_code.co_name))
        elif event == "return":
            depth -= 1

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return entered, deepest


def test_a_bare_call_runs_little_of_the_package():
    hidden, teacher, head = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8), torch.randn(50, 8)

    def call():
        linear_divergence(hidden, head, teacher, head)

    call()  # imports and caches
    entered, frames = trace_call(call)
    files = {file for file, _ in entered}
    print(f"{len(entered)} functions, {len(files)} files, {frames} frames")
    assert len(entered) <= MOST_FUNCTIONS, sorted(entered)
    assert len(files) <= MOST_FILES, sorted(files)
    assert frames <= MOST_FRAMES
