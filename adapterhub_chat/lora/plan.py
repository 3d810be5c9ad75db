"""Plan: the mix of one batch, prepared for the low-rank products at every linear layer:

    y_t = W x_t + sum_s M[t, s] * (alpha_s / r_s) * B_s A_s x_t          (LoRA, arXiv 2106.09685)

`W x` is computed with the backbone's own weight, untouched; a `LoRALinear` adds the sum. A and B are stored
in the slots of a `Bank`, a `Plan` holds one batch's M in the form that the kernels need, and `activate` sets
the plan of the calling thread. Legend: S slots, R rank bucket, J members of a site, N rows, T tokens of a
row, G groups (distinct slots in use).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from adapterhub_chat.lora.bank import Bank, BankLayout
from adapterhub_chat.lora.kernels import (
    Form,
    choose_form,
    rows_in_group_order,
    site_products,
    split_terms,
)
from adapterhub_chat.lora.native import Entries, Sites
from adapterhub_chat.lora.sites import Site, SiteLayers

BankSlot = tuple[Bank, int]
"""A slot of a bank."""


@dataclass(frozen=True, slots=True)
class _Term:
    """A part of a mix that one form computes; all its slots have one layout."""

    form: Form
    places: Sequence[BankSlot]
    rows: Tensor | None
    """Indices of the rows that take part; None for all rows."""

    @property
    def bank(self) -> Bank:
        """The first place's bank, whose layout all places share."""
        return self.places[0][0]

    def gather(self, factors: Callable[[Bank], Tensor], dtype: torch.dtype) -> Tensor:
        """Return one factor of all places, (G, ...); a view where they are adjacent slots of one bank."""
        slots = [slot for _, slot in self.places]
        first, last = slots[0], slots[-1] + 1
        if slots == list(range(first, last)) and all(b is self.bank for b, _ in self.places):
            stacked = factors(self.bank)
            return (stacked if last - first == len(stacked) else stacked[first:last]).to(dtype)
        return torch.stack([factors(bank)[slot] for bank, slot in self.places]).to(dtype)


