"""Merge: one adapter out of several, by a method of the table, module by module.

A source's delta is `scale * B A` with its own rank, alpha and rsLoRA, and zero in a module that it does not
have. A method gets the deltas of one module and their weights; its result is compressed to the requested
rank, and has scale 1. Sums stay low-rank throughout; elementwise methods make one module's deltas dense at a
time. A method may also use the second moment of a module's inputs.
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
from adapterhub_chat.merge.methods import METHODS, MergeSettings, Method, Moments, shrink_moment

MAX_LISTED_MODULES = 5
"""Modules that an error message lists."""


@dataclass(frozen=True, slots=True)
class RankReport:
    """How much of a method's result is left after its compression to a rank."""

    energy: float
    """Share of the squared Frobenius norm that is left, over all modules."""
    modules: Mapping[str, float]
    """The same for each module."""


@dataclass(frozen=True, slots=True)
class Merged:
    """The result of a merge."""

    weights: AdapterWeights
    report: RankReport


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
    """Merge adapters by a method of METHODS; raise ConfigError with all misfits.

    `rank` None takes the method's default (`Method.ranks`). `seed` is the only source of randomness. A method
    with `Method.needs_moments` calls `moments` once a module, in the order of `modules_of`.
    """
    chosen = METHODS.get(method)
    misfits = list(_misfits(adapters, weights, method, rank, density))
    if chosen and chosen.needs_moments and moments is None:
        misfits.append(f"{method} needs moments: what enters each module (a hub gathers them)")
    if any(adapter.head for adapter in adapters):
        misfits.append(
            "adapters of an encoder have heads, which no method merges; mix them row by row"
        )
    if misfits:
        raise ConfigError("the merge", misfits)
    assert chosen is not None
    source_weights = default_weights(chosen, len(adapters)) if weights is None else weights
    sizes = _sizes(adapters)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    shares: dict[str, float] = {}
    total_kept = total_energy = 0.0
    for module, size in sizes.items():
        pairs = [_delta(adapter, module, size) for adapter in adapters]
        share = chosen.density if density is None else density
        shrunk = (
            tuple(map(shrink_moment, moments(module))) if moments and chosen.needs_moments else ()
        )
        settings = MergeSettings(
            tuple(map(float, source_weights)), share or 1.0, seed, module, shrunk
        )
        delta = chosen.function(pairs, settings)
        if chosen.ranks == "joined" and not isinstance(delta, Tensor):
            (b, a), kept, energy = delta, 1.0, 1.0
        else:
            module_rank = rank or _default_rank(chosen, adapters, pairs)
            (b, a), kept, energy = compress(delta, min(module_rank, *size), settings.metric)
        factors[module] = (a.float().contiguous(), b.float().contiguous())
        shares[module] = min(kept / energy, 1.0) if energy > 0 else 1.0
        total_kept, total_energy = total_kept + kept, total_energy + energy
    overall = min(total_kept / total_energy, 1.0) if total_energy > 0 else 1.0
    alphas = {module: float(a.shape[0]) for module, (a, _) in factors.items()}
    return Merged(AdapterWeights(factors, alphas), RankReport(overall, shares))


def relative_distance(adapter: AdapterWeights, reference: AdapterWeights) -> float:
    """Return the norm of the difference of two adapters' deltas over the norm of the reference's."""
    difference = norm = 0.0
    for module, size in _sizes([adapter, reference]).items():
        (b, a), expected = _delta(adapter, module, size), _delta(reference, module, size)
        difference += frobenius_norm(concatenate_ranks([(-b, a), expected])) ** 2
        norm += frobenius_norm(expected) ** 2
    return math.sqrt(difference / norm) if norm else math.sqrt(difference)


def default_weights(method: Method, num_sources: int) -> list[float]:
    """Return the weights that a method uses where none are specified."""
    return [1.0 if method.weights == "ones" else 1 / num_sources] * num_sources


def modules_of(adapters: Sequence[AdapterWeights]) -> list[str]:
    """Return the modules of all sources, in the order in which they are merged."""
    return list(_sizes(adapters))


def _default_rank(method: Method, adapters: Sequence[AdapterWeights], pairs: Sequence[Pair]) -> int:
    if method.ranks == "all":
        return sum(len(a) for _, a in pairs)
    return max(adapter.max_rank for adapter in adapters)


def _sizes(adapters: Sequence[AdapterWeights]) -> dict[str, tuple[int, int]]:
    """Return (out, in) of every module of all sources."""
    return {
        module: (len(b), a.shape[1])
        for adapter in adapters
        for module, (a, b) in adapter.factors.items()
    }


def _delta(adapter: AdapterWeights, module: str, size: tuple[int, int]) -> Pair:
    """Return the factors of an adapter's delta in a module, of rank 0 if it has no such module."""
    if module not in adapter.factors:
        return torch.zeros(size[0], 0).double(), torch.zeros(0, size[1]).double()
    a, b = adapter.factors[module]
    return b.double() * adapter.scale(module), a.double()


# -- misfits ---------------------------------------------------------------------------------------


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
    num_sources: int, weights: Sequence[float] | None, method: str, density: float | None
) -> Iterator[str]:
    """Yield the misfits of a merge's settings; the sources need not be read for that."""
    chosen = METHODS.get(method)
    if chosen is None:
        yield f"unknown method {method!r}; known: {', '.join(METHODS)} (and auto, in a hub)"
    if weights is not None:
        if len(weights) != num_sources:
            yield f"{num_sources} adapters but {len(weights)} weights: give one per adapter"
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
        names = ", ".join(m.name for m in METHODS.values() if m.density is not None)
        yield f"{method} drops nothing, so it takes no density; leave it out, or use one of {names}"


def _rank_misfits(
    adapters: Sequence[AdapterWeights], method: str, rank: int | None
) -> Iterator[str]:
    if rank is None:
        return
    max_rank = max((min(size) for size in _sizes(adapters).values()), default=1)
    if not 1 <= rank <= max_rank:
        yield f"rank must be from 1 to {max_rank} (the smaller side of the widest layer), not {rank}"
    elif method == "cat":
        yield "cat keeps all ranks of its sources; leave rank out, or use svd"


def _source_misfits(adapters: Sequence[AdapterWeights]) -> Iterator[str]:
    if not adapters:
        yield "there are no adapters to merge; give one or more"
    for number, adapter in enumerate(adapters, 1):
        if not adapter.is_finite:
            yield f"adapter {number} has numbers that are not finite; it cannot be merged"
    sizes = _sizes(adapters)
    unequal = [
        module
        for adapter in adapters
        for module, size in _sizes([adapter]).items()
        if size != sizes[module]
    ]
    if unequal:
        listed = ", ".join(list(dict.fromkeys(unequal))[:MAX_LISTED_MODULES])
        yield f"the adapters are for other backbones: their layers have other sizes ({listed})"
