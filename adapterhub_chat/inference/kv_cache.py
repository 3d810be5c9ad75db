"""KVCache: static memory for the keys and values of the rows that are being decoded; PrefixCache.

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

from adapterhub_chat.model.kv_shapes import KVShapes

LENGTH_STEP = 64
"""Capacities, and the lengths that attention reads, are multiples of this, so that few shapes occur."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first tokens of a row with their keys and values."""

    tokens: tuple[int, ...]
    keys: Sequence[Tensor]
    """(K, length, D) of every layer."""
    values: Sequence[Tensor]
    """(K, length, E) of every layer."""

    @property
    def nbytes(self) -> int:
        """Size of the keys and values in bytes."""
        return sum(t.nbytes for t in (*self.keys, *self.values))


class KVCache:
    """Keys (N, K, C, D) and values (N, K, C, E) of every layer."""

    def __init__(self, shapes: KVShapes, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate nothing yet."""
        self.num_rows, self.capacity = 0, 0
        empty = torch.empty(0, dtype=dtype, device=device)
        self.keys = [empty.new_empty(0, heads, 0, width) for heads, width, _ in shapes]
        self.values = [empty.new_empty(0, heads, 0, width) for heads, _, width in shapes]
        self.token_bytes = sum(heads * (key + value) for heads, key, value in shapes)
        """Size of one token of one row in bytes."""
        self.token_bytes *= empty.element_size()

    @property
    def nbytes(self) -> int:
        """Size of the memory in bytes."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def reserve(self, num_rows: int, length: int) -> None:
        """Reserve `num_rows` rows of `length` tokens; the first `num_rows` rows keep their content."""
        if num_rows <= self.num_rows and length <= self.capacity:
            return
        capacity = round_up(max(length, self.capacity))
        keys, values = (
            [self._enlarged(old, num_rows, capacity) for old in tensors]
            for tensors in (self.keys, self.values)
        )  # all of them or, where there is no memory, none
        self.keys, self.values, self.num_rows, self.capacity = keys, values, num_rows, capacity

    def _enlarged(self, old: Tensor, num_rows: int, capacity: int) -> Tensor:
        num_copied = min(num_rows, self.num_rows)
        new = old.new_zeros(num_rows, old.shape[1], capacity, old.shape[3])
        new[:num_copied, :, : self.capacity] = old[:num_copied]
        return new

    def clear(self) -> None:
        """Free the memory."""
        for tensors in (self.keys, self.values):
            tensors[:] = [t.new_empty(0, t.shape[1], 0, t.shape[3]) for t in tensors]
        self.num_rows = self.capacity = 0

    def zero_row(self, row: int) -> None:
        """Set a row to zero: masked positions get weight zero, but zero times NaN is NaN."""
        for t in (*self.keys, *self.values):
            t[row].zero_()

    def read_prefix(self, row: int, tokens: Sequence[int]) -> Prefix:
        """Return a copy of the keys and values of a row's first tokens, which are `tokens`."""
        length = len(tokens)
        keys, values = (
            [t[row, :, :length].clone() for t in tensors] for tensors in (self.keys, self.values)
        )
        return Prefix(tuple(tokens), keys, values)

    def write_prefix(self, row: int, prefix: Prefix, length: int) -> None:
        """Copy the first `length` tokens of a prefix to the beginning of a row."""
        for tensors, sources in ((self.keys, prefix.keys), (self.values, prefix.values)):
            for t, source in zip(tensors, sources, strict=True):
                t[row, :, :length] = source[:, :length]


def round_up(length: int) -> int:
    """Return the next multiple of LENGTH_STEP."""
    return -(-length // LENGTH_STEP) * LENGTH_STEP


MIN_PREFIX_TOKENS = 16
"""Shorter prefixes are not worth a copy."""

MixKey = tuple[tuple[str, float], ...]
"""Content hashes and weights of a row's mix: never names, whose content may change."""


class PrefixCache:
    """Prefixes of finished rows by the content of their mix; the least recently used are evicted."""

    def __init__(self, max_bytes: int) -> None:
        """Keep at most `max_bytes` bytes; 0 keeps nothing."""
        self.max_bytes, self.nbytes = max_bytes, 0
        self._prefixes: OrderedDict[tuple[MixKey, tuple[int, ...]], Prefix] = OrderedDict()

    def find(self, key: MixKey, tokens: Sequence[int]) -> tuple[Prefix, int] | None:
        """Return the prefix that shares the most first tokens with `tokens`, and their number."""
        best: tuple[Prefix, int] | None = None
        for (prefix_key, _), prefix in self._prefixes.items():
            if prefix_key == key:
                length = common_prefix_length(prefix.tokens, tokens)
                if length >= MIN_PREFIX_TOKENS and (best is None or length > best[1]):
                    best = prefix, length
        if best is not None:
            self._prefixes.move_to_end((key, best[0].tokens))
        return best

    def accepts(self, nbytes: int, length: int) -> bool:
        """Return whether a prefix of that size would be kept."""
        return length >= MIN_PREFIX_TOKENS and nbytes <= self.max_bytes

    def insert(self, key: MixKey, prefix: Prefix) -> None:
        """Keep a prefix; remove those of the same mix that it begins with."""
        for old_key, tokens in [k for k in self._prefixes if k[0] == key]:
            if common_prefix_length(tokens, prefix.tokens) == len(tokens):
                self.nbytes -= self._prefixes.pop((old_key, tokens)).nbytes
        self._prefixes[key, prefix.tokens] = prefix
        self.nbytes += prefix.nbytes
        while self.nbytes > self.max_bytes:
            self.nbytes -= self._prefixes.popitem(last=False)[1].nbytes


def common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of first tokens that two sequences share."""
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length
