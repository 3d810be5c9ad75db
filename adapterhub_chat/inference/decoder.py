"""Decoders: new tokens of several rows through the backbone, over a static key-value cache.

`ModuleDecoder` runs transformers' own modules, whatever the attention's pattern and shapes; fused_decoder.py
has one that is faster, and stateful_decoder.py one for architectures whose layers carry a state. Legend: N
rows, T new tokens of a row, V vocabulary, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from adapterhub_chat.inference.kv_cache import KeyValues, round_up
from adapterhub_chat.lora.plan import Plan, activate
from adapterhub_chat.model.adapter_model import AdapterModel, keeping
from adapterhub_chat.model.cache_shape import AttentionCache, CacheShape
from adapterhub_chat.model.masks import RowLayout, laid_out


@dataclass(frozen=True)
class StepInput:
    """New tokens of rows that lie side by side in the cache."""

    first: int
    """Place of the first row."""
    ids: Tensor
    """(N, T); a row's own are its first ones."""
    starts: Sequence[int]
    """How many tokens of each row are in the cache, which must have room for T more."""
    lengths: Sequence[int]
    """How many of each row's T tokens are its own."""

    @property
    def positions(self) -> Tensor:
        """Where every token stands in its row, (N, T)."""
        begin = torch.tensor(self.starts, device=self.ids.device)
        return begin[:, None] + torch.arange(self.ids.shape[1], device=self.ids.device)

    @property
    def own_positions(self) -> Tensor:
        """The positions (N, T), those beyond a row's own tokens being that of its last one."""
        ends = [start + length - 1 for start, length in zip(self.starts, self.lengths, strict=True)]
        return self.positions.minimum(torch.tensor(ends, device=self.ids.device)[:, None])

    @property
    def last(self) -> Tensor:
        """The flat (row * T + column) place of every row's last own token, (N,)."""
        rows, width = self.ids.shape
        places = torch.arange(rows) * width + torch.tensor(self.lengths) - 1
        return places.to(self.ids.device)


class Decoder(Protocol):
    """What an engine asks of a backbone."""

    limit: int
    """The longest row, in tokens."""
    takes_chunks: bool
    """Whether a prompt may be fed in parts."""

    def new_cache(self) -> KeyValues:
        """Return an empty cache of the rows' keys and values."""
        ...

    def forward(self, cache: KeyValues, feed: StepInput, plan: Plan | None) -> Tensor:
        """Return the logits (N, V) after each row's last new token."""
        ...

    def early_states(self, ids: Tensor) -> Tensor:
        """Return the states (N, T, H) of ids padded on the right; see AdapterModel.early_states."""
        ...


def head_shape(config: Any) -> tuple[int, int, int]:
    """Return heads, key-value heads and head width of a Llama-like configuration."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def limit_of(config: Any) -> int:
    """Return the longest row that the positions allow."""
    return getattr(config, "max_position_embeddings", None) or 2**31


def mask_of(positions: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Return the additive mask (N, 1, T, length) for tokens at `positions` (N, T): none sees a later one."""
    columns = torch.arange(length, device=positions.device)
    hidden = columns > positions[:, None, :, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)


class View(AttentionCache):
    """The cache as transformers' modules see it during one forward."""

    def __init__(self, cache: KeyValues, feed: StepInput) -> None:
        """Look at the rows of a feed."""
        rows, width = feed.ids.shape
        self.cache, self.positions = cache, feed.positions
        self.seen = min(round_up(max(feed.starts) + width), cache.length)
        super().__init__(self.seen)
        self.rows = slice(feed.first, feed.first + rows)
        self.index = torch.arange(rows, device=feed.ids.device)[:, None]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Return the additive mask (N, 1, T, seen): a token sees what stands at its position or before."""
        return mask_of(self.positions, self.seen, dtype)

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values (N, K, T, D); return all of them (N, K, seen, D)."""
        own = self.cache.keys[layer][self.rows], self.cache.values[layer][self.rows]
        for tensor, new in zip(own, (keys, values), strict=True):
            tensor[self.index, :, self.positions] = new.transpose(1, 2)
        return own[0][:, :, : self.seen], own[1][:, :, : self.seen]


class ModuleDecoder:
    """See Decoder: transformers' own modules."""

    def __init__(self, model: AdapterModel, shape: CacheShape) -> None:
        """Prepare for the model's backbone, whose layers keep keys and values of `shape`."""
        self.backbone, self.shape = model.backbone, shape
        self.takes_chunks = model.backbone.packs
        self.early_states = model.early_states
        self.limit = limit_of(self.backbone.text_config)

    def new_cache(self) -> KeyValues:
        """See Decoder."""
        return KeyValues(self.shape, self.backbone.dtype, self.backbone.device)

    @torch.inference_mode()
    def forward(self, cache: KeyValues, feed: StepInput, plan: Plan | None) -> Tensor:
        """See Decoder."""
        view = View(cache, feed)
        keys = torch.arange(view.seen, device=feed.ids.device)[None]
        layout = RowLayout(view.positions, keys)
        own_mask = None if self.backbone.asks_for_masks else view.mask(self.backbone.dtype)
        with activate(plan), keeping(feed.last), laid_out(layout):
            out = self.backbone.model(
                input_ids=feed.ids,
                attention_mask=own_mask,
                position_ids=feed.own_positions,
                use_cache=True,
                **{self.backbone.cache_name: view},
            )
        logits: Tensor = out.logits
        return logits
