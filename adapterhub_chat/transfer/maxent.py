"""Maximum-entropy transfer: weights of source examples by how well they represent the target.

Of all weightings of n source examples whose mean target log-likelihood reaches a level, the one of smallest
KL divergence to the uniform is w_i ~ exp(lam * log p_T(y_i | x_i)); lam = 1 is P_S(x) P_T(y|x), normalised.
If the target has no labels, entropy balancing (Hainmueller 2012, doi.org/10.1093/pan/mpr025) matches the
mean of features instead. Pure functions of float64 tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapterhub_chat.errors import DataError

MAX_WEIGHT = 20.0
"""Largest weight of one example; the mean is 1."""
BISECTION_STEPS = 60
"""Halvings of a bisection: more than a float64 can resolve."""


@dataclass(frozen=True)
class Weighting:
    """Weights of source examples, of mean 1, and statistics of them."""

    weights: Tensor
    """(n,) float64."""
    lam: float
    """The Lagrange multiplier: 0 gives uniform weights, 1 the plain formula."""
    effective: float
    """Effective sample size, as a share of n."""
    clipped: int
    """Number of weights that were cut to the maximum."""
    note: str = ""
    """What the weights do not reach, and how close they come."""
    residual: float | None = None
    """For balanced features: the largest distance of means left, in the source's standard deviations."""


def tilt(log_likelihood: Tensor, lam: float) -> Tensor:
    """Return w_i ~ exp(lam * l_i), (n,), summing to 1."""
    return (lam * log_likelihood.double()).softmax(0)


def effective_size(weights: Tensor) -> float:
    """Return the effective sample size (sum w)^2 / sum w^2."""
    weights = weights.double()
    return float(weights.sum() ** 2 / weights.square().sum())


def reweighted(
    log_likelihood: Tensor, *, share: float = 0.3, max_weight: float = MAX_WEIGHT
) -> Weighting:
    """Return the weighting for (n,) target log-likelihoods of the source's labels.

    The multiplier is 1, or smaller, so that the effective sample size is at least `share` of n; then weights
    are cut to `max_weight`. Raises DataError if there are no numbers, or some are not finite.
    """
    _check(log_likelihood)
    count, lam = len(log_likelihood), 1.0
    if effective_size(tilt(log_likelihood, lam)) < share * count:
        low, high = 0.0, lam  # the effective size falls as lam grows
        for _ in range(BISECTION_STEPS):
            middle = (low + high) / 2
            enough = effective_size(tilt(log_likelihood, middle)) >= share * count
            low, high = (middle, high) if enough else (low, middle)
        lam = low
    return _clipped(tilt(log_likelihood, lam), lam, max_weight)


def at_level(log_likelihood: Tensor, level: float) -> Weighting:
    """Return the weighting whose mean log-likelihood, before clipping, is `level`; see `lam_for`."""
    lam = lam_for(log_likelihood, level)
    return _clipped(tilt(log_likelihood, lam), lam, MAX_WEIGHT)


