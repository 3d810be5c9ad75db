"""Gradient-free search for merge weights by CMA-ES."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from cmaes import CMA

from adapterhub_chat.errors import UsageError

MAX_WEIGHT = 1.5
"""Weights are searched between -MAX_WEIGHT and MAX_WEIGHT, as in LoraHub (arXiv 2307.13269)."""
INITIAL_SIGMA = 0.3
"""Standard deviation of the first population around the start."""

Objective = Callable[[Sequence[float]], float]
"""Weights -> loss, the smaller the better; NaN counts as infinity."""


def search_weights(
    objective: Objective, num_weights: int, budget: int = 40, seed: int = 0
) -> list[float]:
    """Return the best weights of `budget` evaluations of an objective.

    The first evaluations are the simple choices: the mean, the sum, each source alone. CMA-ES continues from
    the best of them (arXiv 1604.00772, by the library cmaes). Equal seeds give equal weights.
    """
    if num_weights < 1 or budget < 1:
        raise UsageError(f"a search needs a source and a try, not {num_weights} and {budget}")
    evaluated: list[tuple[float, list[float]]] = []

    def loss(weights: list[float]) -> float:
        value = float(objective(weights))
        value = math.inf if math.isnan(value) else value
        evaluated.append((value, weights))
        return value

    for weights in _simple_choices(num_weights)[:budget]:
        loss(weights)
    _evolve(loss, min(evaluated)[1], budget - len(evaluated), seed)
    return min(evaluated)[1]


def _simple_choices(num_weights: int) -> list[list[float]]:
    """Return the mean, the sum and each source alone, without duplicates."""
    single = [[float(i == j) for j in range(num_weights)] for i in range(num_weights)]
    choices = [[1 / num_weights] * num_weights, [1.0] * num_weights, *single]
    return [list(weights) for weights in dict.fromkeys(map(tuple, choices))]


def _evolve(
    loss: Callable[[list[float]], float], start: list[float], budget: int, seed: int
) -> None:
    """Evaluate `loss` at `budget` more points by CMA-ES; only complete populations update its state."""
    bounds = np.array([[-MAX_WEIGHT, MAX_WEIGHT]] * len(start))
    evolution = CMA(mean=np.array(start), sigma=INITIAL_SIGMA, bounds=bounds, seed=seed)
    while budget > 0:
        points = [evolution.ask() for _ in range(min(evolution.population_size, budget))]
        losses = [(point, loss(point.tolist())) for point in points]
        budget -= len(points)
        if len(points) == evolution.population_size:
            evolution.tell(losses)
