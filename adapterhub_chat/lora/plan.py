"""The one equation, for every linear layer of the backbone that carries adapters:

    y_t = W x_t + sum_s M[t, s] * (alpha_s / r_s) * B_s A_s x_t          (LoRA, arXiv 2106.09685)

`W x` is computed with the backbone's own weight, untouched; a `LoRALinear` in front of it adds the sum.
A and B live in the slots of a `Bank`, a `Plan` is one batch's M made ready for the kernels, and `activate`
chooses the plan for the calling thread alone. Legend: S slots, R rank bucket, J members of a site,
N rows, T tokens of a row, G groups (distinct slots in use).
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
from adapterhub_chat.lora.kernels import Form, choose_form, in_place, site_products, terms
from adapterhub_chat.lora.native import Entries, Sites
from adapterhub_chat.lora.sites import Layers, Site

MixPlace = tuple[Bank, int]
"""A slot of a bank."""


@dataclass(frozen=True, slots=True)
class _Term:
    """A part of a mix that one form computes, in slots of one layout."""

    form: Form
    places: Sequence[MixPlace]
    rows: Tensor | None
    """The rows that take part; None is all of them."""

    @property
    def bank(self) -> Bank:
        """A bank with the layout of all the places."""
        return self.places[0][0]

    def pick(self, factors: Callable[[Bank], Tensor], dtype: torch.dtype) -> Tensor:
        """Return one factor of all the places, (G, ...): a view where they adjoin in one bank."""
        slots = [slot for _, slot in self.places]
        first, last = slots[0], slots[-1] + 1
        if slots == list(range(first, last)) and all(b is self.bank for b, _ in self.places):
            whole = factors(self.bank)
            return (whole if last - first == len(whole) else whole[first:last]).to(dtype)
        return torch.stack([factors(bank)[slot] for bank, slot in self.places]).to(dtype)


class Plan:
    """One batch's mix M (N, S), with everything that the kernels need worked out once.

    Rows of zeros are left out of every product: their output is the backbone's own, bit for bit.
    A plan is used by one thread at a time.
    """

    def __init__(self, places: Sequence[MixPlace], mix: Tensor) -> None:
        """Analyse `mix` (N, S), a CPU tensor of weights; column s belongs to `places[s]`."""
        self.num_rows = len(mix)
        self._places, self._mix = places, mix
        self._alike = [(own, mix[:, columns]) for own, columns in _by_layout(places, mix)]
        self._terms = [_term(part, own) for own, weights in self._alike for part in terms(weights)]
        self._shrunk: dict[str, tuple[Tensor, list[Tensor | None]]] = {}
        self._outputs: dict[str, tuple[Tensor, tuple[Tensor, ...]]] = {}
        self._factors: dict[tuple[str, int], tuple[Tensor, ...]] = {}
        self._side_by_side: dict[str, Tensor] = {}
        self._entries: dict[int, list[Entries]] = {}

    @property
    def _whole(self) -> bool:
        """Whether one form takes all rows, in groups that lie side by side, each with weight 1."""
        only = self._terms[0]
        return len(self._terms) == 1 and only.rows is None and in_place(only.form)

    @property
    def empty(self) -> bool:
        """Whether no row has an adapter."""
        return not self._terms

    @property
    def num_places(self) -> int:
        """How many slots are in use."""
        return sum(len(places) for places, _ in self._alike)

    def row(self, number: int) -> Plan:
        """Return the plan of one row alone."""
        return Plan(self._places, self._mix[number : number + 1])

    def apply(
        self, layers: Layers, member: int, x: Tensor, base: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the layer's output under this mix: base(x) and the update."""
        site = layers.site
        if not self._acts_on(site):
            return base(x)
        if not (layers.plain and self._whole and torch.is_grad_enabled()):
            return self.add(site, member, x, base(x))
        kept = self._outputs.pop(site.name, None)
        if kept is None or kept[0] is not x:
            a, *b = self._site_factors(site, 0, x.dtype)
            kept = (x, site_products(x, layers.weights, a, b))
        if member + 1 < len(site.members):
            self._outputs[site.name] = kept
        return kept[1][member]

    def add(self, site: Site, member: int, x: Tensor, y: Tensor) -> Tensor:
        """Return y plus the mixed low-rank product of x; the rows are the first dimension of both.

        `y` may be overwritten.
        """
        if not self._acts_on(site):
            return y
        shrunk = self._shrink(site, member, x)
        for n, (term, h) in enumerate(zip(self._terms, shrunk, strict=True)):
            if h is None:
                continue
            rank = term.bank.rank
            own = h[..., member * rank : (member + 1) * rank].to(y.dtype)
            b = self._site_factors(site, n, x.dtype)[1 + member].to(y.dtype)
            if term.rows is None:
                y = term.form.add(y, own, b)
                continue
            rows = y.reshape(self.num_rows, -1, y.shape[-1])
            added = term.form.add(rows.index_select(0, term.rows), own, b)
            y = rows.index_copy(0, term.rows, added).view(y.shape)
        return y

    def add_site(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """Return y (N*T, outs of all members side by side) plus the update of x (N, T, in).

        `y` may be overwritten: where all rows lie in groups, by one product that adds to it.
        """
        if not self._acts_on(site):
            return y
        if not self._whole:
            parts = y.unflatten(0, (self.num_rows, -1)).split(site.out_features, dim=-1)
            added = [self.add(site, j, x, part) for j, part in enumerate(parts)]
            return (added[0] if len(added) == 1 else torch.cat(added, dim=-1)).flatten(0, 1)
        a, *b = self._site_factors(site, 0, x.dtype)
        if site.name not in self._side_by_side:
            self._side_by_side[site.name] = b[0] if len(b) == 1 else _block_diagonal(b)
        h = torch.bmm(x.reshape(len(a), -1, x.shape[-1]), a.mT)
        y.view(len(a), -1, y.shape[-1]).baddbmm_(h, self._side_by_side[site.name])
        return y

    def label_logits(self, features: Tensor, rows: Tensor, width: int) -> Tensor:
        """Return label logits (P, >= width), float32, of features (P, W); each belongs to a row of the mix.

        A row's logits are the weighted sum of its adapters' heads; labels that none of them knows get -inf,
        and in a row without any head all labels are alike.
        """
        heads = [(own, mix) for own, mix in self._alike if own[0][0].head]
        width = max([width, *(own[0][0].head[1].shape[1] for own, _ in heads)])
        total = features.new_zeros(len(features), width, dtype=torch.float32)
        known = torch.zeros_like(total, dtype=torch.bool)
        for places, mix in heads:
            weight, bias = (
                torch.stack([bank.head[n][slot] for bank, slot in places]) for n in (0, 1)
            )
            spare = width - bias.shape[1]
            each = torch.einsum("pw,glw->pgl", features.float(), weight.float()) + bias.float()
            counts = torch.tensor([bank.labels[slot] for bank, slot in places])
            own = torch.arange(bias.shape[1]) < counts[:, None]
            share = (mix[rows.cpu()][:, :, None] * own).to(features.device)  # (P, G, L)
            total = total + functional.pad((share * each).sum(1), (0, spare))
            known |= functional.pad((share != 0).any(1), (0, spare))
        return total.masked_fill(~known & known.any(1, keepdim=True), -math.inf)

    def entries(self, tokens: int = 1) -> list[Entries]:
        """Return this mix for the native products: one item for every layout of bank.

        With `tokens`, each row stands for so many rows of x, side by side.
        """
        if tokens in self._entries:
            return self._entries[tokens]
        found = []
        for places, weights in self._alike:
            bank = places[0][0]
            sites = _SITES.get(bank.layout)
            if sites is None:
                sites = _SITES[bank.layout] = Sites(bank)
            found.append(
                Entries(places, weights.repeat_interleave(tokens, 0), sites, many=tokens > 1)
            )
        self._entries[tokens] = found
        return found

    def single(self) -> list[tuple[MixPlace, float] | None] | None:
        """Return every row's one slot and its weight, None for a row without; None where rows mix several."""
        rows: list[tuple[MixPlace, float] | None] = [None] * self.num_rows
        for places, mix in self._alike:
            for row, column in (mix != 0).nonzero().tolist():
                if rows[row] is not None:
                    return None
                rows[row] = places[column], float(mix[row, column])
        return rows

    def release(self) -> None:
        """Forget the last forward's intermediate tensors.

        Picked factors of a trainable bank belong to its graph: a block that is run again picks its own.
        """
        self._shrunk.clear()
        self._outputs.clear()
        if any(term.bank.trainable for term in self._terms):
            self._factors.clear()

    def _acts_on(self, site: Site) -> bool:
        return any(site.name in term.bank.A for term in self._terms)

    def _shrink(self, site: Site, member: int, x: Tensor) -> list[Tensor | None]:
        """Return each term's h for x: the site's first member computes it, the last one lets it go."""
        kept = self._shrunk.pop(site.name, None)
        if kept is None or kept[0] is not x:
            rows = x.reshape(self.num_rows, -1, x.shape[-1])
            shrunk: list[Tensor | None] = []
            for n, term in enumerate(self._terms):
                if site.name not in term.bank.A:
                    shrunk.append(None)
                    continue
                own = rows if term.rows is None else rows.index_select(0, term.rows)
                shrunk.append(term.form.shrink(own, self._site_factors(site, n, x.dtype)[0]))
            kept = (x, shrunk)
        if member + 1 < len(site.members):
            self._shrunk[site.name] = kept
        return kept[1]

    def _site_factors(self, site: Site, term: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return A (G, J*R, in) and each member's B (G, R, out) of the slots that a term uses."""
        key = (site.name, term)
        if (cached := self._factors.get(key)) is not None:
            return cached
        own = self._terms[term]
        factors = (
            own.pick(lambda bank: bank.A[site.name], dtype),
            *(own.pick(lambda bank, m=m: bank.B[m], dtype) for m in site.members),  # type: ignore[misc]
        )
        self._factors[key] = factors
        return factors


_SITES: dict[BankLayout, Sites] = {}
"""The native products' view of every layout of bank: few, and small."""


def _block_diagonal(factors: Sequence[Tensor]) -> Tensor:
    """Return (G, J*R, sum of outs) with the members' B (G, R, out) along the diagonal."""
    groups, rank = factors[0].shape[:2]
    outs = [factor.shape[2] for factor in factors]
    whole = factors[0].new_zeros(groups, rank * len(factors), sum(outs))
    for j, (part, factor) in enumerate(zip(whole.split(outs, dim=2), factors, strict=True)):
        part[:, j * rank : (j + 1) * rank] = factor
    return whole


def _by_layout(
    places: Sequence[MixPlace], mix: Tensor
) -> Iterator[tuple[list[MixPlace], list[int]]]:
    """Yield the places in use whose banks have one layout, with their columns of the mix."""
    columns = (mix != 0).any(0).nonzero().flatten().tolist()
    for layout in dict.fromkeys(places[c][0].layout for c in columns):
        own = [c for c in columns if places[c][0].layout == layout]
        yield [places[c] for c in own], own


def _term(mix: Tensor, places: Sequence[MixPlace]) -> _Term:
    used, device = mix != 0, places[0][0].device
    rows = used.any(1).nonzero().flatten()
    columns = used.any(0).nonzero().flatten().tolist()
    form = choose_form(mix[rows][:, columns], device)
    own = [places[c] for c in columns]
    return _Term(form, own, None if len(rows) == len(mix) else rows.to(device))


_ACTIVE: ContextVar[Plan | None] = ContextVar("adapterhub_active_plan", default=None)


@contextmanager
def activate(plan: Plan | None) -> Iterator[None]:
    """Let every forward of the calling thread (or task) inside the block follow `plan`."""
    token = _ACTIVE.set(plan)
    try:
        yield
    finally:
        _ACTIVE.reset(token)
        if plan is not None:
            plan.release()


def active() -> Plan | None:
    """Return the plan that the calling thread's forwards follow now."""
    return _ACTIVE.get()
