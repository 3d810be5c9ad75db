"""pull: an adapter from a Hub into the pool, by way of a quarantine folder, and `adapters.lock.json`."""

from __future__ import annotations

import json
import shutil
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
from adapterhub_chat.files import file_sha256, replaced_file
from adapterhub_chat.pool.lockfile import Lockfile, Pinned, is_installed, read_lock
from adapterhub_chat.pool.names import check_name
from adapterhub_chat.pool.registry import Registry
from adapterhub_chat.pool.stored import CARD, Status, Stored
from adapterhub_chat.remote import signing
from adapterhub_chat.remote.client import HubClient, Snapshot
from adapterhub_chat.remote.names import check_repo

MAX_FILE_BYTES = {
    CONFIG: MAX_CONFIG,
    WEIGHTS: MAX_WEIGHTS,
    MANIFEST: MAX_MANIFEST,
    signing.SIGNATURE_FILE: 64 * 2**10,
}
"""The files that are downloaded, and the size limit of each."""
REQUIRED_FILES = (CONFIG, WEIGHTS)


@dataclass(frozen=True)
class Pulled:
    """The result of pulling one adapter."""

    name: str
    repo: str
    commit: str
    status: Status
    signed_by: str
    """The signer's public key; empty without a signature."""
    changed: bool
    """False when the pool already had the same files."""


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
    _check_origin(registry, name, repo, hub, lock, replace=replace)
    revision_name = revision or "main"
    snapshot = hub.snapshot(repo, revision_name)
    if (previous := lock.adapters.get(name)) and not replace:
        _check_history(hub, snapshot, previous, revision_name)
    with registry.pool.quarantine() as folder:
        hashes = _download(hub, snapshot, folder)
        signer = _signer(folder, hashes, key)
        if (
            previous
            and not replace
            and previous.commit == snapshot.commit
            and previous.files != hashes
        ):
            raise HubError(
                f"{repo} at {snapshot.commit} has other files than when it was pulled before; a commit does "
                "not change. If you trust that, pull with --replace"
            )
        if (
            previous
            and previous.signed_by
            and not replace
            and signer not in (previous.signed_by, key)
        ):
            raise AdapterError(
                f"{repo} was signed by {previous.signed_by} when {name!r} was pulled, and by "
                f"{signer or 'nobody'} now; --require-signature KEY names the new key, --replace takes what "
                "is there"
            )
        pinned = Pinned(
            endpoint=hub.endpoint,
            repo=repo,
            revision=revision_name,
            commit=snapshot.commit,
            files=hashes,
            signed_by=signer,
        )
        _check_published_repo(folder, repo, signer)

        def check_name_is_free() -> None:
            current_lock = read_lock(registry.pool.root)
            _check_origin(registry, name, repo, hub, current_lock, replace=replace)

        return _install(registry, name, folder, pinned, check_name_is_free)


def pull_locked(registry: Registry, token: str | None = None) -> list[Pulled]:
    """Restore the pool to the exact files of its lock; files that were pulled before come from the cache."""
    pool = registry.pool
    lock = read_lock(pool.root)
    if not lock.adapters:
        raise UsageError(f"the pool {pool.root} has no adapters.lock.json, or an empty one")
    pulled = []
    for name, pinned in lock.adapters.items():
        with pool.quarantine() as folder:
            if not _is_up_to_date(pool.root / check_name(name), pinned):
                _restore(pinned, folder, token)
                _signer(folder, pinned.files, pinned.signed_by or None)
                pulled.append(_install(registry, name, folder, pinned))
                continue
        signer = _signer(pool.root / name, pinned.files, pinned.signed_by or None)
        status = registry.verify(name).status
        pulled.append(Pulled(name, pinned.repo, pinned.commit, status, signer, changed=False))
    return pulled


def _is_up_to_date(folder: Path, pinned: Pinned) -> bool:
    """Return whether a pool member has all files of its lock entry, weights and config among them."""
    weights = pinned.files.get(WEIGHTS, "")
    weights_match = CONFIG in pinned.installed and pinned.installed.get(WEIGHTS) == weights
    return weights_match and is_installed(folder, pinned.installed)


# ---- origin and history --------------------------------------------------------------------------


def _check_origin(
    registry: Registry, name: str, repo: str, hub: HubClient, lock: Lockfile, *, replace: bool
) -> None:
    """Raise UsageError when the pool has an adapter of that name from another origin."""
    pinned = lock.adapters.get(name)
    if replace or (pinned is None and name not in registry.pool):
        return
    if pinned is None:
        origin = "was not pulled"
    elif (pinned.endpoint, pinned.repo) != (hub.endpoint, repo):
        origin = f"came from {pinned.repo} at {pinned.endpoint}"
    else:
        return
    raise UsageError(
        f"the pool has an adapter {name!r}, and it {origin}; pull under another name (--name), or let it "
        "be replaced (--replace)"
    )


def _check_history(hub: HubClient, snapshot: Snapshot, previous: Pinned, revision: str) -> None:
    """Raise HubError when a pulled tag has moved, or a pulled commit no longer exists."""
    if snapshot.commit == previous.commit:
        return
    cure = "; if you trust that, pull with --replace"
    if revision == previous.revision and revision in hub.tags(snapshot.repo):
        raise HubError(
            f"the tag {revision!r} of {snapshot.repo} meant {previous.commit} when it was pulled and means "
            f"{snapshot.commit} now: tags are not to move{cure}"
        )
    try:
        hub.snapshot(snapshot.repo, previous.commit)
    except HubError as error:
        raise HubError(
            f"{snapshot.repo} has no commit {previous.commit} any more, which was pulled before: its history "
            f"was rewritten, or somebody else has the name now{cure}"
        ) from error


