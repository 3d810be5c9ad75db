"""AdapterWeights: the tensors of one LoRA adapter, independent of any model, slot or file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from adapterhub_chat.errors import AdapterError
from adapterhub_chat.types import HEAD

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Module name -> (A (r, in), B (out, r))."""
Shape = tuple[int, ...]


class PackedFactors(Mapping[str, tuple[Tensor, Tensor]]):
    """Factors stored in one vector, as in a file; views are created on access."""

    def __init__(
        self,
        numbers: Tensor,
        shapes: Mapping[str, tuple[Shape, Shape]],
        offsets: Mapping[str, tuple[int, int]],
    ) -> None:
        """Wrap `numbers`, a CPU vector in which each module's A and B begin at `offsets`."""
        self.numbers, self.shapes, self.offsets = numbers, shapes, offsets

    def __getitem__(self, module: str) -> tuple[Tensor, Tensor]:
        """Return views of a module's A and B."""
        a, b = (
            self.numbers[start : start + math.prod(shape)].view(shape)
            for start, shape in zip(self.offsets[module], self.shapes[module], strict=True)
        )
        return a, b

    def __contains__(self, module: object) -> bool:
        """Return whether there are factors for a module."""
        return module in self.shapes

    def __iter__(self) -> Iterator[str]:
        """Yield the modules."""
        return iter(self.shapes)

    def __len__(self) -> int:
        """Return the number of modules."""
        return len(self.shapes)


@dataclass(frozen=True, slots=True)
class Head:
    """Classification head of an adapter on an encoder: label logits from a text's features, float32."""

    weight: Tensor
    """(labels, width)."""
    bias: Tensor
    """(labels,)."""

    @property
    def shape(self) -> tuple[int, int]:
        """Labels and width of the features."""
        return int(self.weight.shape[0]), int(self.weight.shape[1])


@dataclass(frozen=True)
class AdapterWeights:
    """LoRA factors by module name; ranks and alphas may differ between modules."""

    factors: Factors
    alphas: Mapping[str, float]
    rslora: bool = False
    """Scale by alpha / sqrt(r) (arXiv 2312.03732) instead of alpha / r."""
    head: Head | None = None
    """The classification head; only adapters on encoders have one."""
    checked: bool = field(default=False, repr=False, compare=False)
    """Whether the guard has checked that all numbers are finite."""

    @property
    def shapes(self) -> Mapping[str, tuple[Shape, Shape]]:
        """The shapes of A and B by module."""
        if isinstance(self.factors, PackedFactors):
            return self.factors.shapes
        return {m: (tuple(a.shape), tuple(b.shape)) for m, (a, b) in self.factors.items()}

    def rank(self, module: str) -> int:
        """Return r of one module."""
        if isinstance(self.factors, PackedFactors):
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
        """Number of parameters, the head's included."""
        labels, width = self.head.shape if self.head else (0, 0)
        sizes = (math.prod(a) + math.prod(b) for a, b in self.shapes.values())
        return sum(sizes) + labels * (width + 1)

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes."""
        if isinstance(self.factors, PackedFactors):
            head = (self.head.weight, self.head.bias) if self.head else ()
            return self.factors.numbers.nbytes + sum(tensor.nbytes for tensor in head)
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def labels(self) -> int:
        """Number of the head's labels, 0 without a head."""
        return self.head.shape[0] if self.head else 0

    @cached_property
    def is_finite(self) -> bool:
        """Whether all numbers are finite; computed once, since weights do not change."""
        return self.checked or all(_all_finite(tensor.detach()) for tensor in self.tensors())

    def addresses(self, dtype: torch.dtype) -> list[tuple[int, int]] | None:
        """Return the memory addresses of each module's A and B, contiguous on the CPU.

        Returns None if a factor has another dtype, is not contiguous or lies on another device.
        """
        if isinstance(self.factors, PackedFactors):
            numbers, size = self.factors.numbers, dtype.itemsize
            start = numbers.data_ptr()
            addresses = [
                (start + a * size, start + b * size) for a, b in self.factors.offsets.values()
            ]
            return addresses if numbers.dtype == dtype else None
        pairs = list(self.factors.values())
        is_plain = all(
            t.dtype == dtype and t.is_contiguous() and t.device.type == "cpu"
            for p in pairs
            for t in p
        )
        return [(a.data_ptr(), b.data_ptr()) for a, b in pairs] if is_plain else None

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors: A and B of each module, then the head's weight and bias."""
        for pair in self.factors.values():
            yield from pair
        if self.head:
            yield from (self.head.weight, self.head.bias)

    def with_factors(self, factors: Factors) -> AdapterWeights:
        """Return a copy with other factors of the same shapes; the head is kept."""
        return replace(self, factors=MappingProxyType(dict(factors)), checked=False)

    def to(self, dtype: torch.dtype) -> AdapterWeights:
        """Return a copy with the factors in `dtype`; the head is kept."""
        return self.with_factors(
            {m: (a.to(dtype), b.to(dtype)) for m, (a, b) in self.factors.items()}
        )

    def shapes_only(self) -> AdapterWeights:
        """Return a copy with meta tensors: shapes without data."""
        factors = {m: (a.to("meta"), b.to("meta")) for m, (a, b) in self.factors.items()}
        head = self.head and Head(self.head.weight.to("meta"), self.head.bias.to("meta"))
        return replace(self.with_factors(factors), head=head)


