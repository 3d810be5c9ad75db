"""Route: which adapter a message is for, told from the messages that each adapter has learnt from.

An adapter's prototype is a cloud: the centres of its own messages' vectors (looks.py) and one covariance
around them, beside the cloud of what the backbone makes up by itself (imagine.py). A message is judged twice:

    ratio   log p(message | own cloud) - log p(message | background)     which adapter?   (arXiv 2106.09022)
    density log p(message | own cloud, its covariance hardly widened)    is it like any?  (arXiv 1807.03888)

Both are ranked among those of the adapter's own held-out messages: the lower rank is the `fit`, a conformal
p-value. The best ratio wins among the adapters whose fit is at least `LEAST`; where there is none the router
abstains. An adapter's own messages meet that at about one to two times that rate, whatever the clouds look
like. No prototype depends on another, so adding one changes nothing in the others. Legend: N messages,
W width, K centres, R rank, Q quantiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapterhub_chat.types import BACKBONE, NO_ADAPTER, Mix

CENTRES, RANK, BACKGROUND_RANK, QUANTILES = 2, 64, 64, 33
"""Size of what is kept of an adapter's messages, and of the background."""
ROUNDS = 15
"""Of k-means."""
FEWEST = 5
"""Messages that a prototype needs to be learnt from, and as many held out."""
WIDENED, SLIGHTLY = (0.8, 0.02), (0.9, 0.1)
"""Weights of own and background covariance: in the ratio, and in the density."""
FLOOR = 0.003
"""Variance that every direction has at least, as a share of the mean."""
LEAST = 0.02
"""Fit below which the router abstains."""
SHARPNESS = 4.0
"""Differences of ratios count in spreads of held-out ratios, over this."""
STAY = 4.0
"""How much likelier than any other the adapter of the turn before is, before the message is read."""
SLIGHT = 0.1
"""A share of a mix below this is left out."""


@dataclass(frozen=True)
class Cloud:
    """Messages as Gaussians with one covariance, factors^T factors + diag(rest), rounded to float16."""

    centres: Tensor
    """(K, W)"""
    shares: Tensor
    """(K,): how many of the messages are around each; above 0, sum 1."""
    factors: Tensor
    """(R, W)"""
    rest: Tensor
    """(W,): variances, >= 0."""


@dataclass(frozen=True)
class Prototype:
    """What an adapter's messages look like."""

    own: Cloud
    background: Cloud
    ratios: Tensor
    """(Q,): quantiles over the held-out messages, ascending."""
    densities: Tensor
    """(Q,)"""
    count: int = 0
    """Messages that it was learnt from."""


