"""Atomic changes of files and folders: sync, exchange, links, locks, and content versions."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from adapterhub_chat.errors import warn

LOCK_FILE = ".lock"
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two folders atomically; return False, with nothing changed, where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = (os.fsencode(first), os.fsencode(second))
    return bool(renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def link(source: str, target: str) -> None:
    """Hard-link a file; copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def same_file(first: Path, second: Path) -> bool:
    """Return whether two files have the same bytes."""
    if not first.is_file() or first.stat().st_size != second.stat().st_size:
        return False
    return file_sha256(first) == file_sha256(second)


def folder_lock(folder: Path) -> FileLock:
    """Return the lock on a folder, held through the file `.lock` in it; it ends with its process."""
    return FileLock(folder / LOCK_FILE)


def remove_leftover(path: Path) -> None:
    """Remove a file or folder that a killed process left; a folder whose lock is held stays."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if (path / LOCK_FILE).exists():
        try:
            with folder_lock(path).acquire(blocking=False):
                pass  # released before the removal: Windows removes no open file
        except Timeout:
            return
    shutil.rmtree(path, ignore_errors=True)


def version_of(folder: Path, files: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Return inode and change time of a folder and of these files in it; they change with its content."""
    versions = []
    for path in (folder, *(folder / file for file in files)):
        with suppress(OSError, ValueError):  # missing, or an invalid path
            stat = path.stat()
            versions.append((stat.st_ino, stat.st_ctime_ns))
    return tuple(versions)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON atomically; on an OSError warn and keep the old file."""
    scratch = path.with_name(f".tmp-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        warn(f"{path} cannot be written: {error}")
