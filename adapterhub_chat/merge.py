"""Merge: a table of ways to make one adapter of several, each a pure function, module by module.

A source's delta is `scale * B A` with its own rank, alpha and rsLoRA, and zero in a module that it does not
have. A method sees the deltas of one module and their weights; what comes out is compressed to the wanted
rank, and has scale 1. Sums stay low-rank all the way; methods that look at single numbers make one
module's deltas dense at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from adapterhub_chat.errors import ConfigError
from adapterhub_chat.lowrank import Pair, compress, joined
from adapterhub_chat.sparsify import (
    add,
    agree,
    drop,
    drop_small,
    elected,
    keep_largest,
    threshold,
)
from adapterhub_chat.weights import AdapterWeights, seed_of

SHOWN = 5
"""Modules that a message lists."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a method is told beside the deltas of one module."""

    weights: tuple[float, ...]
    density: float = 1.0
    seed: int = 0
    module: str = ""


Function = Callable[[Sequence[Pair], Setting], Pair | Tensor]
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


@dataclass(frozen=True, slots=True)
class Report:
    """How much of what a method wanted is in the result of that rank."""

    energy: float
    """Share of the squared Frobenius norm, over all modules."""
    modules: Mapping[str, float]
    """The same, module by module."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge gives."""

    weights: AdapterWeights
    report: Report


@torch.no_grad()
def merge(
    adapters: Sequence[AdapterWeights],
    weights: Sequence[float] | None = None,
    *,
    method: str = "svd",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Merged:
    """Merge adapters by a method of METHODS; raise ConfigError naming all that does not fit.

    `rank` None takes the method's own (`Method.ranks`). Nothing random happens but by `seed`.
    """
    chosen = METHODS.get(method)
    found = list(_misfits(adapters, weights, method, rank, density))
    if any(adapter.head for adapter in adapters):
        found.append(
            "adapters of an encoder have heads, which no method merges; mix them row by row"
        )
    if found:
        raise ConfigError("the merge", found)
    assert chosen is not None
    given = default_weights(chosen, len(adapters)) if weights is None else weights
    sizes = _sizes(adapters)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    shares: dict[str, float] = {}
    kept_in_all = in_all = 0.0
    for module, size in sizes.items():
        pairs = [_delta(adapter, module, size) for adapter in adapters]
        share = chosen.density if density is None else density
        setting = Setting(tuple(map(float, given)), share or 1.0, seed, module)
        delta = chosen.function(pairs, setting)
        if chosen.ranks == "joined" and not isinstance(delta, Tensor):
            (b, a), kept, total = delta, 1.0, 1.0
        else:
            wanted = rank or _own_rank(chosen, adapters, pairs)
            (b, a), kept, total = compress(delta, min(wanted, *size))
        factors[module] = (a.float().contiguous(), b.float().contiguous())
        shares[module] = min(kept / total, 1.0) if total > 0 else 1.0
        kept_in_all, in_all = kept_in_all + kept, in_all + total
    energy = min(kept_in_all / in_all, 1.0) if in_all > 0 else 1.0
    alphas = {module: float(a.shape[0]) for module, (a, _) in factors.items()}
    return Merged(AdapterWeights(factors, alphas), Report(energy, shares))


def default_weights(method: Method, count: int) -> list[float]:
    """Return the weights that a method has for `count` sources."""
    return [1.0 if method.weights == "ones" else 1 / count] * count


def _own_rank(method: Method, adapters: Sequence[AdapterWeights], pairs: Sequence[Pair]) -> int:
    if method.ranks == "all":
        return sum(len(a) for _, a in pairs)
    return max(adapter.max_rank for adapter in adapters)


def _sizes(adapters: Sequence[AdapterWeights]) -> dict[str, tuple[int, int]]:
    """Return (out, in) of every module that a source has."""
    return {m: (len(b), a.shape[1]) for own in adapters for m, (a, b) in own.factors.items()}


def _delta(adapter: AdapterWeights, module: str, size: tuple[int, int]) -> Pair:
    """Return an adapter's delta in a module, of rank 0 where it has none there."""
    if module not in adapter.factors:
        return torch.zeros(size[0], 0).double(), torch.zeros(0, size[1]).double()
    a, b = adapter.factors[module]
    return b.double() * adapter.scale(module), a.double()


# -- methods ---------------------------------------------------------------------------------------


def weighted_sum(pairs: Sequence[Pair], setting: Setting) -> Pair:
    """Return sum_i w_i delta_i, exactly, as factors."""
    return joined([(b * w, a) for (b, a), w in zip(pairs, setting.weights, strict=True)])


def elementwise(sparsify: Sparsify, consensus: Consensus) -> Function:
    """Return the method that thins every weighted delta out by itself, and then brings them together."""

    def method(pairs: Sequence[Pair], setting: Setting) -> Tensor:
        thin = [
            sparsify(delta, setting.density, _random(setting, source))
            for source, delta in enumerate(_dense(pairs, setting))
        ]
        return consensus(torch.stack(thin))

    return method


def sce(pairs: Sequence[Pair], setting: Setting) -> Tensor:
    """Select where the sources differ most, weigh them by what is left of them, erase the minority's sign."""
    deltas = torch.stack(_dense(pairs, setting))
    spread = deltas.var(dim=0, correction=0)
    deltas = deltas * (spread >= threshold(spread, setting.density))
    mass = deltas.square().sum(dim=(1, 2))
    shares = mass / mass.sum() if mass.sum() > 0 else mass
    agreeing = shares[:, None, None] * (deltas.sign() == elected(deltas))
    return (deltas * agreeing).sum(0) / agreeing.sum(0).clamp(min=torch.finfo(deltas.dtype).tiny)


def knots(pairs: Sequence[Pair], setting: Setting) -> Pair:
    """Turn all deltas into one shared basis U S, and bring their coordinates V_i together by TIES.

    [delta_1 ... delta_n] = U S [V_1 ... V_n]; directions that no source uses are left out, so that they
    take no share of the density.
    """
    q, r = torch.linalg.qr(joined(pairs)[0])
    cores = r.split([len(a) for _, a in pairs], dim=1)
    side_by_side = torch.cat([c @ a for c, (_, a) in zip(cores, pairs, strict=True)], dim=1)
    u, values, vh = torch.linalg.svd(side_by_side, full_matrices=False)
    used = values > values.max() * torch.finfo(values.dtype).eps * max(side_by_side.shape)
    parts = vh[used].chunk(len(pairs), dim=1)
    weighted = [part * w for part, w in zip(parts, setting.weights, strict=True)]
    thin = [keep_largest(part, setting.density, Generator()) for part in weighted]
    return q @ (u[:, used] * values[used]), agree(torch.stack(thin))


def _dense(pairs: Sequence[Pair], setting: Setting) -> list[Tensor]:
    """Return the weighted deltas (out, in) of one module, float32."""
    return [(b @ a * w).float() for (b, a), w in zip(pairs, setting.weights, strict=True)]


def _random(setting: Setting, source: int) -> Generator:
    """Return a source's own random numbers in a module: the same whoever else is merged."""
    return Generator().manual_seed(seed_of(setting.seed, f"{source} {setting.module}"))


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
    )
}


