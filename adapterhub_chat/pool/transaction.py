"""Transactions on a pool's folder: its lock, scratch folders, atomic renames, and the clean-up after kills.

New content is written to a scratch folder and takes the old one's place in one rename; leftovers of a killed
process are removed by the next process that opens the pool.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout

from adapterhub_chat.errors import AdapterHubError, PoolError
from adapterhub_chat.files import exchange, folder_lock, remove_leftover, sync
from adapterhub_chat.pool.lockfile import PLANNED_LOCKFILE, PLANNED_STEP, settle_lock

SCRATCH_PREFIX, OLD_PREFIX, DOWNLOAD_PREFIX = ".tmp-", ".old-", ".incoming-"
LEFTOVER_PREFIXES = (SCRATCH_PREFIX, OLD_PREFIX, DOWNLOAD_PREFIX, PLANNED_LOCKFILE, PLANNED_STEP)
"""Beginnings of the names that a killed process may leave behind."""


@contextmanager
def transaction(root: Path, action: str) -> Iterator[Path]:
    """Lock the pool and yield a scratch folder inside it, which is removed at the end of the block."""
    with locked(root, action):
        scratch = Path(tempfile.mkdtemp(dir=root, prefix=SCRATCH_PREFIX))
        try:
            scratch.chmod(0o755)
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def locked(root: Path, action: str) -> Iterator[None]:
    """Lock the pool for the block; an OSError becomes a PoolError that names the `action`."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with folder_lock(root):
            settle_lock(root)
            yield
    except AdapterHubError:
        raise
    except OSError as error:
        raise PoolError(_explain(error, root, action)) from error


def put_in_place(root: Path, scratch: Path, name: str) -> None:
    """Rename the folder `scratch` to the adapter's folder, replacing the old version if there is one.

    A rename cannot overwrite a folder; Linux can exchange two in one call. On other systems the old folder is
    renamed first, and between the two renames a reader finds neither version.
    """
    for path in (*scratch.rglob("*"), scratch):
        sync(path)
    target, aside = root / name, root / f"{OLD_PREFIX}{name}"
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
    """Yield a temporary folder for unchecked files; it is removed at the end of the block."""
    with locked(root, "a download"):
        folder = Path(tempfile.mkdtemp(dir=root, prefix=DOWNLOAD_PREFIX))  # mode 700
        lock = folder_lock(folder)
        lock.acquire()  # while it is held, `sweep` leaves the folder alone
    try:
        yield folder
    except AdapterHubError:
        raise
    except OSError as error:
        raise PoolError(_explain(error, root, "a download")) from error
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def sweep(root: Path) -> None:
    """Remove what killed processes left behind, unless another process holds the pool's lock."""
    if not any(next(root.glob(f"{prefix}*"), None) for prefix in LEFTOVER_PREFIXES):
        return
    try:
        with folder_lock(root).acquire(blocking=False):
            for path in root.glob(f"{OLD_PREFIX}*"):
                if not (target := root / path.name.removeprefix(OLD_PREFIX)).exists():
                    os.rename(path, target)
            settle_lock(root)
            for path in (p for prefix in LEFTOVER_PREFIXES for p in root.glob(f"{prefix}*")):
                remove_leftover(path)
    except Timeout:
        return
    except OSError:
        return  # a read-only pool


def _explain(error: OSError, root: Path, action: str) -> str:
    intro = f"{action} failed, and the pool {root} is as it was"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{intro}: the disk is full. Free some space and try again."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{intro}: no permission to write there. Choose another pool folder."
    return f"{intro}: {error}."
