"""Dense deltas thinned out one by one, and brought together number by number: parts of merge methods."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

SPREAD = 0.2
"""DELLA: how far the chance to be kept reaches from the smallest number of a row to the largest."""


def keep_largest(delta: Tensor, density: float, _: Generator) -> Tensor:
    """Return the delta with its largest numbers alone (TIES calls it trim)."""
    size = delta.abs()
    return delta * (size >= threshold(size, density))


def drop(delta: Tensor, density: float, random: Generator) -> Tensor:
    """Return the delta with numbers dropped by chance and the others scaled up to make up for them."""
    kept = torch.rand(delta.shape, generator=random) < density
    return delta * kept / density


def drop_small(delta: Tensor, density: float, random: Generator) -> Tensor:
    """Drop by chance, small numbers of a row sooner than large ones (DELLA calls it MAGPRUNE)."""
    width = delta.shape[1]
    order = delta.abs().argsort(dim=1).argsort(dim=1)
    reach = min(SPREAD, 2 * density, 2 * (1 - density))
    chance = density + reach * (order / max(width - 1, 1) - 0.5)
    kept = torch.rand(delta.shape, generator=random) < chance
    return delta * kept / chance.clamp(min=1 / width)


def add(deltas: Tensor) -> Tensor:
    """Return the sum (...) of deltas (sources, ...)."""
    return deltas.sum(0)


def agree(deltas: Tensor) -> Tensor:
    """Return, number by number, the mean of those sources that have the elected sign (TIES)."""
    agreeing = deltas.sign() == elected(deltas)
    return (deltas * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def elected(deltas: Tensor) -> Tensor:
    """Return the sign (...) that has the larger mass among deltas (sources, ...)."""
    return torch.where(deltas.sum(0) >= 0, 1.0, -1.0).to(deltas)


def threshold(sizes: Tensor, density: float) -> Tensor:
    """Return the smallest of the largest numbers that make up the share `density`."""
    flat = sizes.flatten()
    if not len(flat):
        return torch.zeros(())
    kept = min(max(1, round(density * len(flat))), len(flat))
    return flat.kthvalue(len(flat) - kept + 1).values
