"""Three ways to compute `sum_s M[n, s] * B_s A_s x_n`; `choose_form` picks one per batch by a measured rule.

Each form has two halves: `shrink` (x, A) -> h and `add` (y, h, B) -> y + B h, so that linears which share
an input share one shrink, and products accumulate into y where possible.
Legend: N rows with at least one adapter, T tokens of a row, G slots in use, R rank bucket, K = J*R the
ranks of a site's members side by side. This module knows no model modules or names.
`adapterhub-chat bench kernels` prints the measurements behind the rule (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

PADDING_LIMIT = 2.0
"""Batched products are faster while padding the groups to one size costs at most this factor in rows."""


class Form(Protocol):
    """One way to compute the mixed low-rank product."""

    def shrink(self, x: Tensor, a: Tensor) -> Tensor:
        """Map x (N, T, in) and a (G, K, in) to h (..., K), in the form's own layout."""
        ...

    def add(self, y: Tensor, h: Tensor, b: Tensor) -> Tensor:
        """Return y (N, T, out) plus what h (..., R) and b (G, R, out) give; y may be overwritten."""
        ...


@dataclass(frozen=True, slots=True)
class Batched:
    """One-hot rows in groups padded to equal size: two batched products."""

    groups: int
    places: int
    """Rows of each group, padding included."""
    gather: Tensor | None
    """Source row of each place of the (G, places) layout; None when the rows are in that order."""
    scatter: Tensor | None
    """Place of each row in that layout."""
    weight: Tensor | None
    """(G, places, 1, 1), or None when every weight is 1."""

    def shrink(self, x: Tensor, a: Tensor) -> Tensor:
        """Return h (G, places * T, K)."""
        if self.gather is not None:
            x = x.index_select(0, self.gather)
        h = torch.bmm(x.reshape(self.groups, -1, x.shape[-1]), a.mT)
        if self.weight is None:
            return h
        scaled: Tensor = h.unflatten(1, (self.places, -1)) * self.weight.to(h.dtype)
        return scaled.flatten(1, 2)

    def add(self, y: Tensor, h: Tensor, b: Tensor) -> Tensor:
        """Return y (N, T, out) + B h; in place, by one product, where the rows are in group order."""
        if self.scatter is None and y.is_contiguous() and not y._is_view():
            added: Tensor = _AddProducts.apply(y, h, b)  # type: ignore[no-untyped-call]
            return added
        delta = torch.bmm(h, b).reshape(self.groups * self.places, -1, b.shape[2])
        delta = delta if self.scatter is None else delta.index_select(0, self.scatter)
        return y + delta.view(y.shape)


class _AddProducts(torch.autograd.Function):
    """y += h B by group, in place: one pass over y instead of three."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, b: Tensor) -> Tensor:
        """Overwrite y (N, T, out) with y + h (G, M, R) b (G, R, out)."""
        ctx.mark_dirty(y)
        ctx.save_for_backward(h, b)
        y.view(len(b), -1, b.shape[2]).baddbmm_(h, b)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the gradients of y, h and b."""
        (dy,) = gradients
        h, b = ctx.saved_tensors
        d = dy.reshape(len(b), -1, b.shape[2])
        _, needs_h, needs_b = ctx.needs_input_grad
        return dy, torch.bmm(d, b.mT) if needs_h else None, torch.bmm(h.mT, d) if needs_b else None


def rows_in_group_order(form: Form) -> bool:
    """Return whether the rows form adjacent groups of equal size, all with weight 1."""
    return isinstance(form, Batched) and form.gather is None and form.weight is None


