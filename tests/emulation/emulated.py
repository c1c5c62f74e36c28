"""What rows_emulated.py and options_emulated.py share: the operators of the emulated CUDA library as a row backend."""

import os

import pytest
import torch

from opsd_kernels._rows import backends, compiled_rows, extension

extension.load()
torch.ops.load_library(os.environ["OPSD_EMULATED_LIBRARY"])


@pytest.fixture
def backend() -> str:
    return "emulated"


IN_FLOAT64 = ("test_an_infinite_term_is_clipped", "test_a_teacher_of_one_row_for_all")
# Each device runs every kind and form in bf16; fp32 and fp16 meet every kind in one form.
ONE_FORM = {torch.float32: "difference, softcap", torch.float16: "pair"}
COVERED = ("test_loss_and_gradient", "test_statistics", "test_clips", "test_mix", "test_policy")


@pytest.fixture(autouse=True)
def served(request, monkeypatch):
    """The emulated operators, whatever backend is asked for; and the part of the matrix that they run."""
    monkeypatch.setattr(compiled_rows, "OPERATORS", torch.ops.opsd_emulated)
    monkeypatch.setattr(backends, "select", lambda *_: compiled_rows)
    callspec = getattr(request.node, "callspec", None)
    params, test = callspec.params if callspec else {}, request.node.originalname
    dtype, form = params.get("dtype"), params.get("form")
    if dtype == torch.float64 or test in IN_FLOAT64:
        pytest.skip("the CUDA kernels have no float64")
    if test in COVERED and form is not None and form != ONE_FORM.get(dtype, form):
        pytest.skip("not in the part of the matrix that the emulator runs")
