"""Prefixes: what the backbone made of earlier rows is kept, under a budget, for rows that begin alike."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from adapterhub_chat.cache import Prefix

SHORTEST = 16
"""Tokens below which copying is no gain."""

Key = tuple[tuple[str, float], ...]
"""Contents and weights of a row's mix: never names, whose content may change."""


class Prefixes:
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
