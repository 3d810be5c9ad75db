"""Attention for packed rows on a CPU, where torch's fused kernel has a slow backward pass.

The textbook formula (arXiv 1706.03762) with as few passes over the scores as plain torch allows: scale and
mask come in with the first product, and grouped queries read their keys in place instead of from copies.
The keys' mean is taken off first (SageAttention, arXiv 2410.02367): that moves all scores of a query alike,
so the softmax stays, and what is left of them is small enough to be written down in bf16.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Return softmax(scale q k^T + mask) v as (N, T, H, D).

    `query` (N, H, T, D); `key` and `value` (N, K, T, D) with H a multiple of K; `mask` (N, 1 or H, T, T) is
    added to the scores: a full (N, H, T, T) one is used as it lies.
    """
    rows, heads, length, width = query.shape
    groups = rows * key.shape[1]
    key = key - key.mean(-2, keepdim=True).detach()
    whole = mask.expand(rows, heads, length, length).reshape(groups, -1, length)
    q, k, v = (t.reshape(groups, -1, width) for t in (query, key, value))
    scores = torch.baddbmm(whole, q, k.mT, alpha=scale)
    mixed = torch.bmm(scores.softmax(-1), v)
    return mixed.view(rows, heads, length, width).transpose(1, 2)


PACKED = "adapterhub_packed"
"""Name under which transformers knows `_attention`."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend by `packed_attention` where a gradient goes through packed rows, else as "sdpa" does."""
    packed = attention_mask is not None and attention_mask.is_floating_point() and not dropout
    unusual = any(options.get(name) is not None for name in ("softcap", "s_aux"))
    if packed and torch.is_grad_enabled() and not unusual:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        assert attention_mask is not None
        return packed_attention(query, key, value, attention_mask, scale), None
    plain = transformers.AttentionInterface()["sdpa"]
    out: tuple[Tensor, None] = plain(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )
    return out
