"""The attention function of every backbone that lets one be chosen, in training, scoring and decoding alike.

Where a gradient goes through packed rows on a CPU, torch's fused kernel has a slow backward pass: there the
textbook formula (arXiv 1706.03762) runs with as few passes over the scores as plain torch allows. Scale and
mask come in with the first product, and grouped queries read their keys in place instead of from copies. The
keys' mean is taken off first (SageAttention, arXiv 2410.02367): that moves all scores of a query alike, so
the softmax stays, and what is left of them is small enough to be written down in bf16. Soft caps (Gemma 2)
and sinks (gpt-oss), which the fused kernel does not know, are computed here too.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from adapterhub_chat.errors import UsageError
from adapterhub_chat.model.masks import mask_for_transformers

IGNORED = frozenset({"sliding_window", "position_ids"})
"""Options of a call that the mask holds already, or that change no number."""


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Return softmax(scale q k^T + mask) v as (N, T, H, E).

    `query` (N, H, T, D); `key` (N, K, T, D) and `value` (N, K, T, E) with H a multiple of K; `mask` (N, 1 or
    H, T, T) is added to the scores: a full (N, H, T, T) one is used as it lies.
    """
    rows, heads, length, width = query.shape
    groups = rows * key.shape[1]
    key = key - key.mean(-2, keepdim=True).detach()
    full = mask.expand(rows, heads, length, length).reshape(groups, -1, length)
    q, k = (t.reshape(groups, -1, width) for t in (query, key))
    v = value.reshape(groups, -1, value.shape[-1])
    scores = torch.baddbmm(full, q, k.mT, alpha=scale)
    mixed = torch.bmm(scores.softmax(-1), v)
    return mixed.view(rows, heads, length, -1).transpose(1, 2)


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return attention (N, T, H, E) with soft-capped scores, or with one sink a head (H,).

    A soft cap c makes a score c tanh(score / c) (arXiv 2408.00118); a sink takes part in the softmax as one
    more score, and has no value (arXiv 2309.17453). `mask` is additive, boolean, or None for a causal one.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = (query @ key.mT) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float() + _additive(mask, scores)
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(len(scores), -1, scores.shape[2], 1)
        scores = torch.cat([scores, column], dim=-1)
    shares = scores.softmax(-1)[..., : key.shape[2]]
    return (shares.to(value.dtype) @ value).transpose(1, 2)


def _additive(mask: Tensor | None, scores: Tensor) -> Tensor:
    length, total = scores.shape[-2:]
    if mask is None:
        mask = torch.ones(length, total, dtype=torch.bool, device=scores.device)
        mask = mask.tril(total - length)
    if mask.dtype == torch.bool:
        lowest = torch.finfo(torch.float32).min
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, lowest)
    return mask[..., :total].float()


NAME = "adapterhub"
"""Name under which transformers knows `_attention`."""


def _attention(  # noqa: PLR0913 - transformers' own signature
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as the model asks; see the module. Raises UsageError for an option that is not known here."""
    unknown = [name for name, value in options.items() if _matters(name, value)]
    if unknown:
        raise UsageError(
            f"{type(module).__name__} attends with {', '.join(unknown)}, which is not supported; use another "
            "backbone"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is not None or s_aux is not None:
        return explicit_attention(query, key, value, attention_mask, scale, softcap, s_aux), None
    packed = attention_mask is not None and attention_mask.is_floating_point() and not dropout
    if packed and torch.is_grad_enabled() and query.device.type == "cpu" and position_bias is None:
        assert attention_mask is not None
        return packed_attention(query, key, value, attention_mask, scale), None
    if position_bias is not None:
        options["position_bias"] = position_bias
    plain = transformers.AttentionInterface()["sdpa"]
    out: tuple[Tensor, None] = plain(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )
    return out


def _matters(option: str, value: Any) -> bool:
    """Return whether an option brings numbers that may change what attention gives, beyond its mask."""
    return option not in IGNORED and isinstance(value, Tensor | float)


transformers.AttentionInterface.register(NAME, _attention)
transformers.AttentionMaskInterface.register(NAME, mask_for_transformers)
