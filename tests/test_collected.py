"""Every test file is collected: pytest's default passes over directories named build and dist."""

from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def uncollected(root: Path, skipped: list[str]) -> list[str]:
    """Return the test files below a directory whose name pytest does not enter."""
    paths = [path.relative_to(root) for path in sorted((root / "tests").rglob("test_*.py"))]
    return [
        str(path)
        for path in paths
        if any(fnmatch(part, pattern) for part in path.parent.parts for pattern in skipped)
    ]


def test_every_test_file_is_collected(pytestconfig):
    assert uncollected(ROOT, pytestconfig.getini("norecursedirs")) == []


def test_the_check_finds_a_skipped_directory(tmp_path):
    for name in ("tests/build/test_a.py", "tests/unit/test_b.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert uncollected(tmp_path, ["*.egg", "build"]) == ["tests/build/test_a.py"]
