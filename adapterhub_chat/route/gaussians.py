"""Messages as clouds of vectors: centres, a covariance of low rank, and log p under them.

Legend: N messages, W width, K centres, R rank, D densities, J clouds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from adapterhub_chat.route.prototype import GaussianMixture

ROUNDS = 15
"""Of k-means."""
FLOOR = 0.003
"""Variance that every direction has at least, as a share of the mean."""
COMMON = (0.9, 0.1)
"""Weights of own and background covariances in the one that all clouds are compared under."""


def fit_mixture(vectors: Tensor, centres: int, rank: int) -> GaussianMixture:
    """Return the cloud of vectors (N, W): k-means' centres, the largest directions around them."""
    labels = _k_means(vectors, min(centres, len(vectors)))
    counts = torch.bincount(labels)
    present = counts.nonzero().flatten()
    middles = torch.stack([vectors[labels == k].mean(0) for k in present.tolist()])
    around = vectors - middles[torch.searchsorted(present, labels)]
    around = around / math.sqrt(max(1, len(vectors) - 1))
    _, sizes, directions = torch.linalg.svd(around, full_matrices=False)
    largest = torch.zeros(rank, vectors.shape[1], dtype=vectors.dtype)
    largest[: len(sizes)] = (sizes[:, None] * directions)[:rank]
    factors = as_half(largest)
    rest = (around.pow(2).sum(0) - factors.pow(2).sum(0)).clamp_min(0)
    return GaussianMixture(
        as_half(middles), as_half(counts[present] / len(vectors)), factors, as_half(rest)
    )


class Densities:
    """log p of D clouds' centres, each under a weighted sum of two covariances, by Woodbury's identity."""

    def __init__(self, roots: Tensor, inside: Tensor, centres: Tensor, offsets: Tensor) -> None:
        """Take (D, W), (D, W, R), (D, K, W) and (D, K)."""
        self._parts = roots, inside, centres, offsets

    @classmethod
    def of(
        cls,
        cloud: GaussianMixture,
        first: GaussianMixture,
        second: GaussianMixture,
        weights: Sequence[float],
    ) -> Densities:
        """Return one."""
        parts = [(w, c) for w, c in zip(weights, (first, second), strict=True) if w]
        factors = torch.cat([math.sqrt(w) * c.factors for w, c in parts])
        variances = sum((w * c.rest for w, c in parts), torch.zeros_like(cloud.rest))
        mean = (variances + factors.pow(2).sum(0)).mean()
        variances = variances + FLOOR * mean + 1e-9
        root = variances.rsqrt()
        scaled = factors * root
        lower = torch.linalg.cholesky(torch.eye(len(scaled)).to(scaled) + scaled @ scaled.T)
        inside = torch.linalg.solve_triangular(lower, scaled, upper=False).T
        size = variances.log().sum() / 2 + lower.diagonal().log().sum()
        return cls(
            root[None],
            inside[None],
            (cloud.centres * root)[None],
            (cloud.shares.log() - size)[None],
        )

    @classmethod
    def joined(cls, several: Sequence[Densities]) -> Densities:
        """Return all of several as one, the smaller filled up with what counts nothing."""
        roots, inside, centres, offsets = zip(*(own._parts for own in several), strict=True)
        rank, most = max(t.shape[2] for t in inside), max(t.shape[1] for t in offsets)
        return cls(
            torch.cat(roots),
            torch.cat([pad(t, (0, rank - t.shape[2])) for t in inside]),
            torch.cat([pad(t, (0, 0, 0, most - t.shape[1])) for t in centres]),
            torch.cat([pad(t, (0, most - t.shape[1]), value=-math.inf) for t in offsets]),
        )

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Of the numbers."""
        return tuple(part.shape for part in self._parts)

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return log p of the first W numbers of each vector, (N, D)."""
        roots, inside, centres, offsets = self._parts
        scaled = vectors[:, None, : roots.shape[1]] * roots
        apart = (scaled[:, :, None] - centres).transpose(0, 1)  # (D, N, K, W)
        along = apart.flatten(1, 2) @ inside
        distance = apart.square().sum(-1) - along.square().sum(-1).view(apart.shape[:3])
        return torch.logsumexp(offsets[:, None] - distance / 2, -1).T


class LinearDiscriminant:
    """log p of every cloud's centres under one covariance for all, up to a constant of the message."""

    def __init__(self, clouds: Sequence[tuple[GaussianMixture, GaussianMixture]]) -> None:
        """Take each cloud with its background, which may have fewer numbers."""
        width = clouds[0][0].width
        weighted = [
            (w / len(clouds), c) for pair in clouds for w, c in zip(COMMON, pair, strict=True)
        ]
        rows = torch.cat([pad(math.sqrt(w) * c.factors, (0, width - c.width)) for w, c in weighted])
        common = rows.T @ rows
        for weight, cloud in weighted:
            common.diagonal()[: cloud.width].add_(weight * cloud.rest)
        common.diagonal().add_(FLOOR * common.diagonal().mean() + 1e-9)
        lower = torch.linalg.cholesky(common)
        most = max(len(own.centres) for own, _ in clouds)
        centres, shares = zip(*(_filled(own, most) for own, _ in clouds), strict=True)
        points = torch.stack(centres)  # (J, K, W)
        slopes = torch.cholesky_solve(points.flatten(0, 1).T, lower)
        heights = (points.flatten(0, 1).T * slopes).sum(0) / 2
        self._slopes, self._heights = slopes, torch.stack(shares).log() - heights.view(-1, most)

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return log p of each vector (N, W) under each cloud, (N, J)."""
        slopes, heights = self._slopes, self._heights
        return torch.logsumexp((vectors @ slopes).view(-1, *heights.shape) + heights, -1)


def _filled(cloud: GaussianMixture, most: int) -> tuple[Tensor, Tensor]:
    """Return centres and shares, filled up to `most` with what counts nothing."""
    missing = most - len(cloud.centres)
    return pad(cloud.centres, (0, 0, 0, missing)), pad(cloud.shares, (0, missing))


def _k_means(vectors: Tensor, centres: int) -> Tensor:
    """Return the nearest of some centres of each vector (N, W), in units of each number's deviation: (N,)."""
    scaled = vectors / (vectors.std(0) + 1e-3)
    generator = torch.Generator().manual_seed(0)
    middles = scaled[torch.randperm(len(scaled), generator=generator)[:centres]]
    labels = torch.cdist(scaled, middles).argmin(1)
    for _ in range(ROUNDS):
        groups = [scaled[labels == k] for k in range(centres)]
        middles = torch.stack(
            [g.mean(0) if len(g) else m for g, m in zip(groups, middles, strict=True)]
        )
        labels = torch.cdist(scaled, middles).argmin(1)
    return labels


def as_half(numbers: Tensor) -> Tensor:
    """Return numbers as they come back from float16, in float64."""
    largest = torch.finfo(torch.float16).max
    return numbers.clamp(-largest, largest).half().double()
