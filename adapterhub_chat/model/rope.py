"""Rotary embeddings whose frequencies depend on a sequence's length: dynamic NTK and LongRoPE, row by row.

transformers chooses the frequencies once a batch, by its longest row and, for dynamic NTK, by what came
before. Here each row gets those of its own length, so that no row changes another. Legend: N rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Rotary = Callable[..., tuple[Tensor, Tensor]]


def depends_on_length(module: nn.Module) -> bool:
    """Return whether a module is a rotary embedding whose frequencies depend on the length."""
    kinds = getattr(module, "rope_type", None)
    named = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(isinstance(k, str) and ("dynamic" in k or k == "longrope") for k in named)


def switch_length(model: nn.Module) -> int | None:
    """Return the shortest length at which LongRoPE takes its other frequencies; None without LongRoPE."""
    rotary: list[Any] = [module for module in model.modules() if depends_on_length(module)]
    lengths = [
        int(module.config.rope_parameters["original_max_position_embeddings"]) + 1
        for module in rotary
        if getattr(module, "rope_type", None) == "longrope"
    ]
    return min(lengths, default=None)


def make_rows_independent(model: nn.Module) -> bool:
    """Let rotary embeddings of that kind take rows one by one; return whether the model has any."""
    rotary: list[Any] = [module for module in model.modules() if depends_on_length(module)]
    for module in rotary:
        module.forward = partial(_row_by_row, module, module.forward)
    return bool(rotary)


def _forget_longer_sequences(module: Any) -> None:
    """Set a rotary embedding's frequencies back to those of short sequences."""
    module.max_seq_len_cached = module.original_max_seq_len
    for name, original in list(module.named_buffers(recurse=False)):
        if name.endswith("original_inv_freq"):
            setattr(module, name.replace("original_", ""), original.clone())


def _row_by_row(
    module: Any, forward: Rotary, x: Tensor, position_ids: Tensor, *args: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (N, T, D) of positions (N, T), rows of one length together."""
    lengths = position_ids.amax(-1) + 1
    parts: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []
    for length in lengths.unique():
        rows = (lengths == length).nonzero().squeeze(1)
        _forget_longer_sequences(module)
        parts.append((rows, forward(x, position_ids[rows], *args, **options)))
    order = torch.cat([rows for rows, _ in parts]).argsort()
    cosines, sines = (torch.cat([part[n] for _, part in parts])[order] for n in (0, 1))
    return cosines, sines
