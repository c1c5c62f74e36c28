"""Build the documentation site. A broken link, a missing anchor or a page outside the menu must fail."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("mkdocs.yml", "mkdocs_hooks.py", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings_handlers.python", reason="the docs extra is not installed")


def build(root: Path, out: Path) -> subprocess.CompletedProcess:
    config, options = str(root / "mkdocs.yml"), ["--strict", "-d", str(out)]
    command = [sys.executable, "-m", "mkdocs", "build", "-f", config, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_site_builds(tmp_path):
    """Docstrings appear, and links between the root and the folders lead to pages."""
    done = build(ROOT, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "reference" / "linear-divergence.html").read_text()
    assert 'id="opsd_kernels.linear_divergence"' in page
    page = (tmp_path / "site" / "CONTRIBUTING.html").read_text()
    assert 'href="design/life-of-a-call.html"' in page
    page = (tmp_path / "site" / "tutorials" / "getting-started.html").read_text()
    assert 'href="../README.html#three-commands"' in page
    assert 'id="tutorials"' in (tmp_path / "site" / "index.html").read_text()


LINK = {"sizing": "[x](nowhere.md)"}
# Each of them alone fails a build of mkdocs --strict, which tells all.
OTHERS = {"guides/cuda": "[x](choosing.md#nothing)", "unlisted": "# A page that is in no menu"}


@pytest.mark.parametrize("faults", [LINK, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=" ".join)
def test_a_broken_link_or_an_unlisted_page_fails(tmp_path, faults):
    for part in PARTS:
        shutil.copy(ROOT / part, tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "opsd_kernels").symlink_to(ROOT / "opsd_kernels")
    for page, text in faults.items():
        with (tmp_path / "docs" / f"{page}.md").open("a") as file:
            file.write(f"\n{text}\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    for page in faults:
        assert re.search(rf"WARNING.*\b{page}\.md", done.stderr, re.DOTALL), done.stderr
