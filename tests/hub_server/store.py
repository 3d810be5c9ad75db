"""Repositories, their commits, refs and LFS objects: one SQLite file, beside the contents.

Every change is one transaction, so that it is there in full or not at all, also after a crash.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .blobs import Blobs, Entry, Tree, lfs_entry
from .errors import BUSY, STALE, HubError, repo_not_found, revision_not_found
from .settings import Settings

SCHEMA = """
CREATE TABLE IF NOT EXISTS repos (
    id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT, namespace TEXT, name TEXT, private INTEGER,
    created TEXT, UNIQUE (kind, namespace, name));
CREATE TABLE IF NOT EXISTS commits (
    repo INTEGER REFERENCES repos ON DELETE CASCADE, oid TEXT, parent TEXT, title TEXT, message TEXT,
    author TEXT, date TEXT, tree TEXT, PRIMARY KEY (repo, oid));
CREATE TABLE IF NOT EXISTS refs (
    repo INTEGER REFERENCES repos ON DELETE CASCADE, kind TEXT, name TEXT, target TEXT,
    PRIMARY KEY (repo, kind, name));
CREATE TABLE IF NOT EXISTS objects (
    repo INTEGER REFERENCES repos ON DELETE CASCADE, sha256 TEXT, size INTEGER, PRIMARY KEY (repo, sha256));
"""
COMMIT = "commits.oid, parent, title, message, author, date, tree"
LINE = f"""
WITH RECURSIVE line(oid, depth) AS (
    SELECT ?1, 0 UNION ALL
    SELECT commits.parent, depth + 1 FROM commits JOIN line USING (oid)
    WHERE commits.repo = ?2 AND commits.parent IS NOT NULL)
