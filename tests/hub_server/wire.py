"""ASGI middleware: raw paths, a record of the requests, and fault injection."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import anyio
from anyio import CapacityLimiter, from_thread, to_thread
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .mischief import Mischief, RecordedRequest, Reply

GIT = re.compile(r"/(?:(datasets)/)?([^/]+)/([^/]+?)(?:\.git/info(?=/lfs/)|(?=/resolve/))(.*)")
THREADS = 64


def route(path: str) -> str:
    """Return the path of a route, in which the kind of a repository is explicit."""
    match = GIT.fullmatch(path)
    return f"/{match[1] or 'models'}/{match[2]}/{match[3]}{match[4]}" if match else path


class Wire:
    """Middleware that records requests; paths stay percent-encoded, so that `feat%2Fx` is one branch."""

    def __init__(
        self,
        app: ASGIApp,
        record: Callable[[RecordedRequest], object],
        mischief: Callable[[], Mischief | None],
    ) -> None:
        self._app, self._record, self._mischief = app, record, mischief
        self._threads = CapacityLimiter(THREADS)  # the routes wait for no thread held by a mischief

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        seen = _seen(scope)
        self._record(seen)
        scope = {**scope, "path": route(seen.path), "seen": seen}
        mischief = self._mischief()
        if mischief is None:
            return await self._app(scope, receive, send)

        def reply_to() -> Reply:
            return mischief(seen, lambda: from_thread.run(_answer, self._app, scope, receive))

        reply = await to_thread.run_sync(reply_to, limiter=self._threads)
        if seen.method != "HEAD":
            _fit_length(reply)
        await _send(reply, receive, send)


def _seen(scope: Scope) -> RecordedRequest:
    headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
    path, query = scope["raw_path"].decode("latin-1"), scope["query_string"].decode("latin-1")
    return RecordedRequest(scope["method"], path, query, headers)


async def _answer(app: ASGIApp, scope: Scope, receive: Receive) -> Reply:
    """Return the application's complete reply."""
    reply, body = Reply(), bytearray()

    async def keep(message: Message) -> None:
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            for key, value in message["headers"]:
                reply.headers[key.decode("latin-1")] = value.decode("latin-1")
        else:
            body.extend(message.get("body", b""))

    await app(scope, receive, keep)
    reply.body = bytes(body)
    return reply


def _fit_length(reply: Reply) -> None:
    reply.headers.pop("content-length", None)
    if isinstance(reply.body, bytes):
        reply.headers["content-length"] = str(len(reply.body))


async def _send(reply: Reply, receive: Receive, send: Send) -> None:
    headers = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in reply.headers.items()]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    if isinstance(reply.body, bytes):
        return await send({"type": "http.response.body", "body": reply.body[: reply.cut]})
    async with anyio.create_task_group() as group:
        group.start_soon(_drip, iter(reply.body), send, group.cancel_scope)
        while (await receive())["type"] != "http.disconnect":
            pass
        group.cancel_scope.cancel()  # nobody reads it any more, and it may be endless


async def _drip(pieces: Iterator[bytes], send: Send, scope: anyio.CancelScope) -> None:
    while (piece := await to_thread.run_sync(next, pieces, None)) is not None:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
    scope.cancel()
