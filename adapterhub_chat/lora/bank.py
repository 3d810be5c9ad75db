"""Bank: a fixed number of adapter slots in device memory, stored as one matrix.

Legend: S slots, R rank bucket, J members of a site, P parameters of a slot.
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
"""Layout of a slot: sites, rank, and a head's (labels, width)."""


class Bank:
    """A fixed number of adapter slots: loading an adapter copies its weights, shapes never change.

    A slot is one row of `flat` (S, P): A (J*R, in) of every site, then B^T (R, out) of every module, with
    the scale folded in, then a head's weight and bias; zeros where its adapter has no weights, a smaller rank
    or fewer labels. `A` and `B` are the views (S, J*R, in) and (S, R, out) that the products use, `head` the
    views (S, labels, width) and (S, labels) of the heads; `labels` is the number of labels of each slot. With
    `trainable` they are leaves whose gradients are views of one such matrix; an optimizer updates separate
    fp32 vectors of this layout with B unscaled.
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
        self.site_of_module = {m: (s.name, j) for s in sites for j, m in enumerate(s.members)}
        self._a_shapes = {s.name: (len(s.members) * rank, s.in_features) for s in sites}
        out_features = {m: o for s in sites for m, o in zip(s.members, s.out_features, strict=True)}
        self._b_shapes = {m: (rank, out) for m, out in out_features.items()}
        self._head_shapes: list[tuple[int, ...]] = [head, head[:1]] if head else []
        self._sizes = [
            math.prod(s)
            for s in (*self._a_shapes.values(), *self._b_shapes.values(), *self._head_shapes)
        ]
        b_start = sum(self._sizes[: len(self._a_shapes)])
        self._b_range = slice(b_start, b_start + sum(rank * out for out in out_features.values()))
        self.flat = torch.zeros(slots, sum(self._sizes), dtype=dtype, device=device)
        self.A, self.B, self.head = self._views(self.flat)
        self.gradients: Tensor | None = None
        if trainable:
            # The gradients are strided views, which autograd warns about; it costs no time here.
            warnings.filterwarnings("ignore", message="grad and param do not obey")
            self.scratch = torch.zeros(self.flat.shape[1], device=device)
            """One vector (P,), a buffer for `gradient`."""
            self.gradients = torch.zeros_like(self.flat)
            gradients_a, gradients_b, gradients_head = self._views(self.gradients)
            gradients = (*gradients_a.values(), *gradients_b.values(), *gradients_head)
            leaves = (*self.A.values(), *self.B.values(), *self.head)
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.requires_grad_().grad = gradient

    @cached_property
    def offsets(self) -> dict[str, tuple[int, int]]:
        """Where A and B of each module begin in a slot."""
        starts = accumulate(self._sizes, initial=0)
        a_starts, b_starts = (
            dict(zip(shapes, starts, strict=False)) for shapes in (self._a_shapes, self._b_shapes)
        )
        offsets = {}
        for site in self.sites.values():
            a_size = self.rank * site.in_features
            for j, module in enumerate(site.members):
                offsets[module] = a_starts[site.name] + j * a_size, b_starts[module]
        return offsets

    @torch.no_grad()
    def write(self, slot: int, weights: AdapterWeights) -> None:
        """Write an adapter into a slot, replacing the slot's content."""
        row = self.flat[slot]
        if weights.num_parameters < len(row):
            row.zero_()
        for module, (a, b) in weights.factors.items():
            site, j = self.site_of_module[module]
            rank, first_row = a.shape[0], j * self.rank
            self.A[site][slot, first_row : first_row + rank].copy_(a)
            # three dimensions: torch's special case for copying a transposed matrix takes twice as long
            target, scale = self.B[module][slot : slot + 1, :rank], weights.scale(module)
            if b.dtype == self.dtype:
                target.copy_(b.T).mul_(scale)
            else:  # rounded once, after scaling
                target.copy_((b.float() * scale).T)
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
        weights = self.weights(self.flat[slot].detach().float(), like)
        scales = {m: like.scale(m) or 1.0 for m in weights.factors}
        return weights.with_factors(
            {m: (a, b / scales[m]) for m, (a, b) in weights.factors.items()}
        )

    @torch.no_grad()
    def put(self, slot: int, vector: Tensor, scale: float) -> None:
        """Write a vector (P,) of this layout into a slot, with B multiplied by `scale`."""
        self.flat[slot].copy_(vector)
        self.flat[slot, self._b_range].mul_(scale)

    @torch.no_grad()
    def gradient(self, slot: int, scale: float, out: Tensor) -> Tensor:
        """Fill `out` (P,) with the gradient with respect to the vector that `put` wrote into a slot."""
        assert self.gradients is not None
        out.copy_(self.gradients[slot])
        out[self._b_range].mul_(scale)
        return out

    def host_copy(self) -> Bank:
        """Return an empty one-slot bank of the same layout on the CPU."""
        sites, rank, head = self.layout
        return Bank(sites, slots=1, rank=rank, dtype=self.dtype, head=head)

    def zero_gradients(self) -> None:
        """Set all gradients to zero."""
        if self.gradients is not None:
            self.gradients.zero_()

    @torch.no_grad()
    def vector(self, weights: AdapterWeights) -> Tensor:
        """Return an adapter as a vector (P,) of this layout, fp32, with B unscaled."""
        vector = torch.zeros(self.flat.shape[1], device=self.device)
        a_views, b_views, head_views = self._views(vector[None])
        if weights.head:
            for target, source in zip(
                head_views, (weights.head.weight, weights.head.bias), strict=True
            ):
                target[0, : weights.labels].copy_(source)
        for module, (a, b) in weights.factors.items():
            target_a, target_b = self._module_views(a_views, b_views, module, weights.rank(module))
            target_a[0].copy_(a)
            target_b[0].copy_(b.T)
        return vector

    @torch.no_grad()
    def weights(self, vector: Tensor, like: AdapterWeights) -> AdapterWeights:
        """Return a copy of a vector (P,) as an adapter with the modules, ranks and alphas of `like`."""
        a_views, b_views, head_views = self._views(vector[None])
        factors = {}
        for module in like.factors:
            a, b = self._module_views(a_views, b_views, module, like.rank(module))
            factors[module] = (a[0].cpu().clone(), b[0].T.cpu().contiguous())
        head = like.head and Head(*(view[0, : like.labels].cpu().clone() for view in head_views))
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
        """Return the size of all slots in bytes."""
        return self.flat.nbytes

    def _views(
        self, flat: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[Tensor, ...]]:
        """Return the factors inside `flat` (n, P): A by site, B by module, a head's weight and bias."""
        if not self._sizes:
            return {}, {}, ()
        parts = flat.split(self._sizes, dim=1)
        shapes = (*self._a_shapes.values(), *self._b_shapes.values(), *self._head_shapes)
        views = [p.unflatten(1, shape).detach() for p, shape in zip(parts, shapes, strict=True)]
        num_a, num_ab = len(self._a_shapes), len(self._a_shapes) + len(self._b_shapes)
        a_views = dict(zip(self._a_shapes, views[:num_a], strict=True))
        return (
            a_views,
            dict(zip(self._b_shapes, views[num_a:num_ab], strict=True)),
            tuple(views[num_ab:]),
        )

    def _module_views(
        self, a_views: dict[str, Tensor], b_views: dict[str, Tensor], module: str, rank: int
    ) -> tuple[Tensor, Tensor]:
        """Return a module's A (n, r, in) and B (n, r, out) in views of this layout."""
        site, j = self.site_of_module[module]
        first_row = j * self.rank
        return a_views[site][:, first_row : first_row + rank], b_views[module][:, :rank]
