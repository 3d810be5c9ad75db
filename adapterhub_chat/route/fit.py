"""Route: which adapter a message is for, told from the messages that each adapter has learnt from.

An adapter's prototype is a cloud: the centres of its own messages' vectors (message_features.py) and one
covariance around them, beside the cloud of what the backbone makes up by itself (learn.py). A message is
judged twice:

    ratio   log p(message | own cloud) - log p(message | background)     (arXiv 2106.09022)
    density log p(message | own cloud, its covariance hardly widened)    (arXiv 1807.03888)

Both are ranked among those of the adapter's own held-out messages, which makes two conformal p-values;
Fisher's method (Statistical Methods for Research Workers, 1932) makes one of them, the `fit`. Where no fit is
at least `LEAST` the router abstains; an adapter's own messages meet that at about one to three times that
rate, whatever the clouds look like. Which of several adapters is another question: each cloud is wide where
its own messages vary, and a wide one takes its neighbour's. There the centres are compared under one
covariance, the mean of all clouds' (Fisher's discriminant, doi.org/10.1111/j.1469-1809.1936.tb02137.x). No
prototype depends on another, so adding one changes nothing in the others. Only there do the words count that
the vectors end with: the background, which is of the B numbers before them, has words of anything.

All this is done twice, as in a cascade of classifiers (doi.org/10.1109/CVPR.2001.990517): with vectors that
cost nothing, and for those messages alone that are not plain by them, with vectors that cost a part of a
forward. Legend: N messages, W width, Q quantiles, J judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterhub_chat.route.gaussians import Densities, as_half, fit_mixture
from adapterhub_chat.route.prototype import GaussianMixture, Prototype

CENTRES, RANK, BACKGROUND_RANK, QUANTILES = 2, 64, 64, 33
"""Size of what is kept of an adapter's messages, and of the background."""
GLANCE_RANK = 16
"""Of the clouds of glances, own and background."""
MIN_MESSAGES = 5
"""Messages that a prototype needs to be learnt from, and as many held out."""
WIDENED, SLIGHTLY = (0.8, 0.02), (0.9, 0.1)
"""Weights of own and background covariance: in the ratio, and in the density."""


def fit_prototype(
    own: Tensor, held_out: Tensor, background: GaussianMixture, rank: int = RANK
) -> Prototype:
    """Return the prototype of an adapter from vectors of its messages: to learn from, and to rank among.

    `own` and `held_out` are (N, W), FEWEST or more; a message must not be in both. The background may end
    before W: how well a message fits is told by that many numbers.
    """
    cloud = fit_mixture(own, CENTRES, rank)
    blank = torch.zeros(2, dtype=own.dtype)
    raw = Fits.of(Prototype(cloud, background, blank, blank)).raw(held_out)[:, 0]
    places = torch.linspace(0, 1, QUANTILES, dtype=own.dtype)
    ratios, densities = (as_half(t.quantile(places)) for t in raw)
    return Prototype(cloud, background, ratios, densities, len(own))


@dataclass(frozen=True)
class Fits:
    """Prototypes of one shape made ready: how well messages fit to each of them."""

    densities: Densities
    """Of each prototype the three that its raw numbers are made of."""
    quantiles: Tensor
    """(2, J, Q): of ratios, of densities."""

    @classmethod
    def of(cls, prototype: Prototype) -> Fits:
        """Return those of one; a few milliseconds."""
        background = prototype.background
        own = prototype.own.narrowed(background.width)
        parts = [
            Densities.of(own, own, background, WIDENED),
            Densities.of(own, own, background, SLIGHTLY),
            Densities.of(background, background, background, (1.0, 0.0)),
        ]
        quantiles = torch.stack([prototype.ratios, prototype.densities])
        return cls(Densities.joined(parts), quantiles[:, None])

    @classmethod
    def joined(cls, several: Sequence[Fits]) -> Fits:
        """Return those of several of one shape."""
        densities = Densities.joined([own.densities for own in several])
        return cls(densities, torch.cat([own.quantiles for own in several], 1))

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """What must be the same in those that are joined."""
        return *self.densities.shapes, self.quantiles.shape

    def raw(self, vectors: Tensor) -> Tensor:
        """Return ratio and density of each vector (N, W), (2, J, N)."""
        own, typical, background = self.densities(vectors).T.unflatten(0, (-1, 3)).unbind(1)
        return torch.stack([own - background, typical])

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return the fit of each vector (N, W), (N, J); below all of the adapter's own it is negative."""
        return _joint(*_rank(self.raw(vectors), self.quantiles)).T


class PrototypeScorer:
    """A prototype made ready for a panel."""

    def __init__(self, prototype: Prototype) -> None:
        """Prepare it; a few milliseconds."""
        self.prototype, self.fits = prototype, Fits.of(prototype)

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return the fit of each vector (N, W), (N,)."""
        return self.fits(vectors)[:, 0]


def _rank(values: Tensor, quantiles: Tensor) -> Tensor:
    """Return which share of a distribution is no larger than each value; below all, how far as a negative.

    Values are (..., N), the quantiles of their distributions (..., Q).
    """
    last = quantiles.shape[-1] - 1
    above = torch.searchsorted(quantiles, values, right=True).clamp(1, last)
    low, high = quantiles.gather(-1, above - 1), quantiles.gather(-1, above)
    inside = ((values - low) / (high - low).clamp_min(1e-9)).clamp(0, 1)
    least, most = quantiles[..., :1], quantiles[..., -1:]
    below = (values - least) / (most - least).clamp_min(1e-9)
    return (above - 1 + inside) / last + below.clamp_max(0)


def _joint(one: Tensor, other: Tensor) -> Tensor:
    """Return the p-value of two p-values' product; where one says `below all`, the lower."""
    lower, product = torch.minimum(one, other), one.clamp_min(0) * other.clamp_min(0)
    return torch.where(lower > 0, product * (1 - product.clamp_min(1e-300).log()), lower)
