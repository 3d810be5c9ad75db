"""Attention masks of packed and of cached rows, for every pattern that transformers' models ask for.

A model of transformers asks for one mask a kind of layer (full, sliding window, chunked) and hands over a
predicate on the indices of a query and a key. Here the predicate is evaluated on *positions within an
example* instead of places in a row, and tokens of other examples are hidden, so that a window is right in
packed rows and over a cache alike. Legend: N rows, T queries, L keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(row, head, query, key) indices that broadcast -> whether the query may look at the key."""


@dataclass(frozen=True)
class RowLayout:
    """Where the tokens of a forward stand."""

    queries: Tensor
    """(N, T) position of each query within its example."""
    keys: Tensor
    """(N or 1, L) position of each key within its example."""
    visible: Tensor | None = None
    """(N, T, L) bool: whether a key belongs to what the query may see at all; None hides none."""
    heads: int = 1
    """Copies of the mask, one a head: a backward pass on a CPU reads a full one fastest."""


_LAYOUT: ContextVar[RowLayout | None] = ContextVar("adapterhub_row_layout", default=None)


@contextmanager
def laid_out(layout: RowLayout) -> Iterator[None]:
    """Make all masks that models ask for inside the block those of `layout`."""
    token = _LAYOUT.set(layout)
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def layout_mask(layout: RowLayout, allows: Predicate, dtype: torch.dtype) -> Tensor:
    """Return the additive mask (N, heads, T, L): 0 where a query may look, else the lowest number."""
    queries, keys = layout.queries[:, :, None], layout.keys[:, None, :]
    rows = torch.arange(len(queries), device=queries.device)[:, None, None]
    seen = allows(rows, torch.zeros_like(rows), queries, keys)
    if layout.visible is not None:
        seen = seen & layout.visible
    seen = seen.expand(len(queries), queries.shape[1], keys.shape[2])
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    mask = mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
    return mask if layout.heads == 1 else mask.expand(-1, layout.heads, -1, -1).contiguous()


def mask_for_transformers(*, mask_function: Predicate, dtype: torch.dtype, **options: Any) -> Any:
    """Return the mask that a model asks for: that of the active layout, else transformers' own for sdpa.

    An entry of transformers' AttentionMaskInterface.
    """
    layout = _LAYOUT.get()
    if layout is None:
        plain = transformers.AttentionMaskInterface()["sdpa"]
        return plain(mask_function=mask_function, dtype=dtype, **options)
    return layout_mask(layout, mask_function, dtype)
