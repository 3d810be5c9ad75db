"""Engine: continuous batching; requests join and leave between steps, each with its own mix and sampling.

A step feeds a chunk of new prompts and then one token of every row that is past its prompt. The thread that
waits for a result makes the steps, so that no thread runs when nobody waits; a server lets one thread
`serve`. Missing adapters are loaded while other requests are decoded (fetching.py).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from adapterhub_chat.errors import QueueFullError, UsageError
from adapterhub_chat.inference.batch import RunningBatch, RunningRow
from adapterhub_chat.inference.decoder import Decoder
from adapterhub_chat.inference.fetching import MAX_FETCHES, MAX_PREFETCHES, AdapterFetcher
from adapterhub_chat.inference.fused_decoder import make_decoder
from adapterhub_chat.inference.graph_decoder import GraphDecoder
from adapterhub_chat.inference.kv_cache import PrefixCache
from adapterhub_chat.inference.requests import Completion, Request, Ticket
from adapterhub_chat.model.adapter_model import AdapterModel

POLL_SECONDS = 0.05
"""Seconds after which a waiting thread looks again."""


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
        load_in_thread: bool | None = None,
        graphs: bool = False,
        decoder: Decoder | None = None,
    ) -> None:
        """Decode at most `rows` requests together and let at most `queue` wait.

        `chunk` bounds the prompt tokens of a step, `cache_bytes` the keys and values (one request may
        always run), `prefix_bytes` those of finished requests that are kept for others. `load_in_thread`:
        adapters are loaded by a thread, else between two steps, which is the default on a CPU of few cores.
        `decoder`: by default the fastest one for the backbone. `graphs`: its steps of one token a row are
        recorded (graph_decoder.py); raises UsageError where that cannot be.
        """
        self.model = model
        self.max_rows, self.max_queue = rows, queue
        decoder = decoder or make_decoder(model)
        self._batch = RunningBatch(
            model,
            GraphDecoder(model, decoder) if graphs else decoder,
            chunk=chunk,
            cache_bytes=cache_bytes,
            prefixes=PrefixCache(prefix_bytes),
        )
        self._waiting: deque[Ticket] = deque()
        self._suspects: deque[RunningRow] = deque()
        """Rows of a failed step, which start anew one after another."""
        self._readmitted: RunningRow | None = None
        """The last of them that did."""
        self._fetcher = AdapterFetcher(model, load_in_thread)
        self._step_lock = threading.Lock()
        self._changed = threading.Condition()

    # -- requests ----------------------------------------------------------------------------------

    @property
    def decoder(self) -> Decoder:
        """What computes the logits of every step."""
        return self._batch.decoder

    @property
    def running(self) -> int:
        """Number of requests that have a row."""
        return len(self._batch.rows) + len(self._suspects)

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a row."""
        return len(self._waiting)

    @property
    def cache_nbytes(self) -> int:
        """Bytes of the keys and values of running requests, as allocated."""
        return self._batch.cache.nbytes

    def submit(
        self,
        request: Request,
        on_text: Callable[[str], None] | None = None,
        *,
        block: bool = False,
    ) -> Ticket:
        """Queue a request; `on_text` is called with each new piece of text, in the thread that makes steps.

        Raises UsageError for a prompt that is empty or longer than the backbone's positions, and
        QueueFullError when the queue is full; with `block`, it makes steps until there is room.
        """
        self.check([request])
        ticket = Ticket(request, self, on_text)
        while not self._enqueue(ticket):
            if not block:
                raise QueueFullError(
                    f"{len(self._waiting)} requests wait already, as many as allowed; try again later"
                )
            self.drive(lambda: len(self._waiting) < self.max_queue)
        return ticket

    def _enqueue(self, ticket: Ticket) -> bool:
        """Append a request to the queue; return False if it is full."""
        with self._changed:
            if len(self._waiting) >= self.max_queue:
                return False
            self._waiting.append(ticket)
            self._changed.notify_all()
            return True

    def drive(self, until: Callable[[], bool]) -> None:
        """Make steps, or wait while another thread makes them, until `until()` holds."""
        while not until():
            if self._step_lock.acquire(blocking=False):
                try:
                    while not until():
                        self.step()
                finally:
                    self._step_lock.release()
                    with self._changed:
                        self._changed.notify_all()
            else:
                with self._changed:
                    self._changed.wait(POLL_SECONDS)

    def serve(self, stopping: threading.Event) -> None:
        """Make steps as long as there are requests, and sleep while there are none, until `stopping`."""
        while not stopping.is_set():
            self.drive(lambda: stopping.is_set() or not (self._batch.rows or self._waiting))
            with self._changed:
                if not (self._waiting or stopping.is_set()):
                    self._changed.wait(POLL_SECONDS)

    def check(self, requests: Sequence[Request]) -> None:
        """Raise one UsageError that names all prompts that are empty or too long."""
        max_length, name = self.decoder.max_length, self.model.backbone.name
        num_ids = len(self.model.backbone.model.get_input_embeddings().weight)
        problems = []
        for n, request in enumerate(requests):
            length = len(request.prompt)
            if not length:
                problems.append(f"prompt {n} is empty: give at least one token of text")
            elif length >= max_length:
                problems.append(
                    f"prompt {n} has {length} tokens; {name} takes at most {max_length - 1} and one for the "
                    "answer: shorten it"
                )
            elif not 0 <= min(request.prompt) <= max(request.prompt) < num_ids:
                problems.append(
                    f"prompt {n} holds a token id out of range: {name} knows 0 to {num_ids - 1}"
                )
        if problems:
            raise UsageError("; ".join(problems))

    # -- steps -------------------------------------------------------------------------------------

    def step(self) -> None:
        """Start waiting requests, feed a chunk of prompts, and one token of every row past its prompt.

        When a step fails, the request that makes it fail ends with the error; the others go on.
        """
        try:
            self._advance()
        except Exception as error:
            self._isolate(error)
        except BaseException as error:  # Ctrl-C, in whichever thread makes the steps
            self._abort(error)
            raise

    def _advance(self) -> None:
        self._end_cancelled()
        if self._suspects:
            self._readmit()
        else:
            self._admit()
        self._batch.step()
        if self._readmitted and not (self._suspects or self._readmitted.num_prefill_left):
            self._readmitted = None
        self._retire()
        if (
            not self._batch.rows and self._fetcher.pending
        ):  # nothing to do until an adapter is there
            self._fetcher.wait(POLL_SECONDS)

    def _end_cancelled(self) -> None:
        """End the requests that are cancelled or past their deadline."""
        waiting = list(self._waiting)  # a copy: other threads may submit meanwhile
        for ticket in [t for t in waiting if t.end_reason]:
            self._dequeue(ticket)
            empty = Completion("", (), ticket.end_reason, len(ticket.request.prompt), 0)
            self._finish(ticket, empty)
        for row in [row for row in self._suspects if row.ticket.end_reason]:
            self._suspects.remove(row)
            row.emit(row.detokenizer.finish(row.ticket.end_reason))
            self._complete(row)
        for row in self._batch.rows:
            if row.ticket.end_reason:
                row.emit(row.detokenizer.finish(row.ticket.end_reason))
        self._retire()

    def _retire(self) -> None:
        """Report the rows that have ended, and release their slots."""
        for row in self._batch.retire():
            self._complete(row)

    def _complete(self, row: RunningRow) -> None:
        """Report a row that has ended, and release its slots."""
        self._fetcher.slots_released()
        self.model.slots.release(row.lease)
        self._finish(row.ticket, row.completion(), row.error)

    def _admit(self) -> None:
        """Start waiting requests whose adapters are loaded; load those of the next ones."""
        self._fetcher.begin_step(idle=not self._batch.rows)
        for place, ticket in enumerate(list(self._waiting)):
            if len(self._batch.rows) >= self.max_rows:
                if place >= MAX_PREFETCHES:
                    return
                if place >= MAX_FETCHES:
                    self._fetcher.prefetch(ticket)
                else:
                    self._fetcher.fetch(ticket)
            elif not self._start(ticket):
                return

    def _start(self, ticket: Ticket) -> bool:
        """Give a request a row, if its adapters are loaded; return False if the cache is full."""
        try:
            lease = self._fetcher.take(ticket, idle=not self._batch.rows)
        except Exception as error:
            self._dequeue(ticket)
            self._finish(ticket, error=error)
            return True
        if lease is None:
            return True
        if not self._batch.has_room(ticket.request):
            self._fetcher.put_back(ticket, lease)
            return False
        self._dequeue(ticket)
        try:
            self._batch.start(RunningRow(ticket, lease, self.model.backbone))
        except BaseException as error:  # no memory for its keys and values, or Ctrl-C
            self.model.slots.release(lease)
            self._finish(ticket, error=error)
            if not isinstance(error, Exception):
                raise
        return True

    def _isolate(self, error: Exception) -> None:
        """End the request that makes steps fail; the others start anew, one after another.

        A row that runs alone is the one; among several, it is the first with which a step fails again.
        """
        rows = self._batch.clear()
        guilty = self._readmitted if self._readmitted in rows else None
        if guilty is None and len(rows) == 1:
            guilty = rows[0]
        self._readmitted = None
        for row in rows:
            if row is guilty:
                self._fail(row, error)
            elif row.detokenizer.finish_reason:
                self._complete(row)
            else:
                row.restart()
                self._suspects.append(row)

    def _readmit(self) -> None:
        """Start the next of the rows that were in a failed step, once those before it have made a step."""
        if not any(row.num_prefill_left for row in self._batch.rows):
            self._readmitted = self._suspects.popleft()
            self._batch.start(self._readmitted)

    def _abort(self, error: BaseException) -> None:
        """End all running requests with an error; the KV cache is cleared."""
        rows = [*self._batch.clear(), *self._suspects]
        self._suspects.clear()
        for row in rows:
            self._fail(row, error)

    def _fail(self, row: RunningRow, error: BaseException) -> None:
        """End a running request with an error."""
        if not row.ticket.done:
            self.model.slots.release(row.lease)
            self._finish(row.ticket, error=error)

    def _dequeue(self, ticket: Ticket) -> None:
        """Take a request out of the queue."""
        self._waiting.remove(ticket)
        self._fetcher.forget(ticket)

    def _finish(
        self,
        ticket: Ticket,
        completion: Completion | None = None,
        error: BaseException | None = None,
    ) -> None:
        """Set a request's outcome and wake the threads that wait for it."""
        ticket.completion, ticket.error = None if error else completion, error
        with self._changed:
            self._changed.notify_all()
