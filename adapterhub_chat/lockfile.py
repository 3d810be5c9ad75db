"""`adapters.lock.json`: where each pulled adapter of a pool came from, to the commit and to the byte."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapterhub_chat.config import explain
from adapterhub_chat.errors import PoolError, join_misfits
from adapterhub_chat.manifest import file_sha256

FILE, NEXT = "adapters.lock.json", ".next.lock.json"
MOST_BYTES, SHOWN = 2**20, 10
COMMIT = r"^[0-9a-f]{40}$"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Pinned(BaseModel):
    """One adapter's source."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    endpoint: str
    repo: str
    revision: str = Field(description="What was asked for: a branch, tag or commit.")
    commit: str = Field(pattern=COMMIT, description="What that was then.")
    files: dict[str, Sha256] = Field(description="sha256 of each file that was pulled.")
    installed: dict[str, Sha256] = Field(
        default_factory=dict, description="sha256 of each file as it was put into the pool."
    )
    signed_by: str = Field(
        default="",
        pattern=r"^(ed25519:[A-Za-z0-9+/]{43}=)?$",
        description="The public key of its signature, if it had one.",
    )


class Lock(BaseModel):
    """The content of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = Field(default=1, ge=1, le=1)
    adapters: dict[str, Pinned] = Field(default_factory=dict)

    def with_pinned(self, name: str, pinned: Pinned | None) -> Lock:
        """Return the lock with another source for one adapter, or without it."""
        rest = {n: p for n, p in self.adapters.items() if n != name}
        return Lock(adapters=dict(sorted({**rest, **({name: pinned} if pinned else {})}.items())))


class Step(BaseModel):
    """A lock that is to come, and the adapter that has to be in its place first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    pinned: Pinned | None
    lock: Lock


def read_lock(root: Path) -> Lock:
    """Return a pool's lock, an empty one when it has none; raise PoolError for one that cannot be read."""
    path = root / FILE
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise PoolError(f"{path} is larger than {MOST_BYTES:,} bytes; it is no lock file")
        return Lock.model_validate_json(data)
    except FileNotFoundError:
        return Lock()
    except OSError as error:
        raise PoolError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise PoolError(join_misfits(str(path), list(explain(error, Lock))[:SHOWN])) from error


def plan_lock(root: Path, name: str, pinned: Pinned | None) -> None:
    """Write down what a pool's lock is to say once the adapter of that name is in its place.

    Under the pool's lock, before the folder is renamed; `settle_lock` completes it, now or after a kill.
    """
    lock = read_lock(root)
    if pinned is None and name not in lock.adapters:
        return
    step = Step(name=name, pinned=pinned, lock=lock.with_pinned(name, pinned))
    scratch = root / f".tmp-{NEXT}"
    scratch.write_text(step.model_dump_json())
    with scratch.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(scratch, root / NEXT)


def settle_lock(root: Path) -> None:
    """Put a planned lock into force if its adapter came into place, else forget it."""
    path = root / NEXT
    try:
        step = Step.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return
    except ValidationError:  # of another version of this project
        path.unlink()
        return
    if _has_come(root, step):
        scratch = root / f".tmp-{FILE}"
        scratch.write_text(dump_lock(step.lock))
        os.replace(scratch, root / FILE)
    path.unlink()


def _has_come(root: Path, step: Step) -> bool:
    """Return whether an adapter is what a step was to make of it: what is pinned, or not that any more."""
    folder = root / step.name
    if step.pinned is not None:
        return is_installed(folder, step.pinned.installed)
    before = read_lock(root).adapters.get(step.name)
    return before is None or not is_installed(folder, before.installed)


def is_installed(folder: Path, hashes: Mapping[str, str]) -> bool:
    """Return whether the files with these sha256 lie in a folder."""
    return bool(hashes) and all(
        (folder / name).is_file() and file_sha256(folder / name) == sha256
        for name, sha256 in hashes.items()
    )


def dump_lock(lock: Lock) -> str:
    """Return the JSON text of a lock."""
    return json.dumps(lock.model_dump(mode="json"), indent=2) + "\n"
