"""From fits to a route: a set of prototypes, a two-stage cascade, and abstention."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from adapterhub_chat.route.fit import BatchedPrototypes, PrototypeScorer
from adapterhub_chat.route.gaussians import LinearDiscriminant
from adapterhub_chat.types import BACKBONE, NO_ADAPTER, Mix

MIN_FIT = 0.02
"""Fit from which an adapter is close to a message; where none is close, the router abstains."""
OUTLIER_FIT = -0.2
"""Fit below which an adapter is excluded although another is close: all of its own held-out messages fit
clearly better."""
SHARE_TEMPERATURE = 4.0
"""Divides the log p under the common covariance, so that the shares are calibrated."""
PREVIOUS_ODDS = 4.0
"""Prior odds of the adapter of the previous turn against any other."""
CONFIDENT_SHARE, CONFIDENT_FIT = 0.99, 0.3
"""Share and fit from which the first stage of the cascade decides."""
SCORER_BATCH = 16
"""Messages that are scored at once."""
MIN_MIX_SHARE = 0.1
"""A smaller share is left out of a mix."""


@dataclass(frozen=True)
class Route:
    """The adapters that should answer a message. An abstention has the empty mix: the backbone answers."""

    adapter: str
    """The heaviest of the mix, `backbone` after an abstention."""
    mix: Mix
    confidence: float
    """In [0, 1]: the adapter's share, reduced where the message does not fit its prototype."""
    abstained: bool
    reason: str
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Adapter -> its `share` among those that are close (of all, where none is), and its `fit`."""


class ScorerSet:
    """The scorers of several adapters, evaluated together."""

    def __init__(self, scorers: Mapping[str, PrototypeScorer]) -> None:
        """Take the scorers by adapter name, at least one; the main cost is one factorisation (W, W)."""
        self.scorers = dict(scorers)
        prototypes = [scorer.prototype for scorer in self.scorers.values()]
        self._discriminant = LinearDiscriminant([(p.mixture, p.background) for p in prototypes])
        groups: dict[tuple[torch.Size, ...], list[int]] = {}
        batches = [scorer.batched for scorer in self.scorers.values()]
        for index, batch in enumerate(batches):
            groups.setdefault(batch.shapes, []).append(index)
        self._batches = [
            BatchedPrototypes.concatenated([batches[i] for i in group]) for group in groups.values()
        ]
        self._order = torch.tensor([i for group in groups.values() for i in group]).argsort()

    def routes(self, vectors: Tensor, *, top: int = 1, previous: str | None = None) -> list[Route]:
        """Return the route of the message of each vector (N, W); see `choose_route`."""
        log_probs = self._discriminant(vectors).tolist()
        fits = torch.cat([self._fits(part) for part in vectors.split(SCORER_BATCH)]).tolist()
        rows = (
            dict(zip(self.scorers, zip(*row, strict=True), strict=True))
            for row in zip(log_probs, fits, strict=True)
        )
        return [choose_route(row, top=top, previous=previous) for row in rows]

    def _fits(self, vectors: Tensor) -> Tensor:
        """Return the fit of each vector (N, W) to each adapter, (N, J)."""
        return torch.cat([batch(vectors) for batch in self._batches], 1)[:, self._order]


@dataclass(frozen=True)
class AdapterScorers:
    """An adapter's scorers, by early-layer and by token features; the latter may be missing."""

    early_layer: PrototypeScorer
    token: PrototypeScorer | None = None


