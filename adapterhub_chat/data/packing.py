"""Packing: several examples in each row of a fixed length, separated by the attention mask.

Fixed shapes avoid repeated set-up on a CPU, and little is spent on padding. A continuation attends to its
prompt and itself, at the same positions as in an unpacked batch, so that a packed loss equals the unpacked
one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapterhub_chat.data.encoding import Encoded

LENGTH_STEP = 16
LOOKAHEAD = 32
"""Maximum number of examples skipped to fill a row; they come first in the next batch."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed rows for one forward: N rows of L tokens, P predicted positions."""

    ids: Tensor
    """(N, L) token ids."""
    positions: Tensor
    """(N, L) position of each token within its own example."""
    segments: Tensor
    """(N, L) number of the piece that each token belongs to, -1 for padding."""
    parents: Tensor
    """(N, L) the other piece that the token attends to: its prompt; -2 for none."""
    keep: Tensor
    """(P,) flat indices into (N * L) of the positions that predict an answer token."""
    targets: Tensor
    """(P,) the tokens to predict."""
    owners: Tensor
    """(P,) number of the continuation that each target belongs to, counted over the whole batch."""
    weights: Tensor
    """(P,) float32 weight of each target's loss in training."""

    @property
    def num_rows(self) -> int:
        """N."""
        return int(self.ids.shape[0])

    def prompt_tokens(self) -> tuple[Tensor, Tensor]:
        """Return the flat indices (T,) of the prompts' tokens, and the example (T,) each belongs to.

        Examples are counted over the whole batch, row by row.
        """
        is_prompt = (self.parents == -2) & (self.segments >= 0)
        indices = is_prompt.flatten().nonzero().squeeze(1)
        length = self.ids.shape[1]  # a row has fewer pieces than tokens
        piece = indices // length * length + self.segments.flatten()[indices]
        return indices, torch.unique(piece, return_inverse=True)[1]

    def mask(self, dtype: torch.dtype, *, causal: bool = True) -> Tensor:
        """Return the additive attention mask (N, 1, L, L): 0 for visible tokens, else the dtype's minimum.

        Unless `causal`, a token also attends to later tokens of its piece.
        """
        visible = self.visible()
        if causal:
            visible &= torch.ones(visible.shape[1:], dtype=torch.bool, device=visible.device).tril()
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        mask.masked_fill_(~visible, torch.finfo(dtype).min)
        return mask[:, None]

    def visible(self) -> Tensor:
        """Return whether a token's piece or its prompt holds another token, (N, L, L) bool, in any order."""
        seg, parent = self.segments, self.parents
        same = seg[:, :, None] == seg[:, None, :]
        return same | (parent[:, :, None] == seg[:, None, :])

    def pieces(self) -> Tensor:
        """Return the number of each token's piece (N, L), over the batch; a row's padding is a piece."""
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
        writer = _RowWriter(ids[n], positions[n], segments[n], parents[n])
        for example in row:
            prompt = writer.write(example.prompt, 0, -2)
            last_index = n * length + writer.end - 1
            for continuation in example.continuations:
                first_index = n * length + writer.end
                if len(continuation) > 1:
                    writer.write(continuation[:-1], len(example.prompt), prompt)
                keep += [last_index, *range(first_index, first_index + len(continuation) - 1)]
                targets += continuation
                owners += [owner] * len(continuation)
                weights += [example.weight] * len(continuation)
                owner += 1
    kept_indices, target_ids, owner_numbers = (
        torch.tensor(values, dtype=torch.long) for values in (keep, targets, owners)
    )
    loss_weights = torch.tensor(weights)
    return Batch(
        ids, positions, segments, parents, kept_indices, target_ids, owner_numbers, loss_weights
    )


class _RowWriter:
    """Writes pieces one after another into a row of a batch: prompts, and continuations of a prompt."""

    def __init__(self, ids: Tensor, positions: Tensor, segments: Tensor, parents: Tensor) -> None:
        """Take the row's tensors, each (L,)."""
        self._ids, self._positions = ids, positions
        self._segments, self._parents = segments, parents
        self.end = 0
        """Tokens written so far."""
        self._num_pieces = 0

    def write(self, tokens: Sequence[int], start: int, parent: int) -> int:
        """Write a piece whose first position is `start`; return its number in the row."""
        place, piece = slice(self.end, self.end + len(tokens)), self._num_pieces
        self._ids[place] = torch.tensor(tokens)
        self._positions[place] = torch.arange(start, start + len(tokens))
        self._segments[place], self._parents[place] = piece, parent
        self.end, self._num_pieces = place.stop, piece + 1
        return piece


def isolated(rows: Sequence[Sequence[Encoded]]) -> list[Sequence[Encoded]]:
    """Return rows with each continuation in a row of its own, in the same order."""
    return [
        [replace(example, continuations=(continuation,))]
        for row in rows
        for example in row
        for continuation in example.continuations
    ]


def longest(rows: Sequence[Sequence[Encoded]]) -> int:
    """Return the tokens of the longest row, rounded up to a multiple of LENGTH_STEP."""
    most = max((sum(e.num_inputs for e in row) for row in rows), default=1)
    return -(-most // LENGTH_STEP) * LENGTH_STEP


def fill_rows(waiting: deque[Encoded], *, num_rows: int, length: int) -> list[list[Encoded]]:
    """Take examples from the left of `waiting` into at most `num_rows` rows of `length` tokens, first fit.

    Up to LOOKAHEAD examples that do not fit are skipped and put back, in order.
    """
    rows: list[list[Encoded]] = []
    free_space: list[int] = []
    skipped: list[Encoded] = []
    while waiting and len(skipped) < LOOKAHEAD:
        example = waiting.popleft()
        num_inputs = example.num_inputs
        assert num_inputs <= length, "encode_examples cuts to the row length"
        row = next((i for i, space_left in enumerate(free_space) if space_left >= num_inputs), None)
        if row is None and len(rows) < num_rows:
            rows.append([])
            free_space.append(length)
            row = len(rows) - 1
        if row is None:
            skipped.append(example)
            continue
        rows[row].append(example)
        free_space[row] -= num_inputs
    waiting.extendleft(reversed(skipped))
    return rows


def epochs(
    examples: Sequence[Encoded], *, num_rows: int, length: int, seed: int
) -> Iterator[list[list[Encoded]]]:
    """Yield the rows of each training step, without end; each epoch has a new seeded order.

    The stream depends on its arguments alone: an adapter gets the same rows in the same order, whichever
    other adapters are trained. A step always has `num_rows` rows, so it may contain the end of an epoch and
    the next.
    """
    generator = torch.Generator().manual_seed(seed)
    waiting: deque[Encoded] = deque()
    min_waiting = LOOKAHEAD + num_rows * length // 2  # an example has at least two tokens
    while True:
        while len(waiting) < min_waiting:
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
