"""Names of things on a Hub, checked before any of them becomes part of a path or an address."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from adapterhub_chat.artifact.card import REPO
from adapterhub_chat.errors import HubError, UsageError

PUBLIC = "https://huggingface.co"
STORES = (".huggingface.co", ".hf.co", ".amazonaws.com")
"""Hosts, by their ends, to which huggingface.co sends on for large files; no token goes there."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,199}")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Hosts:
    """Where requests may go: the endpoint, and for huggingface.co its stores."""

    scheme: str
    host: str
    port: int | None
    stores: tuple[str, ...] = ()

    def check(self, request: Any) -> None:
        """Refuse a request that leaves the endpoint, or takes a token to one of its stores."""
        url = request.url
        if (url.scheme, url.host, url.port) == (self.scheme, self.host, self.port):
            return
        if url.scheme == "https" and url.host.endswith(self.stores or ("\0",)):
            request.headers.pop("authorization", None)
            return
        own = f"{self.scheme}://{self.host}" + (f":{self.port}" if self.port else "")
        there = f"{url.scheme}://{url.netloc.decode()}"
        raise HubError(f"{own} sent on to {there}, which is another host; nothing was sent there")


def check_repo(repo: str) -> str:
    """Return `repo` when it can be `user/name`, else raise UsageError."""
    if isinstance(repo, str) and REPO.fullmatch(repo):
        parts = repo.split("/")
        if not any(".." in p or "--" in p or p.endswith((".git", ".", "-")) for p in parts):
            return repo
    raise UsageError(
        f"{repo!r:.120} is no repository: write user/name, each up to 96 letters, digits, '.', '_' and '-', "
        "beginning and ending with a letter, digit or '_', without '..' and '--'"
    )


def check_revision(revision: str) -> str:
    """Return `revision` when it can be a branch, tag or commit, else raise UsageError."""
    if isinstance(revision, str) and REVISION.fullmatch(revision):
        parts = revision.split("/")
        if all(part and ".." not in part and not part.endswith((".", ".lock")) for part in parts):
            return revision
    raise UsageError(
        f"{revision!r:.120} is no revision: a branch, a tag or a commit of 40 hex digits has up to 200 "
        "letters, digits, '.', '_', '-' and '/'"
    )


def check_endpoint(endpoint: str) -> tuple[str, Hosts]:
    """Return an endpoint without its last slash, and where requests to it may go; else raise UsageError."""
    try:
        parts = urlsplit(endpoint)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    host = parts.hostname or ""
    plain = parts.scheme == "https" or (parts.scheme == "http" and host in LOOPBACK)
    rest = (parts.username, parts.password, parts.query, parts.fragment, parts.path.strip("/"))
    if not plain or not host or any(rest) or not re.fullmatch(r"[A-Za-z0-9.:-]+", host):
        raise UsageError(
            f"{endpoint!r:.120} is no endpoint: write https://HOST, or http://127.0.0.1:PORT for a Hub on "
            "this machine, with nothing behind it"
        )
    stores = STORES if endpoint.rstrip("/") == PUBLIC else ()
    return endpoint.rstrip("/"), Hosts(parts.scheme, host, port, stores)
