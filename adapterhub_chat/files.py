"""Files and folders that appear, change and go in one step, as far as the system can do that."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from adapterhub_chat.errors import warn

_RENAME_EXCHANGE, _AT_FDCWD = 2, -100


def sync(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk before anything that follows."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one rename; return False, with nothing done, where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = (os.fsencode(one), os.fsencode(other))
    return bool(renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def link(source: str, target: str) -> None:
    """Give a file a second name; copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def same_file(one: Path, other: Path) -> bool:
    """Return whether two files have the same bytes."""
    if not one.is_file() or one.stat().st_size != other.stat().st_size:
        return False
    return file_sha256(one) == file_sha256(other)


def remove_left(path: Path) -> None:
    """Remove what a killed run left; a folder in which another process is at work stays."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except BlockingIOError:
        return
    finally:
        os.close(handle)


def version_of(folder: Path, files: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Return what tells one version of a folder, and of these files in it, from the next."""
    found = []
    for path in (folder, *(folder / file for file in files)):
        with suppress(OSError, ValueError):  # not there, or no path at all
            stat = path.stat()
            found.append((stat.st_ino, stat.st_ctime_ns))
    return tuple(found)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON in one step; on a full disk warn, and leave the old file."""
    scratch = path.with_name(f".tmp-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        warn(f"{path} cannot be written: {error}")
