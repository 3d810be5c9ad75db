"""Gaussian mixtures of message vectors: fitting, log densities, and the linear discriminant.

Legend: N messages, W width, K centres, R rank, D densities, J mixtures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from adapterhub_chat.route.prototype import GaussianMixture

KMEANS_ITERATIONS = 15
VARIANCE_FLOOR = 0.003
"""Added to every variance, as a share of the mean variance."""
SHARED_WEIGHTS = (0.9, 0.1)
"""Weights of the adapters' and the backgrounds' covariances in the discriminant's common one."""


def fit_mixture(vectors: Tensor, num_centres: int, rank: int) -> GaussianMixture:
    """Return the mixture of vectors (N, W): k-means centres, and the largest directions around them."""
    labels = _k_means(vectors, min(num_centres, len(vectors)))
    counts = torch.bincount(labels)
    present = counts.nonzero().flatten()
    centres = torch.stack([vectors[labels == k].mean(0) for k in present.tolist()])
    deviations = vectors - centres[torch.searchsorted(present, labels)]
    deviations = deviations / math.sqrt(max(1, len(vectors) - 1))
    _, sizes, directions = torch.linalg.svd(deviations, full_matrices=False)
    largest = torch.zeros(rank, vectors.shape[1], dtype=vectors.dtype)
    largest[: len(sizes)] = (sizes[:, None] * directions)[:rank]
    factors = rounded_to_half(largest)
    diagonal = (deviations.pow(2).sum(0) - factors.pow(2).sum(0)).clamp_min(0)
    shares = rounded_to_half(counts[present] / len(vectors))
    return GaussianMixture(rounded_to_half(centres), shares, factors, rounded_to_half(diagonal))


class Densities:
    """log p of D mixtures, each under a weighted sum of two covariances, by Woodbury's identity."""

    def __init__(
        self, inverse_roots: Tensor, low_rank: Tensor, centres: Tensor, offsets: Tensor
    ) -> None:
        """Take (D, W), (D, W, R), (D, K, W) and (D, K)."""
        self._parts = inverse_roots, low_rank, centres, offsets

    @classmethod
    def of(
        cls,
        mixture: GaussianMixture,
        first: GaussianMixture,
        second: GaussianMixture,
        weights: Sequence[float],
    ) -> Densities:
        """Return the density of one mixture, under the weighted covariances of `first` and `second`."""
        parts = [(w, m) for w, m in zip(weights, (first, second), strict=True) if w]
        factors = torch.cat([math.sqrt(w) * m.factors for w, m in parts])
        variances = sum((w * m.diagonal for w, m in parts), torch.zeros_like(mixture.diagonal))
        mean = (variances + factors.pow(2).sum(0)).mean()
        variances = variances + VARIANCE_FLOOR * mean + 1e-9
        root = variances.rsqrt()
        scaled = factors * root
        lower = torch.linalg.cholesky(torch.eye(len(scaled)).to(scaled) + scaled @ scaled.T)
        low_rank = torch.linalg.solve_triangular(lower, scaled, upper=False).T
        half_log_det = variances.log().sum() / 2 + lower.diagonal().log().sum()
        return cls(
            root[None],
            low_rank[None],
            (mixture.centres * root)[None],
            (mixture.shares.log() - half_log_det)[None],
        )

    @classmethod
    def concatenated(cls, several: Sequence[Densities]) -> Densities:
        """Return all densities as one batch; smaller ranks and numbers of centres are padded."""
        roots, low_rank, centres, offsets = zip(*(d._parts for d in several), strict=True)
        rank, num_centres = max(t.shape[2] for t in low_rank), max(t.shape[1] for t in offsets)
        return cls(
            torch.cat(roots),
            torch.cat([pad(t, (0, rank - t.shape[2])) for t in low_rank]),
            torch.cat([pad(t, (0, 0, 0, num_centres - t.shape[1])) for t in centres]),
            torch.cat([pad(t, (0, num_centres - t.shape[1]), value=-math.inf) for t in offsets]),
        )

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """The shapes of the four tensors."""
        return tuple(part.shape for part in self._parts)

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return log p of the first W features of each vector, (N, D), up to the constant of 2 pi."""
        roots, low_rank, centres, offsets = self._parts
        scaled = vectors[:, None, : roots.shape[1]] * roots
        deviations = (scaled[:, :, None] - centres).transpose(0, 1)  # (D, N, K, W)
        projected = deviations.flatten(1, 2) @ low_rank
        distance = deviations.square().sum(-1)
        distance = distance - projected.square().sum(-1).view(deviations.shape[:3])
        return torch.logsumexp(offsets[:, None] - distance / 2, -1).T


class LinearDiscriminant:
    """log p of every mixture under one common covariance, up to a constant of the message."""

    def __init__(self, mixtures: Sequence[tuple[GaussianMixture, GaussianMixture]]) -> None:
        """Take each mixture with its background, which may be narrower."""
        width = mixtures[0][0].width
        weighted = [
            (w / len(mixtures), m)
            for pair in mixtures
            for w, m in zip(SHARED_WEIGHTS, pair, strict=True)
        ]
        rows = torch.cat([pad(math.sqrt(w) * m.factors, (0, width - m.width)) for w, m in weighted])
        common = rows.T @ rows
        for weight, mixture in weighted:
            common.diagonal()[: mixture.width].add_(weight * mixture.diagonal)
        common.diagonal().add_(VARIANCE_FLOOR * common.diagonal().mean() + 1e-9)
        lower = torch.linalg.cholesky(common)
        num_centres = max(len(mixture.centres) for mixture, _ in mixtures)
        centres, shares = zip(*(_padded(m, num_centres) for m, _ in mixtures), strict=True)
        points = torch.stack(centres).flatten(0, 1)  # (J K, W)
        coefficients = torch.cholesky_solve(points.T, lower)
        halves = (points.T * coefficients).sum(0) / 2
        self._coefficients = coefficients
        self._intercepts = torch.stack(shares).log() - halves.view(-1, num_centres)

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return log p of each vector (N, W) under each mixture, (N, J)."""
        products = (vectors @ self._coefficients).view(-1, *self._intercepts.shape)
        return torch.logsumexp(products + self._intercepts, -1)


def _padded(mixture: GaussianMixture, num_centres: int) -> tuple[Tensor, Tensor]:
    """Return centres and shares, padded to `num_centres` with centres of share zero."""
    missing = num_centres - len(mixture.centres)
    return pad(mixture.centres, (0, 0, 0, missing)), pad(mixture.shares, (0, missing))


def _k_means(vectors: Tensor, num_centres: int) -> Tensor:
    """Return the cluster of each vector (N, W), (N,); distances are in units of each feature's deviation."""
    scaled = vectors / (vectors.std(0) + 1e-3)
    generator = torch.Generator().manual_seed(0)
    centres = scaled[torch.randperm(len(scaled), generator=generator)[:num_centres]]
    labels = torch.cdist(scaled, centres).argmin(1)
    for _ in range(KMEANS_ITERATIONS):
        groups = [scaled[labels == k] for k in range(num_centres)]
        centres = torch.stack(
            [g.mean(0) if len(g) else c for g, c in zip(groups, centres, strict=True)]
        )
        labels = torch.cdist(scaled, centres).argmin(1)
    return labels


def rounded_to_half(numbers: Tensor) -> Tensor:
    """Return float64 numbers rounded to float16 (and clamped to its range)."""
    largest = torch.finfo(torch.float16).max
    return numbers.clamp(-largest, largest).half().double()
