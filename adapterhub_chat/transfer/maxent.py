"""Maximum-entropy transfer: which source examples speak for the target, as weights over them.

Of all weightings of n source examples whose mean target log-likelihood reaches a level, the one of smallest
KL divergence to the uniform is w_i ~ exp(lam * log p_T(y_i | x_i)); lam = 1 is P_S(x) P_T(y|x), normalised.
Where the target has no labels, entropy balancing (Hainmueller 2012, doi.org/10.1093/pan/mpr025) matches the
mean of features instead. Pure functions of float64 tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapterhub_chat.errors import DataError

STEPS = 60
"""Halvings of a bisection: more than a float64 can tell apart."""


@dataclass(frozen=True)
class Weighting:
    """Weights over source examples, mean 1, and how they came about."""

    weights: Tensor
    """(n,) float64."""
    lam: float
    """The Lagrange multiplier: 0 is the uniform, 1 the plain formula."""
    effective: float
    """Effective sample size, as a share of n."""
    clipped: int
    """How many weights were cut to the largest allowed."""
    note: str = ""
    """What the weights do not reach, and how near they come."""
    residual: float | None = None
    """Where means of features are matched: the largest distance left, in deviations of the source."""


def tilt(log_likelihood: Tensor, lam: float) -> Tensor:
    """Return w_i ~ exp(lam * l_i), (n,), summing to 1."""
    return (lam * log_likelihood.double()).softmax(0)


def effective_size(weights: Tensor) -> float:
    """Return (sum w)^2 / sum w^2: as many equal weights would vary as little."""
    weights = weights.double()
    return float(weights.sum() ** 2 / weights.square().sum())


def kl_to_uniform(weights: Tensor) -> float:
    """Return the KL divergence of weights that sum to 1 from equal ones, in nats."""
    weights = weights.double()
    return float(torch.special.xlogy(weights, weights * len(weights)).sum())


def reweighted(
    log_likelihood: Tensor, *, share: float = 0.3, lam: float = 1.0, most: float = 20.0
) -> Weighting:
    """Return the weighting for (n,) target log-likelihoods of the source's labels.

    `lam` is taken down until the effective sample size is at least `share` of n; then no weight is larger
    than `most` times the mean. Raises DataError for numbers that are none, or nothing to weigh.
    """
    _check(log_likelihood)
    count = len(log_likelihood)
    if effective_size(tilt(log_likelihood, lam)) < share * count:
        low, high = 0.0, lam  # the effective size falls as lam grows
        for _ in range(STEPS):
            middle = (low + high) / 2
            enough = effective_size(tilt(log_likelihood, middle)) >= share * count
            low, high = (middle, high) if enough else (low, middle)
        lam = low
    return _clipped(tilt(log_likelihood, lam), lam, most)


def at_level(log_likelihood: Tensor, level: float, *, most: float = 20.0) -> Weighting:
    """Return the weighting whose mean log-likelihood is `level`, but for what is clipped; see `lam_for`."""
    lam = lam_for(log_likelihood, level)
    return _clipped(tilt(log_likelihood, lam), lam, most)


def lam_for(log_likelihood: Tensor, level: float) -> float:
    """Return the multiplier at which the weighted mean of (n,) log-likelihoods is `level`.

    Raises DataError, naming the nearest level, when no weighting reaches it: it must lie between the plain
    mean (lam = 0) and the largest value (lam without end).
    """
    _check(log_likelihood)
    values = log_likelihood.double()
    low, high = float(values.mean()), float(values.max())
    if not low <= level < high:
        nearest = low if level < low else high
        raise DataError(
            f"no multiplier gives a mean log-likelihood of {level:.4g}: the nearest is {nearest:.4g} (lam "
            f"{'= 0' if level < low else 'without end'})"
        )
    top = 1.0
    while float(tilt(values, top) @ values) < level:
        top *= 2
    bottom = 0.0
    for _ in range(STEPS):
        middle = (bottom + top) / 2
        below = float(tilt(values, middle) @ values) < level
        bottom, top = (middle, top) if below else (bottom, middle)
    return bottom


NEAR = 0.25
"""Distance of two means, in deviations of the source, up to which they count as brought together."""
STEEPER, RIDGES = 4.0, 24
"""By how much the ridge grows while too few examples carry the weight, and how often at most."""
GENTLE = 0.7
"""Least effective sample size, as a share, where features alone say what is like the target: they know
nothing of the labels, and what they win in likeness is soon less than what fewer examples lose
(scripts/compare_reweighting.py)."""


def balanced(
    source: Tensor,
    target: Tensor,
    *,
    ridge: float = 1e-2,
    share: float = GENTLE,
    most: float = 20.0,
) -> Weighting:
    """Return weights ~ exp(lam . phi) for source features (n, d) that match the mean of target ones (m, d).

    Minimises the convex dual log mean exp(lam . phi) - lam . phi_T + ridge / 2 |lam|^2 by L-BFGS; features
    are scaled by the source's own deviations first. The ridge grows until the effective sample size is at
    least `share` of n. A target that no weights reach gets the nearest ones, and a note that says so; source
    examples that are all alike get equal ones.
    """
    _check(source)
    _check(target)
    if len(source) < 2 or not source.shape[1]:
        note = "the source's examples all look the same, so they count alike"
        return Weighting(torch.ones(len(source)).double(), 0.0, 1.0, 0, note)
    mean, deviation = source.double().mean(0), source.double().std(0).clamp(min=1e-9)
    phi, goal = (source.double() - mean) / deviation, (target.double().mean(0) - mean) / deviation
    for _ in range(RIDGES):
        lam = _dual_minimum(phi, goal, ridge)
        weights = (phi @ lam).softmax(0)
        if effective_size(weights) >= share * len(phi):
            break
        ridge *= STEEPER
    weighting = _clipped(weights, float(lam.norm()), most)
    residual = float((weighting.weights @ phi / len(phi) - goal).abs().max())
    before = float(goal.abs().max())
    note = (
        "no multiplier brings the source's mean features to the target's with an effective size of "
        f"{share:.0%}: the nearest leaves {residual:.2f} of {before:.2f} standard deviations"
    )
    return replace(weighting, note=note if residual > NEAR else "", residual=residual)


def drawn(weights: Tensor, count: int) -> list[int]:
    """Return `count` indices, each about as often as its weight (n,) says, in ascending order.

    Systematic resampling: the cumulated weights at even steps, which varies less than independent draws
    (Douc, Cappe, Moulines 2005, arXiv cs/0507025).
    """
    _check(weights)
    shares = (weights.double() / weights.double().sum()).cumsum(0)
    places = (torch.arange(count).double() + 0.5) / count
    return torch.searchsorted(shares, places).clamp(max=len(weights) - 1).tolist()


def principal(source: Tensor, target: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return both features (n, d), (m, d) along the source's `most` widest directions, (n, k), (m, k).

    There are more dimensions than examples to match otherwise, and noise would be matched.
    """
    _check(source)
    _check(target)
    mean = source.double().mean(0)
    _, spread, directions = torch.linalg.svd(source.double() - mean, full_matrices=False)
    kept = directions[:most][spread[:most] > max(1e-5 * float(spread[0]), 1e-9)]
    return (source.double() - mean) @ kept.T, (target.double() - mean) @ kept.T


def _dual_minimum(phi: Tensor, goal: Tensor, ridge: float) -> Tensor:
    lam = torch.zeros(phi.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([lam], max_iter=200, line_search_fn="strong_wolfe")

    def dual() -> Tensor:
        optimizer.zero_grad()
        value = (phi @ lam).logsumexp(0) - lam @ goal + ridge / 2 * lam.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(dual)
    return lam.detach()


def _clipped(weights: Tensor, lam: float, most: float) -> Weighting:
    """Scale to mean 1 and cut what is larger than `most`; the rest is scaled up again."""
    scaled = weights * len(weights)
    over = scaled > most
    if bool(over.any()) and bool((~over).any()):
        rest = len(weights) - most * int(over.sum())
        if rest > 0:
            scaled = torch.where(over, most, scaled * rest / scaled[~over].sum())
    return Weighting(scaled, lam, effective_size(scaled) / len(scaled), int(over.sum()))


def _check(values: Tensor) -> None:
    if not len(values):
        raise DataError("there is nothing to weigh: no source or target examples")
    if not bool(values.isfinite().all()):
        bad = int((~values.isfinite()).sum())
        raise DataError(f"{bad} of {values.numel()} numbers to weigh by are not finite")
