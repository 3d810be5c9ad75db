"""Authentication and authorisation: the dependencies of the routes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated
from urllib.parse import unquote

from fastapi import Depends, Request

from .capability import Signer
from .errors import HubError, repo_not_found
from .settings import Settings
from .store import Repo, Store

KINDS = ("models", "datasets")


@dataclass(frozen=True)
class Caller:
    """The user of a token with a role (read or write); without a name, an anonymous caller."""

    name: str | None = None
    role: str = "read"


@dataclass
class Hub:
    """Shared state of the routes."""

    endpoint: str
    store: Store
    settings: Settings
    signer: Signer
    tokens: dict[str, Caller] = field(default_factory=dict)

    def url(self, repo: Repo) -> str:
        prefix = "" if repo.kind == "models" else f"{repo.kind}/"
        return f"{self.endpoint}/{prefix}{repo.path}"


def _hub(request: Request) -> Hub:
    hub: Hub = request.app.state.hub
    return hub


TheHub = Annotated[Hub, Depends(_hub)]


def _caller(request: Request, hub: TheHub) -> Caller:
    """Refuse an unknown token before anything else is checked."""
    header = request.headers.get("authorization")
    if header is None:
        return Caller()
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or token not in hub.tokens:
        raise HubError(401, "Invalid credentials in Authorization header")
    return hub.tokens[token]


TheCaller = Annotated[Caller, Depends(_caller)]


def check_writer(caller: Caller, namespace: str) -> str:
    """Return the caller's name, if they may write under `namespace`."""
    if caller.name is None:
        raise HubError(401, "You must be logged in to write.")
    if caller.role != "write":
        raise HubError(403, "This token may only read.")
    if caller.name != namespace:
        raise HubError(
            403, f"You don't have the rights to write under the namespace {namespace!r}."
        )
    return caller.name


def find(hub: Hub, caller: Caller, kind: str, namespace: str, name: str) -> Repo:
    """Return a repository that the caller may read."""
    repo = hub.store.repo(kind, unquote(namespace), unquote(name)) if kind in KINDS else None
    if repo is None or (repo.private and caller.name != repo.namespace):
        raise repo_not_found()
    return repo


def _readable(hub: TheHub, caller: TheCaller, kind: str, namespace: str, name: str) -> Repo:
    return find(hub, caller, kind, namespace, name)


Readable = Annotated[Repo, Depends(_readable)]


def _writable(caller: TheCaller, repo: Readable) -> Repo:
    check_writer(caller, repo.namespace)
    return repo


Writable = Annotated[Repo, Depends(_writable)]