def site_products(
    x: Tensor, weights: Sequence[tuple[Tensor, Tensor | None]], a: Tensor, b: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return W_j x + B_j A_j x for every member j of a site; the rows form adjacent groups of equal size.

    `x` (N, T, in), frozen `weights` (W (out, in), bias), `a` (G, J*R, in), each `b` (G, R, out). The
    gradient of x is accumulated in one tensor, where autograd would make one for each product.
    """
    frozen = [tensor for pair in weights for tensor in pair]
    outputs: tuple[Tensor, ...] = _SiteProducts.apply(x, a, *b, *frozen)  # type: ignore[no-untyped-call]
    return outputs


class _SiteProducts(torch.autograd.Function):
    """See `site_products`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        """Compute all members' outputs; `rest` is each B, then each W and its bias."""
        num_members = len(rest) // 3
        b, weights, biases = rest[:num_members], rest[num_members::2], rest[num_members + 1 :: 2]
        flat = x.reshape(-1, x.shape[-1])
        h = torch.bmm(flat.view(len(a), -1, x.shape[-1]), a.mT)
        outputs = []
        for h_member, factor, weight, bias in zip(
            h.chunk(num_members, -1), b, weights, biases, strict=True
        ):
            y = torch.bmm(h_member, factor).view(
                -1, len(weight)
            )  # the small product first: the large
            y.addmm_(flat, weight.T)  # one adds to it on its way
            outputs.append((y if bias is None else y.add_(bias)).view(*x.shape[:-1], -1))
        ctx.save_for_backward(x, h, a, *b)
        ctx.weights = weights
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, a and every b; the weights are frozen."""
        x, h, a, *b = ctx.saved_tensors
        h_members = h.mT.contiguous().chunk(len(b), 1)
        needs_x = ctx.needs_input_grad[0]
        db, dhs, dx = [], [], None
        for d, h_member, factor, weight in zip(gradients, h_members, b, ctx.weights, strict=True):
            # all uses of one gradient come together, while it is in the CPU cache
            d_groups = d.reshape(len(a), -1, d.shape[-1])
            db.append(torch.bmm(h_member, d_groups))
            dhs.append(torch.bmm(d_groups, factor.mT))
            if needs_x:
                flat = d_groups.reshape(-1, d.shape[-1])
                dx = flat @ weight if dx is None else dx.addmm_(flat, weight)
        dh = torch.cat(dhs, -1)
        da = torch.bmm(dh.mT.contiguous(), x.reshape(len(a), -1, x.shape[-1]))
        if dx is not None:
            dx.view(len(a), -1, x.shape[-1]).baddbmm_(dh, a)
            dx = dx.view(x.shape)
        return dx, da, *db, *[None] * (2 * len(b))


@dataclass(frozen=True, slots=True)
class Ragged:
    """One-hot rows in groups of very different sizes: `grouped_mm` over the sorted rows."""

    order: Tensor
    inverse: Tensor
    ends: Tensor
    """Last row (exclusive) of each group, int32."""
    weight: Tensor | None
    """(N, 1, 1) in sorted order."""

    def shrink(self, x: Tensor, a: Tensor) -> Tensor:
        """Return h (N, T, K), rows sorted by group."""
        h = self._product(x.index_select(0, self.order), a.mT)
        return h if self.weight is None else h * self.weight.to(h.dtype)

    def add(self, y: Tensor, h: Tensor, b: Tensor) -> Tensor:
        """Return y (N, T, out) + B h."""
        return y + self._product(h, b).index_select(0, self.inverse).view(y.shape)

    def _product(self, x: Tensor, w: Tensor) -> Tensor:
        """Return x (N, T, k) times w (G, k, n), each row with the matrix of its group."""
        rows, tokens, _ = x.shape
        flat = x.reshape(rows * tokens, -1)
        ends = self.ends * tokens
        if _grouped_mm_takes(flat, w):
            y = functional.grouped_mm(flat, w, offs=ends.to(torch.int32))
        else:
            sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
            parts = zip(flat.split(sizes), w, strict=True)
            y = torch.cat([part @ factor for part, factor in parts])
        return y.view(rows, tokens, -1)


def _grouped_mm_takes(x: Tensor, w: Tensor) -> bool:
    """Return whether `grouped_mm` supports these: rows of both must be multiples of 16 bytes."""
    widths = (x.shape[-1], w.shape[-1], w.shape[-2])
    aligned = all(width * x.element_size() % 16 == 0 for width in widths)
    return hasattr(functional, "grouped_mm") and x.dtype != torch.float64 and aligned


@dataclass(frozen=True, slots=True)
class Dense:
    """Rows that mix several slots: computes all slots for all rows and multiplies by the weights."""

    weight: Tensor
    """(N, 1, G, 1)."""

    def shrink(self, x: Tensor, a: Tensor) -> Tensor:
        """Return h (N, T, G, K), weighted."""
        groups, k, width = a.shape
        h = x @ a.reshape(groups * k, width).T
        weighted: Tensor = h.unflatten(-1, (groups, k)) * self.weight.to(x.dtype)
        return weighted

    def add(self, y: Tensor, h: Tensor, b: Tensor) -> Tensor:
        """Return y (N, T, out) + B h."""
        return y + (h.flatten(2) @ b.flatten(0, 1)).view(y.shape)


def split_terms(mix: Tensor) -> list[Tensor]:
    """Return matrices that sum to `mix` (N, S), each of which one form computes without waste.

    A batch in which some row mixes all slots in use stays one dense term; where rows mix fewer slots than the
    batch has, as in {shared: 1, task: 1}, each term holds one slot of every row.
    """
    is_used = mix != 0
    max_slots, in_use = int(is_used.sum(1).max()) if len(mix) else 0, int(is_used.any(0).sum())
    if max_slots <= 1 or max_slots == in_use:
        return [mix] if max_slots else []
    position = is_used.cumsum(1) * is_used  # 1 for a row's first slot in use, 2 for its second, ...
    return [mix * (position == n) for n in range(1, max_slots + 1)]


def choose_form(weights: Tensor, device: torch.device | str = "cpu") -> Form:
    """Return the fastest form for `weights` (N, G): every row and every column has a nonzero entry."""
    return _to_device(_choose_on_cpu(weights), torch.device(device))


def _choose_on_cpu(weights: Tensor) -> Form:
    if bool(((weights != 0).sum(1) > 1).any()):
        return Dense(weights[:, None, :, None])
    group = weights.abs().argmax(1)
    weight = weights.gather(1, group[:, None]).flatten()
    scale = None if bool((weight == 1).all()) else weight
    counts = torch.bincount(group, minlength=weights.shape[1])
    if weights.shape[1] * int(counts.max()) <= PADDING_LIMIT * len(group):
        return _batched(group.tolist(), counts.tolist(), scale)
    order = group.argsort(stable=True)
    sorted_scale = None if scale is None else scale[order][:, None, None]
    return Ragged(order, order.argsort(), counts.cumsum(0).to(torch.int32), sorted_scale)


def _batched(group: Sequence[int], counts: Sequence[int], scale: Tensor | None) -> Batched:
    """Lay the rows out as (G, size of the largest group).

    Padding repeats a row of its own group and is never read back: a row with non-finite numbers must not
    reach another group's gradient.
    """
    groups, places = len(counts), max(counts)
    filled, scatter = [0] * groups, [0] * len(group)
    gather = [group.index(g) for g in range(groups) for _ in range(places)]
    for row, g in enumerate(group):
        place = g * places + filled[g]
        filled[g] += 1
        gather[place], scatter[row] = row, place
    is_in_order = gather == list(range(len(group)))
    weight = None if scale is None else scale[gather].view(groups, places, 1, 1)
    if is_in_order:
        return Batched(groups, places, None, None, weight)
    return Batched(groups, places, torch.tensor(gather), torch.tensor(scatter), weight)


def _to_device(form: Form, device: torch.device) -> Form:
    moved = {
        name: value.to(device) if isinstance(value := getattr(form, name), Tensor) else value
        for name in form.__dataclass_fields__  # type: ignore[attr-defined]
    }
    return type(form)(**moved)
