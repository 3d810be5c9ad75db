"""Parts of elementwise merge methods: sparsification of one dense delta, and consensus of several."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

DELLA_SPREAD = 0.2
"""DELLA: difference of the keep probabilities of a row's largest and smallest number."""


def keep_largest(delta: Tensor, density: float, _: Generator) -> Tensor:
    """Return the delta with only its numbers of largest magnitude (TIES calls it trim)."""
    magnitude = delta.abs()
    return delta * (magnitude >= threshold(magnitude, density))


def drop(delta: Tensor, density: float, random: Generator) -> Tensor:
    """Return the delta with numbers dropped at random and the others rescaled by 1 / density (DARE)."""
    kept = torch.rand(delta.shape, generator=random) < density
    return delta * kept / density


def drop_by_rank(delta: Tensor, density: float, random: Generator) -> Tensor:
    """Drop numbers at random, small ones of a row more often than large ones (DELLA calls it MAGPRUNE)."""
    width = delta.shape[1]
    ranks = delta.abs().argsort(dim=1).argsort(dim=1)
    spread = min(DELLA_SPREAD, 2 * density, 2 * (1 - density))
    probability = density + spread * (ranks / max(width - 1, 1) - 0.5)
    kept = torch.rand(delta.shape, generator=random) < probability
    return delta * kept / probability.clamp(min=1 / width)


def sum_deltas(deltas: Tensor) -> Tensor:
    """Return the sum (...) of deltas (sources, ...)."""
    return deltas.sum(0)


def sign_consensus(deltas: Tensor) -> Tensor:
    """Return the elementwise mean of the sources that have the elected sign (TIES)."""
    agreeing = deltas.sign() == elected_sign(deltas)
    return (deltas * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def elected_sign(deltas: Tensor) -> Tensor:
    """Return the sign (...) of the sum of deltas (sources, ...); zero counts as positive."""
    return torch.where(deltas.sum(0) >= 0, 1.0, -1.0).to(deltas)


def threshold(magnitudes: Tensor, density: float) -> Tensor:
    """Return the smallest number of the largest `density` share, at least one number."""
    flat = magnitudes.flatten()
    if not len(flat):
        return torch.zeros(())
    num_kept = min(max(1, round(density * len(flat))), len(flat))
    return flat.kthvalue(len(flat) - num_kept + 1).values
