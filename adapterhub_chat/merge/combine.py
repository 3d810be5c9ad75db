"""Merge: one adapter out of several, by a method of the table, module by module.

A source's delta is `scale * B A` with its own rank, alpha and rsLoRA, and zero in a module that it does not
have. A method sees the deltas of one module and their weights; what comes out is compressed to the wanted
rank, and has scale 1. Sums stay low-rank all the way; methods that look at single numbers make one
module's deltas dense at a time. A method may also look at what enters a module: its second moment.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterhub_chat.errors import ConfigError
from adapterhub_chat.lora.lowrank import Pair, compress, concatenate_ranks, frobenius_norm
from adapterhub_chat.lora.weights import AdapterWeights
from adapterhub_chat.merge.methods import METHODS, MergeSettings, Method, Moments, shrunk

SHOWN = 5
"""Modules that a message lists."""


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
    moments: Moments | None = None,
) -> Merged:
    """Merge adapters by a method of METHODS; raise ConfigError naming all that does not fit.

    `rank` None takes the method's own (`Method.ranks`). Nothing random happens but by `seed`. `moments` are
    asked for by a method that looks (`Method.needs_moments`), module by module in the order of `modules_of`.
    """
    chosen = METHODS.get(method)
    found = list(_misfits(adapters, weights, method, rank, density))
    if chosen and chosen.needs_moments and moments is None:
        found.append(f"{method} needs moments: what enters each module (a hub gathers them)")
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
        seen = tuple(map(shrunk, moments(module))) if moments and chosen.needs_moments else ()
        setting = MergeSettings(tuple(map(float, given)), share or 1.0, seed, module, seen)
        delta = chosen.function(pairs, setting)
        if chosen.ranks == "joined" and not isinstance(delta, Tensor):
            (b, a), kept, total = delta, 1.0, 1.0
        else:
            wanted = rank or _own_rank(chosen, adapters, pairs)
            (b, a), kept, total = compress(delta, min(wanted, *size), setting.metric)
        factors[module] = (a.float().contiguous(), b.float().contiguous())
        shares[module] = min(kept / total, 1.0) if total > 0 else 1.0
        kept_in_all, in_all = kept_in_all + kept, in_all + total
    energy = min(kept_in_all / in_all, 1.0) if in_all > 0 else 1.0
    alphas = {module: float(a.shape[0]) for module, (a, _) in factors.items()}
    return Merged(AdapterWeights(factors, alphas), Report(energy, shares))


def distance(one: AdapterWeights, other: AdapterWeights) -> float:
    """Return the norm of the difference of two adapters' deltas over that of the second one's."""
    apart = whole = 0.0
    for module, size in _sizes([one, other]).items():
        (b, a), own = _delta(one, module, size), _delta(other, module, size)
        apart += frobenius_norm(concatenate_ranks([(-b, a), own])) ** 2
        whole += frobenius_norm(own) ** 2
    return math.sqrt(apart / whole) if whole else math.sqrt(apart)


def default_weights(method: Method, count: int) -> list[float]:
    """Return the weights that a method has for `count` sources."""
    return [1.0 if method.weights == "ones" else 1 / count] * count


def modules_of(adapters: Sequence[AdapterWeights]) -> list[str]:
    """Return the modules that a source has, in the order in which they are merged."""
    return list(_sizes(adapters))


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
        elif chosen is not None and chosen.needs_moments and min(weights, default=0) < 0:
            yield f"{method} weighs what enters a module, so weights are at least 0; use another method"
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
        if not adapter.is_finite:
            yield f"adapter {number} has numbers that are not finite; it cannot be merged"
    sizes = _sizes(adapters)
    other = [m for own in adapters for m, size in _sizes([own]).items() if size != sizes[m]]
    if other:
        some = ", ".join(list(dict.fromkeys(other))[:SHOWN])
        yield f"the adapters are for other backbones: their layers have other sizes ({some})"
