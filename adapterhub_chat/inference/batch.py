"""RunningBatch: the rows that are being decoded, their places in the KV cache, and the two kinds of step.

A row's place in the cache is its index. Rows that are past their prompts come first, so that a step of one
token each reads one block of the cache; the others follow in the order in which they came.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from adapterhub_chat.errors import AdapterError
from adapterhub_chat.inference.decoder import Decoder, StepInput
from adapterhub_chat.inference.detokenizer import Detokenizer
from adapterhub_chat.inference.kv_cache import PrefixCache, round_up
from adapterhub_chat.inference.requests import Completion, Request, Ticket
from adapterhub_chat.inference.sampling import (
    TokenLogprob,
    make_generator,
    sample_token,
    token_logprob,
)
from adapterhub_chat.lora.plan import Plan
from adapterhub_chat.lora.slots import Lease, plan_for
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.backbone import Backbone
from adapterhub_chat.types import Mix

CHUNK_STEP = 16
"""Widths of prompt chunks are multiples of this, so that few shapes occur."""


class RunningRow:
    """A request while it is being decoded."""

    def __init__(self, ticket: Ticket, lease: Lease, backbone: Backbone) -> None:
        """Begin with no computed tokens; `lease` holds the slots of the request's adapters."""
        self.ticket, self.lease, self.request = ticket, lease, ticket.request
        self.detokenizer = Detokenizer(
            backbone.tokenizer,
            self.request.sampling,
            backbone.end_ids,
            streaming=ticket.on_text is not None,
        )
        self.generator = make_generator(self.request.sampling)
        self.num_computed = 0
        """Tokens whose keys and values are in the cache."""
        self.prefill_length = len(self.request.prompt)
        """Tokens to compute before the next one is sampled: the prompt; after a restart, the text too."""
        self.num_reused = 0
        """Tokens of the prompt that came from the prefix cache."""
        self.logprobs: list[TokenLogprob] = []
        self.first_token_time = 0.0
        self.error: Exception | None = None
        self.is_corrupt = False
        """Whether its keys and values may hold NaN or infinity."""

    @property
    def length(self) -> int:
        """Number of tokens of prompt and text so far."""
        return len(self.request.prompt) + len(self.detokenizer.ids)

    @property
    def tokens(self) -> Sequence[int]:
        """Token ids of prompt and text so far."""
        return (*self.request.prompt, *self.detokenizer.ids)

    @property
    def num_prefill_left(self) -> int:
        """Tokens that are still to be computed before the next one is sampled."""
        return max(0, self.prefill_length - self.num_computed)

    def restart(self) -> None:
        """Compute all tokens so far anew, since nothing of them is in the cache any more."""
        self.num_computed, self.prefill_length = 0, self.length

    def append(self, token: int, logits: Tensor | None) -> None:
        """Add a token; pass on the text that can no longer change. `logits` (V,) give its log-probability."""
        sampling = self.request.sampling
        self.first_token_time = self.first_token_time or time.monotonic()
        num_tokens = len(self.detokenizer.ids)
        piece = self.detokenizer.append(token)
        added = len(self.detokenizer.ids) > num_tokens
        if sampling.logprobs is not None and logits is not None and added:
            self.logprobs.append(token_logprob(logits, token, sampling.logprobs))
        self.emit(piece)

    def emit(self, piece: str) -> None:
        """Call `on_text` with a piece of text; an exception in it ends this request alone."""
        try:
            if piece and self.ticket.on_text is not None:
                self.ticket.on_text(piece)
        except Exception as error:
            self.error = error
            self.detokenizer.finish("error")

    def fail_not_finite(self) -> None:
        """End with an error, because the logits are not finite."""
        self.is_corrupt = True
        self.error = AdapterError(
            f"{self.request.mix}: the logits are not finite after {self.num_computed} tokens; it cannot "
            "be used in this dtype, or with this weight"
        )
        self.detokenizer.finish("error")

    def completion(self) -> Completion:
        """Return the outcome, with times in seconds since the request was submitted."""
        now, start = time.monotonic(), self.ticket.submitted
        return Completion(
            self.detokenizer.text,
            tuple(self.detokenizer.ids),
            self.detokenizer.finish_reason,
            len(self.request.prompt),
            self.num_reused,
            tuple(self.logprobs),
            (self.first_token_time or now) - start,
            now - start,
        )


