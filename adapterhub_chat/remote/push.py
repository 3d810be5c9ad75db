"""push: publish one adapter of the pool as one commit on a Hub, under a new version tag."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from adapterhub_chat.artifact.card import render_card
from adapterhub_chat.artifact.manifest import (
    MANIFEST,
    Manifest,
    dump_manifest,
    scores_below_backbone,
    transfer_problem,
)
from adapterhub_chat.artifact.peft_config import CONFIG
from adapterhub_chat.artifact.safetensors_header import WEIGHTS
from adapterhub_chat.errors import AdapterError, HubError
from adapterhub_chat.pool.pool import Pool
from adapterhub_chat.pool.stored import CARD
from adapterhub_chat.remote import signing
from adapterhub_chat.remote.client import HubClient
from adapterhub_chat.remote.names import check_repo, check_revision

VERSION_PATTERN = re.compile(r"v([1-9][0-9]{0,5})")


@dataclass(frozen=True)
class Published:
    """The location of a published adapter."""

    repo: str
    commit: str
    version: str
    """The tag of this commit."""
    url: str


def push(
    pool: Pool,
    name: str,
    repo: str,
    hub: HubClient,
    *,
    version: str | None = None,
    private: bool = False,
    force: bool = False,
    key: Path | None = None,
) -> Published:
    """Publish a pool member; see AdapterHub.push."""
    check_repo(repo)
    if version is not None:
        check_revision(version)
    manifest = _publishable_manifest(pool, name, force=force).model_copy(update={"published": repo})
    files = _published_files(pool, name, manifest, key)
    hub.create(repo, private=private)
    if version is not None and version in hub.tags(repo):
        raise HubError(
            f"{repo} has a version {version!r} already, and versions do not move; name another one"
        )
    commit = hub.commit(repo, files, f"{name}: {manifest.about or 'adapter'}"[:200])
    tag = _tag_version(hub, repo, commit, version)
    pool.describe(name, manifest)
    return Published(repo, commit, tag, f"{hub.endpoint}/{repo}/tree/{tag}")


def _publishable_manifest(pool: Pool, name: str, *, force: bool) -> Manifest:
    """Return the manifest of a pool member; raise AdapterError when it should not be published."""
    stored = pool.load(name)
    manifest = stored.manifest
    if manifest is None:
        raise AdapterError(
            f"adapter {name!r} has no manifest: nothing is known about it. Measure it first: "
            f"adapterhub-chat adopt {name} --task TASK"
        )
    if manifest.stack:
        raise AdapterError(
            f"adapter {name!r} is a stack: nobody can use it without {manifest.stack[-1].name!r}. Publish "
            f"it as one plain adapter: adapterhub-chat flatten {name}"
        )
    if force:
        return manifest
    if not manifest.scores:
        raise AdapterError(
            f"adapter {name!r} was never measured: adapterhub-chat eval --adapter {name} --save. "
            "--force publishes it all the same, and its card says so"
        )
    if harm := transfer_problem(manifest):
        raise AdapterError(f"{harm}. --force publishes it all the same, and its card says so")
    if lost_scores := scores_below_backbone(manifest):
        worse = "; ".join(
            f"{s.task}: {s.metric} {s.value:.3f}, backbone {s.backbone_value:.3f}"
            for s in lost_scores
        )
        raise AdapterError(
            f"adapter {name!r} is worse than the backbone without it ({worse}). --force publishes it all the "
            "same, and its card says so"
        )
    return manifest


def _published_files(
    pool: Pool, name: str, manifest: Manifest, key: Path | None
) -> dict[str, bytes]:
    """Return the published files by name; other files of the folder are left out."""
    folder = pool.path(name)
    files = {
        CONFIG: (folder / CONFIG).read_bytes(),
        WEIGHTS: (folder / WEIGHTS).read_bytes(),
        MANIFEST: dump_manifest(manifest).encode(),
    }
    hashes = {file: hashlib.sha256(data).hexdigest() for file, data in files.items()}
    if hashes[WEIGHTS] != manifest.sha256:
        raise AdapterError(f"adapter {name!r} was saved anew a moment ago; push it again")
    if key is not None:
        files[signing.SIGNATURE_FILE] = signing.sign(key, hashes)
    return {**files, CARD: render_card(manifest).encode()}


def _tag_version(hub: HubClient, repo: str, commit: str, version: str | None) -> str:
    """Tag a commit with `version`, else with the next free one; return the tag."""
    if version is not None:
        if hub.tag(repo, version, commit):
            return version
        raise HubError(
            f"{repo} got a version {version!r} from somebody else a moment ago; the commit {commit} is "
            "there, without a version"
        )
    tags = hub.tags(repo)
    if existing := [
        tag
        for tag, tagged_commit in tags.items()
        if tagged_commit == commit and VERSION_PATTERN.fullmatch(tag)
    ]:
        return existing[0]  # the commit was already published
    newest = max((int(m[1]) for tag in tags if (m := VERSION_PATTERN.fullmatch(tag))), default=0)
    for number in range(newest + 1, newest + 1000):
        if hub.tag(repo, f"v{number}", commit):
            return f"v{number}"
    raise HubError(f"{repo}: no version is free between v{newest + 1} and v{newest + 999}")
