"""Pool: a folder of adapters, one sub-folder each. A save is atomic.

A new version is written to a scratch folder and takes the old one's place in one rename. The previous version
lies in a sub-folder of the new one, so that one rename changes both; `rollback` exchanges them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapterhub_chat.artifact.card import render_card
from adapterhub_chat.artifact.folder import DEFAULT_TARGET, ReadTarget, read_folder, write_weights
from adapterhub_chat.artifact.manifest import MANIFEST, Manifest, dump_manifest
from adapterhub_chat.artifact.peft_config import CONFIG
from adapterhub_chat.artifact.safetensors_header import WEIGHTS
from adapterhub_chat.errors import AdapterError, PoolError, UsageError
from adapterhub_chat.files import file_sha256, link, same_file
from adapterhub_chat.lora.weights import AdapterWeights
from adapterhub_chat.pool.index import PoolIndex
from adapterhub_chat.pool.lockfile import Pinned, plan_lock, settle_lock
from adapterhub_chat.pool.names import check_name
from adapterhub_chat.pool.stored import CARD, Stored, read_stored
from adapterhub_chat.pool.transaction import (
    SCRATCH_PREFIX,
    locked,
    put_in_place,
    quarantine,
    transaction,
)

EARLIER = ".earlier"
"""Sub-folder of an adapter that holds its previous version."""
PROBES, MAX_PROBES = ".probes", 10_000
"""File of the pool that lists the keys of probes that were passed, and how many it keeps."""
PROBE_KEY = re.compile(r"[0-9a-f]{64}")


class Pool(PoolIndex):
    """A folder of adapters."""

    def load(self, name: str, target: ReadTarget = DEFAULT_TARGET) -> Stored:
        """Read an adapter; raise AdapterError when its bytes do not match its manifest's hash."""
        return read_stored(self.path(name), name, target=target)

    def save(
        self,
        name: str,
        weights: AdapterWeights,
        config: Mapping[str, Any],
        manifest: Manifest,
    ) -> Stored:
        """Write an adapter, or a new version of it, atomically; on failure the pool is unchanged.

        The previous version is kept for `rollback`, the one before that is removed; saving the same weights
        and config again makes no new version. The manifest's `sha256` is set to that of the written
        weights. Raises PoolError for a full disk or missing rights, UsageError for a name that cannot be
        a folder, AdapterError for weights or config that could not be loaded again.
        """
        check_name(name)
        with transaction(self.root, f"saving {name!r}") as scratch:
            write_weights(scratch / WEIGHTS, weights)
            (scratch / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n")
            sha256 = _read_back(scratch, name)
            final = manifest.model_copy(update={"name": name, "sha256": sha256})
            _write_texts(scratch, final)
            self._link_earlier(scratch, name)
            plan_lock(self.root, name, None)
            put_in_place(self.root, scratch, name)
        return Stored(name, self.root / name, weights, dict(config), final)

    def install(
        self, name: str, folder: Path, pinned: Pinned, check_free: Callable[[], None] = lambda: None
    ) -> None:
        """Move the checked files of a quarantine folder into the pool under a name, and pin their source.

        Adapter and lockfile change together: the next writer completes or undoes what a kill interrupted.
        `check_free` is called with the pool locked; it raises when the name is taken.
        """
        check_name(name)
        with transaction(self.root, f"installing {name!r}") as scratch:
            check_free()
            for file in pinned.installed:
                os.rename(folder / file, scratch / file)
            self._link_earlier(scratch, name)
            plan_lock(self.root, name, pinned)
            put_in_place(self.root, scratch, name)

    def quarantine(self) -> AbstractContextManager[Path]:
        """Yield a temporary folder for unchecked files; it is removed at the end of the block."""
        return quarantine(self.root)

    def describe(self, name: str, manifest: Manifest) -> None:
        """Replace an adapter's manifest and card; its weights and all other files stay as they are.

        Raises AdapterError when the pool's weights are no longer those that the manifest describes.
        """
        source = self.path(name)
        with transaction(self.root, f"describing {name!r}") as scratch:
            if file_sha256(source / WEIGHTS) != manifest.sha256:
                raise AdapterError(
                    f"adapter {name!r} was saved anew since it was loaded; load it again first"
                )
            shutil.copytree(source, scratch, copy_function=link, dirs_exist_ok=True)
            _write_texts(scratch, manifest)
            put_in_place(self.root, scratch, name)

    def load_earlier(self, name: str) -> Stored:
        """Read the previous version of an adapter, which `rollback` would restore.

        Raises UsageError when there is none, AdapterError when its bytes do not match its manifest's hash.
        """
        folder = self.path(name) / EARLIER
        if not folder.is_dir():
            raise UsageError(
                f"adapter {name!r} has no earlier version in the pool {self.root}: one is kept when other "
                "weights are saved under its name"
            )
        return read_stored(folder, name)

    def rollback(self, name: str) -> Stored:
        """Exchange an adapter with its previous version atomically; return the restored version.

        A second call returns to the newer version. Raises as `load_earlier` does, with nothing changed.
        """
        source = self.path(name)
        with transaction(self.root, f"rolling back {name!r}") as scratch:
            restored = self.load_earlier(name)
            _link_version(source / EARLIER, scratch)
            _link_version(source, scratch / EARLIER)
            plan_lock(self.root, name, None)
            put_in_place(self.root, scratch, name)
        return replace(restored, path=source)

    def answered_probes(self) -> list[str]:
        """Return the recorded keys of passed probes; none when the file cannot be read."""
        try:
            lines = (self.root / PROBES).read_text("ascii", errors="replace").splitlines()
        except OSError:
            return []
        return [line for line in lines if PROBE_KEY.fullmatch(line)]

    def record_answered_probe(self, key: str) -> None:
        """Record the key of a passed probe; does nothing where the pool cannot be written to."""
        if not self.root.is_dir():
            return
        with suppress(PoolError), transaction(self.root, "noting a probe") as scratch:
            keys = [*dict.fromkeys((*self.answered_probes(), key))][-MAX_PROBES:]
            (scratch / PROBES).write_text("\n".join(keys) + "\n", "ascii")
            os.replace(scratch / PROBES, self.root / PROBES)

    def delete(self, name: str) -> None:
        """Remove an adapter and its previous version."""
        source = self.path(name)
        with locked(self.root, f"deleting {name!r}"):
            # renamed, not moved into a new folder: the disk may be full
            trash = self.root / f"{SCRATCH_PREFIX}{uuid.uuid4().hex}"
            plan_lock(self.root, name, None)
            os.rename(source, trash)
            settle_lock(self.root)
            shutil.rmtree(trash, ignore_errors=True)

    def check_writable(self) -> None:
        """Raise PoolError when nothing can be saved here, so that training fails before it starts."""
        with transaction(self.root, "a trial"):
            pass

    def _link_earlier(self, scratch: Path, name: str) -> None:
        """Link the previous version into a new version's folder.

        It is the pool's current version, or that one's own previous version when the content is the same.
        """
        current = self.root / name
        if name not in self:
            return
        is_same_version = all(
            same_file(current / file, scratch / file) for file in (WEIGHTS, CONFIG)
        )
        if (source := current / EARLIER if is_same_version else current).is_dir():
            _link_version(source, scratch / EARLIER)


def _read_back(scratch: Path, name: str) -> str:
    """Return the sha256 of the weights just written; raise AdapterError when they cannot be read."""
    try:
        *_, sha256 = read_folder(scratch)
    except AdapterError as error:
        raise AdapterError(f"adapter {name!r} is not saved: {error}") from error
    return sha256


def _write_texts(folder: Path, manifest: Manifest) -> None:
    """Write manifest and card as new files; the existing ones may be hard links to the old version's."""
    for file, text in ((MANIFEST, dump_manifest(manifest)), (CARD, render_card(manifest))):
        (folder / file).unlink(missing_ok=True)
        (folder / file).write_text(text, encoding="utf-8")


def _link_version(source: Path, target: Path) -> None:
    """Hard-link the files of one version, without its own previous version, into `target`."""
    without = shutil.ignore_patterns(EARLIER)
    shutil.copytree(source, target, copy_function=link, ignore=without, dirs_exist_ok=True)
