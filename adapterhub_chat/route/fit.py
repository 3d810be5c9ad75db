"""Route: which adapter should answer a message, judged by the messages that each adapter was trained on.

An adapter's prototype is a Gaussian mixture: the centres of its training messages' vectors
(message_features.py) and one covariance around them, beside the mixture of texts that the bare backbone
samples (background.py). A message gets two scores:

    ratio   log p(message | own mixture) - log p(message | background)     (arXiv 2106.09022)
    density log p(message | own mixture, its covariance hardly widened)    (arXiv 1807.03888)

Both are ranked among the scores of the adapter's own held-out messages, which gives two conformal p-values;
Fisher's method (Statistical Methods for Research Workers, 1932) combines them into one, the `fit`. Where no
fit is at least `MIN_FIT` the router abstains; one to three times that share of an adapter's own messages fall
below it, whatever the mixtures look like. The choice between adapters is another question: a mixture is wide
where its own messages vary, and a wide one attracts the messages of its neighbours. There the centres are
compared under one covariance, the mean of all mixtures' (Fisher's discriminant,
doi.org/10.1111/j.1469-1809.1936.tb02137.x). No prototype depends on another, so adding one leaves the others
as they are. Only this comparison uses the n-gram features at the end of the vectors: the background covers
the B features before them, since its texts are on no topic.

All this is done twice, as in a cascade of classifiers (doi.org/10.1109/CVPR.2001.990517): with token
features, which cost almost nothing, and for the messages that these leave open with early-layer features,
which cost part of a forward pass. Legend: N messages, W width, B background width, Q quantiles, J prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterhub_chat.route.gaussians import Densities, fit_mixture, rounded_to_half
from adapterhub_chat.route.prototype import GaussianMixture, Prototype

NUM_CENTRES, RANK, BACKGROUND_RANK, NUM_QUANTILES = 2, 64, 64, 33
"""Sizes of an early-layer prototype and of its background."""
TOKEN_RANK = 16
"""Rank of the mixtures of token features, the adapter's and the background's."""
MIN_MESSAGES = 5
"""Messages that a prototype needs for fitting, and as many held out."""
RATIO_WEIGHTS, DENSITY_WEIGHTS = (0.8, 0.02), (0.9, 0.1)
"""Weights of the adapter's and the background's covariance, in the ratio and in the density."""


def fit_prototype(
    messages: Tensor, held_out: Tensor, background: GaussianMixture, rank: int = RANK
) -> Prototype:
    """Return the prototype of an adapter from vectors of its messages: for fitting, and for the quantiles.

    `messages` and `held_out` are (N, W), MIN_MESSAGES or more; a message must not be in both. The background
    may be narrower than W: only its B features count for the fit.
    """
    mixture = fit_mixture(messages, NUM_CENTRES, rank)
    blank = torch.zeros(2, dtype=messages.dtype)
    unranked = BatchedPrototypes.of(Prototype(mixture, background, blank, blank))
    scores = unranked.raw_scores(held_out)[:, 0]
    levels = torch.linspace(0, 1, NUM_QUANTILES, dtype=messages.dtype)
    ratios, densities = (rounded_to_half(t.quantile(levels)) for t in scores)
    return Prototype(mixture, background, ratios, densities, len(messages))


@dataclass(frozen=True)
class BatchedPrototypes:
    """J prototypes of equal shapes, prepared to score messages together."""

    densities: Densities
    """3 J of them: for each prototype the two of its own mixture and that of the background."""
    quantiles: Tensor
    """(2, J, Q): of ratios, of densities."""

    @classmethod
    def of(cls, prototype: Prototype) -> BatchedPrototypes:
        """Return a batch of one prototype; takes a few milliseconds."""
        background = prototype.background
        mixture = prototype.mixture.narrowed(background.width)
        parts = [
            Densities.of(mixture, mixture, background, RATIO_WEIGHTS),
            Densities.of(mixture, mixture, background, DENSITY_WEIGHTS),
            Densities.of(background, background, background, (1.0, 0.0)),
        ]
        quantiles = torch.stack([prototype.ratios, prototype.densities])
        return cls(Densities.concatenated(parts), quantiles[:, None])

    @classmethod
    def concatenated(cls, batches: Sequence[BatchedPrototypes]) -> BatchedPrototypes:
        """Return one batch of all prototypes, whose `shapes` must be equal."""
        densities = Densities.concatenated([batch.densities for batch in batches])
        return cls(densities, torch.cat([batch.quantiles for batch in batches], 1))

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """The shapes that must be equal in batches to be concatenated."""
        return *self.densities.shapes, self.quantiles.shape

    def raw_scores(self, vectors: Tensor) -> Tensor:
        """Return ratio and density of each vector (N, W), (2, J, N)."""
        wide, density, background = self.densities(vectors).T.unflatten(0, (-1, 3)).unbind(1)
        return torch.stack([wide - background, density])

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return the fit of each vector (N, W), (N, J); negative below all of the held-out messages."""
        return _fisher_combined(*_quantile_rank(self.raw_scores(vectors), self.quantiles)).T


class PrototypeScorer:
    """The fit of messages to one prototype."""

    def __init__(self, prototype: Prototype) -> None:
        """Prepare the densities; takes a few milliseconds."""
        self.prototype, self.batched = prototype, BatchedPrototypes.of(prototype)

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return the fit of each vector (N, W), (N,)."""
        return self.batched(vectors)[:, 0]


def _quantile_rank(values: Tensor, quantiles: Tensor) -> Tensor:
    """Return the share of a distribution that is no larger than each value; below all, a negative distance.

    Values are (..., N), the quantiles of their distributions (..., Q).
    """
    last = quantiles.shape[-1] - 1
    above = torch.searchsorted(quantiles, values, right=True).clamp(1, last)
    low, high = quantiles.gather(-1, above - 1), quantiles.gather(-1, above)
    inside = ((values - low) / (high - low).clamp_min(1e-9)).clamp(0, 1)
    lowest, highest = quantiles[..., :1], quantiles[..., -1:]
    below = (values - lowest) / (highest - lowest).clamp_min(1e-9)
    return (above - 1 + inside) / last + below.clamp_max(0)


def _fisher_combined(first: Tensor, second: Tensor) -> Tensor:
    """Return the p-value of the product of two p-values; the lower one where it is not positive."""
    lower = torch.minimum(first, second)
    product = first.clamp_min(0) * second.clamp_min(0)
    return torch.where(lower > 0, product * (1 - product.clamp_min(1e-300).log()), lower)
