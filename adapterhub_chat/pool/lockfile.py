"""`adapters.lock.json`: where each pulled adapter of a pool came from, to the commit and to the byte."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapterhub_chat.artifact.untrusted import parse_json, read_bytes
from adapterhub_chat.errors import AdapterError, PoolError, join_misfits
from adapterhub_chat.files import file_sha256, replaced_file
from adapterhub_chat.validation import explain

FILE, NEXT, STEP = "adapters.lock.json", ".next.lock.json", ".next.lock.step"
"""The lock; the one that is to come; and what has to be in its place first."""
MOST_BYTES, MOST_VALUES = 2**20, 20_000
COMMIT_HASH = r"^[0-9a-f]{40}$"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,95}$")]
"""Of a file in an adapter's folder, and of an adapter."""


class Pinned(BaseModel):
    """One adapter's source."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    endpoint: str
    repo: str
    revision: str = Field(description="What was asked for: a branch, tag or commit.")
    commit: str = Field(pattern=COMMIT_HASH, description="What that was then.")
    files: dict[Name, Sha256] = Field(description="sha256 of each file that was pulled.")
    installed: dict[Name, Sha256] = Field(
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
    adapters: dict[Name, Pinned] = Field(default_factory=dict)

    def with_pinned(self, name: str, pinned: Pinned | None) -> Lock:
        """Return the lock with another source for one adapter, or without it."""
        rest = {n: p for n, p in self.adapters.items() if n != name}
        return Lock(adapters=dict(sorted({**rest, **({name: pinned} if pinned else {})}.items())))


class LockStep(BaseModel):
    """The adapter that has to be in its place before the lock that is to come is in force."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    pinned: Pinned | None


def read_lock(root: Path) -> Lock:
    """Return a pool's lock, an empty one when it has none; raise PoolError for one that cannot be read."""
    path = root / FILE
    if not os.path.lexists(path):
        return Lock()
    try:
        return Lock.model_validate(parse_json(read_bytes(path, MOST_BYTES), MOST_VALUES))
    except AdapterError as error:
        raise PoolError(str(error)) from error
    except ValidationError as error:
        raise PoolError(join_misfits(str(path), explain(error, Lock))) from error
    except ValueError as error:
        raise PoolError(f"{path} is no lock file: {error}") from error


def plan_lock(root: Path, name: str, pinned: Pinned | None) -> None:
    """Write what a pool's lock is to say once the adapter of that name is in its place.

    Under the pool's lock, before the folder is renamed. All that takes room on the disk is written here:
    `settle_lock` renames, now or after a kill.
    """
    lock = read_lock(root)
    if pinned is None and name not in lock.adapters:
        return
    step = LockStep(name=name, pinned=pinned)
    for file, text in (
        (NEXT, dump_lock(lock.with_pinned(name, pinned))),
        (STEP, step.model_dump_json()),
    ):
        with replaced_file(root / file, durable=True) as scratch:
            scratch.write_text(text)


def settle_lock(root: Path) -> None:
    """Put a planned lock into force if its adapter came into place, else forget it."""
    path = root / STEP
    try:
        step = LockStep.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        (root / NEXT).unlink(missing_ok=True)
        return
    except ValidationError:  # of another version of this project
        step = None
    if step is not None and (root / NEXT).is_file() and _has_come(root, step):
        os.replace(root / NEXT, root / FILE)
    (root / NEXT).unlink(missing_ok=True)
    path.unlink()


def _has_come(root: Path, step: LockStep) -> bool:
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
