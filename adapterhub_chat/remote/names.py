"""Names of things on a Hub, checked before any of them becomes part of a path or an address."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from adapterhub_chat.artifact.card import REPO
from adapterhub_chat.errors import HubError, UsageError

PUBLIC_ENDPOINT = "https://huggingface.co"
STORAGE_HOST_SUFFIXES = (".huggingface.co", ".hf.co", ".amazonaws.com")
"""Suffixes of the hosts to which huggingface.co redirects for large files; they receive no token."""
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


REVISION_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,199}")
COMMIT_PATTERN = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Hosts:
    """The hosts that requests may go to: the endpoint and, for huggingface.co, its storage hosts."""

    scheme: str
    host: str
    port: int | None
    stores: tuple[str, ...] = ()

    def check(self, request: Any) -> None:
        """Raise HubError for a request to another host; remove the token from one to a storage host."""
        url = request.url
        if (url.scheme, url.host, url.port) == (self.scheme, self.host, self.port):
            return
        if url.scheme == "https" and url.host.endswith(self.stores or ("\0",)):
            request.headers.pop("authorization", None)
            return
        origin = f"{self.scheme}://{self.host}" + (f":{self.port}" if self.port else "")
        target = f"{url.scheme}://{url.netloc.decode()}"
        raise HubError(
            f"{origin} sent on to {target}, which is another host; nothing was sent there"
        )


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
    if isinstance(revision, str) and REVISION_PATTERN.fullmatch(revision):
        parts = revision.split("/")
        if all(part and ".." not in part and not part.endswith((".", ".lock")) for part in parts):
            return revision
    raise UsageError(
        f"{revision!r:.120} is no revision: a branch, a tag or a commit of 40 hex digits has up to 200 "
        "letters, digits, '.', '_', '-' and '/'"
    )


def check_endpoint(endpoint: str) -> tuple[str, Hosts]:
    """Return an endpoint without its last slash and its allowed hosts; raise UsageError when invalid."""
    try:
        parts = urlsplit(endpoint)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    host = parts.hostname or ""
    scheme_allowed = parts.scheme == "https" or (parts.scheme == "http" and host in LOOPBACK_HOSTS)
    extra_parts = (
        parts.username,
        parts.password,
        parts.query,
        parts.fragment,
        parts.path.strip("/"),
    )
    if (
        not scheme_allowed
        or not host
        or any(extra_parts)
        or not re.fullmatch(r"[A-Za-z0-9.:-]+", host)
    ):
        raise UsageError(
            f"{endpoint!r:.120} is no endpoint: write https://HOST, or http://127.0.0.1:PORT for a Hub on "
            "this machine, with nothing behind it"
        )
    stores = STORAGE_HOST_SUFFIXES if endpoint.rstrip("/") == PUBLIC_ENDPOINT else ()
    return endpoint.rstrip("/"), Hosts(parts.scheme, host, port, stores)