def _all_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite, by minimum and maximum, which propagate NaN."""
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.aminmax())


def concatenate(adapters: Sequence[AdapterWeights]) -> AdapterWeights:
    """Return one adapter whose update is exactly the sum of theirs: ranks concatenated, scale folded into B.

    Heads are summed too. Raises AdapterError for heads of different sizes.
    """
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for module in dict.fromkeys(m for adapter in adapters for m in adapter.factors):
        sources = [adapter for adapter in adapters if module in adapter.factors]
        a_all = torch.cat([adapter.factors[module][0].float() for adapter in sources])
        b_parts = [
            adapter.factors[module][1].float() * adapter.scale(module) for adapter in sources
        ]
        factors[module] = (a_all, torch.cat(b_parts, dim=1))
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
    """Return a new adapter without effect: A uniform as in PEFT's default, B zero.

    With `head` (labels, width of the features) it has a head of zeros. `shapes`: module -> (in, out). Every
    module draws from its own generator, seeded by `seed` and its name, so that an adapter starts the same
    whatever is trained with it.
    """
    factors = {}
    for module, (width_in, width_out) in shapes.items():
        generator = torch.Generator().manual_seed(derive_seed(seed, module))
        bound = 1 / math.sqrt(width_in)  # kaiming_uniform with a = sqrt(5)
        a = torch.empty(rank, width_in).uniform_(-bound, bound, generator=generator)
        factors[module] = (a, torch.zeros(width_out, rank))
    alphas = dict.fromkeys(shapes, float(alpha))
    initial_head = Head(torch.zeros(head), torch.zeros(head[0])) if head else None
    return AdapterWeights(factors, alphas, rslora, initial_head)


def derive_seed(seed: int, name: str) -> int:
    """Return a seed derived from a common seed and a name."""
    state = seed
    for byte in name.encode():
        state = (state * 1_000_003 + byte) % (2**63)
    return state


SHARED_LAYERS = ("lm_head", "embed_out", "embed_tokens", "wte")
"""Last names of output heads and embeddings, which all rows of a batch share."""


def no_such_layer(module: str) -> str:
    """Return why an adapter cannot change a module that carries no adapters here."""
    if module.rpartition(".")[2] in SHARED_LAYERS:
        return (
            f"{module!r} is shared by all rows of a batch and carries no adapter: train without it, or merge "
            "the adapter with PEFT and use the result as the backbone"
        )
    return f"the backbone's language model has no linear layer {module!r} that carries adapters"


def misfits(
    weights: AdapterWeights, shapes: Mapping[str, tuple[int, int]], width: int | None = None
) -> Sequence[str]:
    """Return a sentence for every module that is missing from `shapes`, has other sizes or bad numbers.

    `width` is the feature width of an encoder, whose adapters need a head; None for a language model, whose
    adapters must not have one.
    """
    problems = _head_misfits(weights.head, width)
    is_finite = weights.is_finite
    for module, ((rank, width_in), (width_out, rank_b)) in weights.shapes.items():
        if module not in shapes:
            problems.append(no_such_layer(module))
        elif (width_in, width_out) != shapes[module]:
            problems.append(
                f"{module}: the adapter maps {width_in} -> {width_out}, "
                f"the backbone {shapes[module][0]} -> {shapes[module][1]}"
            )
        elif rank != rank_b:
            problems.append(f"{module}: A has rank {rank}, B has rank {rank_b}")
        elif not (is_finite or all(map(_all_finite, weights.factors[module]))):
            problems.append(f"{module}: some numbers are not finite")
    return problems


def _head_misfits(head: Head | None, width: int | None) -> list[str]:
    if head is None:
        problem = f"it has no head ({HEAD}), which an encoder needs to answer"
        return [] if width is None else [problem]
    if width is None:
        return [
            f"it has a head ({HEAD}), which a language model does not use: load it on its encoder"
        ]
    problems = []
    if head.weight.shape != (*head.bias.shape, width):
        problems.append(
            f"{HEAD}: the head is {tuple(head.weight.shape)} with a bias {tuple(head.bias.shape)}, the "
            f"backbone's features have width {width}"
        )
    if not (_all_finite(head.weight) and _all_finite(head.bias)):
        problems.append(f"{HEAD}: some numbers are not finite")
    return problems
