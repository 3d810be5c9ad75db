"""How repositories, commits and files look in JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from .blobs import Entry, Tree, pointer
from .card import card_json, tags_of
from .store import Commit, Repo, Store

MOST_CARD = 1_000_000

Json = dict[str, Any]


def card_of(store: Store, commit: Commit) -> Json:
    """The metadata of a commit's README.md."""
    entry = commit.tree.get("README.md")
    if entry is None or entry.size > MOST_CARD:
        return {}
    text = store.blobs.path(entry.sha256).read_text("utf-8", errors="replace")
    card: Json = json.loads(card_json(text))
    return card


def model_info(store: Store, repo: Repo, commit: Commit, blobs: bool = False) -> Json:
    """All that is said about a repository at a commit; with `blobs`, its files' sizes and hashes."""
    card = card_of(store, commit)
    siblings = [
        {"rfilename": path, **(_blob(entry) if blobs else {})}
        for path, entry in commit.tree.items()
    ]
    return {
        "_id": f"{repo.id:024x}",
        "id": repo.path,
        "modelId": repo.path,
        "author": repo.namespace,
        "sha": commit.oid,
        "lastModified": commit.date,
        "createdAt": repo.created,
        "private": repo.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags_of(card),
        "library_name": card.get("library_name"),
        "pipeline_tag": card.get("pipeline_tag"),
        "cardData": card,
        "siblings": siblings,
    }


def _lfs(entry: Entry) -> Json:
    return {"size": entry.size, "pointerSize": len(pointer(entry.sha256, entry.size))}


def _blob(entry: Entry) -> Json:
    lfs = {"lfs": {"sha256": entry.sha256, **_lfs(entry)}} if entry.lfs else {}
    return {"size": entry.size, "blobId": entry.oid, **lfs}


def file_json(path: str, entry: Entry) -> Json:
    lfs = {"lfs": {"oid": entry.sha256, **_lfs(entry)}} if entry.lfs else {}
    return {"type": "file", "oid": entry.oid, "size": entry.size, "path": path, **lfs}


def folder_json(path: str, tree: Tree) -> Json:
    inside = sorted((p, e.oid) for p, e in tree.items() if p.startswith(f"{path}/"))
    oid = hashlib.sha1(json.dumps(inside).encode()).hexdigest()
    return {"type": "directory", "oid": oid, "size": 0, "path": path}


def folders(paths: Iterable[str]) -> set[str]:
    """All folders that files of these paths lie in."""
    return {str(parent) for path in paths for parent in PurePosixPath(path).parents} - {".", "/"}


def entries(tree: Tree, paths: Iterable[str]) -> list[Json]:
    """The files and folders of those paths which are in the tree."""
    known = folders(tree)
    return [
        file_json(path, tree[path]) if path in tree else folder_json(path, tree)
        for path in paths
        if path in tree or path in known
    ]


def listing(tree: Tree, folder: str, recursive: bool) -> list[Json]:
    """What lies in a folder ("" is the root); with `recursive`, also in its folders."""
    start = f"{folder}/" if folder else ""
    inside = [path for path in {*tree, *folders(tree)} if path.startswith(start)]
    if not recursive:
        inside = [path for path in inside if "/" not in path.removeprefix(start)]
    return entries(tree, sorted(inside))


def commit_json(commit: Commit) -> Json:
    return {
        "id": commit.oid,
        "title": commit.title,
        "message": commit.message,
        "authors": [{"user": commit.author}],
        "date": commit.date,
    }


def refs_json(kind: str, refs: dict[str, str]) -> list[Json]:
    prefix = {"branches": "heads", "tags": "tags"}[kind]
    return [
        {"name": name, "ref": f"refs/{prefix}/{name}", "targetCommit": oid}
        for name, oid in refs.items()
    ]
