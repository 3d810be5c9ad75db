"""Contents, kept by their sha256, and how git and LFS name them."""

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
    """A file of a tree. `oid` is git's name for it; of its pointer where the file is an LFS object."""

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
    """The text that git keeps in place of an LFS object."""
    head = "version https://git-lfs.github.com/spec/v1"
    return f"{head}\noid sha256:{sha256}\nsize {size}\n".encode()


def lfs_entry(sha256: str, size: int) -> Entry:
    return Entry(git_oid(pointer(sha256, size)), size, sha256, lfs=True)


class Incoming:
    """A content on its way in: hashed and counted as it is written."""

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
        """Let it be found under `path`, whatever happens to the machine from here on."""
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
        """Where one part of an upload waits for the others."""
        return self._incoming / f"{repo}-{sha256}-{number}"

    @contextmanager
    def incoming(self) -> Iterator[Incoming]:
        """Give a content to write and then move; what was not moved is gone after it."""
        content = Incoming(self._incoming / uuid.uuid4().hex)
        try:
            yield content
        finally:
            content.close()

    def add(self, data: bytes) -> Entry:
        """Keep a content; return it as a regular file."""
        with self.incoming() as content:
            content.write(data)
            if not self.path(content.sha256).exists():
                content.move(self.path(content.sha256))
            return Entry(git_oid(data), content.size, content.sha256, lfs=False)
