"""Weights of a merge found without gradients: CMA-ES, a small population that learns where to look."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adapterhub_chat.errors import UsageError

MOST = 1.5
"""Weights are looked for between -MOST and MOST, as LoraHub does (arXiv 2307.13269)."""
STEP = 0.3
"""How far from the start the first population spreads."""

Objective = Callable[[Sequence[float]], float]
"""Weights -> a number, the smaller the better; a NaN is worse than all numbers."""


def search(objective: Objective, count: int, budget: int = 40, seed: int = 0) -> list[float]:
    """Return the best of `budget` sets of `count` weights by a caller's objective.

    The first are the plain choices: the mean, the sum, each source alone. CMA-ES goes on from the best of
    them (arXiv 1604.00772, with rank-one and rank-mu updates). Equal seeds give equal weights.
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
    start = torch.tensor(min(tried)[1], dtype=torch.float64)
    _evolve(loss, start, budget - len(tried), torch.Generator().manual_seed(seed))
    return min(tried)[1]


def _plain(count: int) -> list[list[float]]:
    """Return the choices that need no search, each once."""
    alone = [[float(i == j) for j in range(count)] for i in range(count)]
    choices = [[1 / count] * count, [1.0] * count, *alone]
    return [list(weights) for weights in dict.fromkeys(map(tuple, choices))]


def _evolve(
    loss: Callable[[list[float]], float], mean: Tensor, budget: int, random: torch.Generator
) -> None:
    """Let `loss` see `budget` more points: CMA-ES with its default settings (arXiv 1604.00772, table 1)."""
    n = len(mean)
    size = 4 + int(3 * math.log(n))
    shares = math.log((size + 1) / 2) - torch.arange(1, size // 2 + 1).double().log()
    shares = shares / shares.sum()
    mass = float(1 / shares.square().sum())
    c_s, c_c = (mass + 2) / (n + mass + 5), (4 + mass / n) / (n + 4 + 2 * mass / n)
    c_1 = 2 / ((n + 1.3) ** 2 + mass)
    c_mu = min(1 - c_1, 2 * (mass - 2 + 1 / mass) / ((n + 2) ** 2 + mass))
    damping = 1 + c_s + 2 * max(0.0, math.sqrt((mass - 1) / (n + 1)) - 1)
    usual = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))
    covariance, step = torch.eye(n).double(), STEP
    path_s, path_c = torch.zeros(n).double(), torch.zeros(n).double()
    while budget > 0:
        values, axes = torch.linalg.eigh(covariance)
        spread = axes * values.clamp(min=1e-20).sqrt()
        noise = torch.randn(min(size, budget), n, generator=random, dtype=torch.float64)
        points = (mean + step * noise @ spread.T).clamp(-MOST, MOST)
        order = sorted(range(len(points)), key=[loss(p.tolist()) for p in points].__getitem__)
        budget -= len(points)
        if len(points) < size:
            return
        best = (points[order[: len(shares)]] - mean) / step
        move = shares @ best
        mean = mean + step * move
        whitened = axes @ ((axes.T @ move) / values.clamp(min=1e-20).sqrt())
        path_s = (1 - c_s) * path_s + math.sqrt(c_s * (2 - c_s) * mass) * whitened
        path_c = (1 - c_c) * path_c + math.sqrt(c_c * (2 - c_c) * mass) * move
        step *= math.exp((float(path_s.norm()) / usual - 1) * c_s / damping)
        covariance = (1 - c_1 - c_mu) * covariance + c_1 * torch.outer(path_c, path_c)
        covariance = covariance + c_mu * (best.T * shares) @ best
