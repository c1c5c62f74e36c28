"""Count what a reader of the op has to follow.

The distinct functions, files and frames of the package that a bare call runs until its loss, the length of a
function of the core, and the files that an option passes through.
"""

import ast
import statistics
import sys
from pathlib import Path

import torch

import opsd_kernels
from opsd_kernels import linear_divergence

PACKAGE = Path(opsd_kernels.__file__).parent
MOST_FUNCTIONS, MOST_FILES, MOST_FRAMES = 85, 10, 8  # they may only fall
LEAST_MEDIAN = 6  # lines of a core function's body; it may only rise
MOST_FILES_OF_AN_OPTION = 11  # signatures, spec, the trainer's setting, kernels; it may only fall


def trace_call(run) -> tuple[set[tuple[str, str, int]], int]:
    """Return (file, name, line) of each function of the package that `run` enters, and the deepest stack."""
    entered, depth, deepest = set(), 0, 0

    def profile(frame, event, _):
        nonlocal depth, deepest
        code = frame.f_code
        if not code.co_filename.startswith(str(PACKAGE)) or code.co_name.startswith("<"):
            return
        if event == "call":
            depth += 1
            deepest = max(deepest, depth)
            place = str(Path(code.co_filename).relative_to(PACKAGE))
            entered.add((place, code.co_name, code.co_firstlineno))
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
    files = {file for file, *_ in entered}
    print(f"{len(entered)} functions, {len(files)} files, {frames} frames")
    assert len(entered) <= MOST_FUNCTIONS, sorted(entered)
    assert len(files) <= MOST_FILES, sorted(files)
    assert frames <= MOST_FRAMES


def body_lines(function: ast.FunctionDef) -> int:
    """Count the lines of a function without its signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
    return body[-1].end_lineno - body[0].lineno + 1


def test_functions_of_the_core_are_not_over_cut():
    trees = [ast.parse(path.read_text()) for path in (PACKAGE / "_core").glob("*.py")]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert statistics.median(map(body_lines, functions)) >= LEAST_MEDIAN


def test_an_option_passes_through_few_files():
    kinds = {".py", ".h", ".cpp", ".cu", ".cuh"}
    sources = [path for top in (PACKAGE, PACKAGE.parent / "csrc") for path in top.rglob("*")]
    naming = [path for path in sources if path.suffix in kinds and "entry_clip" in path.read_text()]
    assert len(naming) <= MOST_FILES_OF_AN_OPTION, naming
