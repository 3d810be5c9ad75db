"""Changes of a pool's folder that are all or nothing: its lock, scratch folders, the rename, and the sweep.

What is new is written in a scratch folder beside the old and takes its place in one rename; whatever a killed
run left behind is swept up by the next one that opens the pool.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapterhub_chat.errors import AdapterHubError, PoolError
from adapterhub_chat.files import exchange, remove_left, sync
from adapterhub_chat.pool.lockfile import NEXT, STEP, settle_lock

TEMPORARY, ASIDE, INCOMING = ".tmp-", ".old-", ".incoming-"
LEFT = (TEMPORARY, ASIDE, INCOMING, NEXT, STEP)
"""What a killed run may leave, by how it begins."""


@contextmanager
def changing(root: Path, what: str) -> Iterator[Path]:
    """Hold the pool's lock; give a scratch folder inside it that is gone afterwards."""
    with alone(root, what):
        scratch = Path(tempfile.mkdtemp(dir=root, prefix=TEMPORARY))
        try:
            scratch.chmod(0o755)
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def alone(root: Path, what: str) -> Iterator[None]:
    """Hold the pool's lock; turn what the system says into a PoolError about `what`."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root):
            settle_lock(root)
            yield
    except AdapterHubError:
        raise
    except OSError as error:
        raise PoolError(_explain(error, root, what)) from error


@contextmanager
def _locked(root: Path, *, wait: bool = True) -> Iterator[bool]:
    with (root / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def put_in_place(root: Path, scratch: Path, name: str) -> None:
    """Put the folder `scratch` where the adapter is or shall be, in one rename.

    Folders cannot be overwritten by a rename; Linux can exchange two in one call. Where it cannot,
    the old folder steps aside first: the only moment in which a reader could find neither.
    """
    for path in (*scratch.rglob("*"), scratch):
        sync(path)
    target, aside = root / name, root / f"{ASIDE}{name}"
    if not target.exists():
        os.rename(scratch, target)
    elif not exchange(scratch, target):
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(target, aside)
        os.rename(scratch, target)
        shutil.rmtree(aside, ignore_errors=True)
    settle_lock(root)
    sync(root)


@contextmanager
def quarantine(root: Path) -> Iterator[Path]:
    """Give a folder for files that nobody has checked; what is left in it at the end is gone."""
    with alone(root, "a download"):
        folder = Path(tempfile.mkdtemp(dir=root, prefix=INCOMING))  # for the owner alone
        mine = os.open(folder, os.O_RDONLY)
        fcntl.flock(mine, fcntl.LOCK_EX)  # tells others that somebody is at work there
    try:
        yield folder
    except AdapterHubError:
        raise
    except OSError as error:
        raise PoolError(_explain(error, root, "a download")) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(mine)


def sweep(root: Path) -> None:
    """Remove what killed runs left, unless another process is at work here right now."""
    if not any(next(root.glob(f"{left}*"), None) for left in LEFT):
        return
    try:
        with _locked(root, wait=False) as mine:
            if not mine:
                return
            for old in root.glob(f"{ASIDE}*"):
                if not (target := root / old.name.removeprefix(ASIDE)).exists():
                    os.rename(old, target)
            settle_lock(root)
            for path in (p for left in LEFT for p in root.glob(f"{left}*")):
                remove_left(path)
    except OSError:
        return  # a pool that may only be read stays as it is


def _explain(error: OSError, root: Path, what: str) -> str:
    before = f"{what} failed, and the pool {root} is as it was"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{before}: the disk is full. Free some space and try again."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{before}: no permission to write there. Choose another pool folder."
    return f"{before}: {error}."
