"""The routes of uploads: preupload, LFS objects whole or in parts, and commits."""

from __future__ import annotations

import asyncio
import functools
import hashlib
from typing import Annotated, Literal
from urllib.parse import unquote

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from .access import Hub, TheCaller, TheHub, Writable
from .blobs import Incoming
from .capability import Permit
from .changes import Content, RepoPath, Sha256, changed, read_changes
from .errors import HubError
from .repositories import RawBody
from .store import Change, Repo
from .views import Json

BINARY = (".safetensors", ".bin", ".gguf", ".pt", ".npz", ".zip", ".png", ".parquet")

router = APIRouter()


def is_lfs(limit: int | None, path: str, size: int, sample: bytes) -> bool:
    """Whether a file becomes an LFS object: it is binary and larger than the limit."""
    binary = path.lower().endswith(BINARY) or b"\0" in sample
    return limit is not None and size > limit and binary


class Planned(BaseModel):
    """A file of a planned commit; `sample` is its beginning."""

    path: RepoPath
    sample: Content = b""
    size: int = Field(ge=0)


class Plan(BaseModel):
    """The body of a preupload."""

    files: list[Planned] = Field(max_length=256)


@router.post("/api/{kind}/{namespace}/{name}/preupload/{revision}")
def preupload(hub: TheHub, repo: Writable, revision: str, plan: Plan) -> Json:
    tree = hub.store.commit(repo, unquote(revision)).tree
    files = []
    for file in plan.files:
        lfs = is_lfs(hub.settings.lfs_over, file.path, file.size, file.sample)
        oid = tree[file.path].etag if file.path in tree else None
        mode = "lfs" if lfs else "regular"
        files.append({"path": file.path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return {"files": files}


# ---- LFS objects ---------------------------------------------------------------------------------


class Announced(BaseModel):
    """An LFS object to be uploaded."""

    oid: Sha256
    size: int = Field(ge=0)


class Batch(BaseModel):
    """The body of an LFS batch."""

    operation: Literal["upload"]
    objects: list[Announced]
    transfers: list[str] = ["basic"]


@router.post("/{kind}/{namespace}/{name}/lfs/objects/batch")
def lfs_batch(hub: TheHub, repo: Writable, batch: Batch) -> Json:
    parts = "multipart" in batch.transfers
    return {"objects": [{**o.model_dump(), **_actions(hub, repo, o, parts)} for o in batch.objects]}


def _actions(hub: Hub, repo: Repo, wanted: Announced, parts: bool) -> Json:
    """The upload actions of an object; none if this repository has it."""
    known = hub.store.object_size(repo.id, wanted.oid)
    if known == wanted.size:
        return {}
    if known is not None:
        return {"error": {"code": 422, "message": f"This object has {known} bytes."}}

    def url(method: str, part: int = 0) -> str:
        permit = Permit(method, repo.id, wanted.oid, wanted.size, part)
        return f"{hub.endpoint}{hub.signer.path(permit)}"

    upload: Json = {"href": url("PUT"), "header": {}}
    if parts and wanted.size > hub.settings.part_size:
        urls = {str(n): url("PUT", n) for n in range(1, _parts(hub, wanted.size) + 1)}
        upload = {
            "href": url("POST"),
            "header": {"chunk_size": str(hub.settings.part_size), **urls},
        }
    verify = {"href": f"{hub.url(repo)}.git/info/lfs/objects/verify"}
    return {"actions": {"upload": upload, "verify": verify}}


def _parts(hub: Hub, size: int) -> int:
    return -(-size // hub.settings.part_size)


@router.post("/{kind}/{namespace}/{name}/lfs/objects/verify")
def lfs_verify(hub: TheHub, repo: Writable, wanted: Announced) -> Json:
    hub.store.link(repo, wanted.oid, wanted.size)
    return {}


def _permit(
    hub: TheHub,
    request: Request,
    repo: int,
    sha256: str,
    size: int,
    part: int,
    expires: str = "",
    signature: str = "",
) -> Permit:
    permit = Permit(request.method, repo, sha256, size, part)
    hub.signer.check(permit, expires, signature)
    return permit


Permitted = Annotated[Permit, Depends(_permit)]
OBJECT = "/lfs/{repo}/{sha256}/{size}/{part}"


@router.put(OBJECT)
async def lfs_put(hub: TheHub, request: Request, permit: Permitted) -> Response:
    length = permit.size
    if permit.part:
        before = (permit.part - 1) * hub.settings.part_size
        length = min(hub.settings.part_size, permit.size - before)
    blobs = hub.store.blobs
    with blobs.incoming() as content:
        await _receive(request, content, length)
        if permit.part:
            content.move(blobs.part(permit.repo, permit.sha256, permit.part))
        else:
            await asyncio.to_thread(_keep, hub, permit, content)
        return Response(headers={"ETag": f'"{content.sha256}"'})


async def _receive(request: Request, content: Incoming, length: int) -> None:
    """Write the body; stop when it exceeds its limit."""
    async for chunk in request.stream():
        content.write(chunk)
        if content.size > length:
            raise HubError(400, f"The upload is longer than the {length} bytes announced.")
    if content.size < length:
        raise HubError(400, f"The upload has {content.size} of the {length} bytes announced.")


def _keep(hub: Hub, permit: Permit, content: Incoming) -> None:
    if content.sha256 != permit.sha256:
        raise HubError(400, f"The upload's sha256 is {content.sha256}, not {permit.sha256}.")
    content.move(hub.store.blobs.path(permit.sha256))
    hub.store.add_object(permit.repo, permit.sha256, permit.size)


class Part(BaseModel):
    """An uploaded part, by its ETag."""

    partNumber: int
    etag: str


class Joined(BaseModel):
    """All parts of an object."""

    oid: Sha256
    parts: list[Part]


@router.post(OBJECT)
def lfs_join(hub: TheHub, permit: Permitted, joined: Joined) -> Json:
    if hub.store.object_size(permit.repo, permit.sha256) == permit.size:
        return {}  # asked again, the answer to the first time was lost
    numbers = list(range(1, _parts(hub, permit.size) + 1))
    if [part.partNumber for part in joined.parts] != numbers:
        raise HubError(400, f"The parts of this object are 1 to {len(numbers)}.")
    paths = [hub.store.blobs.part(permit.repo, permit.sha256, number) for number in numbers]
    with hub.store.blobs.incoming() as content:
        for part, path in zip(joined.parts, paths, strict=True):
            data = path.read_bytes() if path.exists() else b""
            if hashlib.sha256(data).hexdigest() != part.etag.strip('"'):
                raise HubError(400, f"Part {part.partNumber} is not as it was uploaded.")
            content.write(data)
        _keep(hub, permit, content)
    for path in paths:
        path.unlink(missing_ok=True)
    return {}


# ---- the commit ----------------------------------------------------------------------------------


@router.post("/api/{kind}/{namespace}/{name}/commit/{revision}")
def commit(
    hub: TheHub,
    caller: TheCaller,
    repo: Writable,
    revision: str,
    body: RawBody,
    create_pr: bool = False,
) -> Json:
    if create_pr:
        raise HubError(400, "Pull requests are not supported.")
    changes = read_changes(body)
    make = functools.partial(
        changed,
        operations=changes.operations,
        add=hub.store.blobs.add,
        link=functools.partial(hub.store.link, repo),
    )
    head = changes.header
    change = Change(make, str(caller.name), head.summary, head.description, head.parentCommit)
    done = hub.store.advance(repo, unquote(revision), change)
    url = f"{hub.url(repo)}/commit/{done.oid}"
    return {"success": True, "commitOid": done.oid, "commitUrl": url, "hookOutput": ""}
