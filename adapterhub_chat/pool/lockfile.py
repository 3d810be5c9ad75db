"""`adapters.lock.json`: repository, commit and file hashes of each adapter that was pulled into a pool."""

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

LOCKFILE, PLANNED_LOCKFILE, PLANNED_STEP = (
    "adapters.lock.json",
    ".next.lock.json",
    ".next.lock.step",
)
"""The lockfile, the planned next one, and the adapter change after which it becomes valid."""
MAX_LOCKFILE_BYTES, MAX_LOCKFILE_VALUES = 2**20, 20_000
COMMIT_HASH = r"^[0-9a-f]{40}$"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
SafeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,95}$")]
"""Name of an adapter, or of a file in its folder."""


class Pinned(BaseModel):
    """The source of one pulled adapter."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    endpoint: str
    repo: str
    revision: str = Field(description="The revision that was asked for: a branch, tag or commit.")
    commit: str = Field(pattern=COMMIT_HASH, description="The commit that it was at that time.")
    files: dict[SafeName, Sha256] = Field(description="sha256 of each file that was pulled.")
    installed: dict[SafeName, Sha256] = Field(
        default_factory=dict, description="sha256 of each file as it was put into the pool."
    )
    signed_by: str = Field(
        default="",
        pattern=r"^(ed25519:[A-Za-z0-9+/]{43}=)?$",
        description="The public key of its signature, if it had one.",
    )


class Lockfile(BaseModel):
    """The content of `adapters.lock.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = Field(default=1, ge=1, le=1)
    adapters: dict[SafeName, Pinned] = Field(default_factory=dict)

    def with_pinned(self, name: str, pinned: Pinned | None) -> Lockfile:
        """Return the lockfile with this source for one adapter; without the adapter for None."""
        others = {n: p for n, p in self.adapters.items() if n != name}
        return Lockfile(
            adapters=dict(sorted({**others, **({name: pinned} if pinned else {})}.items()))
        )


class PlannedStep(BaseModel):
    """The adapter change that must be complete before the planned lockfile is valid."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    pinned: Pinned | None


def read_lock(root: Path) -> Lockfile:
    """Return a pool's lockfile, an empty one if there is none; raise PoolError for an unreadable one."""
    path = root / LOCKFILE
    if not os.path.lexists(path):
        return Lockfile()
    try:
        return Lockfile.model_validate(
            parse_json(read_bytes(path, MAX_LOCKFILE_BYTES), MAX_LOCKFILE_VALUES)
        )
    except AdapterError as error:
        raise PoolError(str(error)) from error
    except ValidationError as error:
        raise PoolError(join_misfits(str(path), explain(error, Lockfile))) from error
    except ValueError as error:
        raise PoolError(f"{path} is no lock file: {error}") from error


def plan_lock(root: Path, name: str, pinned: Pinned | None) -> None:
    """Write the lockfile that becomes valid once the adapter of that name is in its place.

    Call this with the pool locked, before the folder is renamed. Everything that takes disk space is written
    here; `settle_lock` only renames, now or after a kill.
    """
    lock = read_lock(root)
    if pinned is None and name not in lock.adapters:
        return
    step = PlannedStep(name=name, pinned=pinned)
    for file, text in (
        (PLANNED_LOCKFILE, dump_lock(lock.with_pinned(name, pinned))),
        (PLANNED_STEP, step.model_dump_json()),
    ):
        with replaced_file(root / file, durable=True) as scratch:
            scratch.write_text(text)


def settle_lock(root: Path) -> None:
    """Make a planned lockfile the valid one if its adapter change is complete, else remove it."""
    path = root / PLANNED_STEP
    try:
        step = PlannedStep.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        (root / PLANNED_LOCKFILE).unlink(missing_ok=True)
        return
    except ValidationError:  # of another version of this project
        step = None
    if step is not None and (root / PLANNED_LOCKFILE).is_file() and _is_done(root, step):
        os.replace(root / PLANNED_LOCKFILE, root / LOCKFILE)
    (root / PLANNED_LOCKFILE).unlink(missing_ok=True)
    path.unlink()


def _is_done(root: Path, step: PlannedStep) -> bool:
    """Return whether a planned change is complete: the new files are installed, or the old ones gone."""
    folder = root / step.name
    if step.pinned is not None:
        return is_installed(folder, step.pinned.installed)
    pinned_before = read_lock(root).adapters.get(step.name)
    return pinned_before is None or not is_installed(folder, pinned_before.installed)


def is_installed(folder: Path, hashes: Mapping[str, str]) -> bool:
    """Return whether a folder holds files with these names and sha256 hashes."""
    return bool(hashes) and all(
        (folder / name).is_file() and file_sha256(folder / name) == sha256
        for name, sha256 in hashes.items()
    )


def dump_lock(lock: Lockfile) -> str:
    """Return the JSON text of a lockfile."""
    return json.dumps(lock.model_dump(mode="json"), indent=2) + "\n"