# -- what does not fit -----------------------------------------------------------------------------


def _misfits(
    adapters: Sequence[AdapterWeights],
    weights: Sequence[float] | None,
    method: str,
    rank: int | None,
    density: float | None,
) -> Iterator[str]:
    yield from _source_misfits(adapters)
    yield from setting_misfits(len(adapters), weights, method, density)
    yield from _rank_misfits(adapters, method, rank)


def setting_misfits(
    count: int, weights: Sequence[float] | None, method: str, density: float | None
) -> Iterator[str]:
    """Yield what is wrong with a merge of `count` sources before anything of them is read."""
    chosen = METHODS.get(method)
    if chosen is None:
        yield f"unknown method {method!r}; known: {', '.join(METHODS)} (and auto, in a hub)"
    if weights is not None:
        if len(weights) != count:
            yield f"{count} adapters but {len(weights)} weights: give one per adapter"
        if not all(map(math.isfinite, weights)):
            yield f"weights must be finite numbers, not {list(weights)}"
        elif len(weights) and not any(weights):
            yield "all weights are zero: the merged adapter would do nothing"
    if density is None:
        return
    if not 0 < density <= 1:
        yield f"density must be above 0 and at most 1, not {density}"
    if chosen is not None and chosen.density is None:
        able = ", ".join(m.name for m in METHODS.values() if m.density is not None)
        yield f"{method} drops nothing, so it takes no density; leave it out, or use one of {able}"


def _rank_misfits(
    adapters: Sequence[AdapterWeights], method: str, rank: int | None
) -> Iterator[str]:
    if rank is None:
        return
    most = max((min(size) for size in _sizes(adapters).values()), default=1)
    if not 1 <= rank <= most:
        yield f"rank must be from 1 to {most} (the smaller side of the widest layer), not {rank}"
    elif method == "cat":
        yield "cat keeps all ranks of its sources; leave rank out, or use svd"


def _source_misfits(adapters: Sequence[AdapterWeights]) -> Iterator[str]:
    if not adapters:
        yield "there are no adapters to merge; give one or more"
    for number, adapter in enumerate(adapters, 1):
        if not adapter.finite():
            yield f"adapter {number} has numbers that are not finite; it cannot be merged"
    sizes = _sizes(adapters)
    other = [m for own in adapters for m, size in _sizes([own]).items() if size != sizes[m]]
    if other:
        some = ", ".join(list(dict.fromkeys(other))[:SHOWN])
        yield f"the adapters are for other backbones: their layers have other sizes ({some})"


__all__ = ["METHODS", "Merged", "Method", "Report", "Setting", "default_weights", "merge"]
