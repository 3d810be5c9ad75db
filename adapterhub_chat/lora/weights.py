"""AdapterWeights: the numbers of one LoRA adapter, apart from any model, slot or file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor

from adapterhub_chat.errors import AdapterError
from adapterhub_chat.types import HEAD

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Module name -> (A (r, in), B (out, r))."""
Shape = tuple[int, ...]


class Packed(Mapping[str, tuple[Tensor, Tensor]]):
    """Factors that lie in one vector, as in a file: hundreds of views, each made when it is asked for."""

    def __init__(
        self,
        numbers: Tensor,
        shapes: Mapping[str, tuple[Shape, Shape]],
        offsets: Mapping[str, tuple[int, int]],
    ) -> None:
        """Look at `numbers`, on the CPU, in which each module's A and B begin at `offsets`."""
        self.numbers, self.shapes, self.offsets = numbers, shapes, offsets

    def __getitem__(self, module: str) -> tuple[Tensor, Tensor]:
        """Return a module's A and B, views of the numbers."""
        a, b = (
            self.numbers[start : start + math.prod(shape)].view(shape)
            for start, shape in zip(self.offsets[module], self.shapes[module], strict=True)
        )
        return a, b

    def __contains__(self, module: object) -> bool:
        """Return whether there are factors for a module, without a look at them."""
        return module in self.shapes

    def __iter__(self) -> Iterator[str]:
        """Yield the modules."""
        return iter(self.shapes)

    def __len__(self) -> int:
        """Return the number of modules."""
        return len(self.shapes)


@dataclass(frozen=True, slots=True)
class Head:
    """What an adapter on an encoder answers with: logits of its labels from a text's features, float32."""

    weight: Tensor
    """(labels, width)."""
    bias: Tensor
    """(labels,)."""

    @property
    def shape(self) -> tuple[int, int]:
        """Labels and width of the features."""
        return int(self.weight.shape[0]), int(self.weight.shape[1])


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """LoRA factors by module name; ranks and alphas may differ between modules."""

    factors: Factors
    alphas: Mapping[str, float]
    rslora: bool = False
    """Scale by alpha / sqrt(r) (arXiv 2312.03732) instead of alpha / r."""
    head: Head | None = None
    """On an encoder: what makes label logits; adapters on language models have none."""
    checked: bool = field(default=False, repr=False, compare=False)
    """All numbers are known to be finite: the guard has seen each of them."""
    _finite: list[bool] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def shapes(self) -> Mapping[str, tuple[Shape, Shape]]:
        """The shapes of A and B by module."""
        if isinstance(self.factors, Packed):
            return self.factors.shapes
        return {m: (tuple(a.shape), tuple(b.shape)) for m, (a, b) in self.factors.items()}

    def rank(self, module: str) -> int:
        """Return r of one module."""
        if isinstance(self.factors, Packed):
            return self.factors.shapes[module][0][0]
        return int(self.factors[module][0].shape[0])

    def scale(self, module: str) -> float:
        """Return the factor that multiplies B A x."""
        rank = self.rank(module)
        return self.alphas[module] / (math.sqrt(rank) if self.rslora else rank)

    @property
    def max_rank(self) -> int:
        """The largest rank, which decides the rank bucket."""
        return max(map(self.rank, self.factors), default=0)

    @property
    def num_parameters(self) -> int:
        """How many numbers the adapter has."""
        labels, width = self.head.shape if self.head else (0, 0)
        each = (math.prod(a) + math.prod(b) for a, b in self.shapes.values())
        return sum(each) + labels * (width + 1)

    @property
    def nbytes(self) -> int:
        """Bytes that its numbers take where they are."""
        if isinstance(self.factors, Packed):
            head = (self.head.weight, self.head.bias) if self.head else ()
            return self.factors.numbers.nbytes + sum(tensor.nbytes for tensor in head)
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def labels(self) -> int:
        """How many labels its head knows, 0 without one."""
        return self.head.shape[0] if self.head else 0

    def finite(self) -> bool:
        """Return whether all numbers are finite; they are looked at once, for they do not change."""
        if not self._finite:
            numbers = (tensor.detach() for tensor in self.tensors())
            self._finite.append(self.checked or all(map(_is_finite, numbers)))
        return self._finite[0]

    def addresses(self, dtype: torch.dtype) -> list[tuple[int, int]] | None:
        """Return where A and B of each module begin in the memory of the CPU, their rows without gaps.

        None where some factor is not of `dtype`, or lies otherwise or elsewhere.
        """
        if isinstance(self.factors, Packed):
            numbers, size = self.factors.numbers, dtype.itemsize
            first = numbers.data_ptr()
            found = [(first + a * size, first + b * size) for a, b in self.factors.offsets.values()]
            return found if numbers.dtype == dtype else None
        pairs = list(self.factors.values())
        plain = all(
            t.dtype == dtype and t.is_contiguous() and t.device.type == "cpu"
            for p in pairs
            for t in p
        )
        return [(a.data_ptr(), b.data_ptr()) for a, b in pairs] if plain else None

    def tensors(self) -> Iterator[Tensor]:
        """Yield all its numbers: A and B of each module, and the head's."""
        for pair in self.factors.values():
            yield from pair
        if self.head:
            yield from (self.head.weight, self.head.bias)

    def with_factors(self, factors: Factors) -> AdapterWeights:
        """Return the same adapter, its head too, with other factors of the same shapes."""
        return replace(self, factors=MappingProxyType(dict(factors)), checked=False)

    def to(self, dtype: torch.dtype) -> AdapterWeights:
        """Return the adapter with its factors rounded to `dtype`; the head stays as it is."""
        return self.with_factors(
            {m: (a.to(dtype), b.to(dtype)) for m, (a, b) in self.factors.items()}
        )

    def shapes_only(self) -> AdapterWeights:
        """Return the adapter without its numbers."""
        factors = {m: (a.to("meta"), b.to("meta")) for m, (a, b) in self.factors.items()}
        head = self.head and Head(self.head.weight.to("meta"), self.head.bias.to("meta"))
        return replace(self.with_factors(factors), head=head)


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite, by the smallest and the largest: a NaN is both."""
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.aminmax())


def concatenate(adapters: Sequence[AdapterWeights]) -> AdapterWeights:
    """Return one adapter whose update is the sum of theirs, exactly: ranks side by side, scale in B.

    Its head's logits are the sum of theirs, too. Raises AdapterError for heads of different sizes.
    """
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for module in dict.fromkeys(m for adapter in adapters for m in adapter.factors):
        own = [adapter for adapter in adapters if module in adapter.factors]
        first = torch.cat([adapter.factors[module][0].float() for adapter in own])
        seconds = [adapter.factors[module][1].float() * adapter.scale(module) for adapter in own]
        factors[module] = (first, torch.cat(seconds, dim=1))
    alphas = {m: float(a.shape[0]) for m, (a, _) in factors.items()}
    return AdapterWeights(factors, alphas, head=_sum_of_heads(adapters))


def _sum_of_heads(adapters: Sequence[AdapterWeights]) -> Head | None:
    heads = [adapter.head for adapter in adapters if adapter.head]
    if len({head.shape for head in heads}) > 1:
        sizes = ", ".join(str(head.shape[0]) for head in heads)
        raise AdapterError(
            f"heads of {sizes} labels cannot be added up: the labels must be the same"
        )
    if not heads:
        return None
    first, *others = heads
    return Head(
        sum((h.weight for h in others), first.weight), sum((h.bias for h in others), first.bias)
    )


def initial_weights(
    shapes: Mapping[str, tuple[int, int]],
    *,
    rank: int,
    alpha: float,
    rslora: bool = False,
    seed: int,
    head: tuple[int, int] | None = None,
) -> AdapterWeights:
    """Return a fresh adapter that does nothing yet: A uniform as in PEFT's default, B zero.

    With `head` (labels, width of the features) it has a head of zeros, to which all labels are alike.

    `shapes` maps each module to (in, out). Every module draws from its own generator, seeded by `seed`
    and its name, so that an adapter offsets the same whatever is trained beside it.
    """
    factors = {}
    for module, (width_in, width_out) in shapes.items():
        generator = torch.Generator().manual_seed(seed_of(seed, module))
        bound = 1 / math.sqrt(width_in)  # kaiming_uniform with a = sqrt(5)
        a = torch.empty(rank, width_in).uniform_(-bound, bound, generator=generator)
        factors[module] = (a, torch.zeros(width_out, rank))
    alphas = dict.fromkeys(shapes, float(alpha))
    made = Head(torch.zeros(head), torch.zeros(head[0])) if head else None
    return AdapterWeights(factors, alphas, rslora, made)


def seed_of(seed: int, name: str) -> int:
    """Return the seed that belongs to a name, out of everyone's."""
    mixed = seed
    for byte in name.encode():
        mixed = (mixed * 1_000_003 + byte) % (2**63)
    return mixed


