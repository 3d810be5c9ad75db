"""Engine: the running batch. Requests join and leave between steps; each has its own mix, rules and end.

A step feeds a chunk of new prompts and then one token of every row that is past its prompt. Whoever waits for
a result drives the engine, so that no thread runs when nobody waits; a server lets one thread `serve`.
Adapters that are not loaded yet are fetched by another thread while the others go on; on a CPU of few cores,
between two steps.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from adapterhub_chat.assets.fetch import cache_dir
from adapterhub_chat.errors import NoRoomError, QueueFullError, UsageError
from adapterhub_chat.inference.batch import RunningBatch, RunningRow
from adapterhub_chat.inference.fused_decoder import make_decoder
from adapterhub_chat.inference.graph_decoder import GraphDecoder
from adapterhub_chat.inference.kv_cache import PrefixCache
from adapterhub_chat.inference.requests import Completion, Request, Ticket
from adapterhub_chat.lora.slots import Lease
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.types import Mix

STAGED_SLOTS = 4
"""Waiting requests whose adapters are fetched before there is a row for them."""
PREFETCH_ROWS = 16
"""Waiting requests whose adapters are read from the disk, while there is no slot for them yet."""
FEW_CORES = 4
"""Cores up to which a fetch beside a step costs more than one between two steps (docs/performance.md)."""
PAUSE = 0.05
"""Seconds after which a thread that waits looks again."""


class Engine:
    """See the module. All methods may be called from several threads; one thread at a time makes steps."""

    def __init__(
        self,
        model: AdapterModel,
        *,
        rows: int = 32,
        queue: int = 4096,
        chunk: int = 512,
        cache_bytes: int = 2 * 2**30,
        prefix_bytes: int = 64 * 2**20,
        beside: bool | None = None,
        graphs: bool = False,
        folder: Path | None = None,
    ) -> None:
        """Decode at most `rows` requests together and let at most `queue` wait.

        `chunk` bounds the prompt tokens of a step, `cache_bytes` the keys and values (one request may
        always run), `prefix_bytes` those of finished requests that are kept for others. `beside`: adapters
        are fetched by another thread; else between two steps, one at a time, which is the default on a CPU
        of few cores: there whoever computes beside a step stops it for longer than the fetch takes.
        `graphs`: steps of one token a row are recorded (graph_decoder.py).
        """
        self.model = model
        self.max_rows, self.max_queue = rows, queue
        few = model.backbone.device.type == "cpu" and (os.cpu_count() or 1) <= FEW_CORES
        self._beside = not few if beside is None else beside
        self._may_fetch = True  # between these two steps
        self.decoder = make_decoder(model, folder or cache_dir() / "native")
        if graphs:
            self.decoder = GraphDecoder(model, self.decoder)
        self._batch = RunningBatch(
            model,
            self.decoder,
            chunk=chunk,
            cache_bytes=cache_bytes,
            prefixes=PrefixCache(prefix_bytes),
        )
        self._waiting: deque[Ticket] = deque()
        self._fetched: dict[Ticket, Future[Lease]] = {}
        self._nearing: Future[None] | None = None
        self._near: set[Ticket] = set()  # whose adapters were read ahead
        self._alone: Ticket | None = None  # whose adapters were fetched last while nothing ran
        self._no_room = False  # the last fetch found none; only an ending request changes that
        self._loader = ThreadPoolExecutor(1, "adapterhub-loader")
        self._turn = threading.Lock()
        self._changed = threading.Condition()

    # -- asking ------------------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """How many requests have a row."""
        return len(self._batch.rows)

    @property
    def waiting(self) -> int:
        """How many requests wait for a row."""
        return len(self._waiting)

    def submit(
        self,
        request: Request,
        on_text: Callable[[str], None] | None = None,
        *,
        patient: bool = False,
    ) -> Ticket:
        """Queue a request; `on_text` hears of each piece of text as it comes, in the driving thread.

        Raises UsageError for a prompt that is empty or longer than the backbone's positions, and
        QueueFullError when too many wait already; when `patient`, it drives the engine until there is room.
        """
        self.check([request])
        ticket = Ticket(request, self, on_text)
        while not self._queue(ticket):
            if not patient:
                raise QueueFullError(
                    f"{len(self._waiting)} requests wait already, as many as allowed; try again later"
                )
            self.drive(lambda: len(self._waiting) < self.max_queue)
        return ticket

    def _queue(self, ticket: Ticket) -> bool:
        """Let a request wait, where there is room for one more."""
        with self._changed:
            if len(self._waiting) >= self.max_queue:
                return False
            self._waiting.append(ticket)
            self._changed.notify_all()
            return True

    def drive(self, until: Callable[[], bool]) -> None:
        """Make steps, or wait while another thread makes them, until `until()` holds."""
        while not until():
            if self._turn.acquire(blocking=False):
                try:
                    while not until():
                        self.step()
                finally:
                    self._turn.release()
                    with self._changed:
                        self._changed.notify_all()
            else:
                with self._changed:
                    self._changed.wait(PAUSE)

    def serve(self, stopping: threading.Event) -> None:
        """Make steps as long as there are requests, and sleep while there are none, until `stopping`."""
        while not stopping.is_set():
            self.drive(lambda: stopping.is_set() or not (self._batch.rows or self._waiting))
            with self._changed:
                if not (self._waiting or stopping.is_set()):
                    self._changed.wait(PAUSE)

    def check(self, requests: Sequence[Request]) -> None:
        """Raise one UsageError for all prompts that cannot be answered."""
        limit, name = self.decoder.limit, self.model.backbone.name
        found = []
        for n, request in enumerate(requests):
            length = len(request.prompt)
            if not length:
                found.append(f"prompt {n} is empty: give at least one token of text")
            elif length >= limit:
                found.append(
                    f"prompt {n} has {length} tokens; {name} takes at most {limit - 1} and one for the "
                    "answer: shorten it"
                )
        if found:
            raise UsageError("; ".join(found))

    # -- a step ------------------------------------------------------------------------------------

    def step(self) -> None:
        """Admit what can run, feed a chunk of prompts, and one token of every row past its prompt.

        When a step fails, the running requests end with the error; those that wait are not touched.
        """
        try:
            self._advance()
        except Exception as error:
            self._abort(error)
        except BaseException as error:  # Ctrl-C, in whichever thread makes the steps
            self._abort(error)
            raise

    def _advance(self) -> None:
        self._end_the_unwanted()
        self._may_fetch = True
        self._admit()
        self._batch.step()
        self._retire()
        if not self._batch.rows and self._fetched:  # nothing to do but to wait for an adapter
            wait(self._fetched.values(), timeout=PAUSE, return_when=FIRST_COMPLETED)

    def _end_the_unwanted(self) -> None:
        for ticket in [
            t for t in list(self._waiting) if t.end_reason
        ]:  # others may submit meanwhile
            self._drop(ticket)
            nothing = Completion("", (), ticket.end_reason, len(ticket.request.prompt), 0)
            self._finish(ticket, nothing)
        for row in self._batch.rows:
            if row.ticket.end_reason:
                row.tell(row.writing.close(row.ticket.end_reason))
        self._retire()

    def _retire(self) -> None:
        for row in self._batch.retire():
            self._no_room = False
            self.model.slots.release(row.held)
            self._finish(row.ticket, row.completion(), row.error)

    def _admit(self) -> None:
        """Give rows to waiting requests whose adapters are there; have the next ones' fetched."""
        self._no_room = self._no_room and bool(self._batch.rows or self._fetched)
        for ahead, ticket in enumerate(list(self._waiting)):
            if len(self._batch.rows) >= self.max_rows:
                if ahead >= PREFETCH_ROWS:
                    return
                if ahead >= STAGED_SLOTS:
                    self._bring_near(ticket)
                else:
                    self._fetch(ticket)
            elif not self._start(ticket):
                return

    def _start(self, ticket: Ticket) -> bool:
        """Give a request a row, if its adapters are there; return whether others may be looked at."""
        try:
            held = self._held(ticket)
        except NoRoomError as error:
            self._no_room = True
            if ticket is self._alone:  # nobody was there who could have made room
                self._drop(ticket)
                self._finish(ticket, error=error)
            return True
        except Exception as error:
            self._drop(ticket)
            self._finish(ticket, error=error)
            return True
        if held is None:
            return True
        if not self._batch.has_room(ticket.request):
            self._return(ticket, held)
            return False
        self._waiting.remove(ticket)
        self._near.discard(ticket)
        try:
            self._batch.start(RunningRow(ticket, held, self.model.backbone.tokenizer))
        except BaseException as error:  # no memory for its keys and values, or Ctrl-C
            self.model.slots.release(held)
            self._finish(ticket, error=error)
            if not isinstance(error, Exception):
                raise
        return True

    def _held(self, ticket: Ticket) -> Lease | None:
        """Return the request's adapters, held; None while they are being fetched."""
        future = self._fetched.get(ticket)
        if future is not None:
            if not future.done():
                return None
            del self._fetched[ticket]
            return future.result()
        if self._fetch(ticket):
            return None
        if not (self._batch.rows or self._fetched):
            self._alone = ticket
        return self.model.source.acquire(ticket.request.mix)

    def _fetch(self, ticket: Ticket) -> bool:
        """Have a request's adapters fetched, if some are not there; return whether some are not."""
        mix = ticket.request.mix
        if self.model.holds(mix):
            return False
        if ticket not in self._fetched and len(self._fetched) < STAGED_SLOTS and not self._no_room:
            if not (self._batch.rows or self._fetched):
                self._alone = ticket
            if self._beside:
                self._fetched[ticket] = self._loader.submit(self.model.source.acquire, mix)
            elif self._may_fetch:
                self._may_fetch = False
                self._fetched[ticket] = _called(self.model.source.acquire, mix)
        if ticket not in self._fetched:
            self._bring_near(ticket)
        return True

    def _bring_near(self, ticket: Ticket) -> None:
        """Have a request's adapters read from the disk, one request's at a time, behind what is fetched."""
        busy = self._nearing is not None and not self._nearing.done()
        if (
            self._beside
            and not busy
            and ticket not in self._near
            and len(self._near) < PREFETCH_ROWS
        ):
            self._near.add(ticket)
            self._nearing = self._loader.submit(self.model.source.prefetch, ticket.request.mix)

    def _return(self, ticket: Ticket, held: Lease) -> None:
        """Keep what was fetched for a request that has to wait."""
        kept: Future[Lease] = Future()
        kept.set_result(held)
        self._fetched[ticket] = kept

    def _abort(self, error: BaseException) -> None:
        """End all running requests with an error; what the cache holds is not trusted any more."""
        for row in self._batch.abandon():
            if not row.ticket.done:
                self.model.slots.release(row.held)
                self._finish(row.ticket, error=error)

    # -- ends --------------------------------------------------------------------------------------

    def _drop(self, ticket: Ticket) -> None:
        """Take a request out of the queue; what was fetched for it is let go."""
        self._waiting.remove(ticket)
        future = self._fetched.pop(ticket, None)
        if future is not None and not future.cancel():
            future.add_done_callback(self._let_go)

    def _let_go(self, future: Future[Lease]) -> None:
        if not future.cancelled() and future.exception() is None:
            self.model.slots.release(future.result())

    def _finish(
        self,
        ticket: Ticket,
        completion: Completion | None = None,
        error: BaseException | None = None,
    ) -> None:
        self._near.discard(ticket)
        ticket.completion, ticket.error = None if error else completion, error
        with self._changed:
            self._changed.notify_all()


def _called(acquire: Callable[[Mix], Lease], mix: Mix) -> Future[Lease]:
    """Return the outcome of a call, made now."""
    future: Future[Lease] = Future()
    try:
        future.set_result(acquire(mix))
    except Exception as error:
        future.set_exception(error)
    return future
