"""Merge methods: a table of pure functions from several deltas to one, each with its paper.

They get the deltas of one module as factors, and their weights; some also use the moments of its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from adapterhub_chat.lora.lowrank import Pair, concatenate_ranks
from adapterhub_chat.lora.weights import derive_seed
from adapterhub_chat.merge.sparsify import (
    drop,
    drop_by_rank,
    elected_sign,
    keep_largest,
    sign_consensus,
    sum_deltas,
    threshold,
)

OFF_DIAGONAL_FACTOR = 0.9
"""Factor on the off-diagonal entries of second moments, the shrinkage of arXiv 2212.09849."""
DIAGONAL_EPSILON = 1e-6
"""Share of the mean second moment that is added to each one, so that none is zero."""


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """The arguments of a method beside the deltas of one module."""

    weights: tuple[float, ...]
    density: float = 1.0
    seed: int = 0
    module: str = ""
    moments: tuple[Tensor, ...] = ()
    """Second moment of the module's inputs under each source: (in, in) float64, positive definite."""

    @property
    def metric(self) -> Tensor | None:
        """The weighted sum of the moments, (in, in) float64; None without moments."""
        parts = [m * w for m, w in zip(self.moments, self.weights, strict=False)]
        return torch.stack(parts).sum(0) if parts else None


Moments = Callable[[str], Sequence[Tensor]]
"""Module -> the mean x x^T (in, in) of its inputs x under each source, on examples of that source's task."""
MergeFunction = Callable[[Sequence[Pair], MergeSettings], Pair | Tensor]
"""(deltas of one module, settings) -> the merged delta, as factors or dense (out, in)."""
Sparsify = Callable[[Tensor, float, Generator], Tensor]
"""(delta, density, random numbers) -> the delta with fewer nonzero numbers."""
Consensus = Callable[[Tensor], Tensor]
"""Deltas (sources, ...) -> merged delta (...)."""


@dataclass(frozen=True, slots=True)
class Method:
    """A row of METHODS."""

    name: str
    function: MergeFunction
    paper: str
    about: str
    weights: Literal["mean", "ones"] = "ones"
    """The default weights: 1 / number of sources, or 1 each."""
    ranks: Literal["joined", "all", "largest"] = "largest"
    """The default rank: always the sum of the sources' ranks, by concatenation; as many as an exact result
    needs; or the largest of the sources' ranks."""
    density: float | None = None
    """The default share of numbers to keep; None: the method has no density."""
    needs_moments: bool = False
    """Whether it uses the second moments of the modules' inputs."""


# -- methods ---------------------------------------------------------------------------------------


def weighted_sum(pairs: Sequence[Pair], settings: MergeSettings) -> Pair:
    """Return sum_i w_i delta_i, exactly, as factors."""
    return concatenate_ranks(
        [(b * w, a) for (b, a), w in zip(pairs, settings.weights, strict=True)]
    )


def elementwise(sparsify: Sparsify, consensus: Consensus) -> MergeFunction:
    """Return the method that sparsifies every weighted delta, then combines them."""

    def method(pairs: Sequence[Pair], settings: MergeSettings) -> Tensor:
        sparse = [
            sparsify(delta, settings.density, _generator(settings, source))
            for source, delta in enumerate(_dense(pairs, settings))
        ]
        return consensus(torch.stack(sparse))

    return method


def sce(pairs: Sequence[Pair], settings: MergeSettings) -> Tensor:
    """Select where the sources vary most, weight them by what is selected, erase the minority's sign."""
    deltas = torch.stack(_dense(pairs, settings))
    variance = deltas.var(dim=0, correction=0)
    deltas = deltas * (variance >= threshold(variance, settings.density))
    energies = deltas.square().sum(dim=(1, 2))
    shares = energies / energies.sum() if energies.sum() > 0 else energies
    agreeing = shares[:, None, None] * (deltas.sign() == elected_sign(deltas))
    return (deltas * agreeing).sum(0) / agreeing.sum(0).clamp(min=torch.finfo(deltas.dtype).tiny)


def knots(pairs: Sequence[Pair], settings: MergeSettings) -> Pair:
    """Transform all deltas into one shared basis U S, and merge their coordinates V_i by TIES.

    [delta_1 ... delta_n] = U S [V_1 ... V_n]; directions that no source uses are left out, so that they
    do not count for the density.
    """
    q, r = torch.linalg.qr(concatenate_ranks(pairs)[0])
    cores = r.split([len(a) for _, a in pairs], dim=1)
    side_by_side = torch.cat([c @ a for c, (_, a) in zip(cores, pairs, strict=True)], dim=1)
    u, values, vh = torch.linalg.svd(side_by_side, full_matrices=False)
    used = values > values.max() * torch.finfo(values.dtype).eps * max(side_by_side.shape)
    parts = vh[used].chunk(len(pairs), dim=1)
    weighted = [part * w for part, w in zip(parts, settings.weights, strict=True)]
    sparse = [keep_largest(part, settings.density, Generator()) for part in weighted]
    return q @ (u[:, used] * values[used]), sign_consensus(torch.stack(sparse))


