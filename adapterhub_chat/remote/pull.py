"""pull: an adapter from a Hub into the pool, by way of a quarantine folder, and `adapters.lock.json`."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adapterhub_chat.artifact.card import render_card
from adapterhub_chat.artifact.guard import MAX_CONFIG, MAX_WEIGHTS
from adapterhub_chat.artifact.manifest import MANIFEST, read_manifest
from adapterhub_chat.artifact.manifest import MAX_MANIFEST_BYTES as MAX_MANIFEST
from adapterhub_chat.artifact.peft_config import CONFIG
from adapterhub_chat.artifact.safetensors_header import WEIGHTS
from adapterhub_chat.assets.fetch import cache_dir
from adapterhub_chat.errors import AdapterError, HubError, UsageError
from adapterhub_chat.files import file_sha256
from adapterhub_chat.pool.lockfile import Lockfile, Pinned, is_installed, read_lock
from adapterhub_chat.pool.names import check_name
from adapterhub_chat.pool.registry import Registry
from adapterhub_chat.pool.stored import CARD, Status, Stored
from adapterhub_chat.remote import signing
from adapterhub_chat.remote.client import HubClient, Snapshot
from adapterhub_chat.remote.names import check_repo

LIMITS = {
    CONFIG: MAX_CONFIG,
    WEIGHTS: MAX_WEIGHTS,
    MANIFEST: MAX_MANIFEST,
    signing.SIGNATURE_FILE: 64 * 2**10,
}
"""The files that are taken, and the most bytes of each."""
NEEDED = (CONFIG, WEIGHTS)


@dataclass(frozen=True)
class Pulled:
    """What a pull brought into the pool."""

    name: str
    repo: str
    commit: str
    status: Status
    signed_by: str
    """The public key that vouches for it; empty without a signature."""
    changed: bool
    """Whether the pool has something new: not when the same was there already."""


def pull(
    registry: Registry,
    repo: str,
    hub: HubClient,
    *,
    revision: str | None = None,
    name: str | None = None,
    key: str | None = None,
    replace: bool = False,
) -> Pulled:
    """Bring an adapter into the pool; see AdapterHub.pull."""
    check_repo(repo)
    name = check_name(name or repo.split("/")[1])
    if key is not None:
        signing.key_bytes(key)
    lock = read_lock(registry.pool.root)
    _refuse_strangers(registry, name, repo, hub, lock, replace=replace)
    wanted = revision or "main"
    snapshot = hub.snapshot(repo, wanted)
    if (known := lock.adapters.get(name)) and not replace:
        _refuse_rewritten(hub, snapshot, known, wanted)
    with registry.pool.quarantine() as folder:
        hashes = _download(hub, snapshot, folder)
        signer = _signer(folder, hashes, key)
        if known and not replace and known.commit == snapshot.commit and known.files != hashes:
            raise HubError(
                f"{repo} at {snapshot.commit} has other files than when it was pulled before; a commit does "
                "not change. If you trust that, pull with --replace"
            )
        if known and known.signed_by and not replace and signer not in (known.signed_by, key):
            raise AdapterError(
                f"{repo} was signed by {known.signed_by} when {name!r} was pulled, and by "
                f"{signer or 'nobody'} now; --require-signature KEY names the new key, --replace takes what "
                "is there"
            )
        asked = Pinned(
            endpoint=hub.endpoint,
            repo=repo,
            revision=wanted,
            commit=snapshot.commit,
            files=hashes,
            signed_by=signer,
        )
        _refuse_borrowed(folder, repo, signer)

        def still_mine() -> None:
            now = read_lock(registry.pool.root)
            _refuse_strangers(registry, name, repo, hub, now, replace=replace)

        return _install(registry, name, folder, asked, still_mine)


def pull_locked(registry: Registry, token: str | None = None) -> list[Pulled]:
    """Bring the pool to what its lock says, to the byte; what was pulled before needs no network."""
    pool = registry.pool
    lock = read_lock(pool.root)
    if not lock.adapters:
        raise UsageError(f"the pool {pool.root} has no adapters.lock.json, or an empty one")
    done = []
    for name, pinned in lock.adapters.items():
        with pool.quarantine() as folder:
            if not _is_there(pool.root / check_name(name), pinned):
                _restore(pinned, folder, token)
                _signer(folder, pinned.files, pinned.signed_by or None)
                done.append(_install(registry, name, folder, pinned))
                continue
        signer = _signer(pool.root / name, pinned.files, pinned.signed_by or None)
        status = registry.verify(name).status
        done.append(Pulled(name, pinned.repo, pinned.commit, status, signer, changed=False))
    return done


def _is_there(folder: Path, pinned: Pinned) -> bool:
    """Return whether a pool member is what a lock says, weights and config at least, and all it names."""
    weights = pinned.files.get(WEIGHTS, "")
    whole = CONFIG in pinned.installed and pinned.installed.get(WEIGHTS) == weights
    return whole and is_installed(folder, pinned.installed)


# ---- who may take a name -------------------------------------------------------------------------


def _refuse_strangers(
    registry: Registry, name: str, repo: str, hub: HubClient, lock: Lockfile, *, replace: bool
) -> None:
    """Raise UsageError when the pool has an adapter of that name from elsewhere."""
    known = lock.adapters.get(name)
    if replace or (known is None and name not in registry.pool):
        return
    if known is None:
        origin = "was not pulled"
    elif (known.endpoint, known.repo) != (hub.endpoint, repo):
        origin = f"came from {known.repo} at {known.endpoint}"
    else:
        return
    raise UsageError(
        f"the pool has an adapter {name!r}, and it {origin}; pull under another name (--name), or let it "
        "be replaced (--replace)"
    )


def _refuse_rewritten(hub: HubClient, snapshot: Snapshot, known: Pinned, wanted: str) -> None:
    """Raise HubError when the past has changed: a tag that moved, a commit that is gone."""
    if snapshot.commit == known.commit:
        return
    cure = "; if you trust that, pull with --replace"
    if wanted == known.revision and wanted in hub.tags(snapshot.repo):
        raise HubError(
            f"the tag {wanted!r} of {snapshot.repo} meant {known.commit} when it was pulled and means "
            f"{snapshot.commit} now: tags are not to move{cure}"
        )
    try:
        hub.snapshot(snapshot.repo, known.commit)
    except HubError as error:
        raise HubError(
            f"{snapshot.repo} has no commit {known.commit} any more, which was pulled before: its history "
            f"was rewritten, or somebody else has the name now{cure}"
        ) from error


# ---- what is taken -------------------------------------------------------------------------------


def _download(hub: HubClient, snapshot: Snapshot, folder: Path) -> dict[str, str]:
    """Fetch the files that are known by name; return the sha256 of each."""
    missing = [name for name in NEEDED if name not in snapshot.files]
    if missing:
        raise AdapterError(
            f"{snapshot.repo} at {snapshot.commit} is no adapter: {' and '.join(missing)} not found"
            " (pickled .bin weights are never taken)"
        )
    names = [name for name in LIMITS if name in snapshot.files]
    names.sort(
        key=lambda name: snapshot.files[name].size
    )  # what is small and wrong is found out first
    return {
        name: hub.download(snapshot, name, folder / name, LIMITS[name]).sha256 for name in names
    }


def _signer(folder: Path, hashes: Mapping[str, str], key: str | None) -> str:
    """Return who signed the files, empty for nobody; raise AdapterError when it must be `key` and is not."""
    signer = ""
    if signing.SIGNATURE_FILE in hashes:
        signed = {name: digest for name, digest in hashes.items() if name != signing.SIGNATURE_FILE}
        signer = signing.signer_of((folder / signing.SIGNATURE_FILE).read_bytes(), signed)
    if key is not None and signer != key:
        raise AdapterError(f"it is signed by {signer or 'nobody'}, not by {key}")
    return signer


def _refuse_borrowed(folder: Path, repo: str, signer: str) -> None:
    """Raise AdapterError for files that somebody signed for another repository."""
    manifest = read_manifest(folder) if signer else None
    if manifest is not None and manifest.published != repo:
        raise AdapterError(
            f"the files of {repo} were signed for {manifest.published or 'no repository'!r:.120}: somebody "
            "else may have put them there"
        )


def _install(
    registry: Registry,
    name: str,
    folder: Path,
    pinned: Pinned,
    may: Callable[[], None] = lambda: None,
) -> Pulled:
    """Check what lies in quarantine as a stranger's, and put it into the pool in one step.

    `may` is asked again under the pool's lock: it raises when somebody else has taken the name meanwhile.
    """
    verdict = registry.verify(folder)
    if not verdict.ok:
        problems = "; ".join(verdict.problems)
        raise AdapterError(f"{pinned.repo} is refused, and the pool is as it was: {problems}")
    stored = registry.read(folder, name)
    _keep_for_later(folder, pinned.files)
    _rewrite(folder, stored)
    installed = {
        file: file_sha256(folder / file) for file in (*LIMITS, CARD) if (folder / file).is_file()
    }
    pinned = pinned.model_copy(update={"installed": installed})
    there = is_installed(registry.pool.root / name, installed)
    changed = not there or read_lock(registry.pool.root).adapters.get(name) != pinned
    if changed:
        registry.pool.install(name, folder, pinned, may)
    return Pulled(name, pinned.repo, pinned.commit, verdict.status, pinned.signed_by, changed)


def _rewrite(folder: Path, stored: Stored) -> None:
    """Replace what others wrote by what was understood of it: the config, and the card."""
    rebuilt = (json.dumps(dict(stored.config), indent=2) + "\n").encode()
    if (folder / CONFIG).read_bytes() != rebuilt:
        (folder / CONFIG).write_bytes(rebuilt)
    if stored.manifest is not None:
        (folder / CARD).write_text(render_card(stored.manifest), encoding="utf-8")


# ---- the same again, offline ---------------------------------------------------------------------


def _kept(sha256: str) -> Path:
    return cache_dir() / "pulled" / sha256


def _keep_for_later(folder: Path, hashes: Mapping[str, str]) -> None:
    """Keep files by their content, so that a lock can be followed without a network."""
    for name, sha256 in hashes.items():
        with suppress(OSError):  # a cache that cannot be written to keeps nothing
            target = _kept(sha256)
            if is_installed(target.parent, {target.name: sha256}):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                os.replace(shutil.copyfile(folder / name, Path(scratch) / sha256), target)


def _restore(pinned: Pinned, folder: Path, token: str | None) -> None:
    """Put the files that a lock names into a folder; raise HubError when they cannot be had any more."""
    snapshot: Snapshot | None = None
    own = HubClient().endpoint  # a token is for the user's own Hub, whatever a lock names
    hub = HubClient(pinned.endpoint, token if pinned.endpoint == own else None)
    for name, sha256 in pinned.files.items():
        if name not in LIMITS:
            raise UsageError(f"adapters.lock.json names a file {name!r:.80}, which no adapter has")
        kept = _kept(sha256)
        if kept.is_file() and file_sha256(kept) == sha256:
            shutil.copyfile(kept, folder / name)
            continue
        snapshot = snapshot or hub.snapshot(check_repo(pinned.repo), pinned.commit)
        if name not in snapshot.files:
            raise HubError(f"{pinned.repo} at {pinned.commit} has no {name} any more")
        found = hub.download(snapshot, name, folder / name, LIMITS[name])
        if found.sha256 != sha256:
            raise HubError(
                f"{name} of {pinned.repo} at {pinned.commit} is not what was pulled: sha256 "
                f"{found.sha256}, the lock says {sha256}"
            )
