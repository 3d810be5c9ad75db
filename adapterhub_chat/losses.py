"""Losses as pure functions of logits and targets."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 512
"""Positions whose float32 logits exist at one time: 100 MB for a vocabulary of 49k."""


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return -log p of each target, float32 (P,), for `logits` (P, V) in any dtype."""
    parts = [
        functional.cross_entropy(part.float(), wanted, reduction="none")
        for part, wanted in zip(logits.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return torch.cat(parts)


def sum_by_owner(values: Tensor, owners: Tensor, num_owners: int) -> Tensor:
    """Return the sum of `values` (P,) for each owner, (num_owners,)."""
    return values.new_zeros(num_owners).index_add(0, owners, values)
