"""Atomic changes of files and folders: sync, exchange, links, locks, and content versions."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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
    """Write `value` as JSON in one step; on a full disk warn, and leave the old file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as scratch:
            scratch.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        warn(f"{path} cannot be written: {error}")


@contextmanager
def replaced_file(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path with the same file name; rename that file over `path` when the block ends.

    When the block raises, `path` keeps its old content. The folder of `path` must exist. With `durable` the
    new content is synced to the disk before the rename. Raises OSError.
    """
    with _scratch_folder(path) as folder:
        scratch = folder / path.name
        yield scratch
        if durable:
            sync(scratch)
        os.replace(scratch, path)


@contextmanager
def new_folder(path: Path, *, exist_ok: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder; rename it to `path` when the block ends.

    When the block raises, nothing appears at `path`. The parent of the temporary folder is temporary as well
    and may hold further files until then. Raises OSError when there is a folder at `path` already; with
    `exist_ok` that one, which another process has made meanwhile, is kept instead.
    """
    with _scratch_folder(path) as parent:
        scratch = parent / path.name
        scratch.mkdir()
        yield scratch
        try:
            scratch.rename(path)
        except OSError:
            if not (exist_ok and path.is_dir()):
                raise


def scratch_prefix(path: Path) -> str:
    """Return the first part of the names of temporary folders for `path`; a killed process leaves them."""
    return f".tmp-{path.name[:100]}-"


@contextmanager
def _scratch_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, on the same file system."""
    with tempfile.TemporaryDirectory(
        dir=path.parent, prefix=scratch_prefix(path), ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)
