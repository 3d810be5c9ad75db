"""Losses as pure functions."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from adapterhub_chat.weights import AdapterWeights

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


def overlap(new: AdapterWeights, old: AdapterWeights) -> Tensor:
    """Return the sum over modules of |A_old A_new^T|^2, the overlap of two adapters' input subspaces.

    Orthogonal-subspace protection (O-LoRA, arXiv 2310.14152, equation 8, squared instead of absolute).
    """
    pairs = [
        (old.factors[m][0].float(), a) for m, (a, _) in new.factors.items() if m in old.factors
    ]
    return sum(((its @ mine.T).square().sum() for its, mine in pairs), torch.zeros(()))


def overlap_gradient(new: AdapterWeights, old: AdapterWeights) -> AdapterWeights:
    """Return the gradient of `overlap` with respect to the new factors: 2 A_new A_old^T A_old for A."""
    found = {}
    for module, (a, b) in new.factors.items():
        if module in old.factors:
            its = old.factors[module][0].to(a)
            found[module] = (2 * (a @ its.T) @ its, torch.zeros_like(b))
    return replace(new.with_factors(found), head=None)
