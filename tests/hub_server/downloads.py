"""The route of downloads, of whole files or of ranges."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from .access import Readable, TheHub
from .errors import HubError, entry_not_found

RANGE = re.compile(r"bytes=(\d*)-(\d*)", re.ASCII)
CHUNK = 1 << 20

router = APIRouter()


@router.api_route(
    "/{kind}/{namespace}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"]
)
def resolve(hub: TheHub, repo: Readable, request: Request, revision: str, path: str) -> Response:
    commit = hub.store.commit(repo, unquote(revision))
    entry = commit.tree.get(unquote(path))
    if entry is None:
        raise entry_not_found("Entry not found", commit.oid)
    start, stop = _range(request.headers.get("range", ""), entry.size)
    headers = {
        "X-Repo-Commit": commit.oid,
        "ETag": f'"{entry.etag}"',
        "Accept-Ranges": "bytes",
        "Content-Length": str(stop - start),
        "Content-Type": "application/octet-stream",
    }
    if entry.lfs:
        headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    part = (start, stop) != (0, entry.size)
    if part:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{entry.size}"
    status = 206 if part else 200
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers)
    body = _read(hub.store.blobs.path(entry.sha256), start, stop)
    return StreamingResponse(body, status, headers)


def _range(text: str, size: int) -> tuple[int, int]:
    """Return the first byte to send and the end; an invalid range means the whole file."""
    match = RANGE.fullmatch(text.replace(" ", ""))
    if not match or match.groups() == ("", ""):
        return 0, size
    first, last = match.groups()
    if not first:
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(size, int(last) + 1) if last else size
    if start >= stop:
        headers = {"Content-Range": f"bytes */{size}"}
        raise HubError(416, "The range lies outside the file.", headers=headers)
    return start, stop


def _read(path: Path, start: int, stop: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(min(CHUNK, stop - file.tell())):
            yield chunk
