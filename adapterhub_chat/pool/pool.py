"""Pool: the folder that keeps adapters, one sub-folder each. A save is all or nothing.

A new version is written beside the old one and takes its place in one rename. The version before it lies in a
sub-folder of the new one, so that one rename changes both; `rollback` exchanges them.
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
from adapterhub_chat.artifact.manifest import FILE as MANIFEST
from adapterhub_chat.artifact.manifest import Manifest, dump_manifest
from adapterhub_chat.artifact.peft_config import CONFIG
from adapterhub_chat.artifact.safetensors_header import WEIGHTS
from adapterhub_chat.errors import AdapterError, PoolError, UsageError
from adapterhub_chat.files import file_sha256, link, same_file
from adapterhub_chat.lora.weights import AdapterWeights
from adapterhub_chat.pool.index import PoolIndex
from adapterhub_chat.pool.lockfile import Pinned, plan_lock, settle_lock
from adapterhub_chat.pool.names import check_name
from adapterhub_chat.pool.stored import CARD, Stored, read_stored
from adapterhub_chat.pool.transaction import TEMPORARY, alone, changing, put_in_place, quarantine

EARLIER = ".earlier"
"""Sub-folder of an adapter with the version before it."""
PROBES, MOST_PROBES = ".probes", 10_000
"""File of the pool that names the probes which were answered rightly, and how many it names."""
PROBE_KEY = re.compile(r"[0-9a-f]{64}")


class Pool(PoolIndex):
    """A folder of adapters."""

    def load(self, name: str, landing: ReadTarget = DEFAULT_TARGET) -> Stored:
        """Read an adapter; raise AdapterError when its bytes are not what its manifest says."""
        return read_stored(self.path(name), name, landing=landing)

    def save(
        self,
        name: str,
        weights: AdapterWeights,
        config: Mapping[str, Any],
        manifest: Manifest,
    ) -> Stored:
        """Write an adapter, or a new version of it, in one step; on any failure the pool is as it was.

        The version before it is kept for `rollback`, and the one before that is gone; the same weights
        and config again are no new version. The manifest's `sha256` is set to that of the written
        weights. Raises PoolError for a full disk or missing rights, UsageError for a name that cannot be
        a folder, AdapterError for what could not be loaded again.
        """
        check_name(name)
        with changing(self.root, f"saving {name!r}") as scratch:
            write_weights(scratch / WEIGHTS, weights)
            (scratch / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n")
            sha256 = _read_back(scratch, name)
            final = manifest.model_copy(update={"name": name, "sha256": sha256})
            _write_words(scratch, final)
            self._keep_earlier(scratch, name)
            plan_lock(self.root, name, None)
            put_in_place(self.root, scratch, name)
        return Stored(name, self.root / name, weights, dict(config), final)

    def install(
        self, name: str, folder: Path, pinned: Pinned, may: Callable[[], None] = lambda: None
    ) -> None:
        """Move the checked files of a quarantine folder into the pool under a name, and pin their source.

        One step for adapter and lock: what a kill leaves of it is completed, or undone, by the next writer.
        `may` is asked while nobody else can write, and raises when the name is not free.
        """
        check_name(name)
        with changing(self.root, f"installing {name!r}") as scratch:
            may()
            for file in pinned.installed:
                os.rename(folder / file, scratch / file)
            self._keep_earlier(scratch, name)
            plan_lock(self.root, name, pinned)
            put_in_place(self.root, scratch, name)

    def quarantine(self) -> AbstractContextManager[Path]:
        """Give a folder for files that nobody has checked; what is left in it at the end is gone."""
        return quarantine(self.root)

    def describe(self, name: str, manifest: Manifest) -> None:
        """Replace an adapter's manifest and card; its weights and all other files stay as they are.

        Raises AdapterError when the pool has other weights by now than the manifest describes.
        """
        source = self.path(name)
        with changing(self.root, f"describing {name!r}") as scratch:
            if file_sha256(source / WEIGHTS) != manifest.sha256:
                raise AdapterError(
                    f"adapter {name!r} was saved anew since it was loaded; load it again first"
                )
            shutil.copytree(source, scratch, copy_function=link, dirs_exist_ok=True)
            _write_words(scratch, manifest)
            put_in_place(self.root, scratch, name)

    def earlier(self, name: str) -> Stored:
        """Read the version of an adapter that `rollback` would put back.

        Raises UsageError when there is none, AdapterError when its bytes are not what its manifest says.
        """
        folder = self.path(name) / EARLIER
        if not folder.is_dir():
            raise UsageError(
                f"adapter {name!r} has no earlier version in the pool {self.root}: one is kept when other "
                "weights are saved under its name"
            )
        return read_stored(folder, name)

    def rollback(self, name: str) -> Stored:
        """Exchange an adapter with its earlier version in one step; return what is in its place now.

        A second call returns to the newer version. Raises as `earlier` does, with nothing changed.
        """
        source = self.path(name)
        with changing(self.root, f"rolling back {name!r}") as scratch:
            restored = self.earlier(name)
            _link_version(source / EARLIER, scratch)
            _link_version(source, scratch / EARLIER)
            plan_lock(self.root, name, None)
            put_in_place(self.root, scratch, name)
        return replace(restored, path=source)

    def answered(self) -> list[str]:
        """Return the keys that `note_answered` was given; what cannot be read was never noted."""
        try:
            lines = (self.root / PROBES).read_text("ascii", errors="replace").splitlines()
        except OSError:
            return []
        return [line for line in lines if PROBE_KEY.fullmatch(line)]

    def note_answered(self, key: str) -> None:
        """Note that the probe with this key was answered rightly, where the pool can be written to."""
        if not self.root.is_dir():
            return
        with suppress(PoolError), changing(self.root, "noting a probe") as scratch:
            kept = [*dict.fromkeys((*self.answered(), key))][-MOST_PROBES:]
            (scratch / PROBES).write_text("\n".join(kept) + "\n", "ascii")
            os.replace(scratch / PROBES, self.root / PROBES)

    def delete(self, name: str) -> None:
        """Remove an adapter, and its earlier version with it."""
        source = self.path(name)
        with alone(self.root, f"deleting {name!r}"):
            # renamed, not moved into a new folder: the disk may be full
            gone = self.root / f"{TEMPORARY}{uuid.uuid4().hex}"
            plan_lock(self.root, name, None)
            os.rename(source, gone)
            settle_lock(self.root)
            shutil.rmtree(gone, ignore_errors=True)

    def check_writable(self) -> None:
        """Raise PoolError when nothing can be saved here; better before an hour of training."""
        with changing(self.root, "a trial"):
            pass

    def _keep_earlier(self, scratch: Path, name: str) -> None:
        """Put into a new version's folder the version before it: the pool's, when that has other content."""
        old = self.root / name
        if name not in self:
            return
        again = all(same_file(old / file, scratch / file) for file in (WEIGHTS, CONFIG))
        if (source := old / EARLIER if again else old).is_dir():
            _link_version(source, scratch / EARLIER)


def _read_back(scratch: Path, name: str) -> str:
    """Return the sha256 of the weights just written; raise AdapterError when nobody could read them."""
    try:
        *_, sha256 = read_folder(scratch)
    except AdapterError as error:
        raise AdapterError(f"adapter {name!r} is not saved: {error}") from error
    return sha256


def _write_words(folder: Path, manifest: Manifest) -> None:
    """Write manifest and card as new files: those of the old version may be linked here."""
    for file, text in ((MANIFEST, dump_manifest(manifest)), (CARD, render_card(manifest))):
        (folder / file).unlink(missing_ok=True)
        (folder / file).write_text(text, encoding="utf-8")


def _link_version(source: Path, target: Path) -> None:
    """Give the files of one version, without those of its earlier one, a second place."""
    without = shutil.ignore_patterns(EARLIER)
    shutil.copytree(source, target, copy_function=link, ignore=without, dirs_exist_ok=True)