def misfits(
    weights: AdapterWeights, shapes: Mapping[str, tuple[int, int]], width: int | None = None
) -> Sequence[str]:
    """Return a sentence for every module that is missing from `shapes`, has other sizes or bad numbers.

    `width` is that of an encoder's features, which need a head; None: a language model, which has no use for
    one.
    """
    found = _head_misfits(weights.head, width)
    finite = weights.finite()
    for module, ((rank, width_in), (width_out, its_rank)) in weights.shapes.items():
        if module not in shapes:
            found.append(f"the backbone has no linear layer {module!r}")
        elif (width_in, width_out) != shapes[module]:
            found.append(
                f"{module}: the adapter maps {width_in} -> {width_out}, "
                f"the backbone {shapes[module][0]} -> {shapes[module][1]}"
            )
        elif rank != its_rank:
            found.append(f"{module}: A has rank {rank}, B has rank {its_rank}")
        elif not (finite or all(map(_is_finite, weights.factors[module]))):
            found.append(f"{module}: some numbers are not finite")
    return found


def _head_misfits(head: Head | None, width: int | None) -> list[str]:
    if head is None:
        missing = f"it has no head ({HEAD}), which an encoder needs to answer"
        return [] if width is None else [missing]
    if width is None:
        return [
            f"it has a head ({HEAD}), which a language model does not use: load it on its encoder"
        ]
    found = []
    if head.weight.shape != (*head.bias.shape, width):
        found.append(
            f"{HEAD}: the head is {tuple(head.weight.shape)} with a bias {tuple(head.bias.shape)}, the "
            f"backbone's features have width {width}"
        )
    if not (_is_finite(head.weight) and _is_finite(head.bias)):
        found.append(f"{HEAD}: some numbers are not finite")
    return found