def lam_for(log_likelihood: Tensor, level: float) -> float:
    """Return the multiplier at which the weighted mean of (n,) log-likelihoods is `level`.

    Raises DataError, naming the nearest level, if no weighting reaches it: it must lie between the plain
    mean (lam = 0) and the largest value (lam -> infinity).
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
    upper = 1.0
    while float(tilt(values, upper) @ values) < level:
        upper *= 2
    lower = 0.0
    for _ in range(BISECTION_STEPS):
        middle = (lower + upper) / 2
        below = float(tilt(values, middle) @ values) < level
        lower, upper = (middle, upper) if below else (lower, middle)
    return lower


MAX_RESIDUAL = 0.25
"""Distance of two means, in standard deviations of the source, up to which they count as equal."""
RIDGE_FACTOR, MAX_RIDGES = 4.0, 24
"""By how much the ridge grows while the effective sample size is too small, and how often at most."""
MIN_FEATURE_SHARE = 0.7
"""Smallest effective sample size, as a share, for weights by features alone. Features know nothing of the
labels: a closer match soon gains less than the fewer examples lose (scripts/compare_reweighting.py)."""


def balanced(
    source: Tensor,
    target: Tensor,
    *,
    ridge: float = 1e-2,
    share: float = MIN_FEATURE_SHARE,
    max_weight: float = MAX_WEIGHT,
) -> Weighting:
    """Return weights ~ exp(lam . phi) for source features (n, d) that match the mean of target ones (m, d).

    Minimises the convex dual log mean exp(lam . phi) - lam . phi_T + ridge / 2 |lam|^2 by L-BFGS; features
    are divided by the source's standard deviations first. The ridge grows until the effective sample size is
    at least `share` of n; then weights are cut to `max_weight`. If no weights reach the target, the nearest
    ones are returned with a note. Source examples that are all alike get equal weights.
    """
    _check(source)
    _check(target)
    if len(source) < 2 or not source.shape[1]:
        note = "the source's examples all look the same, so they count alike"
        return Weighting(torch.ones(len(source)).double(), 0.0, 1.0, 0, note)
    mean, deviation = source.double().mean(0), source.double().std(0).clamp(min=1e-9)
    phi, goal = (source.double() - mean) / deviation, (target.double().mean(0) - mean) / deviation
    for _ in range(MAX_RIDGES):
        lam = _dual_minimum(phi, goal, ridge)
        weights = (phi @ lam).softmax(0)
        if effective_size(weights) >= share * len(phi):
            break
        ridge *= RIDGE_FACTOR
    weighting = _clipped(weights, float(lam.norm()), max_weight)
    residual = float((weighting.weights @ phi / len(phi) - goal).abs().max())
    before = float(goal.abs().max())
    note = (
        "no multiplier brings the source's mean features to the target's with an effective size of "
        f"{share:.0%}: the nearest leaves {residual:.2f} of {before:.2f} standard deviations"
    )
    return replace(weighting, note=note if residual > MAX_RESIDUAL else "", residual=residual)


def drawn(weights: Tensor, count: int) -> list[int]:
    """Return `count` indices, each drawn in proportion to its weight (n,), in ascending order.

    Systematic resampling at even steps of the cumulated weights, which varies less than independent draws
    (Douc, Cappe, Moulines 2005, arXiv cs/0507025).
    """
    _check(weights)
    shares = (weights.double() / weights.double().sum()).cumsum(0)
    positions = (torch.arange(count).double() + 0.5) / count
    return torch.searchsorted(shares, positions).clamp(max=len(weights) - 1).tolist()


def principal(source: Tensor, target: Tensor, max_directions: int) -> tuple[Tensor, Tensor]:
    """Project features (n, d), (m, d) on the source's k <= max_directions principal directions.

    With more dimensions than examples, balancing would match noise.
    """
    _check(source)
    _check(target)
    mean = source.double().mean(0)
    _, spread, directions = torch.linalg.svd(source.double() - mean, full_matrices=False)
    widest = spread[:max_directions]
    basis = directions[:max_directions][widest > max(1e-5 * float(spread[0]), 1e-9)]
    return (source.double() - mean) @ basis.T, (target.double() - mean) @ basis.T


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


def _clipped(weights: Tensor, lam: float, max_weight: float) -> Weighting:
    """Scale weights to mean 1 and cut them to `max_weight`; the others are scaled up to keep the mean."""
    scaled = weights * len(weights)
    over = scaled > max_weight
    if bool(over.any()) and bool((~over).any()):
        remaining = len(weights) - max_weight * int(over.sum())
        if remaining > 0:
            scaled = torch.where(over, max_weight, scaled * remaining / scaled[~over].sum())
    return Weighting(scaled, lam, effective_size(scaled) / len(scaled), int(over.sum()))


def _check(values: Tensor) -> None:
    if not len(values):
        raise DataError("there is nothing to weigh: no source or target examples")
    if not bool(values.isfinite().all()):
        num_bad = int((~values.isfinite()).sum())
        raise DataError(f"{num_bad} of {values.numel()} numbers to weigh by are not finite")
