"""The routes about repositories: who am I, make, change, delete, look up, search; refs and trees."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs, unquote, urlencode

from fastapi import APIRouter, Body, Depends, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from .access import KINDS, Hub, Readable, TheCaller, TheHub, Writable, check_writer, find
from .card import read_card
from .errors import HubError, entry_not_found
from .views import Json, commit_json, entries, listing, model_info, refs_json

NAME = re.compile(r"(?!.*(--|\.\.))(?!.*\.git$)[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)
REF = re.compile(
    r"(?!refs/|.*(\.\.|//|\.lock$|/$))(?![0-9a-f]{40}$)[A-Za-z0-9_][\w./+-]{0,199}", re.ASCII
)
BRIEF = {
    "_id", "id", "modelId", "private", "createdAt", "downloads", "likes", "tags", "library_name",
    "pipeline_tag",
}  # fmt: skip

router = APIRouter()


async def body_of(request: Request) -> bytes:
    return await request.body()


RawBody = Annotated[bytes, Depends(body_of)]


def page(hub: Hub, request: Request, items: Sequence[Any], size: int | None = None) -> JSONResponse:
    """Reply with one page, and a link to the next."""
    query = dict(request.query_params)
    size = max(1, min(size or hub.settings.page_size, hub.settings.page_size))
    cursor = query.get("cursor", "0")
    start = int(cursor) if cursor.isdecimal() else 0
    headers = {}
    if start + size < len(items):
        pairs = [(k, v) for k, v in request.query_params.multi_items() if k != "cursor"]
        following = urlencode([*pairs, ("cursor", start + size)])
        headers["Link"] = f'<{hub.endpoint}{request.scope["seen"].path}?{following}>; rel="next"'
    return JSONResponse(items[start : start + size], headers=headers)


@router.get("/api/whoami-v2")
def whoami(caller: TheCaller) -> Json:
    if caller.name is None:
        raise HubError(401, "Invalid username or password.")
    token = {"displayName": caller.name, "role": caller.role}
    auth = {"type": "access_token", "accessToken": token}
    return {"type": "user", "id": caller.name, "name": caller.name, "orgs": [], "auth": auth}


@router.post("/api/validate-yaml")
def validate_yaml(content: Annotated[str, Body(embed=True)]) -> JSONResponse:
    try:
        card = read_card(content)
    except ValueError as error:
        return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, 400)
    empty = {"message": "empty or missing yaml metadata in repo card"}
    return JSONResponse({"errors": [], "warnings": [] if card else [empty]})


# ---- repositories --------------------------------------------------------------------------------


class Named(BaseModel):
    """A repository in the body of a request."""

    name: str
    organization: str | None = None
    type: Literal["model", "dataset"] = "model"
    visibility: Literal["public", "private"] = "public"


class Wanted(BaseModel):
    """Settings of a repository."""

    visibility: Literal["public", "private"]


@router.post("/api/repos/create")
def create(hub: TheHub, caller: TheCaller, named: Named) -> Json:
    namespace = named.organization or caller.name or ""
    check_writer(caller, namespace)
    if not NAME.fullmatch(named.name):
        raise HubError(400, f"{named.name!r} is no name for a repository.")
    kind, private = f"{named.type}s", named.visibility == "private"
    repo = hub.store.create(kind, namespace, named.name, private)
    if repo is None:
        repo = find(hub, caller, kind, namespace, named.name)
        message = f"You already created this {named.type} repo: {repo.path}"
        raise HubError(409, message, body={"url": hub.url(repo)})
    return {"url": hub.url(repo), "name": repo.path, "id": f"{repo.id:024x}"}


@router.delete("/api/repos/delete")
def delete(hub: TheHub, caller: TheCaller, named: Named) -> Json:
    namespace = named.organization or caller.name or ""
    repo = find(hub, caller, f"{named.type}s", namespace, named.name)
    check_writer(caller, repo.namespace)
    hub.store.delete(repo)
    return {}


@router.put("/api/{kind}/{namespace}/{name}/settings")
def change_settings(hub: TheHub, repo: Writable, wanted: Wanted) -> Json:
    hub.store.set_private(repo, wanted.visibility == "private")
    return {"visibility": wanted.visibility}


@router.get("/api/{kind}/{namespace}/{name}/auth-check")
def auth_check(repo: Readable) -> Json:
    return {}


@router.get("/api/{kind}/{namespace}/{name}/auth-check/write")
def auth_check_write(repo: Writable) -> Json:
    return {}


@router.get("/api/{kind}/{namespace}/{name}")
@router.get("/api/{kind}/{namespace}/{name}/revision/{revision}")
def info(
    hub: TheHub,
    repo: Readable,
    revision: str = "main",
    blobs: bool = False,
    expand: Annotated[list[str] | None, Query()] = None,
) -> Json:
    commit = hub.store.commit(repo, unquote(revision))
    found = model_info(hub.store, repo, commit, blobs)
    return {k: v for k, v in found.items() if not expand or k in {"_id", "id", *expand}}


# ---- search --------------------------------------------------------------------------------------


class Search(BaseModel):
    """Query parameters of a search of repositories."""

    filter: list[str] = []
    search: str = ""
    author: str = ""
    pipeline_tag: str = ""
    sort: Literal["", "lastModified", "createdAt", "downloads", "likes", "trendingScore"] = ""
    direction: Literal["-1", "1"] = "-1"
    limit: int | None = None
    full: bool = False
    cardData: bool = False
    expand: list[str] = []
    cursor: str = ""

    def finds(self, found: Json) -> bool:
        tags = {*found["tags"]}
        wanted = {tag for text in self.filter for tag in text.split(",")}
        return (
            wanted <= tags
            and self.search.lower() in found["id"].lower()
            and self.author in ("", found["author"])
            and self.pipeline_tag in ("", found["pipeline_tag"])
        )

    def shows(self, found: Json) -> Json:
        keys = {*self.expand, "id", "_id"} if self.expand else {*found} if self.full else {*BRIEF}
        keys -= set() if self.cardData or self.expand else {"cardData"}
        keys |= {"cardData"} if self.cardData else set()
        return {key: value for key, value in found.items() if key in keys}


@router.get("/api/{kind}")
def search(
    hub: TheHub, caller: TheCaller, request: Request, kind: str, query: Annotated[Search, Query()]
) -> JSONResponse:
    if kind not in KINDS:
        raise HubError(404, f"There is nothing at /api/{kind}.")
    repos = [r for r in hub.store.repos(kind) if not r.private or r.namespace == caller.name]
    infos = [model_info(hub.store, repo, hub.store.commit(repo, "main")) for repo in repos]
    matches = [info for info in infos if query.finds(info)]
    if query.sort in ("lastModified", "createdAt"):
        matches.sort(key=lambda info: info[query.sort], reverse=query.direction == "-1")
    return page(hub, request, [query.shows(info) for info in matches], query.limit)


# ---- what is in a repository ---------------------------------------------------------------------


@router.get("/api/{kind}/{namespace}/{name}/tree/{revision}")
@router.get("/api/{kind}/{namespace}/{name}/tree/{revision}/{path:path}")
def tree(
    hub: TheHub,
    repo: Readable,
    request: Request,
    revision: str,
    path: str = "",
    recursive: bool = False,
) -> JSONResponse:
    commit = hub.store.commit(repo, unquote(revision))
    folder = unquote(path).strip("/")
    items = listing(commit.tree, folder, recursive)
    if folder and not items:
        raise entry_not_found(f"{folder} does not exist on {unquote(revision)}", commit.oid)
    return page(hub, request, items)


@router.post("/api/{kind}/{namespace}/{name}/paths-info/{revision}")
def paths_info(hub: TheHub, repo: Readable, revision: str, body: RawBody) -> list[Json]:
    paths = parse_qs(body.decode("utf-8", "replace")).get("paths", [])
    items = entries(hub.store.commit(repo, unquote(revision)).tree, paths)
    return sorted(items, key=lambda entry: entry["path"])


@router.get("/api/{kind}/{namespace}/{name}/commits/{revision}")
def commits(hub: TheHub, repo: Readable, request: Request, revision: str) -> JSONResponse:
    line = hub.store.history(repo, hub.store.commit(repo, unquote(revision)))
    return page(hub, request, [commit_json(commit) for commit in line])


# ---- refs ----------------------------------------------------------------------------------------


def _check_ref(name: str) -> str:
    if not REF.fullmatch(name):
        raise HubError(400, f"{name!r} is no name for a branch or tag.")
    return name


@router.get("/api/{kind}/{namespace}/{name}/refs")
def refs(hub: TheHub, repo: Readable) -> Json:
    found = {kind: refs_json(kind, hub.store.refs(repo, kind)) for kind in ("branches", "tags")}
    return {**found, "converts": [], "pullRequests": []}


@router.post("/api/{kind}/{namespace}/{name}/branch/{branch}")
def create_branch(hub: TheHub, repo: Writable, branch: str, body: dict[str, Any]) -> Json:
    start = str(body.get("startingPoint", "main"))
    hub.store.add_ref(repo, "branches", _check_ref(unquote(branch)), start)
    return {}


@router.delete("/api/{kind}/{namespace}/{name}/branch/{branch}")
def delete_branch(hub: TheHub, repo: Writable, branch: str) -> Json:
    if unquote(branch) == "main":
        raise HubError(400, "The branch main stays.")
    hub.store.delete_ref(repo, "branches", unquote(branch))
    return {}


@router.post("/api/{kind}/{namespace}/{name}/tag/{revision}")
def create_tag(
    hub: TheHub, repo: Writable, revision: str, tag: Annotated[str, Body(embed=True)]
) -> Json:
    hub.store.add_ref(repo, "tags", _check_ref(tag), unquote(revision))
    return {}


@router.delete("/api/{kind}/{namespace}/{name}/tag/{tag}")
def delete_tag(hub: TheHub, repo: Writable, tag: str) -> Json:
    hub.store.delete_ref(repo, "tags", unquote(tag))
    return {}
