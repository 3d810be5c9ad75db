"""KeyValues: static memory for the keys and values of the rows that are being decoded.

Shapes change only when more rows or longer ones are needed than ever before: a row joins and leaves by
copies of its own numbers. Legend: N rows, C capacity in tokens, K key-value heads, D width of a key, E width
of a value.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterhub_chat.model.cache_shape import CacheShape

LENGTH_STEP = 64
"""Capacities, and what attention looks at, are whole multiples of this: few shapes."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first tokens of a row and what the backbone made of them."""

    tokens: tuple[int, ...]
    keys: Sequence[Tensor]
    """(K, length, D) of every layer."""
    values: Sequence[Tensor]
    """(K, length, E) of every layer."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return sum(t.nbytes for t in (*self.keys, *self.values))


class KeyValues:
    """Keys (N, K, C, D) and values (N, K, C, E) of every layer."""

    def __init__(self, shape: CacheShape, dtype: torch.dtype, device: torch.device) -> None:
        """Start with room for nothing."""
        self.rows, self.length = 0, 0
        empty = torch.empty(0, dtype=dtype, device=device)
        self.keys = [empty.new_empty(0, heads, 0, width) for heads, width, _ in shape]
        self.values = [empty.new_empty(0, heads, 0, width) for heads, _, width in shape]
        numbers = sum(heads * (key + value) for heads, key, value in shape)
        self.token_bytes = numbers * empty.element_size()
        """Bytes of one token of one row."""

    @property
    def nbytes(self) -> int:
        """Bytes that the memory takes."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def reserve(self, rows: int, length: int) -> None:
        """Have room for `rows` rows of `length` tokens; the first `rows` rows stay as they are."""
        if rows <= self.rows and length <= self.length:
            return
        length = round_up(max(length, self.length))
        keys, values = (
            [self._larger(old, rows, length) for old in tensors]
            for tensors in (self.keys, self.values)
        )  # all of them or, where there is no memory, none
        self.keys, self.values, self.rows, self.length = keys, values, rows, length

    def _larger(self, old: Tensor, rows: int, length: int) -> Tensor:
        kept = min(rows, self.rows)
        new = old.new_zeros(rows, old.shape[1], length, old.shape[3])
        new[:kept, :, : self.length] = old[:kept]
        return new

    def clear(self) -> None:
        """Let go of the memory."""
        for tensors in (self.keys, self.values):
            tensors[:] = [t.new_empty(0, t.shape[1], 0, t.shape[3]) for t in tensors]
        self.rows = self.length = 0

    def wipe(self, row: int) -> None:
        """Forget a row's numbers: attention weighs what is hidden by zero, and zero times a NaN is one."""
        for t in (*self.keys, *self.values):
            t[row].zero_()

    def take(self, row: int, tokens: Sequence[int]) -> Prefix:
        """Return a copy of a row's first tokens."""
        length = len(tokens)
        keys, values = (
            [t[row, :, :length].clone() for t in tensors] for tensors in (self.keys, self.values)
        )
        return Prefix(tuple(tokens), keys, values)

    def put(self, row: int, prefix: Prefix, length: int) -> None:
        """Start a row with the first `length` tokens of a prefix."""
        for tensors, own in ((self.keys, prefix.keys), (self.values, prefix.values)):
            for t, part in zip(tensors, own, strict=True):
                t[row, :, :length] = part[:, :length]


def round_up(length: int) -> int:
    """Return the next multiple of LENGTH_STEP."""
    return -(-length // LENGTH_STEP) * LENGTH_STEP


SHORTEST = 16
"""Tokens below which copying is no gain."""

Key = tuple[tuple[str, float], ...]
"""Contents and weights of a row's mix: never names, whose content may change."""


class PrefixCache:
    """Finished rows by the content of their mix; the least recently used go first."""

    def __init__(self, budget: int) -> None:
        """Keep at most `budget` bytes; 0 keeps nothing."""
        self.budget, self.nbytes = budget, 0
        self._kept: OrderedDict[tuple[Key, tuple[int, ...]], Prefix] = OrderedDict()

    def find(self, key: Key, tokens: Sequence[int]) -> tuple[Prefix, int] | None:
        """Return what shares the longest beginning with `tokens`, and how long that is."""
        best: tuple[Prefix, int] | None = None
        for (own, _), prefix in self._kept.items():
            if own == key:
                length = shared_length(prefix.tokens, tokens)
                if length >= SHORTEST and (best is None or length > best[1]):
                    best = prefix, length
        if best is not None:
            self._kept.move_to_end((key, best[0].tokens))
        return best

    def wants(self, nbytes: int, length: int) -> bool:
        """Return whether a prefix of that size would be kept."""
        return length >= SHORTEST and nbytes <= self.budget

    def keep(self, key: Key, prefix: Prefix) -> None:
        """Remember a row's beginning; those that it begins with are not needed any more."""
        for own, tokens in [k for k in self._kept if k[0] == key]:
            if shared_length(tokens, prefix.tokens) == len(tokens):
                self.nbytes -= self._kept.pop((own, tokens)).nbytes
        self._kept[key, prefix.tokens] = prefix
        self.nbytes += prefix.nbytes
        while self.nbytes > self.budget:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many first tokens two sequences share."""
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length
