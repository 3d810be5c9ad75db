"""AdapterWeights: the numbers of one LoRA adapter, apart from any model, slot or file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Module name -> (A (r, in), B (out, r))."""


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """LoRA factors by module name; ranks and alphas may differ between modules."""

    factors: Factors
    alphas: Mapping[str, float]
    rslora: bool = False
    """Scale by alpha / sqrt(r) (arXiv 2312.03732) instead of alpha / r."""
    checked: bool = field(default=False, repr=False, compare=False)
    """All numbers are known to be finite: the guard has seen each of them."""
    _finite: list[bool] = field(default_factory=list, init=False, repr=False, compare=False)

    def rank(self, module: str) -> int:
        """Return r of one module."""
        return int(self.factors[module][0].shape[0])

    def scale(self, module: str) -> float:
        """Return the factor that multiplies B A x."""
        rank = self.rank(module)
        return self.alphas[module] / (math.sqrt(rank) if self.rslora else rank)

    @property
    def max_rank(self) -> int:
        """The largest rank, which decides the rank bucket."""
        return max(self.rank(m) for m in self.factors)

    @property
    def num_parameters(self) -> int:
        """How many numbers the adapter has."""
        return sum(a.numel() + b.numel() for a, b in self.factors.values())

    def finite(self) -> bool:
        """Return whether all numbers are finite; they are looked at once, for they do not change."""
        if not self._finite:
            factors = (factor for pair in self.factors.values() for factor in pair)
            self._finite.append(self.checked or all(_is_finite(f.detach()) for f in factors))
        return self._finite[0]

    def with_factors(self, factors: Factors) -> AdapterWeights:
        """Return the same adapter with other numbers of the same shapes."""
        return replace(self, factors=MappingProxyType(dict(factors)), checked=False)

    def to(self, dtype: torch.dtype) -> AdapterWeights:
        """Return the adapter rounded to `dtype`."""
        return self.with_factors(
            {m: (a.to(dtype), b.to(dtype)) for m, (a, b) in self.factors.items()}
        )


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite, by the smallest and the largest: a NaN is both."""
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.aminmax())


def concatenate(adapters: Sequence[AdapterWeights]) -> AdapterWeights:
    """Return one adapter whose update is the sum of theirs, exactly: ranks side by side, scale in B."""
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for module in dict.fromkeys(m for adapter in adapters for m in adapter.factors):
        own = [adapter for adapter in adapters if module in adapter.factors]
        first = torch.cat([adapter.factors[module][0].float() for adapter in own])
        seconds = [adapter.factors[module][1].float() * adapter.scale(module) for adapter in own]
        factors[module] = (first, torch.cat(seconds, dim=1))
    return AdapterWeights(factors, {m: float(a.shape[0]) for m, (a, _) in factors.items()})


def initial_weights(
    shapes: Mapping[str, tuple[int, int]],
    *,
    rank: int,
    alpha: float,
    rslora: bool = False,
    seed: int,
) -> AdapterWeights:
    """Return a fresh adapter that does nothing yet: A uniform as in PEFT's default, B zero.

    `shapes` maps each module to (in, out). Every module draws from its own generator, seeded by `seed`
    and its name, so that an adapter starts the same whatever is trained beside it.
    """
    factors = {}
    for module, (width_in, width_out) in shapes.items():
        generator = torch.Generator().manual_seed(seed_of(seed, module))
        bound = 1 / math.sqrt(width_in)  # kaiming_uniform with a = sqrt(5)
        a = torch.empty(rank, width_in).uniform_(-bound, bound, generator=generator)
        factors[module] = (a, torch.zeros(width_out, rank))
    return AdapterWeights(factors, dict.fromkeys(shapes, float(alpha)), rslora)


def seed_of(seed: int, name: str) -> int:
    """Return the seed that belongs to a name, out of everyone's."""
    mixed = seed
    for byte in name.encode():
        mixed = (mixed * 1_000_003 + byte) % (2**63)
    return mixed


def misfits(weights: AdapterWeights, shapes: Mapping[str, tuple[int, int]]) -> Sequence[str]:
    """Return a sentence for every module that is missing from `shapes`, has other sizes or bad numbers."""
    found = []
    finite = weights.finite()
    for module, (a, b) in weights.factors.items():
        if module not in shapes:
            found.append(f"the backbone has no linear layer {module!r}")
        elif (a.shape[1], b.shape[0]) != shapes[module]:
            found.append(
                f"{module}: the adapter maps {a.shape[1]} -> {b.shape[0]}, "
                f"the backbone {shapes[module][0]} -> {shapes[module][1]}"
            )
        elif a.shape[0] != b.shape[1]:
            found.append(f"{module}: A has rank {a.shape[0]}, B has rank {b.shape[1]}")
        elif not (finite or (a.isfinite().all() and b.isfinite().all())):
            found.append(f"{module}: some numbers are not finite")
    return found
