"""A copy of the sources to build in."""

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path):
    """The sources that an installation needs, without what was built from them."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(
        ROOT / "opsd_kernels",
        folder / "opsd_kernels",
        ignore=shutil.ignore_patterns("_C.*", "_cuda.*", "__pycache__"),
    )
    return folder
