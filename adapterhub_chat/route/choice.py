"""From fits to a route: panel, cascade and abstention."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from adapterhub_chat.route.fit import Fits, PrototypeScorer
from adapterhub_chat.route.gaussians import LinearDiscriminant
from adapterhub_chat.types import BACKBONE, NO_ADAPTER, Mix

LEAST = 0.02
"""Fit below which an adapter is not close; where none is, the router abstains."""
FAR = -0.2
"""Fit below which an adapter is out although another is close: no message of its own was nearly so unlike."""
TEMPER = 4.0
"""Differences of log p under the common covariance, over this, make shares as sure as they are right."""
STAY = 4.0
"""How much likelier than any other the adapter of the turn before is, before the message is read."""
PLAIN, TYPICAL = 0.99, 0.3
"""Share and fit from which an adapter is chosen at a glance."""
SCORER_BATCH = 16
"""Messages that a panel judges at once."""
SLIGHT = 0.1
"""A share of a mix below this is left out."""


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


class ScorerSet:
    """Several adapters' judges together: whom messages are for."""

    def __init__(self, judges: Mapping[str, PrototypeScorer]) -> None:
        """Take the judges by adapter name, at least one; most of the time is one factorisation (W, W)."""
        self.judges = dict(judges)
        own = [judge.prototype for judge in self.judges.values()]
        self._apart = LinearDiscriminant([(one.own, one.background) for one in own])
        alike: dict[tuple[torch.Size, ...], list[int]] = {}
        fits = [judge.fits for judge in self.judges.values()]
        for place, one in enumerate(fits):
            alike.setdefault(one.shapes, []).append(place)
        self._together = [Fits.joined([fits[i] for i in places]) for places in alike.values()]
        self._order = torch.tensor([i for places in alike.values() for i in places]).argsort()

    def routes(self, vectors: Tensor, *, top: int = 1, previous: str | None = None) -> list[Route]:
        """Return whom the message of each vector (N, W) is for; see `choose`."""
        likely = self._apart(vectors).tolist()
        fits = torch.cat([self._fits(some) for some in vectors.split(SCORER_BATCH)]).tolist()
        rows = (
            dict(zip(self.judges, zip(*own, strict=True), strict=True))
            for own in zip(likely, fits, strict=True)
        )
        return [choose(row, top=top, previous=previous) for row in rows]

    def _fits(self, vectors: Tensor) -> Tensor:
        """Return the fit of each vector (N, W) to each adapter, (N, J)."""
        return torch.cat([fits(vectors) for fits in self._together], 1)[:, self._order]


@dataclass(frozen=True)
class AdapterScorers:
    """Who judges an adapter's messages, by a look and at a glance; None where no glance has been learnt."""

    look: PrototypeScorer
    glance: PrototypeScorer | None = None


class Cascade:
    """The panel that looks at messages, behind one that spares it those that are plain at a glance."""

    def __init__(self, judges: Mapping[str, AdapterScorers]) -> None:
        """Take the judges by adapter name.

        All messages are looked at where one has no glance, and where there is one alone: a message is plain
        beside others, and whether it is anybody's is what a glance tells worst.
        """
        glances = {name: own.glance for name, own in judges.items() if own.glance}
        self.look = ScorerSet({name: own.look for name, own in judges.items()})
        self.glance = ScorerSet(glances) if 1 < len(glances) == len(judges) else None

    def routes(
        self,
        glances: Tensor,
        look: Callable[[Sequence[int]], Tensor],
        *,
        top: int = 1,
        previous: str | None = None,
    ) -> list[Route]:
        """Return whom the message of each glance (N, W) is for; see `choose`.

        `look` returns the closer vectors of the messages of some places, and is called at most once.
        """
        found: list[Route | None] = [None] * len(glances)
        if self.glance is not None:
            found = [_plain(route) for route in self.glance.routes(glances, previous=previous)]
        rest = [place for place, route in enumerate(found) if route is None]
        looked = iter(self.look.routes(look(rest), top=top, previous=previous) if rest else ())
        return [next(looked) if route is None else route for route in found]


def _plain(route: Route) -> Route | None:
    """Return a route by a glance, if that is enough."""
    own = route.scores.get(route.adapter)
    if own is None or own["share"] < PLAIN or own["fit"] < TYPICAL:
        return None
    return replace(route, reason=f"at a glance, {route.reason}")


def choose(
    judged: Mapping[str, tuple[float, float]],
    *,
    top: int = 1,
    previous: str | None = None,
    least: float = LEAST,
) -> Route:
    """Return the route that log p and fit of each adapter mean.

    One is close at a fit of `least`, out below FAR; at most `top` share the mix. `previous` is the adapter of
    the conversation's last turn: it stays unless another is clearly better, also where none is close.
    """
    if not judged:
        return abstention("no adapter can be routed to")
    able = {name: own for name, own in judged.items() if own[1] >= FAR}
    close = any(fit >= least for _, fit in judged.values())
    shares = _shares(able if close else judged, previous)
    scores = {n: {"share": shares.get(n, 0.0), "fit": own[1]} for n, own in judged.items()}
    best = max(shares, key=shares.__getitem__)
    if not close:
        stays = best if previous not in judged else str(previous)
        sure = shares[stays] * max(0.0, judged[stays][1]) / least
        if stays == previous:
            why = f"no adapter is close, so the conversation stays with {stays}"
            return Route(stays, Mix(((stays, 1.0),)), sure, False, why, scores)
        why = (
            f"no adapter is close; {best}, the likeliest, has hardly a message as unlike its others"
        )
        return abstention(why, sure, scores)
    ranked = sorted(shares, key=shares.__getitem__, reverse=True)
    chosen = [n for n in ranked if n == best or shares[n] >= SLIGHT][:top]
    whole = sum(shares[n] for n in chosen)
    mix = Mix(tuple((n, shares[n] / whole) for n in chosen))
    why = (
        f"{best} is the likeliest of {len(able)} that may be meant, {shares[best]:.0%}; "
        f"{max(0.0, judged[best][1]):.0%} of its own messages are no nearer"
    )
    return Route(best, mix, shares[best], False, why, scores)


def abstention(
    reason: str, confidence: float = 0.0, scores: Mapping[str, Mapping[str, float]] | None = None
) -> Route:
    """Return the route to the bare backbone."""
    return Route(BACKBONE, NO_ADAPTER, confidence, True, reason, scores or {})


def _shares(judged: Mapping[str, tuple[float, float]], previous: str | None) -> dict[str, float]:
    """Return each adapter's share by its log p, the previous one's with its bonus."""
    bonus = {previous: math.log(STAY)}
    logits = [likely / TEMPER + bonus.get(name, 0.0) for name, (likely, _) in judged.items()]
    shares = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
    return dict(zip(judged, shares, strict=True))
