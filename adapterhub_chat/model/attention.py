"""Attention for packed rows on a CPU, where torch's fused kernel has a slow backward pass.

The textbook formula (arXiv 1706.03762) with as few passes over the scores as plain torch allows: scale and
mask are part of the first product, and grouped queries read their keys in place instead of from copies.
The keys' mean is subtracted first (SageAttention, arXiv 2410.02367): that shifts all scores of a query
alike, so the softmax is the same, and the remaining scores are small enough for bf16.
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
    added to the scores; one of shape (N, H, T, T) is not copied.
    """
    rows, heads, length, width = query.shape
    groups = rows * key.shape[1]
    key = key - key.mean(-2, keepdim=True).detach()
    masks = mask.expand(rows, heads, length, length).reshape(groups, -1, length)
    q, k, v = (t.reshape(groups, -1, width) for t in (query, key, value))
    scores = torch.baddbmm(masks, q, k.mT, alpha=scale)
    out = torch.bmm(scores.softmax(-1), v)
    return out.view(rows, heads, length, width).transpose(1, 2)


PACKED = "adapterhub_packed"
"""Name of `_attention` in transformers' AttentionInterface."""


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
    """Use `packed_attention` for packed rows that need a gradient, else transformers' "sdpa"."""
    is_packed = attention_mask is not None and attention_mask.is_floating_point() and not dropout
    has_extras = any(options.get(name) is not None for name in ("softcap", "s_aux"))
    if is_packed and torch.is_grad_enabled() and not has_extras:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        assert attention_mask is not None
        return packed_attention(query, key, value, attention_mask, scale), None
    sdpa = transformers.AttentionInterface()["sdpa"]
    out: tuple[Tensor, None] = sdpa(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )
    return out
