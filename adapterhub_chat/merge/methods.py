"""The ways to make one delta of several: a table of pure functions, each with its paper.

They see the deltas of one module, as factors, and their weights; some look at what enters it, too.
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
    add,
    agree,
    drop,
    drop_small,
    elected,
    keep_largest,
    threshold,
)

BETWEEN = 0.9
"""What is left of the second moments between two inputs of a module, as arXiv 2212.09849 shrinks them."""
EPSILON = 1e-6
"""Of the mean second moment, added to that of each input: none may be zero."""


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """What a method is told beside the deltas of one module."""

    weights: tuple[float, ...]
    density: float = 1.0
    seed: int = 0
    module: str = ""
    moments: tuple[Tensor, ...] = ()
    """What enters the module under each source: the second moment (in, in) float64, positive definite."""

    @property
    def metric(self) -> Tensor | None:
        """What enters the module under all sources together, by weight."""
        parts = [m * w for m, w in zip(self.moments, self.weights, strict=False)]
        return torch.stack(parts).sum(0) if parts else None


Moments = Callable[[str], Sequence[Tensor]]
"""Module -> the mean x x^T (in, in) of its inputs x under each source, on items of that source's task."""
Function = Callable[[Sequence[Pair], MergeSettings], Pair | Tensor]
"""(deltas of one module, setting) -> the merged delta, as factors or dense (out, in)."""
Sparsify = Callable[[Tensor, float, Generator], Tensor]
"""(delta, density, random numbers) -> the delta with fewer numbers in it."""
Consensus = Callable[[Tensor], Tensor]
"""(sources, ...) -> (...)."""


@dataclass(frozen=True, slots=True)
class Method:
    """A row of METHODS."""

    name: str
    function: Function
    paper: str
    about: str
    weights: Literal["mean", "ones"] = "ones"
    """The weights that are used where none are given: 1 / sources, or 1 each."""
    ranks: Literal["joined", "all", "largest"] = "largest"
    """What comes out where no rank is given: the ranks side by side (always), as many as an exact
    result needs, or the largest of the sources."""
    density: float | None = None
    """The share of numbers kept where none is given; None: the method has no density."""
    needs_moments: bool = False
    """Whether it looks at what enters the modules."""


# -- methods ---------------------------------------------------------------------------------------


def weighted_sum(pairs: Sequence[Pair], setting: MergeSettings) -> Pair:
    """Return sum_i w_i delta_i, exactly, as factors."""
    return concatenate_ranks([(b * w, a) for (b, a), w in zip(pairs, setting.weights, strict=True)])


def elementwise(sparsify: Sparsify, consensus: Consensus) -> Function:
    """Return the method that thins every weighted delta out by itself, and then brings them together."""

    def method(pairs: Sequence[Pair], setting: MergeSettings) -> Tensor:
        thin = [
            sparsify(delta, setting.density, _random(setting, source))
            for source, delta in enumerate(_dense(pairs, setting))
        ]
        return consensus(torch.stack(thin))

    return method


def sce(pairs: Sequence[Pair], setting: MergeSettings) -> Tensor:
    """Select where the sources differ most, weigh them by what is left of them, erase the minority's sign."""
    deltas = torch.stack(_dense(pairs, setting))
    spread = deltas.var(dim=0, correction=0)
    deltas = deltas * (spread >= threshold(spread, setting.density))
    mass = deltas.square().sum(dim=(1, 2))
    shares = mass / mass.sum() if mass.sum() > 0 else mass
    agreeing = shares[:, None, None] * (deltas.sign() == elected(deltas))
    return (deltas * agreeing).sum(0) / agreeing.sum(0).clamp(min=torch.finfo(deltas.dtype).tiny)


def knots(pairs: Sequence[Pair], setting: MergeSettings) -> Pair:
    """Turn all deltas into one shared basis U S, and bring their coordinates V_i together by TIES.

    [delta_1 ... delta_n] = U S [V_1 ... V_n]; directions that no source uses are left out, so that they
    take no share of the density.
    """
    q, r = torch.linalg.qr(concatenate_ranks(pairs)[0])
    cores = r.split([len(a) for _, a in pairs], dim=1)
    side_by_side = torch.cat([c @ a for c, (_, a) in zip(cores, pairs, strict=True)], dim=1)
    u, values, vh = torch.linalg.svd(side_by_side, full_matrices=False)
    used = values > values.max() * torch.finfo(values.dtype).eps * max(side_by_side.shape)
    parts = vh[used].chunk(len(pairs), dim=1)
    weighted = [part * w for part, w in zip(parts, setting.weights, strict=True)]
    thin = [keep_largest(part, setting.density, Generator()) for part in weighted]
    return q @ (u[:, used] * values[used]), agree(torch.stack(thin))


def regmean(pairs: Sequence[Pair], setting: MergeSettings) -> Pair:
    """Return the delta whose outputs are nearest to each source's own on that source's inputs.

    It solves min_D sum_i w_i E|D x_i - delta_i x_i|^2: D = (sum_i w_i delta_i G_i) (sum_i w_i G_i)^-1,
    where G_i is the second moment of x_i.
    """
    whole = setting.metric
    assert whole is not None
    root = torch.linalg.cholesky(whole)
    parts = [
        (b, torch.cholesky_solve(g @ (a.T * w), root).T)
        for (b, a), g, w in zip(pairs, setting.moments, setting.weights, strict=True)
    ]
    return concatenate_ranks(parts)


def shrunk(moment: Tensor) -> Tensor:
    """Return a second moment, float64, with less between inputs and something on each: few items saw it."""
    own = moment.double()
    diagonal = own.diagonal()
    floor = EPSILON * diagonal.mean().clamp(min=EPSILON)
    return own * BETWEEN + torch.diag(diagonal * (1 - BETWEEN) + floor)


def _dense(pairs: Sequence[Pair], setting: MergeSettings) -> list[Tensor]:
    """Return the weighted deltas (out, in) of one module, float32."""
    return [(b @ a * w).float() for (b, a), w in zip(pairs, setting.weights, strict=True)]


def _random(setting: MergeSettings, source: int) -> Generator:
    """Return a source's own random numbers in a module: the same whoever else is merged."""
    return Generator().manual_seed(derive_seed(setting.seed, f"{source} {setting.module}"))


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
            elementwise(keep_largest, agree),
            "https://arxiv.org/abs/2306.01708",
            "trim to the largest numbers, elect a sign, mean of those that have it",
            density=0.5,
        ),
        Method(
            "dare_linear",
            elementwise(drop, add),
            "https://arxiv.org/abs/2311.03099",
            "drop numbers by chance, scale up the others, weighted mean",
            weights="mean",
            density=0.5,
        ),
        Method(
            "dare_ties",
            elementwise(drop, agree),
            "https://arxiv.org/abs/2311.03099",
            "drop numbers by chance, scale up the others, then as ties",
            density=0.5,
        ),
        Method(
            "magnitude_prune",
            elementwise(keep_largest, add),
            "https://arxiv.org/abs/2306.01708",
            "trim to the largest numbers, weighted mean",
            weights="mean",
            density=0.5,
        ),
        Method(
            "della",
            elementwise(drop_small, agree),
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
