"""Decoding: one mixed batch of prompts, one mix and one set of sampling rules per row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adapterhub_chat.errors import UsageError
from adapterhub_chat.model import AdapterModel, keeping
from adapterhub_chat.types import NO_ADAPTER, Mix

COLD = 1e-5
"""Temperatures that would only overflow."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one row is decoded."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 is greedy; below COLD there is no difference."""
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are no part of it."""
    ignore_eos: bool = False
    seed: int | None = None
    """Equal prompts with equal seeds give equal texts, whatever is decoded beside them."""
    strip: bool = False
    """Leave out white space at both ends."""

    def __post_init__(self) -> None:
        """Refuse values that have no meaning."""
        found = []
        if self.max_new_tokens < 1:
            found.append(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < math.inf:
            found.append(f"temperature={self.temperature} must be a number from 0 on")
        if not 0 < self.top_p <= 1:
            found.append(f"top_p={self.top_p} must lie in (0, 1]")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            found.append(f"seed={self.seed} must fit into 64 bits")
        if "" in self.stop:
            found.append("stop must not hold an empty text: it would end every answer at once")
        if found:
            raise UsageError("; ".join(found))


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Request:
    """One row: prompt ids, who answers, and how."""

    prompt: tuple[int, ...]
    mix: Mix = NO_ADAPTER
    sampling: Sampling = GREEDY


@dataclass
class _Row:
    """A row while it is being decoded."""

    index: int
    request: Request
    ids: list[int] = field(default_factory=list)
    text: str = ""
    done: bool = False
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        """Seed the generator: by the request's seed, else anew."""
        seed = self.request.sampling.seed
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def take(self, token: int, tokenizer: Any) -> str:
        """Add a token; return the text that became certain."""
        sampling = self.request.sampling
        ended = token == tokenizer.eos_token_id and not sampling.ignore_eos
        if not ended:
            self.ids.append(token)
        text: str = tokenizer.decode(self.ids, skip_special_tokens=True)
        cut = min((text.find(s) for s in sampling.stop if s in text), default=-1)
        self.done = ended or cut >= 0 or len(self.ids) >= sampling.max_new_tokens
        if cut < 0:
            cut = len(text) if self.done else _certain(text, sampling.stop)
        shown = text[:cut].strip() if sampling.strip else text[:cut]
        piece = shown[len(self.text) :]
        self.text += piece
        return piece


def generate(
    model: AdapterModel,
    requests: Sequence[Request],
    *,
    on_text: Callable[[int, str], None] = lambda _row, _piece: None,
) -> list[str]:
    """Return the text that continues each request, all of them decoded in one mixed batch.

    `on_text(row, piece)` hears of every new piece of text as it comes (streaming).
    """
    rows = [_Row(i, request) for i, request in enumerate(requests)]
    live = sorted(rows, key=lambda row: str(row.request.mix))  # rows of one adapter side by side
    if live:
        state = _State(model, live)
    with model.holding([request.mix for request in requests]) as among:
        while live:
            with among([row.index for row in live]):
                live = _decode(state, live, on_text)
    return [row.text for row in rows]


def _decode(state: _State, live: Sequence[_Row], on_text: Callable[[int, str], None]) -> list[_Row]:
    """Decode until half of the rows have ended; return the others, with `state` cut down to them."""
    while True:
        logits = state.forward()
        tokens = [_pick(row_logits, row) for row_logits, row in zip(logits, live, strict=True)]
        for row, token in zip(live, tokens, strict=True):
            if not row.done and (piece := row.take(token, state.tokenizer)):
                on_text(row.index, piece)
        state.feed(tokens)
        going = [n for n, row in enumerate(live) if not row.done]
        if len(going) <= len(live) // 2:
            state.select(going)
            return [live[n] for n in going]


@torch.inference_mode()
def next_token_logits(model: AdapterModel, requests: Sequence[Request]) -> Tensor:
    """Return float32 logits (rows, vocab) of the token after each prompt, on the CPU."""
    if not requests:
        return torch.zeros(0, model.backbone.model.config.vocab_size)
    order = sorted(range(len(requests)), key=lambda i: str(requests[i].mix))
    live = [_Row(i, requests[i]) for i in order]
    with model.mixing([row.request.mix for row in live]):
        logits = _State(model, live).forward().float().cpu()
    return logits[torch.tensor(order).argsort()]


class _State:
    """What the running rows share: the tokens to feed next, their mask, and the cache."""

    def __init__(self, model: AdapterModel, live: Sequence[_Row]) -> None:
        """Lay the prompts out side by side, padded on the left."""
        prompts = [row.request.prompt for row in live]
        if empty := sorted(str(row.index) for row in live if not row.request.prompt):
            raise UsageError(f"prompt {', '.join(empty)} is empty: give at least one token of text")
        self.model, self.tokenizer = model.backbone.model, model.backbone.tokenizer
        device, width = model.backbone.device, max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        padded = [[pad] * (width - len(p)) + list(p) for p in prompts]
        lengths = torch.tensor([len(p) for p in prompts])
        self.ids = torch.tensor(padded, device=device)
        self.mask = (torch.arange(width)[None] >= width - lengths[:, None]).long().to(device)
        self.cache = model.backbone.new_cache()

    @torch.inference_mode()
    def forward(self) -> Tensor:
        """Return the last position's logits (rows, V); the head sees no other position."""
        rows, width = self.ids.shape
        last = torch.arange(1, rows + 1, device=self.ids.device) * width - 1
        with keeping(last):
            out = self.model(
                input_ids=self.ids,
                attention_mask=self.mask,
                position_ids=(self.mask.cumsum(1) - 1).clamp(min=0)[:, -width:],
                **self.cache,
                use_cache=True,
            )
        logits: Tensor = out.logits
        return logits

    def feed(self, tokens: Sequence[int]) -> None:
        """Set one next token per row."""
        self.ids = torch.tensor(tokens, device=self.mask.device)[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        index = torch.tensor(rows, dtype=torch.long, device=self.mask.device)
        self.ids, self.mask = self.ids[index], self.mask[index]
        for cache in self.cache.values():
            cache.batch_select_indices(index)


def _pick(logits: Tensor, row: _Row) -> int:
    """Choose the next token from (V,) logits by the row's own rules."""
    sampling = row.request.sampling
    if sampling.temperature < COLD:
        return int(logits.argmax())
    probabilities = (logits.float().cpu() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities[index[outside]] = 0.0
    return int(torch.multinomial(probabilities, 1, generator=row.generator))


def _certain(text: str, stops: Sequence[str]) -> int:
    """Return how many characters cannot change any more: half a letter or half a stop still may."""
    whole = text.rstrip("\ufffd")
    halves = (stop[:n] for stop in stops for n in range(1, len(stop)))
    return len(whole) - max((len(half) for half in halves if whole.endswith(half)), default=0)
