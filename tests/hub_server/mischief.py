"""Fault injection: a test can replace or change the server's replies to chosen requests.

`server.mischief` is called with each request as it was seen and a function that gives the true reply; what
it returns is sent. It may change the reply, make one up, or get the true one and then pretend that it failed:

    def wrong_etag(seen, answer):
        reply = answer()
        if "/resolve/" in seen.path:
            reply.headers["etag"] = '"../../evil"'
        return reply

    server.mischief = wrong_etag
    server.mischief = only("POST .*/commit/", fail(2, 503))

It is called in a thread of its own, so it may sleep; several requests may be in it at once.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RecordedRequest:
    """A received request: `path` is percent-encoded, header names are lower case."""

    method: str
    path: str
    query: str
    headers: dict[str, str]

    @property
    def host(self) -> str:
        return self.headers.get("host", "")

    @property
    def target(self) -> str:
        return f"{self.path}?{self.query}" if self.query else self.path


@dataclass
class Reply:
    """A reply: header names are lower case; an iterator of bytes is sent piece by piece.

    Content-Length follows the body, except of a HEAD. After `cut` bytes the connection breaks off.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | Iterable[bytes] = b""
    cut: int | None = None

    @property
    def json(self) -> Any:
        assert isinstance(self.body, bytes)
        return json.loads(self.body)

    @json.setter
    def json(self, value: Any) -> None:
        self.body = json.dumps(value).encode()
        self.headers["content-type"] = "application/json"


Answer = Callable[[], Reply]
Mischief = Callable[[RecordedRequest, Answer], Reply]


def only(pattern: str, mischief: Mischief) -> Mischief:
    """Apply `mischief` only to requests whose `METHOD /path?query` contains the pattern."""

    def reply_to(seen: RecordedRequest, answer: Answer) -> Reply:
        found = re.search(pattern, f"{seen.method} {seen.target}")
        return mischief(seen, answer) if found else answer()

    return reply_to


def after(change: Callable[[Reply], object]) -> Mischief:
    """Return a mischief that changes the correct reply in place."""

    def reply_to(_seen: RecordedRequest, answer: Answer) -> Reply:
        reply = answer()
        change(reply)
        return reply

    return reply_to


def fail(times: int, status: int, error: str = "Not now.", done: bool = False) -> Mischief:
    """Refuse the first `times` requests; with `done`, after carrying them out."""
    turns = itertools.count()

    def reply_to(_seen: RecordedRequest, answer: Answer) -> Reply:
        if next(turns) >= times:
            return answer()
        if done:
            answer()
        reply = Reply(status)
        reply.json = {"error": error}
        return reply

    return reply_to
