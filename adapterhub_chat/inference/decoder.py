"""Decoders: new tokens of several rows through the backbone, over a static key-value cache.

`ModuleDecoder` runs transformers' own modules, whatever the attention's pattern and shapes; fused_decoder.py
has a faster one, and stateful_decoder.py one for architectures whose layers carry a state. Legend: N rows, T
new tokens of a row, K key-value heads, D width of a key, E width of a value, V vocabulary, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from adapterhub_chat.inference.kv_cache import KVCache, round_up
from adapterhub_chat.lora.plan import Plan, activate
from adapterhub_chat.model.adapter_model import AdapterModel, head_positions
from adapterhub_chat.model.kv_shapes import AttentionCache, KVShapes
from adapterhub_chat.model.masks import RowLayout, laid_out
from adapterhub_chat.model.rope import switch_length


@dataclass(frozen=True)
class StepInput:
    """New tokens of rows that are neighbours in the cache."""

    first_row: int
    """Index of the first row in the cache."""
    ids: Tensor
    """(N, T); a row's new tokens come first, then padding."""
    starts: Sequence[int]
    """Number of cached tokens of each row; the cache must have room for T more."""
    lengths: Sequence[int]
    """Number of new tokens of each row, at most T."""

    @property
    def positions(self) -> Tensor:
        """The position of every token in its row, (N, T)."""
        starts = torch.tensor(self.starts, device=self.ids.device)
        return starts[:, None] + torch.arange(self.ids.shape[1], device=self.ids.device)

    @property
    def token_positions(self) -> Tensor:
        """The positions (N, T) without padding's own: those after a row's last token repeat its position."""
        ends = [start + length - 1 for start, length in zip(self.starts, self.lengths, strict=True)]
        return self.positions.minimum(torch.tensor(ends, device=self.ids.device)[:, None])

    @property
    def last_tokens(self) -> Tensor:
        """Flat indices (row * T + column) of every row's last new token, (N,)."""
        num_rows, width = self.ids.shape
        indices = torch.arange(num_rows) * width + torch.tensor(self.lengths) - 1
        return indices.to(self.ids.device)


class Decoder(Protocol):
    """What an engine needs of a backbone."""

    max_length: int
    """Number of tokens that a row may have."""
    takes_chunks: bool
    """Whether a prompt may be computed in parts, and begin with what an earlier row computed."""
    recompute_length: int | None
    """Length from which all tokens of a row are computed otherwise than before, if there is one."""

    def new_cache(self) -> KVCache:
        """Return an empty cache."""
        ...

    def forward(self, cache: KVCache, inputs: StepInput, plan: Plan | None) -> Tensor:
        """Return the logits (N, V) after each row's last new token."""
        ...

    def early_states(self, ids: Tensor) -> Tensor:
        """Return the states (N, T, H) of ids padded on the right; see AdapterModel.early_states."""
        ...


def head_shape(config: Any) -> tuple[int, int, int]:
    """Return the numbers of heads and of key-value heads, and the head width."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def max_length_of(config: Any) -> int:
    """Return the number of tokens that a row may have by the positions; dynamic NTK stretches them."""
    rope = getattr(config, "rope_parameters", None) or {}
    factor = float(rope.get("factor") or 1) if rope.get("rope_type") == "dynamic" else 1.0
    return int((getattr(config, "max_position_embeddings", None) or 2**31) * factor)


def causal_mask(positions: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Return the additive mask (N, 1, T, length) of tokens at `positions` (N, T) over cached tokens."""
    columns = torch.arange(length, device=positions.device)
    hidden = columns > positions[:, None, :, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)


class CacheView(AttentionCache):
    """The cache as transformers' modules see it during one forward."""

    def __init__(self, cache: KVCache, inputs: StepInput) -> None:
        """Show the rows of a step's input."""
        num_rows, width = inputs.ids.shape
        self.cache, self.positions = cache, inputs.positions
        super().__init__(min(round_up(max(inputs.starts) + width), cache.capacity))
        self.rows = slice(inputs.first_row, inputs.first_row + num_rows)
        self.row_index = torch.arange(num_rows, device=inputs.ids.device)[:, None]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Return the additive causal mask (N, 1, T, length)."""
        return causal_mask(self.positions, self.length, dtype)

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values (N, K, T, D); return those of the rows (N, K, length, D)."""
        cached_keys = self.cache.keys[layer][self.rows]
        cached_values = self.cache.values[layer][self.rows]
        for cached, new in ((cached_keys, keys), (cached_values, values)):
            cached[self.row_index, :, self.positions] = new.transpose(1, 2)
        return cached_keys[:, :, : self.length], cached_values[:, :, : self.length]


class ModuleDecoder:
    """A Decoder that runs transformers' own modules."""

    def __init__(self, model: AdapterModel, shapes: KVShapes) -> None:
        """Prepare the decoder of the model's backbone, whose layers cache keys and values of `shapes`."""
        self.backbone, self.kv_shapes = model.backbone, shapes
        self.early_states = model.early_states
        self.max_length = max_length_of(self.backbone.text_config)
        self.takes_chunks = self.backbone.packs
        self.recompute_length = switch_length(self.backbone.model)

    def new_cache(self) -> KVCache:
        """See Decoder."""
        return KVCache(self.kv_shapes, self.backbone.dtype, self.backbone.device)

    @torch.inference_mode()
    def forward(self, cache: KVCache, inputs: StepInput, plan: Plan | None) -> Tensor:
        """See Decoder."""
        view = CacheView(cache, inputs)
        layout = RowLayout(
            view.positions, torch.arange(view.length, device=inputs.ids.device)[None]
        )
        with activate(plan), head_positions(inputs.last_tokens), laid_out(layout):
            out = self.backbone.model(
                input_ids=inputs.ids,
                attention_mask=None,
                position_ids=inputs.token_positions,
                use_cache=True,
                **{self.backbone.cache_argument: view},
            )
        logits: Tensor = out.logits
        return logits
