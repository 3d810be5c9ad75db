"""A server that lies: a test puts itself between the requests and their true answers.

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
class Seen:
    """A request as it came: `path` is still percent-encoded, the names of headers are lower case."""

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
    """What is sent: the names of headers are lower case; an iterator of bytes is sent piece by piece.

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
Mischief = Callable[[Seen, Answer], Reply]


def only(pattern: str, mischief: Mischief) -> Mischief:
    """Leave alone every request in whose `METHOD /path?query` the pattern is not found."""

    def play(seen: Seen, answer: Answer) -> Reply:
        found = re.search(pattern, f"{seen.method} {seen.target}")
        return mischief(seen, answer) if found else answer()

    return play


def after(change: Callable[[Reply], object]) -> Mischief:
    """Change the true reply in place."""

    def play(_seen: Seen, answer: Answer) -> Reply:
        reply = answer()
        change(reply)
        return reply

    return play


def fail(times: int, status: int, error: str = "Not now.", done: bool = False) -> Mischief:
    """Refuse the first so many requests; with `done`, after doing what they asked for."""
    turns = itertools.count()

    def play(_seen: Seen, answer: Answer) -> Reply:
        if next(turns) >= times:
            return answer()
        if done:
            answer()
        reply = Reply(status)
        reply.json = {"error": error}
        return reply

    return play