SELECT {COMMIT} FROM line JOIN commits ON commits.oid = line.oid AND commits.repo = ?2 ORDER BY depth
"""
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass(frozen=True)
class Repo:
    """A repository; `id` is never used again, `kind` is models or datasets."""

    id: int
    kind: str
    namespace: str
    name: str
    private: bool
    created: str

    @property
    def path(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    tree: Tree


@dataclass(frozen=True)
class Change:
    """A new tree for a branch, and its commit message."""

    make: Callable[[Tree], Tree]
    author: str
    title: str
    message: str = ""
    parent: str | None = None


class Store:
    """The server's persistent state."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.blobs = Blobs(folder / "blobs")
        self._settings = settings
        self._turns: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.RLock()
        self._db = sqlite3.connect(
            folder / "hub.sqlite", isolation_level=None, check_same_thread=False, timeout=30
        )
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.executescript(SCHEMA)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                self._db.execute("ROLLBACK")
                raise

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    # ---- repositories ----------------------------------------------------------------------------

    def repo(self, kind: str, namespace: str, name: str) -> Repo | None:
        names = "kind = ? AND namespace = ? AND name = ?"
        rows = self._rows(f"SELECT * FROM repos WHERE {names}", kind, namespace, name)
        return _repo(rows[0]) if rows else None

    def repos(self, kind: str) -> list[Repo]:
        """The repositories, newest first."""
        rows = self._rows("SELECT * FROM repos WHERE kind = ? ORDER BY id DESC", kind)
        return [_repo(row) for row in rows]

    def create(self, kind: str, namespace: str, name: str, private: bool) -> Repo | None:
        """Return a new repository with a first commit; None if the name is taken."""
        row = (kind, namespace, name, private, _now())
        with self._transaction():
            if self.repo(kind, namespace, name):
                return None
            columns = "(kind, namespace, name, private, created)"
            self._rows(f"INSERT INTO repos {columns} VALUES (?, ?, ?, ?, ?)", *row)
            repo = self.repo(kind, namespace, name)
            assert repo is not None
            tree = {".gitattributes": self.blobs.add(ATTRIBUTES)}
            first = self._add_commit(repo, None, Change(dict, namespace, "initial commit"), tree)
            self._rows("INSERT INTO refs VALUES (?, 'branches', 'main', ?)", repo.id, first.oid)
            return repo

    def delete(self, repo: Repo) -> None:
        self._rows("DELETE FROM repos WHERE id = ?", repo.id)

    def set_private(self, repo: Repo, private: bool) -> None:
        self._rows("UPDATE repos SET private = ? WHERE id = ?", private, repo.id)

    # ---- commits ---------------------------------------------------------------------------------

    def commit(self, repo: Repo, revision: str) -> Commit:
        """Return the commit of a branch, a tag or a full commit id."""
        oid = self._target(repo, "branches", revision) or self._target(repo, "tags", revision)
        query = f"SELECT {COMMIT} FROM commits WHERE repo = ? AND oid = ?"
        rows = self._rows(query, repo.id, oid or revision)
        if not rows:
            raise revision_not_found(revision)
        return _commit(rows[0])

    def history(self, repo: Repo, commit: Commit) -> list[Commit]:
        """The commit and its ancestors, newest first."""
        return [_commit(row) for row in self._rows(LINE, commit.oid, repo.id)]

    def advance(self, repo: Repo, branch: str, change: Change) -> Commit:
        """Put a commit on a branch, if its parent is still the head; else nothing is changed."""
        with self._turn(repo), self._transaction():
            head = self._target(repo, "branches", branch)
            if head is None:
                raise revision_not_found(branch)
            if change.parent and not head.startswith(change.parent):
                raise HubError(412, STALE)
            tree = change.make(self.commit(repo, head).tree)
            commit = self._add_commit(repo, head, change, tree)
            where = "repo = ? AND kind = 'branches' AND name = ?"
            self._rows(f"UPDATE refs SET target = ? WHERE {where}", commit.oid, repo.id, branch)
            return commit

    @contextmanager
    def _turn(self, repo: Repo) -> Iterator[None]:
        with self._lock:
            turn = self._turns[repo.id]
        if not turn.acquire(blocking=self._settings.patient):
            raise HubError(409, BUSY)
        try:
            time.sleep(self._settings.commit_seconds)
            yield
        finally:
            turn.release()

    def _add_commit(self, repo: Repo, parent: str | None, change: Change, tree: Tree) -> Commit:
        rows = json.dumps({path: entry.row() for path, entry in sorted(tree.items())})
        about = (parent, change.title, change.message, change.author, _now())
        # Two commits that do the same are two commits, so each has something of its own.
        oid = hashlib.sha1(json.dumps([*about, rows, uuid.uuid4().hex]).encode()).hexdigest()
        values = (repo.id, oid, *about, rows)
        self._rows("INSERT INTO commits VALUES (?, ?, ?, ?, ?, ?, ?, ?)", *values)
        return Commit(oid, *about, tree)

    # ---- refs ------------------------------------------------------------------------------------

    def _target(self, repo: Repo, kind: str, name: str) -> str | None:
        query = "SELECT target FROM refs WHERE repo = ? AND kind = ? AND name = ?"
        rows = self._rows(query, repo.id, kind, name)
        return rows[0][0] if rows else None

    def refs(self, repo: Repo, kind: str) -> dict[str, str]:
        """Name -> commit id; kind is branches or tags."""
        query = "SELECT name, target FROM refs WHERE repo = ? AND kind = ? ORDER BY rowid"
        return dict(self._rows(query, repo.id, kind))

    def add_ref(self, repo: Repo, kind: str, name: str, revision: str) -> None:
        with self._transaction():
            if self._target(repo, kind, name):
                raise HubError(409, f"Reference already exists: {name}")
            oid = self.commit(repo, revision).oid
            self._rows("INSERT INTO refs VALUES (?, ?, ?, ?)", repo.id, kind, name, oid)

    def delete_ref(self, repo: Repo, kind: str, name: str) -> None:
        with self._transaction():
            if not self._target(repo, kind, name):
                raise revision_not_found(name)
            where = "repo = ? AND kind = ? AND name = ?"
            self._rows(f"DELETE FROM refs WHERE {where}", repo.id, kind, name)

    # ---- LFS objects -----------------------------------------------------------------------------

    def object_size(self, repo: int, sha256: str) -> int | None:
        """The size of an object that was uploaded to this repository, else None."""
        query = "SELECT size FROM objects WHERE repo = ? AND sha256 = ?"
        rows = self._rows(query, repo, sha256)
        return rows[0][0] if rows else None

    def add_object(self, repo: int, sha256: str, size: int) -> None:
        try:
            self._rows("INSERT OR IGNORE INTO objects VALUES (?, ?, ?)", repo, sha256, size)
        except sqlite3.IntegrityError:  # deleted meanwhile
            raise repo_not_found() from None

    def link(self, repo: Repo, sha256: str, size: int | None) -> Entry:
        """Return the file of an uploaded object."""
        known = self.object_size(repo.id, sha256)
        if known is None:
            raise HubError(400, f"LFS object {sha256} was not uploaded to this repository.")
        if size not in (None, known):
            raise HubError(400, f"LFS object {sha256} has {known} bytes, not {size}.")
        return lfs_entry(sha256, known)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _repo(row: tuple[Any, ...]) -> Repo:
    repo = Repo(*row)
    return replace(repo, private=bool(repo.private))


def _commit(row: tuple[Any, ...]) -> Commit:
    tree = json.loads(row[-1])
    return replace(Commit(*row), tree={path: Entry(*entry) for path, entry in tree.items()})
