"""Bounds of an exchange with a Hub: which hosts, how many bytes of an answer, and until when.

`huggingface_hub` shares one client between all its calls in a process. Hooks on that client hold to their
bounds the requests that are made inside `within`, and let everybody else's pass.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from huggingface_hub import get_session
from huggingface_hub.utils import _http as http

from adapterhub_chat.errors import HubError
from adapterhub_chat.remote.names import Hosts

_T = TypeVar("_T")
library: Any = getattr(http, "httpx2", None) or getattr(http, "httpx", None)
"""The HTTP library that the client is made of."""
_bounds: ContextVar[Bounds | None] = ContextVar("adapterhub_hub_bounds", default=None)


@dataclass(frozen=True)
class Bounds:
    """What one exchange may do."""

    hosts: Hosts
    most: int
    """Bytes of an answer's body."""
    end: float
    """When it has to be over, by time.monotonic."""

    @property
    def left(self) -> float:
        """Seconds until then."""
        return self.end - time.monotonic()


def within(bounds: Bounds, what: str, work: Callable[[], _T]) -> _T:
    """Return what `work` returns; raise HubError about `what` when it is not done in time.

    It runs in a thread of its own, which is left to itself then: a server that sends a byte now and then, or
    asks the client to come back tomorrow, cannot hold up more than that. What is left over can ask nothing
    more of the Hub: its next request comes too late.
    """
    _hook_in()
    done: queue.SimpleQueue[tuple[_T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        _bounds.set(bounds)
        try:
            done.put((work(), None))
        except BaseException as error:  # the caller's to handle
            done.put((None, error))

    threading.Thread(target=copy_context().run, args=(run,), daemon=True).start()
    try:
        value, error = done.get(timeout=max(0.0, bounds.left) + 0.5)
    except queue.Empty:
        raise _too_slow(what) from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def _too_slow(what: str) -> HubError:
    return HubError(f"{what} goes too slowly; try again later")


def _hook_in() -> None:
    """Add the hooks to the library's current client and to the clients that it will make.

    After a broken connection the library closes its client and makes another one. Its public
    `set_client_factory` does not fit here: it closes the client that other threads may be using, and no
    public function returns a factory that the user has set, which must go on making the clients.
    """
    if getattr(http._GLOBAL_CLIENT_FACTORY, "func", None) is not _hooked:
        http._GLOBAL_CLIENT_FACTORY = partial(_hooked, http._GLOBAL_CLIENT_FACTORY)
    _with_hooks(get_session())


def _hooked(factory: Any) -> Any:
    return _with_hooks(factory())


def _with_hooks(client: Any) -> Any:
    hooks = client.event_hooks
    if _check_request not in hooks["request"]:
        client.event_hooks = {
            "request": [_check_request, *hooks["request"]],
            "response": [_check_answer, *hooks["response"]],
        }
    return client


def _check_request(request: Any) -> None:
    """Hold a request of ours to its bounds, before it is sent."""
    if (bounds := _bounds.get()) is None:
        return
    bounds.hosts.check(request)
    if bounds.left <= 0:
        raise _too_slow(str(request.url.host))
    request.headers["accept-encoding"] = "identity"
    request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), bounds.left)


def _check_answer(answer: Any) -> None:
    """Hold an answer to a request of ours to its bounds, before its body is read."""
    if (bounds := _bounds.get()) is None:
        return
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise HubError(f"{answer.url.host} packs its answer although it was told not to")
    answer.stream = _Bounded(answer.stream, bounds, str(answer.url.host))


class _Bounded(library.SyncByteStream):  # type: ignore[misc]
    """A body that ends with an error where its bounds are."""

    def __init__(self, stream: Any, bounds: Bounds, host: str) -> None:
        self._stream, self._bounds, self._host = stream, bounds, host

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for piece in self._stream:
            size += len(piece)
            if size > self._bounds.most:
                raise HubError(
                    f"{self._host} answers with more than the {self._bounds.most:,} bytes that are read"
                )
            if self._bounds.left <= 0:
                raise _too_slow(self._host)
            yield piece

    def close(self) -> None:
        self._stream.close()
