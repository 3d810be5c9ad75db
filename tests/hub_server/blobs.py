"""Contents stored by their sha256, and their names in git and LFS."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """A file of a tree. `oid` is git's hash of it, or of its pointer for an LFS object."""

    oid: str
    size: int
    sha256: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def row(self) -> tuple[str, int, str, bool]:
        return astuple(self)


Tree = dict[str, Entry]


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    """The text that git stores in place of an LFS object."""
    head = "version https://git-lfs.github.com/spec/v1"
    return f"{head}\noid sha256:{sha256}\nsize {size}\n".encode()


def lfs_entry(sha256: str, size: int) -> Entry:
    return Entry(git_oid(pointer(sha256, size)), size, sha256, lfs=True)


class Incoming:
    """A content being received: hashed and counted while it is written."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self._file = path.open("wb")
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def move(self, path: Path) -> None:
        """Move it to `path`, durably."""
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self.path, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def close(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)


class Blobs:
    """The folder of contents."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._incoming = folder / "incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self.folder / sha256

    def part(self, repo: int, sha256: str, number: int) -> Path:
        """The path of one part of an upload."""
        return self._incoming / f"{repo}-{sha256}-{number}"

    @contextmanager
    def incoming(self) -> Iterator[Incoming]:
        """Yield a content to write and move; it is deleted unless it was moved."""
        content = Incoming(self._incoming / uuid.uuid4().hex)
        try:
            yield content
        finally:
            content.close()

    def add(self, data: bytes) -> Entry:
        """Store a content; return it as a regular file."""
        with self.incoming() as content:
            content.write(data)
            if not self.path(content.sha256).exists():
                content.move(self.path(content.sha256))
            return Entry(git_oid(data), content.size, content.sha256, lfs=False)
