"""Weights of a merge found without gradients: CMA-ES, a small population that learns where to look."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from cmaes import CMA

from adapterhub_chat.errors import UsageError

MOST = 1.5
"""Weights are looked for between -MOST and MOST, as LoraHub does (arXiv 2307.13269)."""
STEP = 0.3
"""How far from the start the first population spreads."""

Objective = Callable[[Sequence[float]], float]
"""Weights -> a number, the smaller the better; a NaN is worse than all numbers."""


def search_weights(
    objective: Objective, count: int, budget: int = 40, seed: int = 0
) -> list[float]:
    """Return the best of `budget` sets of `count` weights by a caller's objective.

    The first are the plain choices: the mean, the sum, each source alone. CMA-ES goes on from the best of
    them (arXiv 1604.00772, by the library cmaes). Equal seeds give equal weights.
    """
    if count < 1 or budget < 1:
        raise UsageError(f"a search needs a source and a try, not {count} and {budget}")
    tried: list[tuple[float, list[float]]] = []

    def loss(weights: list[float]) -> float:
        value = float(objective(weights))
        value = math.inf if math.isnan(value) else value
        tried.append((value, weights))
        return value

    for weights in _plain(count)[:budget]:
        loss(weights)
    _evolve(loss, min(tried)[1], budget - len(tried), seed)
    return min(tried)[1]


def _plain(count: int) -> list[list[float]]:
    """Return the choices that need no search, each once."""
    alone = [[float(i == j) for j in range(count)] for i in range(count)]
    choices = [[1 / count] * count, [1.0] * count, *alone]
    return [list(weights) for weights in dict.fromkeys(map(tuple, choices))]


def _evolve(
    loss: Callable[[list[float]], float], start: list[float], budget: int, seed: int
) -> None:
    """Let `loss` see `budget` more points, each population where the ones before it were best."""
    bounds = np.array([[-MOST, MOST]] * len(start))
    evolution = CMA(mean=np.array(start), sigma=STEP, bounds=bounds, seed=seed)
    while budget > 0:
        points = [evolution.ask() for _ in range(min(evolution.population_size, budget))]
        judged = [(point, loss(point.tolist())) for point in points]
        budget -= len(points)
        if len(points) == evolution.population_size:
            evolution.tell(judged)
