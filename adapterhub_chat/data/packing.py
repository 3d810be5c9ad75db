"""Packing: examples side by side in rows of one fixed length, kept apart by the attention mask.

Few, fixed shapes cost a CPU nothing to set up, and no token is spent on padding short examples. Every
continuation sees its own prompt and itself alone, at the positions it would have by itself, so that a
packed loss equals the unpacked one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterhub_chat.data.encoding import Encoded

LOOKAHEAD = 32
"""How many examples may be passed over to fill a row; they come first in the next batch."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed rows, ready for one forward. N rows of L tokens, P predicted positions."""

    ids: Tensor
    """(N, L) token ids."""
    positions: Tensor
    """(N, L) position of each token within its own example."""
    segments: Tensor
    """(N, L) number of the piece that each token belongs to, -1 for padding."""
    parents: Tensor
    """(N, L) piece that the token may also look at: its prompt."""
    keep: Tensor
    """(P,) flat indices into (N * L) of the positions that predict an answer token."""
    targets: Tensor
    """(P,) the tokens to predict."""
    owners: Tensor
    """(P,) number of the continuation that each target belongs to, counted over the whole batch."""
    weights: Tensor
    """(P,) float32, how much each target's loss counts in training."""

    @property
    def num_rows(self) -> int:
        """N."""
        return int(self.ids.shape[0])

    def prompt_tokens(self) -> tuple[Tensor, Tensor]:
        """Return the flat indices (T,) of the prompts' tokens, and the example (T,) each belongs to.

        Examples are counted over the whole batch, row by row.
        """
        own = (self.parents == -2) & (self.segments >= 0)
        places = own.flatten().nonzero().squeeze(1)
        length = self.ids.shape[1]  # a row has fewer pieces than tokens
        piece = places // length * length + self.segments.flatten()[places]
        return places, torch.unique(piece, return_inverse=True)[1]

    def mask(self, dtype: torch.dtype, *, causal: bool = True) -> Tensor:
        """Return the additive attention mask (N, 1, L, L): 0 where a token may look, else -inf-like.

        Unless `causal`, a token also sees those that come after it in its piece.
        """
        seg, parent = self.segments, self.parents
        same = seg[:, :, None] == seg[:, None, :]
        above = parent[:, :, None] == seg[:, None, :]
        seen = same | above
        if causal:
            seen &= torch.ones(seen.shape[1:], dtype=torch.bool, device=seg.device).tril()
        mask = torch.zeros(same.shape, dtype=dtype, device=seg.device)
        mask.masked_fill_(~seen, torch.finfo(dtype).min)
        return mask[:, None]

    def pieces(self) -> Tensor:
        """Return the number of each token's piece (N, L), counted over the batch; padding has its own."""
        length = self.segments.shape[1]
        rows = torch.arange(self.num_rows, device=self.segments.device)
        return rows[:, None] * (length + 1) + self.segments + 1

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`."""
        return Batch(*(getattr(self, name).to(device) for name in self.__slots__))


def pack(rows: Sequence[Sequence[Encoded]], length: int) -> Batch:
    """Return one Batch with the given examples in each row; `length` is L, in tokens."""
    shape = (len(rows), length)
    ids = torch.zeros(shape, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    segments = torch.full(shape, -1, dtype=torch.long)
    parents = torch.full(shape, -2, dtype=torch.long)
    keep: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    weights: list[float] = []
    owner = 0
    for n, row in enumerate(rows):
        at = piece = 0

        def put(tokens: Sequence[int], start: int, parent: int, n: int = n) -> None:
            nonlocal at, piece
            end = at + len(tokens)
            ids[n, at:end] = torch.tensor(tokens)
            positions[n, at:end] = torch.arange(start, start + len(tokens))
            segments[n, at:end], parents[n, at:end] = piece, parent
            at, piece = end, piece + 1

        for example in row:
            prompt_piece = piece
            put(example.prompt, 0, -2)
            last = n * length + at - 1
            for continuation in example.continuations:
                first = n * length + at
                if len(continuation) > 1:
                    put(continuation[:-1], len(example.prompt), prompt_piece)
                keep += [last, *range(first, first + len(continuation) - 1)]
                targets += continuation
                owners += [owner] * len(continuation)
                weights += [example.weight] * len(continuation)
                owner += 1
    places, wanted, whose = (
        torch.tensor(values, dtype=torch.long) for values in (keep, targets, owners)
    )
    counts = torch.tensor(weights)
    return Batch(ids, positions, segments, parents, places, wanted, whose, counts)


def fill_rows(
    waiting: deque[Encoded], *, num_rows: int, length: int, lookahead: int = LOOKAHEAD
) -> list[list[Encoded]]:
    """Take examples from the left of `waiting` into at most `num_rows` rows of `length` tokens, first fit.

    Up to `lookahead` examples that no longer fit are passed over and put back, in order.
    """
    rows: list[list[Encoded]] = []
    space: list[int] = []
    passed: list[Encoded] = []
    while waiting and len(passed) < lookahead:
        example = waiting.popleft()
        need = example.num_inputs
        assert need <= length, "encode_examples cuts to the row length"
        row = next((i for i, free in enumerate(space) if free >= need), None)
        if row is None and len(rows) < num_rows:
            rows.append([])
            space.append(length)
            row = len(rows) - 1
        if row is None:
            passed.append(example)
            continue
        rows[row].append(example)
        space[row] -= need
    waiting.extendleft(reversed(passed))
    return rows


def epochs(
    examples: Sequence[Encoded], *, num_rows: int, length: int, seed: int
) -> Iterator[list[list[Encoded]]]:
    """Yield the rows of one training step after another, for ever; each epoch in a new seeded order.

    The stream depends on nothing but its own arguments: an adapter sees the same rows in the same order
    whatever is trained beside it. A step always has `num_rows` rows, so epochs run into each other.
    """
    generator = torch.Generator().manual_seed(seed)
    waiting: deque[Encoded] = deque()
    enough = LOOKAHEAD + num_rows * length // 2  # an example has at least two tokens
    while True:
        while len(waiting) < enough:
            order = torch.randperm(len(examples), generator=generator).tolist()
            waiting.extend(examples[i] for i in order)
        yield fill_rows(waiting, num_rows=num_rows, length=length)


def in_order(
    examples: Sequence[Encoded], *, num_rows: int, length: int
) -> Iterator[tuple[list[list[Encoded]], list[int]]]:
    """Yield every example once, packed, with the indices of the examples in packing order."""
    index = {id(e): i for i, e in enumerate(examples)}
    waiting = deque(sorted(examples, key=lambda e: e.num_inputs))
    while waiting:
        rows = fill_rows(waiting, num_rows=num_rows, length=length)
        yield rows, [index[id(e)] for row in rows for e in row]
