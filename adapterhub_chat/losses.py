"""Losses as pure functions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

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


def reverse_gradient(values: Tensor, weight: float) -> Tensor:
    """Return `values` as they are; the gradient that comes back is times -weight (arXiv 1505.07818)."""
    reversed_: Tensor = _Reversed.apply(values, weight)  # type: ignore[no-untyped-call]
    return reversed_


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * gradients[0], None


def reversal_weight(progress: float) -> float:
    """Return the weight of the reversed gradient, 0 at the start and near 1 at the end (arXiv 1505.07818)."""
    return 2 / (1 + math.exp(-10 * progress)) - 1


def domain_loss(logits: Tensor, domains: Tensor) -> Tensor:
    """Return the cross-entropy of telling domains (n,) of 0 and 1 by logits (n,), both counting equally."""
    each = functional.binary_cross_entropy_with_logits(logits, domains.to(logits), reduction="none")
    means = [each[domains == domain].mean() for domain in domains.unique()]
    return torch.stack(means).mean()


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