class RunningBatch:
    """All rows, in one KV cache."""

    def __init__(
        self,
        model: AdapterModel,
        decoder: Decoder,
        *,
        chunk: int,
        cache_bytes: int,
        prefixes: PrefixCache,
    ) -> None:
        """Begin without rows; see Engine for the limits."""
        self.model, self.decoder, self.prefixes = model, decoder, prefixes
        self.chunk = chunk if decoder.takes_chunks else decoder.max_length
        self.cache_bytes = cache_bytes
        self.cache = decoder.new_cache()
        self._token_bytes = self.cache.token_bytes
        self.rows: list[RunningRow] = []
        self._num_decoding = 0
        self._plan: tuple[list[Lease], Plan | None] = ([], None)
        """The plan of the last decoding step, and the leases that it was made for."""

    def step(self) -> None:
        """Feed a chunk of prompts, then one token of every row that is past its prompt."""
        if len(self.rows) > self._num_decoding:
            self._prefill()
        if self._num_decoding:
            self._decode()

    def clear(self) -> list[RunningRow]:
        """Remove and return all rows, and free the cache: after a failure its content is not valid."""
        rows, self.rows, self._num_decoding = self.rows, [], 0
        self._plan = ([], None)
        self.cache.clear()
        return rows

    def has_room(self, request: Request) -> bool:
        """Return whether the keys and values of one more row fit into the budget."""
        capacity = max(self._max_length_of(request), self.cache.capacity if self.rows else 0)
        num_rows = len(self.rows) + 1
        return not self.rows or num_rows * capacity * self._token_bytes <= self.cache_bytes

    def _max_length_of(self, request: Request) -> int:
        """Return the tokens to reserve for a request, rounded up."""
        length = len(request.prompt) + request.sampling.max_new_tokens
        return round_up(min(length, self.decoder.max_length) + CHUNK_STEP)

    def start(self, row: RunningRow) -> None:
        """Add a row behind all others; copy the beginning of its prompt from the prefix cache, if there."""
        index, length = len(self.rows), self._max_length_of(row.request)
        if not self.rows and self.cache.capacity > 2 * length:
            self.cache.clear()  # after a long row there would be room for few short ones
        self._reserve(index + 1, length)
        match = self.prefixes.find(row.lease.key, row.request.prompt)
        if match is not None and self.decoder.takes_chunks:
            prefix, num_shared = match
            row.num_computed = row.num_reused = min(num_shared, len(row.request.prompt) - 1)
            self.cache.write_prefix(index, prefix, row.num_computed)
        self.rows.append(row)

    def _reserve(self, num_rows: int, length: int) -> None:
        """Reserve rows of `length` tokens, twice as many as asked for where the budget allows it."""
        if num_rows > self.cache.num_rows or length > self.cache.capacity:
            row_bytes = max(round_up(length), self.cache.capacity) * self._token_bytes
            num_rows = max(num_rows, min(2 * num_rows, self.cache_bytes // row_bytes))
            self.cache.reserve(num_rows, length)

    def _prefill(self) -> None:
        """Feed a chunk of the first new prompts; rows whose prompt is complete take their first token."""
        self._group_new_rows_by_mix()
        rows = self.rows[self._num_decoding :]
        width = _chunk_width(min(self.chunk, rows[0].num_prefill_left))
        num_rows = 1
        while num_rows < len(rows):
            wider = max(width, _chunk_width(min(self.chunk, rows[num_rows].num_prefill_left)))
            if wider * (num_rows + 1) > self.chunk:
                break
            width, num_rows = wider, num_rows + 1
        rows = rows[:num_rows]
        lengths = [min(row.num_prefill_left, width) for row in rows]
        chunks = [row.tokens[row.num_computed :][:n] for row, n in zip(rows, lengths, strict=True)]
        ids = [[*chunk, *[0] * (width - len(chunk))] for chunk in chunks]
        starts = [row.num_computed for row in rows]
        self._reserve(len(self.rows), max(starts) + width)
        plan = plan_for([row.lease for row in rows])
        inputs = StepInput(self._num_decoding, self._tensor(ids), starts, lengths)
        logits = self.decoder.forward(self.cache, inputs, plan)
        complete = []
        for n, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            row.num_computed += length
            if not row.num_prefill_left:
                complete.append(n)
        self._sample(rows, logits, complete)

    def _group_new_rows_by_mix(self) -> None:
        """Sort the rows without computed tokens so that rows of one mix are neighbours.

        The mix of the row that has waited longest comes first, so that no row waits for ever.
        """
        indices = [
            n for n in range(self._num_decoding, len(self.rows)) if not self.rows[n].num_computed
        ]
        rows = [self.rows[n] for n in indices]
        oldest: dict[Mix, float] = {}
        for row in rows:
            submitted = row.ticket.submitted
            oldest[row.request.mix] = min(submitted, oldest.get(row.request.mix, submitted))
        rows.sort(
            key=lambda row: (oldest[row.request.mix], str(row.request.mix), row.ticket.submitted)
        )
        for n, row in zip(indices, rows, strict=True):
            self.rows[n] = row

    def _decode(self) -> None:
        """Feed the last token of every row that is past its prompt, and sample the next."""
        rows = self.rows[: self._num_decoding]
        leases = [row.lease for row in rows]
        if self._plan[0] != leases:
            self._plan = leases, plan_for(leases)
        ids, starts = [[row.detokenizer.ids[-1]] for row in rows], [row.length - 1 for row in rows]
        inputs = StepInput(0, self._tensor(ids), starts, [1] * len(rows))
        logits = self.decoder.forward(self.cache, inputs, self._plan[1])
        for row in rows:
            row.num_computed = row.length
        self._sample(rows, logits, range(len(rows)))

    def _tensor(self, ids: list[list[int]]) -> Tensor:
        return torch.tensor(ids, device=self.model.backbone.device)

    def _sample(self, rows: Sequence[RunningRow], logits: Tensor, complete: Iterable[int]) -> None:
        """Append the next token to the rows at the indices `complete`; `logits` (N, V) are those of all rows.

        A row whose logits are not finite ends with an error, alone.
        """
        max_logits, argmax = logits.max(-1)  # a NaN counts as the largest
        finite, likeliest = max_logits.isfinite().tolist(), argmax.tolist()
        for row in (row for row, fine in zip(rows, finite, strict=True) if not fine):
            row.fail_not_finite()
        for n in (n for n in complete if finite[n]):
            row, sampling = rows[n], rows[n].request.sampling
            if sampling.is_argmax:
                row.append(likeliest[n], None)
            else:
                token = sample_token(logits[n], sampling, row.tokens, row.generator)
                row.append(token, logits[n])
            if not row.detokenizer.finish_reason and row.length >= self.decoder.max_length:
                row.emit(row.detokenizer.finish("length"))

    def retire(self) -> list[RunningRow]:
        """Remove and return the rows that have ended; rows past their prompts come first again."""
        ended = [row for row in self.rows if row.detokenizer.finish_reason]
        for row in ended:
            if row.is_corrupt:
                self.cache.zero_row(self.rows.index(row))
            else:
                self._cache_prefix(row)
        if ended:
            self._plan = ([], None)  # it would keep the slots of the ended rows alive
        going = [row for row in self.rows if not row.detokenizer.finish_reason]
        for row in going:
            if row.length == self.decoder.recompute_length and not row.num_prefill_left:
                row.restart()
        decoding = [row for row in going if not row.num_prefill_left]
        new = [row for row in going if row.num_prefill_left]
        if [*decoding, *new] != self.rows[: len(going)]:
            self._rearrange(decoding, new)
        self.rows, self._num_decoding = self.rows[: len(going)], len(decoding)
        return ended

    def _rearrange(self, decoding: list[RunningRow], new: list[RunningRow]) -> None:
        """Move as few rows as possible so that `decoding` come first and `new` behind them."""
        target: list[RunningRow | None] = [None] * (len(decoding) + len(new))
        moves = []
        for begin, group in ((0, decoding), (len(decoding), new)):
            region = range(begin, begin + len(group))
            for row in group:
                index = self.rows.index(row)
                if index in region:
                    target[index] = row
                else:
                    prefix = self.cache.read_prefix(index, row.tokens[: row.num_computed])
                    moves.append((region, row, prefix))
        for region, row, prefix in moves:
            index = next(i for i in region if target[i] is None)
            target[index] = row
            self.cache.write_prefix(index, prefix, row.num_computed)
        self.rows = [row for row in target if row is not None]

    def _cache_prefix(self, row: RunningRow) -> None:
        """Keep an ended row's keys and values for requests that begin alike."""
        size = row.num_computed * self._token_bytes
        if self.decoder.takes_chunks and self.prefixes.accepts(size, row.num_computed):
            index = self.rows.index(row)
            prefix = self.cache.read_prefix(index, row.tokens[: row.num_computed])
            self.prefixes.insert(row.lease.key, prefix)


def _chunk_width(length: int) -> int:
    return -(-length // CHUNK_STEP) * CHUNK_STEP if length > 1 else 1
