"""Sites, the linear layers that share an input, and the bank of slots in which adapters lie for them.

Legend: S slots, R rank bucket, J members of a site, P numbers of a slot.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from adapterhub_chat.lora.sites import Site
from adapterhub_chat.lora.weights import AdapterWeights, Head

BankLayout = tuple[tuple[Site, ...], int, tuple[int, int] | None]
"""What the numbers of a slot are: sites, rank, and a head's labels and width."""


class Bank:
    """A fixed number of slots for adapters: loading one copies numbers, shapes never change.

    A slot is one row of `flat` (S, P): A (J*R, in) of every site, then B^T (R, out) of every module, with
    the scale folded in, then a head's weight and bias, and zeros where its adapter has no weights, a smaller
    rank or fewer labels. `A` and `B` are the views (S, J*R, in) and (S, R, out) that the products use, `head`
    those of the heads, (S, labels, width) and (S, labels); `labels` says how many each slot knows. With
    `trainable` they are leaves whose gradients are views of one such matrix; the numbers that an optimizer
    moves are kept elsewhere, in fp32, as vectors of this layout with B unscaled.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        slots: int,
        rank: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        trainable: bool = False,
        head: tuple[int, int] | None = None,
    ) -> None:
        """Allocate `slots` x `rank` for the given sites, and a head (labels, width) if there is one."""
        self.sites = {site.name: site for site in sites}
        self.slots, self.rank, self.trainable = slots, rank, trainable
        self.layout: BankLayout = (tuple(sites), rank, head)
        self.labels = [0] * slots
        self.dtype, self.device = dtype, torch.device(device)
        self.home = {m: (s.name, j) for s in sites for j, m in enumerate(s.members)}
        self._a = {s.name: (len(s.members) * rank, s.in_features) for s in sites}
        outs = {m: o for s in sites for m, o in zip(s.members, s.out_features, strict=True)}
        self._b = {m: (rank, out) for m, out in outs.items()}
        self._head: list[tuple[int, ...]] = [head, head[:1]] if head else []
        self._sizes = [math.prod(s) for s in (*self._a.values(), *self._b.values(), *self._head)]
        start = sum(self._sizes[: len(self._a)])
        self._scaled = slice(start, start + sum(rank * out for out in outs.values()))
        self.flat = torch.zeros(slots, sum(self._sizes), dtype=dtype, device=device)
        self.A, self.B, self.head = self._views(self.flat)
        self.slopes: Tensor | None = None
        if trainable:
            # Rows of one matrix are not what autograd expects; nothing gets slower by it here.
            warnings.filterwarnings("ignore", message="grad and param do not obey")
            self.scratch = torch.zeros(self.flat.shape[1], device=device)
            """One vector (P,), for whoever looks at a gradient."""
            self.slopes = torch.zeros_like(self.flat)
            slopes_a, slopes_b, slopes_head = self._views(self.slopes)
            slopes = (*slopes_a.values(), *slopes_b.values(), *slopes_head)
            leaves = (*self.A.values(), *self.B.values(), *self.head)
            for leaf, slope in zip(leaves, slopes, strict=True):
                leaf.requires_grad_().grad = slope

    @cached_property
    def offsets(self) -> dict[str, tuple[int, int]]:
        """Where A and B of each module begin among a slot's numbers."""
        starts = accumulate(self._sizes, initial=0)
        first_a, first_b = (dict(zip(own, starts, strict=False)) for own in (self._a, self._b))
        found = {}
        for site in self.sites.values():
            step = self.rank * site.in_features
            for j, module in enumerate(site.members):
                found[module] = first_a[site.name] + j * step, first_b[module]
        return found

    @torch.no_grad()
    def write(self, slot: int, weights: AdapterWeights) -> None:
        """Put an adapter into a slot; the slot's former content is gone."""
        row = self.flat[slot]
        if weights.num_parameters < len(row):
            row.zero_()
        for module, (a, b) in weights.factors.items():
            site, j = self.home[module]
            rank, start = a.shape[0], j * self.rank
            self.A[site][slot, start : start + rank].copy_(a)
            # three dimensions: torch's own way of copying a transposed matrix takes twice as long
            place, scale = self.B[module][slot : slot + 1, :rank], weights.scale(module)
            if b.dtype == self.dtype:
                place.copy_(b.T).mul_(scale)
            else:  # rounded once, after scaling
                place.copy_((b.float() * scale).T)
        self.write_head(slot, weights.head)

    def set_num_labels(self, slot: int, num_labels: int) -> None:
        """Set how many labels the head in a slot knows; 0 for an adapter without a head."""
        self.labels[slot] = num_labels

    @torch.no_grad()
    def write_head(self, slot: int, head: Head | None) -> None:
        """Put a head's numbers into a slot that is otherwise written; what it does not fill stays zero."""
        self.set_num_labels(slot, head.shape[0] if head else 0)
        if head:
            weight, bias = self.head
            weight[slot, : head.shape[0]].copy_(head.weight)
            bias[slot, : head.shape[0]].copy_(head.bias)

    @torch.no_grad()
    def read(self, slot: int, like: AdapterWeights) -> AdapterWeights:
        """Return the adapter in a slot, fp32, with the modules, ranks and alphas of `like`."""
        found = self.weights(self.flat[slot].detach().float(), like)
        scales = {m: like.scale(m) or 1.0 for m in found.factors}
        return found.with_factors({m: (a, b / scales[m]) for m, (a, b) in found.factors.items()})

    @torch.no_grad()
    def put(self, slot: int, vector: Tensor, scale: float) -> None:
        """Put a vector (P,) of this layout into a slot, its B times `scale`."""
        self.flat[slot].copy_(vector)
        self.flat[slot, self._scaled].mul_(scale)

    @torch.no_grad()
    def gradient(self, slot: int, scale: float, out: Tensor) -> Tensor:
        """Fill `out` (P,) with the gradient of the vector that was put into a slot."""
        assert self.slopes is not None
        out.copy_(self.slopes[slot])
        out[self._scaled].mul_(scale)
        return out

    def host_copy(self) -> Bank:
        """Return an empty bank of one slot of the same layout, in the host's memory."""
        sites, rank, head = self.layout
        return Bank(sites, slots=1, rank=rank, dtype=self.dtype, head=head)

    def zero_gradients(self) -> None:
        """Start to collect gradients anew."""
        if self.slopes is not None:
            self.slopes.zero_()

    @torch.no_grad()
    def vector(self, weights: AdapterWeights) -> Tensor:
        """Return an adapter's numbers, B unscaled, as a vector (P,) of this layout, fp32."""
        vector = torch.zeros(self.flat.shape[1], device=self.device)
        first, second, head = self._views(vector[None])
        if weights.head:
            for place, numbers in zip(head, (weights.head.weight, weights.head.bias), strict=True):
                place[0, : weights.labels].copy_(numbers)
        for module, (a, b) in weights.factors.items():
            at_a, at_b = self._places(first, second, module, weights.rank(module))
            at_a[0].copy_(a)
            at_b[0].copy_(b.T)
        return vector

    @torch.no_grad()
    def weights(self, vector: Tensor, like: AdapterWeights) -> AdapterWeights:
        """Return a vector (P,) as an adapter with the modules, ranks and alphas of `like`; a copy."""
        first, second, last = self._views(vector[None])
        factors = {}
        for module in like.factors:
            a, b = self._places(first, second, module, like.rank(module))
            factors[module] = (a[0].cpu().clone(), b[0].T.cpu().contiguous())
        head = like.head and Head(*(part[0, : like.labels].cpu().clone() for part in last))
        return replace(like.with_factors(factors), head=head)

    @property
    def places(self) -> list[tuple[Bank, int]]:
        """All slots, in order."""
        return [(self, slot) for slot in range(self.slots)]

    @property
    def slot_bytes(self) -> int:
        """Bytes that one slot takes."""
        return sum(self._sizes) * self.flat.element_size()

    def nbytes(self) -> int:
        """Return the bytes that the factors take."""
        return self.flat.nbytes

    def _views(
        self, flat: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[Tensor, ...]]:
        """Return the factors inside `flat` (n, P): A by site, B by module, a head's weight and bias."""
        if not self._sizes:
            return {}, {}, ()
        parts = flat.split(self._sizes, dim=1)
        shapes = (*self._a.values(), *self._b.values(), *self._head)
        views = [p.unflatten(1, shape).detach() for p, shape in zip(parts, shapes, strict=True)]
        count, last = len(self._a), len(self._a) + len(self._b)
        first = dict(zip(self._a, views[:count], strict=True))
        return first, dict(zip(self._b, views[count:last], strict=True)), tuple(views[last:])

    def _places(
        self, first: dict[str, Tensor], second: dict[str, Tensor], module: str, rank: int
    ) -> tuple[Tensor, Tensor]:
        """Return where A (n, r, in) and B (n, r, out) of a module lie in views of this layout."""
        site, j = self.home[module]
        start = j * self.rank
        return first[site][:, start : start + rank], second[module][:, :rank]
