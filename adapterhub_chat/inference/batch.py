"""Running: the rows that are being decoded, their places in the cache, and the two kinds of step.

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
from adapterhub_chat.inference.kv_cache import KeyValues, PrefixCache, round_up
from adapterhub_chat.inference.requests import Completion, Request, Ticket
from adapterhub_chat.inference.sampling import TokenLogprob, generator_of, logprob_of, pick
from adapterhub_chat.lora.plan import Plan
from adapterhub_chat.lora.slots import Lease, plan_for
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.types import Mix

CHUNK_STEP = 16
"""Prompts are fed in chunks of a multiple of this: few shapes."""


class RunningRow:
    """A request while it is being decoded."""

    def __init__(self, ticket: Ticket, held: Lease, tokenizer: object) -> None:
        """Start with nothing fed."""
        self.ticket, self.held, self.request = ticket, held, ticket.request
        self.writing = Detokenizer(tokenizer, self.request.sampling, silent=ticket.on_text is None)
        self.generator = generator_of(self.request.sampling)
        self.num_computed = self.reused = 0  # tokens that are in the cache
        self.logprobs: list[TokenLogprob] = []
        self.first_token = 0.0
        self.error: Exception | None = None
        self.unsound = False
        """What it has left in the cache are not all numbers."""

    @property
    def length(self) -> int:
        """Tokens of prompt and text so far."""
        return len(self.request.prompt) + len(self.writing.ids)

    @property
    def tokens(self) -> Sequence[int]:
        """Prompt and text so far."""
        return (*self.request.prompt, *self.writing.ids)

    @property
    def left(self) -> int:
        """Tokens of the prompt that are still to be fed."""
        return max(0, len(self.request.prompt) - self.num_computed)

    def take(self, token: int, logits: Tensor | None) -> None:
        """Accept a token; tell the listener what became certain."""
        rules = self.request.sampling
        self.first_token = self.first_token or time.monotonic()
        count = len(self.writing.ids)
        piece = self.writing.take(token)
        if rules.logprobs is not None and logits is not None and len(self.writing.ids) > count:
            self.logprobs.append(logprob_of(logits, token, rules.logprobs))
        self.tell(piece)

    def tell(self, piece: str) -> None:
        """Pass a piece of text on; a listener that fails ends its own request alone."""
        try:
            if piece and self.ticket.on_text is not None:
                self.ticket.on_text(piece)
        except Exception as error:
            self.error = error
            self.writing.close("error")

    def break_off(self) -> None:
        """End with an error: what was computed for this row is no answer."""
        self.unsound = True
        self.error = AdapterError(
            f"{self.request.mix}: the logits are not finite after {self.num_computed} tokens; it cannot "
            "be used in this dtype, or with this weight"
        )
        self.writing.close("error")

    def completion(self) -> Completion:
        """Return what came of it."""
        now, start = time.monotonic(), self.ticket.submitted
        return Completion(
            self.writing.text,
            tuple(self.writing.ids),
            self.writing.ended,
            len(self.request.prompt),
            self.reused,
            tuple(self.logprobs),
            (self.first_token or now) - start,
            now - start,
        )


class RunningBatch:
    """All rows, in one cache."""

    def __init__(
        self,
        model: AdapterModel,
        decoder: Decoder,
        *,
        chunk: int,
        cache_bytes: int,
        prefixes: PrefixCache,
    ) -> None:
        """Start with none; see Engine for the limits."""
        self.model, self.decoder, self.prefixes = model, decoder, prefixes
        self.chunk, self.cache_bytes = chunk, cache_bytes
        backbone = model.backbone
        self.cache = KeyValues(decoder.heads, backbone.dtype, backbone.device)
        itemsize = torch.empty(0, dtype=backbone.dtype).element_size()
        self._token_bytes = sum(2 * k * d for k, d in decoder.heads) * itemsize
        self.rows: list[RunningRow] = []
        self._decoding = 0
        self._plan: tuple[list[Lease], Plan | None] = ([], None)

    def step(self) -> None:
        """Feed a chunk of prompts, then one token of every row that is past its prompt."""
        if len(self.rows) > self._decoding:
            self._feed_prompts()
        if self._decoding:
            self._decode()

    def abandon(self) -> list[RunningRow]:
        """Return all rows and forget them: after a failure the cache is not trusted any more."""
        rows, self.rows, self._decoding = self.rows, [], 0
        self._plan = ([], None)
        self.cache.clear()
        return rows

    def has_room(self, request: Request) -> bool:
        """Return whether the keys and values of one more row fit into the budget."""
        length = max(self._length_of(request), self.cache.length if self.rows else 0)
        return (
            not self.rows or (len(self.rows) + 1) * length * self._token_bytes <= self.cache_bytes
        )

    def _length_of(self, request: Request) -> int:
        whole = len(request.prompt) + request.sampling.max_new_tokens
        return round_up(min(whole, self.decoder.limit) + CHUNK_STEP)

    def start(self, row: RunningRow) -> None:
        """Give a row a place behind all others, with what is known of its beginning already."""
        place, length = len(self.rows), self._length_of(row.request)
        if not self.rows and self.cache.length > 2 * length:
            self.cache.clear()  # after a long row there would be room for few short ones
        self._reserve(place + 1, length)
        found = self.prefixes.find(row.held.key, row.request.prompt)
        if found is not None:
            prefix, shared = found
            row.num_computed = row.reused = min(shared, len(row.request.prompt) - 1)
            self.cache.put(place, prefix, row.num_computed)
        self.rows.append(row)

    def _reserve(self, rows: int, length: int) -> None:
        """Have room for so many rows of so many tokens, and for twice the rows where the budget allows."""
        if rows > self.cache.rows or length > self.cache.length:
            row_bytes = max(round_up(length), self.cache.length) * self._token_bytes
            rows = max(rows, min(2 * rows, self.cache_bytes // row_bytes))
            self.cache.reserve(rows, length)

    def _feed_prompts(self) -> None:
        """Feed a chunk of the first new prompts; rows that are through take their first token."""
        self._sort_fresh()
        new = self.rows[self._decoding :]
        width = _step_up(min(self.chunk, new[0].left))
        count = 1
        while count < len(new):
            wider = max(width, _step_up(min(self.chunk, new[count].left)))
            if wider * (count + 1) > self.chunk:
                break
            width, count = wider, count + 1
        new = new[:count]
        lengths = [min(row.left, width) for row in new]
        chunks = [
            row.request.prompt[row.num_computed :][:n] for row, n in zip(new, lengths, strict=True)
        ]
        ids = [[*chunk, *[0] * (width - len(chunk))] for chunk in chunks]
        starts = [row.num_computed for row in new]
        self._reserve(len(self.rows), max(starts) + width)
        plan = plan_for([row.held for row in new])
        feed = StepInput(self._decoding, self._tensor(ids), starts, lengths)
        logits = self.decoder.forward(self.cache, feed, plan)
        through = []
        for n, (row, length) in enumerate(zip(new, lengths, strict=True)):
            row.num_computed += length
            if not row.left:
                through.append(n)
        self._choose(new, logits, through)

    def _sort_fresh(self) -> None:
        """Let rows of one mix lie side by side where nothing of them is in the cache yet.

        The mix of the row that has waited longest comes first, so that none waits for ever.
        """
        places = [n for n in range(self._decoding, len(self.rows)) if not self.rows[n].num_computed]
        fresh = [self.rows[n] for n in places]
        oldest: dict[Mix, float] = {}
        for row in fresh:
            since = row.ticket.submitted
            oldest[row.request.mix] = min(since, oldest.get(row.request.mix, since))
        fresh.sort(
            key=lambda row: (oldest[row.request.mix], str(row.request.mix), row.ticket.submitted)
        )
        for n, row in zip(places, fresh, strict=True):
            self.rows[n] = row

    def _decode(self) -> None:
        """Feed the last token of every row that is past its prompt, and choose the next."""
        rows = self.rows[: self._decoding]
        held = [row.held for row in rows]
        if self._plan[0] != held:
            self._plan = held, plan_for(held)
        ids, starts = [[row.writing.ids[-1]] for row in rows], [row.length - 1 for row in rows]
        feed = StepInput(0, self._tensor(ids), starts, [1] * len(rows))
        logits = self.decoder.forward(self.cache, feed, self._plan[1])
        for row in rows:
            row.num_computed = row.length
        self._choose(rows, logits, range(len(rows)))

    def _tensor(self, ids: list[list[int]]) -> Tensor:
        return torch.tensor(ids, device=self.model.backbone.device)

    def _choose(self, rows: Sequence[RunningRow], logits: Tensor, through: Iterable[int]) -> None:
        """Let the rows at the places `through` take their next token from (N, V) logits of all rows.

        A row whose numbers went out of bounds ends with an error, alone.
        """
        highest, first = logits.max(-1)  # a NaN is the highest of all
        sound, likeliest = highest.isfinite().tolist(), first.tolist()
        for row in (row for row, fine in zip(rows, sound, strict=True) if not fine):
            row.break_off()
        for n in (n for n in through if sound[n]):
            row, own, token = rows[n], logits[n], likeliest[n]
            rules = row.request.sampling
            if rules.plain:
                row.take(token, None)
            else:
                row.take(pick(own, rules, row.tokens, row.generator), own)
            if not row.writing.ended and row.length >= self.decoder.limit:
                row.tell(row.writing.close("length"))

    def retire(self) -> list[RunningRow]:
        """Take out and return the rows that have ended; those past their prompts stand first again."""
        ended = [row for row in self.rows if row.writing.ended]
        for row in ended:
            if row.unsound:
                self.cache.wipe(self.rows.index(row))
            else:
                self._remember(row)
        if ended:
            self._plan = ([], None)  # it keeps the slots of who has ended
        going = [row for row in self.rows if not row.writing.ended]
        past = [row for row in going if not row.left]
        new = [row for row in going if row.left]
        if [*past, *new] != self.rows[: len(going)]:
            self._rearrange(past, new)
        self.rows, self._decoding = self.rows[: len(going)], len(past)
        return ended

    def _rearrange(self, past: list[RunningRow], new: list[RunningRow]) -> None:
        """Move as few rows as possible so that `past` come first and `new` behind them."""
        places: list[RunningRow | None] = [None] * (len(past) + len(new))
        homeless = []
        for begin, group in ((0, past), (len(past), new)):
            region = range(begin, begin + len(group))
            for row in group:
                at = self.rows.index(row)
                if at in region:
                    places[at] = row
                else:
                    homeless.append(
                        (region, row, self.cache.take(at, row.tokens[: row.num_computed]))
                    )
        for region, row, kept in homeless:
            at = next(i for i in region if places[i] is None)
            places[at] = row
            self.cache.put(at, kept, row.num_computed)
        self.rows = [row for row in places if row is not None]

    def _remember(self, row: RunningRow) -> None:
        if self.prefixes.wants(row.num_computed * self._token_bytes, row.num_computed):
            place = self.rows.index(row)
            self.prefixes.keep(row.held.key, self.cache.take(place, row.tokens[: row.num_computed]))


def _step_up(width: int) -> int:
    return -(-width // CHUNK_STEP) * CHUNK_STEP if width > 1 else 1