def regmean(pairs: Sequence[Pair], settings: MergeSettings) -> Pair:
    """Return the delta whose outputs are nearest, by least squares, to each source's on that source's inputs.

    It solves min_D sum_i w_i E|D x_i - delta_i x_i|^2: D = (sum_i w_i delta_i G_i) (sum_i w_i G_i)^-1,
    where G_i is the second moment of x_i.
    """
    total_moment = settings.metric
    assert total_moment is not None
    root = torch.linalg.cholesky(total_moment)
    parts = [
        (b, torch.cholesky_solve(g @ (a.T * w), root).T)
        for (b, a), g, w in zip(pairs, settings.moments, settings.weights, strict=True)
    ]
    return concatenate_ranks(parts)


def shrink_moment(moment: Tensor) -> Tensor:
    """Return a second moment in float64, shrunk towards its diagonal: it is estimated from few examples."""
    moment = moment.double()
    diagonal = moment.diagonal()
    floor = DIAGONAL_EPSILON * diagonal.mean().clamp(min=DIAGONAL_EPSILON)
    return moment * OFF_DIAGONAL_FACTOR + torch.diag(diagonal * (1 - OFF_DIAGONAL_FACTOR) + floor)


def _dense(pairs: Sequence[Pair], settings: MergeSettings) -> list[Tensor]:
    """Return the weighted deltas (out, in) of one module, float32."""
    return [(b @ a * w).float() for (b, a), w in zip(pairs, settings.weights, strict=True)]


def _generator(settings: MergeSettings, source: int) -> Generator:
    """Return a source's random generator for a module, independent of the other sources."""
    return Generator().manual_seed(derive_seed(settings.seed, f"{source} {settings.module}"))


# -- the table -------------------------------------------------------------------------------------

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(
            "linear",
            weighted_sum,
            "https://arxiv.org/abs/2203.05482",
            "the weighted mean of the deltas, exact; as many ranks as that takes, unless rank says less",
            weights="mean",
            ranks="all",
        ),
        Method(
            "cat",
            weighted_sum,
            "https://arxiv.org/abs/2409.05976",
            "the weighted mean of the deltas, exact; the sources' own factors side by side",
            weights="mean",
            ranks="joined",
        ),
        Method(
            "svd",
            weighted_sum,
            "https://doi.org/10.1007/BF02288367",
            "the weighted mean of the deltas, the best approximation of its rank",
            weights="mean",
        ),
        Method(
            "task_arithmetic",
            weighted_sum,
            "https://arxiv.org/abs/2212.04089",
            "the sum of the deltas; a negative weight takes a skill away",
        ),
        Method(
            "ties",
            elementwise(keep_largest, sign_consensus),
            "https://arxiv.org/abs/2306.01708",
            "trim to the largest numbers, elect a sign, mean of those that have it",
            density=0.5,
        ),
        Method(
            "dare_linear",
            elementwise(drop, sum_deltas),
            "https://arxiv.org/abs/2311.03099",
            "drop numbers by chance, scale up the others, weighted mean",
            weights="mean",
            density=0.5,
        ),
        Method(
            "dare_ties",
            elementwise(drop, sign_consensus),
            "https://arxiv.org/abs/2311.03099",
            "drop numbers by chance, scale up the others, then as ties",
            density=0.5,
        ),
        Method(
            "magnitude_prune",
            elementwise(keep_largest, sum_deltas),
            "https://arxiv.org/abs/2306.01708",
            "trim to the largest numbers, weighted mean",
            weights="mean",
            density=0.5,
        ),
        Method(
            "della",
            elementwise(drop_by_rank, sign_consensus),
            "https://arxiv.org/abs/2406.11617",
            "drop by chance, small numbers sooner, scale up the others, then as ties",
            density=0.5,
        ),
        Method(
            "sce",
            sce,
            "https://arxiv.org/abs/2408.07990",
            "select where the sources differ, weigh by what is left, erase minority signs",
            density=0.5,
        ),
        Method(
            "knots",
            knots,
            "https://arxiv.org/abs/2410.19735",
            "turn the deltas into one shared basis, then ties on their coordinates in it",
            density=0.5,
        ),
        Method(
            "regmean",
            regmean,
            "https://arxiv.org/abs/2212.09849",
            "on each source's own inputs the outputs nearest to its own, by least squares",
            needs_moments=True,
        ),
    )
}
