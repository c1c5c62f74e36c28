"""The documentation as a site: it builds without a warning, and a link to nowhere, a missing anchor or a page that nobody can reach fails it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("mkdocs.yml", "mkdocs_hooks.py", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")

pytest.importorskip("mkdocs")


def build(root: Path, out: Path) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-f",
        str(root / "mkdocs.yml"),
        "-d",
        str(out),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_site_builds(tmp_path):
    done = build(ROOT, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "performance.html").is_file()


@pytest.mark.parametrize(
    "page, text",
    [
        ("sizing", "[x](nowhere.md)"),
        ("sizing", "[x](api.md#nothing)"),
        ("unlisted", "# A page that is in no menu"),
    ],
)
def test_what_leads_nowhere_fails(tmp_path, page, text):
    for part in PARTS:
        shutil.copy(ROOT / part, tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with (tmp_path / "docs" / f"{page}.md").open("a") as file:
        file.write(f"\n{text}\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0 and page in done.stderr