class Cascade:
    """Two stages: token features decide the clear messages, early-layer features all others."""

    def __init__(self, scorers: Mapping[str, AdapterScorers]) -> None:
        """Take the scorers by adapter name.

        The first stage is left out where an adapter has no token scorer, and where there is a single adapter:
        token features separate adapters well, but tell poorly whether a message is foreign to all of them.
        """
        by_token = {name: pair.token for name, pair in scorers.items() if pair.token}
        self.early_layer_stage = ScorerSet({n: pair.early_layer for n, pair in scorers.items()})
        self.token_stage = ScorerSet(by_token) if 1 < len(by_token) == len(scorers) else None

    def routes(
        self,
        token_vectors: Tensor,
        early_layer_vectors: Callable[[Sequence[int]], Tensor],
        *,
        top: int = 1,
        previous: str | None = None,
    ) -> list[Route]:
        """Return the route of the message of each token vector (N, W); see `choose_route`.

        `early_layer_vectors` computes the vectors (n, W) of the messages at n indices; it is called at most
        once.
        """
        routes: list[Route | None] = [None] * len(token_vectors)
        if self.token_stage is not None:
            first = self.token_stage.routes(token_vectors, previous=previous)
            routes = [_if_confident(route) for route in first]
        open_indices = [i for i, route in enumerate(routes) if route is None]
        second: list[Route] = []
        if open_indices:
            vectors = early_layer_vectors(open_indices)
            second = self.early_layer_stage.routes(vectors, top=top, previous=previous)
        remaining = iter(second)
        return [next(remaining) if route is None else route for route in routes]


def _if_confident(route: Route) -> Route | None:
    """Return a route of the first stage if its share and fit suffice, else None."""
    score = route.scores.get(route.adapter)
    if score is None or score["share"] < CONFIDENT_SHARE or score["fit"] < CONFIDENT_FIT:
        return None
    return replace(route, reason=f"at a glance, {route.reason}")


def choose_route(
    scores: Mapping[str, tuple[float, float]], *, top: int = 1, previous: str | None = None
) -> Route:
    """Return the route that follows from the (log p, fit) of each adapter.

    An adapter is close from a fit of MIN_FIT, and excluded below OUTLIER_FIT; at most `top` share the mix.
    `previous` is the adapter of the conversation's last turn: it stays unless another is clearly better, also
    where none is close.
    """
    if not scores:
        return abstention("no adapter can be routed to")
    eligible = {name: pair for name, pair in scores.items() if pair[1] >= OUTLIER_FIT}
    close = any(fit >= MIN_FIT for _, fit in scores.values())
    shares = _shares(eligible if close else scores, previous)
    details = {n: {"share": shares.get(n, 0.0), "fit": fit} for n, (_, fit) in scores.items()}
    best = max(shares, key=shares.__getitem__)
    if not close:
        fallback = best if previous not in scores else str(previous)
        confidence = shares[fallback] * max(0.0, scores[fallback][1]) / MIN_FIT
        if fallback == previous:
            reason = f"no adapter is close, so the conversation stays with {fallback}"
            return Route(fallback, Mix(((fallback, 1.0),)), confidence, False, reason, details)
        reason = (
            f"no adapter is close; {best}, the likeliest, has hardly a message as unlike its others"
        )
        return abstention(reason, confidence, details)
    ranked = sorted(shares, key=shares.__getitem__, reverse=True)
    chosen = [n for n in ranked if n == best or shares[n] >= MIN_MIX_SHARE][:top]
    total = sum(shares[n] for n in chosen)
    mix = Mix(tuple((n, shares[n] / total) for n in chosen))
    reason = (
        f"{best} is the likeliest of {len(eligible)} that may be meant, {shares[best]:.0%}; "
        f"{max(0.0, scores[best][1]):.0%} of its own messages are no nearer"
    )
    return Route(best, mix, shares[best], False, reason, details)


def abstention(
    reason: str, confidence: float = 0.0, scores: Mapping[str, Mapping[str, float]] | None = None
) -> Route:
    """Return the route to the bare backbone."""
    return Route(BACKBONE, NO_ADAPTER, confidence, True, reason, scores or {})


def _shares(scores: Mapping[str, tuple[float, float]], previous: str | None) -> dict[str, float]:
    """Return each adapter's share by its log p, with the prior odds of the previous one."""
    prior = {previous: math.log(PREVIOUS_ODDS)}
    logits = [
        log_prob / SHARE_TEMPERATURE + prior.get(name, 0.0)
        for name, (log_prob, _) in scores.items()
    ]
    shares = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
    return dict(zip(scores, shares, strict=True))
