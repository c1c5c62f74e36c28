"""Write files and directories atomically, also under a crash: temporary sibling, fsync, rename."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

PENDING = ".pending-"


def write_file(path: Path, content: str | bytes) -> None:
    """Replace `path` atomically."""
    pending = path.with_name(f"{PENDING}{path.name}-{uuid.uuid4().hex[:8]}")
    pending.write_bytes(content.encode() if isinstance(content, str) else content)
    _sync(pending)
    os.replace(pending, path)
    _sync(path.parent)


def write_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into an empty directory, then rename that to `path`.

    An existing `path` is left unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pending = path.with_name(f"{PENDING}{path.name}-{uuid.uuid4().hex[:8]}")
    pending.mkdir()
    try:
        fill(pending)
        # Contents before names: a rename may reach the disk before data that was never flushed.
        for file in pending.rglob("*"):
            _sync(file)
        _sync(pending)
        if not path.exists():
            _rename_unless_taken(pending, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(pending, ignore_errors=True)


def remove_pending(folder: Path) -> None:
    """Remove leftovers of a crash. No other process may be writing to the folder."""
    for leftover in folder.glob(f"{PENDING}*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _rename_unless_taken(pending: Path, path: Path) -> None:
    try:
        os.rename(pending, path)
    except OSError:
        # Not an error if another process has written the same directory first.
        if not path.exists():
            raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