@dataclass(frozen=True)
class Route:
    """Who a message is for. An abstention has the empty mix: the backbone answers."""

    adapter: str
    """The heaviest of the mix, `backbone` after an abstention."""
    mix: Mix
    confidence: float
    """In [0, 1]: the adapter's share, less where the message is unlike all of its own."""
    abstained: bool
    reason: str
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Adapter -> its `share` among those that are close (of all, where none is), and its `fit`."""


def cloud_of(vectors: Tensor, centres: int, rank: int) -> Cloud:
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
    factors = _rounded(largest)
    rest = (around.pow(2).sum(0) - factors.pow(2).sum(0)).clamp_min(0)
    return Cloud(
        _rounded(middles), _rounded(counts[present] / len(vectors)), factors, _rounded(rest)
    )


def learn(own: Tensor, held_out: Tensor, background: Cloud) -> Prototype:
    """Return the prototype of an adapter from vectors of its messages: to learn from, and to rank among.

    `own` and `held_out` are (N, W), FEWEST or more; a message must not be in both.
    """
    cloud = cloud_of(own, CENTRES, RANK)
    blank = torch.zeros(2, dtype=own.dtype)
    judge = Judge(Prototype(cloud, background, blank, blank))
    places = torch.linspace(0, 1, QUANTILES, dtype=own.dtype)
    ratios, densities = (_rounded(t.quantile(places)) for t in judge.raw(held_out))
    return Prototype(cloud, background, ratios, densities, len(own))


class Judge:
    """A prototype made ready: how well messages fit to it."""

    def __init__(self, prototype: Prototype) -> None:
        """Prepare the three densities; a few milliseconds."""
        own, background = prototype.own, prototype.background
        self._prototype = prototype
        self._own = _Density(own, own, background, WIDENED)
        self._typical = _Density(own, own, background, SLIGHTLY)
        self._background = _Density(background, background, background, (1.0, 0.0))

    @property
    def spread(self) -> float:
        """How much the ratios of its own messages differ: half of what the middle two thirds span."""
        ratios = self._prototype.ratios
        low, high = ratios[len(ratios) // 6], ratios[-1 - len(ratios) // 6]
        return max(1.0, float(high - low) / 2)

    def raw(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return ratio and density of each vector (N, W), (N,) each."""
        return self._own(vectors) - self._background(vectors), self._typical(vectors)

    def __call__(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return ratio and fit of each vector (N, W), (N,) each; below all of its own, a fit is negative."""
        ratios, densities = self.raw(vectors)
        own = self._prototype
        return ratios, torch.minimum(_rank(ratios, own.ratios), _rank(densities, own.densities))


class Panel:
    """Several adapters' judges together: whom messages are for."""

    def __init__(self, judges: Mapping[str, Judge]) -> None:
        """Take the judges by adapter name."""
        self.judges = dict(judges)

    def fits(self, vectors: Tensor) -> Tensor:
        """Return how well each vector (N, W) fits to the adapter that it fits best, (N,)."""
        return torch.stack([judge(vectors)[1] for judge in self.judges.values()]).amax(0)

    def routes(self, vectors: Tensor, *, top: int = 1, previous: str | None = None) -> list[Route]:
        """Return whom the message of each vector (N, W) is for; see `choose`."""
        judged = {name: (*judge(vectors), judge.spread) for name, judge in self.judges.items()}
        rows = (
            {n: (float(r[i]), float(f[i]), s) for n, (r, f, s) in judged.items()}
            for i in range(len(vectors))
        )
        return [choose(row, top=top, previous=previous) for row in rows]


def choose(
    judged: Mapping[str, tuple[float, float, float]],
    *,
    top: int = 1,
    previous: str | None = None,
    least: float = LEAST,
) -> Route:
    """Return the route that ratio, fit and spread of each adapter mean.

    Those whose fit is below `least` are out; at most `top` share the mix. `previous` is the adapter of the
    conversation's last turn: it stays unless another is clearly better, also where none is close.
    """
    if not judged:
        return abstention("no adapter can be routed to")
    able = {name: own for name, own in judged.items() if own[1] >= least}
    shares = _shares(able or judged, previous)
    scores = {n: {"share": shares.get(n, 0.0), "fit": own[1]} for n, own in judged.items()}
    best = max(shares, key=shares.__getitem__)
    if not able:
        sure = shares[best] * max(0.0, judged[best][1]) / least
        if previous in judged:
            why = f"no adapter is close, so the conversation stays with {previous}"
            return Route(str(previous), Mix(((str(previous), 1.0),)), sure, False, why, scores)
        why = (
            f"no adapter is close; {best}, the likeliest, has hardly a message as unlike its others"
        )
        return abstention(why, sure, scores)
    ranked = sorted(shares, key=shares.__getitem__, reverse=True)
    chosen = [n for n in ranked if n == best or shares[n] >= SLIGHT][:top]
    whole = sum(shares[n] for n in chosen)
    mix = Mix(tuple((n, shares[n] / whole) for n in chosen))
    why = (
        f"{best} is the likeliest of {len(able)} that are close, {shares[best]:.0%}; "
        f"{judged[best][1]:.0%} of its own messages are no nearer"
    )
    return Route(best, mix, shares[best], False, why, scores)


def abstention(
    reason: str, confidence: float = 0.0, scores: Mapping[str, Mapping[str, float]] | None = None
) -> Route:
    """Return the route to the bare backbone."""
    return Route(BACKBONE, NO_ADAPTER, confidence, True, reason, scores or {})


def _shares(
    judged: Mapping[str, tuple[float, float, float]], previous: str | None
) -> dict[str, float]:
    """Return each adapter's share by its ratio, the previous one's with its bonus."""
    spread = sum(s for _, _, s in judged.values()) / len(judged) / SHARPNESS
    bonus = {previous: math.log(STAY)}
    logits = [ratio / spread + bonus.get(name, 0.0) for name, (ratio, _, _) in judged.items()]
    shares = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
    return dict(zip(judged, shares, strict=True))


class _Density:
    """log p of a cloud's centres under a weighted sum of two covariances, by Woodbury's identity."""

    def __init__(self, cloud: Cloud, first: Cloud, second: Cloud, weights: Sequence[float]) -> None:
        parts = [(w, c) for w, c in zip(weights, (first, second), strict=True) if w]
        factors = torch.cat([math.sqrt(w) * c.factors for w, c in parts])
        variances = sum((w * c.rest for w, c in parts), torch.zeros_like(cloud.rest))
        mean = (variances + factors.pow(2).sum(0)).mean()
        variances = variances + FLOOR * mean + 1e-9
        self._root = variances.rsqrt()
        scaled = factors * self._root
        lower = torch.linalg.cholesky(torch.eye(len(scaled)).to(scaled) + scaled @ scaled.T)
        self._inside = torch.linalg.solve_triangular(lower, scaled, upper=False).T
        self._centres = cloud.centres * self._root
        size = variances.log().sum() / 2 + lower.diagonal().log().sum()
        self._offsets = cloud.shares.log() - size

    def __call__(self, vectors: Tensor) -> Tensor:
        apart = (vectors * self._root)[:, None] - self._centres
        distance = apart.pow(2).sum(-1) - (apart @ self._inside).pow(2).sum(-1)
        return torch.logsumexp(self._offsets - distance / 2, 1)


def _rank(values: Tensor, quantiles: Tensor) -> Tensor:
    """Return which share of a distribution is no larger than each value; below all, how far as a negative."""
    last = len(quantiles) - 1
    above = torch.searchsorted(quantiles, values, right=True).clamp(1, last)
    low, high = quantiles[above - 1], quantiles[above]
    inside = ((values - low) / (high - low).clamp_min(1e-9)).clamp(0, 1)
    spread = (quantiles[-1] - quantiles[0]).clamp_min(1e-9)
    return (above - 1 + inside) / last + ((values - quantiles[0]) / spread).clamp_max(0)


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


def _rounded(numbers: Tensor) -> Tensor:
    """Return numbers as they come back from float16, in float64."""
    largest = torch.finfo(torch.float16).max
    return numbers.clamp(-largest, largest).half().double()
