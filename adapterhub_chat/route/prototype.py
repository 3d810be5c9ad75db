"""Prototypes as tensors, read from a manifest's numbers and written back to them."""

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
    """Gaussians with one covariance, factors^T factors + diag(diagonal); all numbers are exact in float16."""

    centres: Tensor
    """(K, W)"""
    shares: Tensor
    """(K,): the weight of each centre; above 0, sum 1."""
    factors: Tensor
    """(R, W)"""
    diagonal: Tensor
    """(W,): the variances beside the factors, >= 0."""

    @property
    def width(self) -> int:
        """W."""
        return self.diagonal.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All numbers, in the order of a manifest."""
        return self.centres, self.shares, self.factors, self.diagonal

    def narrowed(self, width: int) -> GaussianMixture:
        """Return the mixture of the first `width` features."""
        return GaussianMixture(
            self.centres[:, :width], self.shares, self.factors[:, :width], self.diagonal[:width]
        )


@dataclass(frozen=True)
class Prototype:
    """The distribution of an adapter's messages, and the scores of those that were held out."""

    mixture: GaussianMixture
    background: GaussianMixture
    """Of the first B features."""
    ratios: Tensor
    """(Q,): quantiles over the held-out messages, ascending."""
    densities: Tensor
    """(Q,)"""
    count: int = 0
    """Messages that it was fitted to."""


def prototype_of(stored: StoredPrototype) -> Prototype:
    """Return a stored prototype as float64 tensors."""
    numbers = stored.decoded()
    ratios, densities = torch.from_numpy(numbers.ratios), torch.from_numpy(numbers.densities)
    mixture, background = _mixture_of(numbers.own), _mixture_of(numbers.background)
    return Prototype(mixture, background, ratios, densities, stored.count)


def _mixture_of(numbers: MixtureNumbers) -> GaussianMixture:
    return GaussianMixture(*map(torch.from_numpy, numbers))


def routing_of(early_layer: Prototype, token: Prototype | None = None) -> Routing:
    """Return what a manifest stores of an adapter's prototypes."""
    glance = None if token is None else TokenPrototype(**_stored_fields(token))
    return Routing(**_stored_fields(early_layer), glance=glance)


def _stored_fields(prototype: Prototype) -> dict[str, Any]:
    mixture, background = prototype.mixture, prototype.background
    parts = (*mixture.tensors, *background.tensors, prototype.ratios, prototype.densities)
    numbers = torch.cat([part.flatten() for part in parts]).half().numpy()
    return {
        "width": mixture.width,
        "background_width": background.width,
        "centres": len(mixture.centres),
        "rank": len(mixture.factors),
        "background_rank": len(background.factors),
        "quantiles": len(prototype.ratios),
        "count": prototype.count,
        "numbers": base64.b64encode(numbers.tobytes()).decode("ascii"),
    }