class Plan:
    """One batch's mix M (N, S), analysed once for all layers.

    Rows of zeros take part in no product: their output equals the backbone's bit for bit. A plan is used by
    one thread at a time.
    """

    def __init__(self, places: Sequence[BankSlot], mix: Tensor) -> None:
        """Analyse `mix` (N, S), a CPU tensor of weights; column s belongs to `places[s]`."""
        self.num_rows = len(mix)
        self._places, self._mix = places, mix
        self._layout_groups = [
            (layout_places, mix[:, columns])
            for layout_places, columns in _group_by_layout(places, mix)
        ]
        self._terms = [
            _make_term(one_form, layout_places)
            for layout_places, layout_mix in self._layout_groups
            for one_form in split_terms(layout_mix)
        ]
        self._shrunk: dict[str, tuple[Tensor, list[Tensor | None]]] = {}
        self._outputs: dict[str, tuple[Tensor, tuple[Tensor, ...]]] = {}
        self._factors: dict[tuple[str, int], tuple[Tensor, ...]] = {}
        self._joined_b: dict[str, Tensor] = {}
        self._entries: dict[int, list[Entries]] = {}

    @property
    def _has_single_form(self) -> bool:
        """Whether one form computes all rows, in adjacent groups of equal size and with weight 1."""
        only = self._terms[0]
        return len(self._terms) == 1 and only.rows is None and rows_in_group_order(only.form)

    @property
    def empty(self) -> bool:
        """Whether no row has an adapter."""
        return not self._terms

    @property
    def num_places(self) -> int:
        """Number of slots in use."""
        return sum(len(places) for places, _ in self._layout_groups)

    def row(self, number: int) -> Plan:
        """Return the plan of one row alone."""
        return Plan(self._places, self._mix[number : number + 1])

    def apply(
        self, layers: SiteLayers, member: int, x: Tensor, base: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the layer's output under this mix: base(x) plus the update."""
        site = layers.site
        if not self._carries(site):
            return base(x)
        if not (layers.plain and self._has_single_form and torch.is_grad_enabled()):
            return self.add(site, member, x, base(x))
        cached = self._outputs.pop(site.name, None)
        if cached is None or cached[0] is not x:
            a, *b = self._site_factors(site, 0, x.dtype)
            cached = (x, site_products(x, layers.weights, a, b))
        if member + 1 < len(site.members):
            self._outputs[site.name] = cached
        return cached[1][member]

    def add(self, site: Site, member: int, x: Tensor, y: Tensor) -> Tensor:
        """Return y plus the mixed low-rank product of x; the rows are the first dimension of both.

        `y` may be overwritten.
        """
        if not self._carries(site):
            return y
        shrunk = self._shrink(site, member, x)
        for n, (term, h) in enumerate(zip(self._terms, shrunk, strict=True)):
            if h is None:
                continue
            rank = term.bank.rank
            h_member = h[..., member * rank : (member + 1) * rank].to(y.dtype)
            b = self._site_factors(site, n, x.dtype)[1 + member].to(y.dtype)
            if term.rows is None:
                y = term.form.add(y, h_member, b)
                continue
            rows = y.reshape(self.num_rows, -1, y.shape[-1])
            added = term.form.add(rows.index_select(0, term.rows), h_member, b)
            y = rows.index_copy(0, term.rows, added).view(y.shape)
        return y

    def add_site(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """Return y (N*T, sum of the members' outs) plus the update of x (N, T, in).

        `y` may be overwritten: where all rows lie in adjacent groups, one product accumulates into it.
        """
        if not self._carries(site):
            return y
        if not self._has_single_form:
            parts = y.unflatten(0, (self.num_rows, -1)).split(site.out_features, dim=-1)
            added = [self.add(site, j, x, part) for j, part in enumerate(parts)]
            return (added[0] if len(added) == 1 else torch.cat(added, dim=-1)).flatten(0, 1)
        a, *b = self._site_factors(site, 0, x.dtype)
        if site.name not in self._joined_b:
            self._joined_b[site.name] = b[0] if len(b) == 1 else _block_diagonal(b)
        h = torch.bmm(x.reshape(len(a), -1, x.shape[-1]), a.mT)
        y.view(len(a), -1, y.shape[-1]).baddbmm_(h, self._joined_b[site.name])
        return y

    def label_logits(self, features: Tensor, rows: Tensor, width: int) -> Tensor:
        """Return label logits (P, >= width), float32, of features (P, W); `rows` gives each one's mix row.

        A row's logits are the weighted sum of its adapters' heads; labels that none of them has get -inf. A
        row without a head gets zeros.
        """
        heads = [(places, mix) for places, mix in self._layout_groups if places[0][0].head]
        width = max([width, *(places[0][0].head[1].shape[1] for places, _ in heads)])
        total = features.new_zeros(len(features), width, dtype=torch.float32)
        known = torch.zeros_like(total, dtype=torch.bool)
        for places, mix in heads:
            weight, bias = (
                torch.stack([bank.head[n][slot] for bank, slot in places]) for n in (0, 1)
            )
            padding = width - bias.shape[1]
            each = torch.einsum("pw,glw->pgl", features.float(), weight.float()) + bias.float()
            counts = torch.tensor([bank.labels[slot] for bank, slot in places])
            is_own_label = torch.arange(bias.shape[1]) < counts[:, None]
            share = (mix[rows.cpu()][:, :, None] * is_own_label).to(features.device)  # (P, G, L)
            total = total + functional.pad((share * each).sum(1), (0, padding))
            known |= functional.pad((share != 0).any(1), (0, padding))
        return total.masked_fill(~known & known.any(1, keepdim=True), -math.inf)

    def entries(self, tokens: int = 1) -> list[Entries]:
        """Return this mix for the native products, one item per layout.

        Each row of the mix applies to `tokens` consecutive rows of x.
        """
        if tokens in self._entries:
            return self._entries[tokens]
        entries = []
        for places, weights in self._layout_groups:
            bank = places[0][0]
            sites = _NATIVE_SITES.get(bank.layout)
            if sites is None:
                sites = _NATIVE_SITES[bank.layout] = Sites(bank)
            entries.append(
                Entries(places, weights.repeat_interleave(tokens, 0), sites, many=tokens > 1)
            )
        self._entries[tokens] = entries
        return entries

    def single(self) -> list[tuple[BankSlot, float] | None] | None:
        """Return each row's slot and weight, None for a row without; None if a row mixes several slots."""
        rows: list[tuple[BankSlot, float] | None] = [None] * self.num_rows
        for places, mix in self._layout_groups:
            for row, column in (mix != 0).nonzero().tolist():
                if rows[row] is not None:
                    return None
                rows[row] = places[column], float(mix[row, column])
        return rows

    def release(self) -> None:
        """Drop the last forward's intermediate tensors.

        Gathered factors of a trainable bank belong to its autograd graph, so they are gathered again.
        """
        self._shrunk.clear()
        self._outputs.clear()
        if any(term.bank.trainable for term in self._terms):
            self._factors.clear()

    def _carries(self, site: Site) -> bool:
        return any(site.name in term.bank.A for term in self._terms)

    def _shrink(self, site: Site, member: int, x: Tensor) -> list[Tensor | None]:
        """Return each term's h = A x: computed by the site's first member, dropped after the last one."""
        cached = self._shrunk.pop(site.name, None)
        if cached is None or cached[0] is not x:
            rows = x.reshape(self.num_rows, -1, x.shape[-1])
            shrunk: list[Tensor | None] = []
            for n, term in enumerate(self._terms):
                if site.name not in term.bank.A:
                    shrunk.append(None)
                    continue
                term_rows = rows if term.rows is None else rows.index_select(0, term.rows)
                shrunk.append(term.form.shrink(term_rows, self._site_factors(site, n, x.dtype)[0]))
            cached = (x, shrunk)
        if member + 1 < len(site.members):
            self._shrunk[site.name] = cached
        return cached[1]

    def _site_factors(self, site: Site, term: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return A (G, J*R, in) and each member's B (G, R, out) of a term's slots."""
        key = (site.name, term)
        if (cached := self._factors.get(key)) is not None:
            return cached
        active_term = self._terms[term]
        factors = (
            active_term.gather(lambda bank: bank.A[site.name], dtype),
            *(active_term.gather(lambda bank, m=m: bank.B[m], dtype) for m in site.members),  # type: ignore[misc]
        )
        self._factors[key] = factors
        return factors


_NATIVE_SITES: dict[BankLayout, Sites] = {}
"""Cache of the native site descriptions by layout; few and small."""


def _block_diagonal(factors: Sequence[Tensor]) -> Tensor:
    """Return (G, J*R, sum of outs) with the members' B (G, R, out) as diagonal blocks."""
    groups, rank = factors[0].shape[:2]
    out_features = [factor.shape[2] for factor in factors]
    joined = factors[0].new_zeros(groups, rank * len(factors), sum(out_features))
    for j, (block, factor) in enumerate(
        zip(joined.split(out_features, dim=2), factors, strict=True)
    ):
        block[:, j * rank : (j + 1) * rank] = factor
    return joined


def _group_by_layout(
    places: Sequence[BankSlot], mix: Tensor
) -> Iterator[tuple[list[BankSlot], list[int]]]:
    """Yield the places in use by layout, each group with its columns of the mix."""
    columns = (mix != 0).any(0).nonzero().flatten().tolist()
    for layout in dict.fromkeys(places[c][0].layout for c in columns):
        layout_columns = [c for c in columns if places[c][0].layout == layout]
        yield [places[c] for c in layout_columns], layout_columns


def _make_term(mix: Tensor, places: Sequence[BankSlot]) -> _Term:
    used, device = mix != 0, places[0][0].device
    rows = used.any(1).nonzero().flatten()
    columns = used.any(0).nonzero().flatten().tolist()
    form = choose_form(mix[rows][:, columns], device)
    used_places = [places[c] for c in columns]
    return _Term(form, used_places, None if len(rows) == len(mix) else rows.to(device))


_ACTIVE: ContextVar[Plan | None] = ContextVar("adapterhub_active_plan", default=None)


@contextmanager
def activate(plan: Plan | None) -> Iterator[None]:
    """Apply `plan` to every forward of the calling thread (or task) inside the block."""
    token = _ACTIVE.set(plan)
    try:
        yield
    finally:
        _ACTIVE.reset(token)
        if plan is not None:
            plan.release()


def active() -> Plan | None:
    """Return the active plan of the calling thread."""
    return _ACTIVE.get()
