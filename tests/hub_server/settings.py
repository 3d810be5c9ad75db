"""How a server behaves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The keyword arguments of `HubServer`."""

    page_size: int = 1000
    """Most items on a page of a listing."""
    lfs_over: int | None = 1000
    """Binary files of more bytes travel as LFS objects; None: every file travels within its commit."""
    part_size: int = 5_000_000
    """LFS objects of more bytes are uploaded in parts of so many."""
    url_seconds: float = 3600
    """How long an upload URL is good for."""
    commit_seconds: float = 0
    """How much longer a commit takes than it needs."""
    patient: bool = True
    """Whether a commit waits while another of the same repository is under way, or is refused with 409."""
