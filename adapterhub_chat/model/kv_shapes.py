"""What a backbone's layers keep of earlier tokens: keys and values of which shape, or something else.

Layers that only attend keep keys and values, which can be cut at any token, and examples beside each other in
a row are kept apart by a mask. Recurrences, linear attention and short convolutions carry a state through the
row instead, which no mask stops. Which of the two a backbone has is asked of its own code: one token goes
through it over a cache that takes keys and values alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adapterhub_chat.lora.plan import activate
from adapterhub_chat.model.masks import RowLayout, laid_out

KVShapes = Sequence[tuple[int, int, int]]
"""Key-value heads, width of a key and width of a value, of every layer."""


class AttentionCache:
    """The part of transformers' cache that layers which only attend ask for."""

    is_sliding = (False,)
    is_compileable = False

    def __init__(self, length: int) -> None:
        """Be a cache of `length` tokens, the new ones among them."""
        self.length = length

    def get_seq_length(self, *_: Any) -> int:
        """Return how many tokens it has."""
        return self.length

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        """Return how many keys a layer sees, and the place of the first."""
        return self.length, 0

    def get_query_offset(self, *_: Any) -> int:
        """Return the place of the first new token; masks are made of positions, not of places."""
        return 0


class _ShapeRecorder(AttentionCache):
    """Keeps nothing but the shapes of what layers would write."""

    def __init__(self) -> None:
        super().__init__(1)
        self.shapes: dict[int, tuple[int, int, int]] = {}

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Note the shape of a layer's keys and values."""
        self.shapes[layer] = (keys.shape[1], keys.shape[3], values.shape[3])
        return keys, values


@torch.inference_mode()
def kv_shapes_of(model: Any, cache_name: str) -> KVShapes | None:
    """Return the shape of each layer's keys and values; None where a layer keeps something else."""
    recorder = _ShapeRecorder()
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    try:
        with activate(None), laid_out(RowLayout(ids, ids)):
            model(input_ids=ids, position_ids=ids, use_cache=True, **{cache_name: recorder})
    except (AttributeError, TypeError):  # a layer asks for what such a cache does not have
        return None
    count = max(recorder.shapes, default=-1) + 1
    return [recorder.shapes.get(layer, (0, 0, 0)) for layer in range(count)] or None
