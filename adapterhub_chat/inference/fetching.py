"""AdapterFetcher: loads the adapters of waiting requests, in a thread or between two steps.

On a CPU of few cores a load in a thread slows the steps for longer than the load itself takes, so there the
default is one load between two steps. See engine.py for who calls it.
"""

from __future__ import annotations

import os
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from adapterhub_chat.errors import NoRoomError
from adapterhub_chat.inference.requests import Ticket
from adapterhub_chat.lora.slots import Lease
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.types import Mix

MAX_FETCHES = 4
"""Waiting requests whose adapters are loaded into slots before there is a row for them."""
MAX_PREFETCHES = 16
"""Waiting requests whose adapters are read from the disk while there is no slot for them."""
FEW_CORES = 4
"""Up to this number of cores adapters are loaded between two steps (docs/performance.md)."""


class AdapterFetcher:
    """Leases on adapters that are being loaded, by request; used by the thread that makes the steps."""

    def __init__(self, model: AdapterModel, load_in_thread: bool | None = None) -> None:
        """Load from the model's AdapterSource; `load_in_thread` None decides by the number of cores."""
        few_cores = model.backbone.device.type == "cpu" and (os.cpu_count() or 1) <= FEW_CORES
        self._model = model
        self._load_in_thread = not few_cores if load_in_thread is None else load_in_thread
        self._thread = ThreadPoolExecutor(1, "adapterhub-loader")
        self._leases: dict[Ticket, Future[Lease]] = {}
        self._prefetch: Future[None] | None = None
        self._prefetched: set[Ticket] = set()
        self._may_load_inline = True
        self._out_of_room = False
        """The last load found no slot; only a request that ends can change that."""
        self._fetched_while_idle: Ticket | None = None
        """The request whose load was the only work when it began: if it finds no slot, none ever will."""

    @property
    def pending(self) -> bool:
        """Whether leases were fetched, or are being fetched, that no row has taken."""
        return bool(self._leases)

    def begin_step(self, idle: bool) -> None:
        """Allow one load between steps; `idle` means that no request has a row."""
        self._may_load_inline = True
        if idle and not self.pending:
            self._out_of_room = False

    def slots_released(self) -> None:
        """Try loads again: a request has ended and released its slots."""
        self._out_of_room = False

    def take(self, ticket: Ticket, idle: bool) -> Lease | None:
        """Return a lease on the request's adapters; None while they are being loaded or wait for a slot.

        Raises NoRoomError when there are too few slots even while nothing runs, and what a load raised.
        """
        try:
            future = self._leases.get(ticket)
            if future is not None:
                if not future.done():
                    return None
                del self._leases[ticket]
                return future.result()
            if self.fetch(ticket, idle):
                return None
            self._note_idle(ticket, idle)
            return self._model.source.acquire(ticket.request.mix)
        except NoRoomError:
            self._out_of_room = True
            if ticket is self._fetched_while_idle:
                raise
            return None

    def fetch(self, ticket: Ticket, idle: bool = False) -> bool:
        """Begin to load the request's missing adapters; return whether any are missing."""
        mix = ticket.request.mix
        if self._model.has_loaded(mix):
            return False
        if ticket not in self._leases and len(self._leases) < MAX_FETCHES and not self._out_of_room:
            self._note_idle(ticket, idle)
            if self._load_in_thread:
                self._leases[ticket] = self._thread.submit(self._model.source.acquire, mix)
            elif self._may_load_inline:
                self._may_load_inline = False
                self._leases[ticket] = self._acquired(mix)
        if ticket not in self._leases:
            self.prefetch(ticket)
        return True

    def prefetch(self, ticket: Ticket) -> None:
        """Read the request's adapters from the disk in the thread, one request at a time."""
        busy = self._prefetch is not None and not self._prefetch.done()
        if not self._load_in_thread or busy or ticket in self._prefetched:
            return
        if len(self._prefetched) < MAX_PREFETCHES:
            self._prefetched.add(ticket)
            self._prefetch = self._thread.submit(self._model.source.prefetch, ticket.request.mix)

    def put_back(self, ticket: Ticket, lease: Lease) -> None:
        """Keep a lease for a request that cannot start yet."""
        future: Future[Lease] = Future()
        future.set_result(lease)
        self._leases[ticket] = future

    def forget(self, ticket: Ticket) -> None:
        """Drop all that is kept for a request that has left the queue; release its lease, if any."""
        self._prefetched.discard(ticket)
        future = self._leases.pop(ticket, None)
        if future is not None and not future.cancel():
            future.add_done_callback(self._release)

    def wait(self, seconds: float) -> None:
        """Wait until a load is done, at most so long."""
        wait(self._leases.values(), timeout=seconds, return_when=FIRST_COMPLETED)

    def _note_idle(self, ticket: Ticket, idle: bool) -> None:
        if idle and not self.pending:
            self._fetched_while_idle = ticket

    def _acquired(self, mix: Mix) -> Future[Lease]:
        """Return the outcome of a load that is made now."""
        future: Future[Lease] = Future()
        try:
            future.set_result(self._model.source.acquire(mix))
        except Exception as error:
            future.set_exception(error)
        return future

    def _release(self, future: Future[Lease]) -> None:
        if not future.cancelled() and future.exception() is None:
            self._model.slots.release(future.result())
