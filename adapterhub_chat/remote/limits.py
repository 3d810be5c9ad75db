"""Bounds of an exchange with a Hub: the hosts, the bytes of a response, and the deadline.

`huggingface_hub` shares one client between all its calls in a process. Hooks on that client apply the bounds
to the requests that are made inside `run_within`, and leave all other requests alone.
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
http_library: Any = getattr(http, "httpx2", None) or getattr(http, "httpx", None)
"""The HTTP library of huggingface_hub's client: httpx2, or httpx in older versions."""
_bounds: ContextVar[Bounds | None] = ContextVar("adapterhub_hub_bounds", default=None)


@dataclass(frozen=True)
class Bounds:
    """The limits of one exchange."""

    hosts: Hosts
    max_bytes: int
    """Of a response's body."""
    deadline: float
    """By time.monotonic."""

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


def run_within(bounds: Bounds, what: str, work: Callable[[], _T]) -> _T:
    """Return what `work` returns; raise HubError about `what` when it is not done in time.

    It runs in a thread of its own, which is abandoned after the deadline, so that a server which sends a byte
    now and then, or asks the client to retry tomorrow, blocks nothing else. An abandoned thread sends no
    further request to the Hub: the hooks refuse it.
    """
    _install_hooks()
    results: queue.SimpleQueue[tuple[_T | None, BaseException | None]] = queue.SimpleQueue()

    def work_within_bounds() -> None:
        _bounds.set(bounds)
        try:
            results.put((work(), None))
        except BaseException as error:  # the caller's to handle
            results.put((None, error))

    threading.Thread(target=copy_context().run, args=(work_within_bounds,), daemon=True).start()
    try:
        value, error = results.get(timeout=max(0.0, bounds.seconds_left) + 0.5)
    except queue.Empty:
        raise _timeout_error(what) from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def _timeout_error(what: str) -> HubError:
    return HubError(f"{what} goes too slowly; try again later")


def _install_hooks() -> None:
    """Add the hooks to the library's current client and to the clients that it will make.

    After a broken connection the library closes its client and makes another one. Its public
    `set_client_factory` does not fit here: it closes the client that other threads may be using, and no
    public function returns a factory that the user has set, which must go on making the clients.
    """
    if getattr(http._GLOBAL_CLIENT_FACTORY, "func", None) is not _make_hooked_client:
        http._GLOBAL_CLIENT_FACTORY = partial(_make_hooked_client, http._GLOBAL_CLIENT_FACTORY)
    _add_hooks(get_session())


def _make_hooked_client(factory: Any) -> Any:
    return _add_hooks(factory())


def _add_hooks(client: Any) -> Any:
    hooks = client.event_hooks
    if _check_request not in hooks["request"]:
        client.event_hooks = {
            "request": [_check_request, *hooks["request"]],
            "response": [_check_response, *hooks["response"]],
        }
    return client


def _check_request(request: Any) -> None:
    """Apply the bounds to a request, before it is sent."""
    if (bounds := _bounds.get()) is None:
        return
    bounds.hosts.check(request)
    if bounds.seconds_left <= 0:
        raise _timeout_error(str(request.url.host))
    request.headers["accept-encoding"] = "identity"
    request.extensions["timeout"] = dict.fromkeys(
        ("connect", "read", "write", "pool"), bounds.seconds_left
    )


def _check_response(response: Any) -> None:
    """Apply the bounds to a response, before its body is read."""
    if (bounds := _bounds.get()) is None:
        return
    if response.headers.get("content-encoding", "identity") != "identity":
        raise HubError(f"{response.url.host} packs its answer although it was told not to")
    response.stream = _BoundedStream(response.stream, bounds, str(response.url.host))


class _BoundedStream(http_library.SyncByteStream):  # type: ignore[misc]
    """A response body that raises HubError when it exceeds its bounds."""

    def __init__(self, stream: Any, bounds: Bounds, host: str) -> None:
        self._stream, self._bounds, self._host = stream, bounds, host

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for piece in self._stream:
            size += len(piece)
            if size > self._bounds.max_bytes:
                raise HubError(
                    f"{self._host} answers with more than the {self._bounds.max_bytes:,} bytes that are read"
                )
            if self._bounds.seconds_left <= 0:
                raise _timeout_error(self._host)
            yield piece

    def close(self) -> None:
        self._stream.close()