# ---- download, check, install --------------------------------------------------------------------


def _download(hub: HubClient, snapshot: Snapshot, folder: Path) -> dict[str, str]:
    """Download the files that MAX_FILE_BYTES names; return the sha256 of each."""
    missing = [name for name in REQUIRED_FILES if name not in snapshot.files]
    if missing:
        raise AdapterError(
            f"{snapshot.repo} at {snapshot.commit} is no adapter: {' and '.join(missing)} not found"
            " (pickled .bin weights are never taken)"
        )
    names = [name for name in MAX_FILE_BYTES if name in snapshot.files]
    names.sort(
        key=lambda name: snapshot.files[name].size
    )  # small files first, so that errors in them are found early
    return {
        name: hub.download(snapshot, name, folder / name, MAX_FILE_BYTES[name]).sha256
        for name in names
    }


def _signer(folder: Path, hashes: Mapping[str, str], key: str | None) -> str:
    """Return the signer's key, empty without a signature; raise AdapterError unless it is `key`, if set."""
    signer = ""
    if signing.SIGNATURE_FILE in hashes:
        signed = {name: digest for name, digest in hashes.items() if name != signing.SIGNATURE_FILE}
        signer = signing.signer_of((folder / signing.SIGNATURE_FILE).read_bytes(), signed)
    if key is not None and signer != key:
        raise AdapterError(f"it is signed by {signer or 'nobody'}, not by {key}")
    return signer


def _check_published_repo(folder: Path, repo: str, signer: str) -> None:
    """Raise AdapterError for files that were signed for another repository."""
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
    check_before: Callable[[], None] = lambda: None,
) -> Pulled:
    """Verify the untrusted files in quarantine, and move them into the pool in one step.

    `check_before` is called under the pool's lock; it raises when another process has taken the name.
    """
    verdict = registry.verify(folder)
    if not verdict.ok:
        problems = "; ".join(verdict.problems)
        raise AdapterError(f"{pinned.repo} is refused, and the pool is as it was: {problems}")
    stored = registry.read(folder, name)
    _cache_files(folder, pinned.files)
    _rewrite(folder, stored)
    installed = {
        file: file_sha256(folder / file)
        for file in (*MAX_FILE_BYTES, CARD)
        if (folder / file).is_file()
    }
    pinned = pinned.model_copy(update={"installed": installed})
    unchanged_on_disk = is_installed(registry.pool.root / name, installed)
    changed = not unchanged_on_disk or read_lock(registry.pool.root).adapters.get(name) != pinned
    if changed:
        registry.pool.install(name, folder, pinned, check_before)
    return Pulled(name, pinned.repo, pinned.commit, verdict.status, pinned.signed_by, changed)


def _rewrite(folder: Path, stored: Stored) -> None:
    """Rewrite the config and the card from their validated contents."""
    rebuilt = (json.dumps(dict(stored.config), indent=2) + "\n").encode()
    if (folder / CONFIG).read_bytes() != rebuilt:
        (folder / CONFIG).write_bytes(rebuilt)
    if stored.manifest is not None:
        (folder / CARD).write_text(render_card(stored.manifest), encoding="utf-8")


# ---- the cache of pulled files -------------------------------------------------------------------


def _cache_path(sha256: str) -> Path:
    return cache_dir() / "pulled" / sha256


def _cache_files(folder: Path, hashes: Mapping[str, str]) -> None:
    """Cache files by their sha256, so that a lock can be restored without a network."""
    for name, sha256 in hashes.items():
        with suppress(OSError):  # an unwritable cache stays empty
            target = _cache_path(sha256)
            if is_installed(target.parent, {target.name: sha256}):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with replaced_file(target) as scratch:
                shutil.copyfile(folder / name, scratch)


def _restore(pinned: Pinned, folder: Path, token: str | None) -> None:
    """Write the files of a lock entry into a folder; raise HubError when one is no longer available."""
    snapshot: Snapshot | None = None
    default_endpoint = HubClient().endpoint  # the token is sent to the user's default Hub only
    hub = HubClient(pinned.endpoint, token if pinned.endpoint == default_endpoint else None)
    for name, sha256 in pinned.files.items():
        if name not in MAX_FILE_BYTES:
            raise UsageError(f"adapters.lock.json names a file {name!r:.80}, which no adapter has")
        cached = _cache_path(sha256)
        if cached.is_file() and file_sha256(cached) == sha256:
            shutil.copyfile(cached, folder / name)
            continue
        snapshot = snapshot or hub.snapshot(check_repo(pinned.repo), pinned.commit)
        if name not in snapshot.files:
            raise HubError(f"{pinned.repo} at {pinned.commit} has no {name} any more")
        downloaded = hub.download(snapshot, name, folder / name, MAX_FILE_BYTES[name])
        if downloaded.sha256 != sha256:
            raise HubError(
                f"{name} of {pinned.repo} at {pinned.commit} is not what was pulled: sha256 "
                f"{downloaded.sha256}, the lock says {sha256}"
            )
