"""Prototypes as tensors: what an adapter's messages look like, from a manifest's numbers and back to them."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterhub_chat.artifact.prototype import (
    MixtureNumbers,
    Routing,
    StoredPrototype,
    TokenPrototype,
)


@dataclass(frozen=True)
class GaussianMixture:
    """Messages as Gaussians with one covariance, factors^T factors + diag(rest), rounded to float16."""

    centres: Tensor
    """(K, W)"""
    shares: Tensor
    """(K,): how many of the messages are around each; above 0, sum 1."""
    factors: Tensor
    """(R, W)"""
    rest: Tensor
    """(W,): variances, >= 0."""

    @property
    def width(self) -> int:
        """W."""
        return self.rest.shape[0]

    def narrowed(self, width: int) -> GaussianMixture:
        """Return the cloud of the first numbers of the same messages."""
        return GaussianMixture(
            self.centres[:, :width], self.shares, self.factors[:, :width], self.rest[:width]
        )


@dataclass(frozen=True)
class Prototype:
    """What an adapter's messages look like."""

    own: GaussianMixture
    background: GaussianMixture
    """Of the first B numbers."""
    ratios: Tensor
    """(Q,): quantiles over the held-out messages, ascending."""
    densities: Tensor
    """(Q,)"""
    count: int = 0
    """Messages that it was learnt from."""


def prototype_of(stored: StoredPrototype) -> Prototype:
    """Return a stored prototype as tensors in float64."""
    numbers = stored.decoded()
    ratios, densities = torch.from_numpy(numbers.ratios), torch.from_numpy(numbers.densities)
    own, background = _cloud(numbers.own), _cloud(numbers.background)
    return Prototype(own, background, ratios, densities, stored.count)


def _cloud(numbers: MixtureNumbers) -> GaussianMixture:
    return GaussianMixture(*map(torch.from_numpy, numbers))


def routing_of(prototype: Prototype, glance: Prototype | None = None) -> Routing:
    """Return what a manifest keeps of prototypes."""
    return Routing(
        **_kept(prototype), glance=None if glance is None else TokenPrototype(**_kept(glance))
    )


def _kept(prototype: Prototype) -> dict[str, Any]:
    own, background = prototype.own, prototype.background
    clouds = (part for c in (own, background) for part in (c.centres, c.shares, c.factors, c.rest))
    flat = torch.cat([t.flatten() for t in (*clouds, prototype.ratios, prototype.densities)])
    return {
        "width": own.width,
        "background_width": background.width,
        "centres": len(own.centres),
        "rank": len(own.factors),
        "background_rank": len(background.factors),
        "quantiles": len(prototype.ratios),
        "count": prototype.count,
        "numbers": base64.b64encode(flat.half().numpy().tobytes()).decode("ascii"),
    }
