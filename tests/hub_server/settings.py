"""Settings of the server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The keyword arguments of `HubServer`."""

    page_size: int = 1000
    """Maximum number of items on a page of a listing."""
    lfs_over: int | None = 1000
    """Larger binary files are LFS objects; None: all files are inside their commits."""
    part_size: int = 5_000_000
    """Larger LFS objects are uploaded in parts of this size, in bytes."""
    url_seconds: float = 3600
    """Lifetime of an upload URL, in seconds."""
    commit_seconds: float = 0
    """Additional duration of a commit, in seconds."""
    patient: bool = True
    """Whether a commit waits for another one of the same repository, or is refused with 409."""
