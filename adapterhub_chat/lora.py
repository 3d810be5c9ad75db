"""The one equation, for every linear layer of the backbone that carries adapters:

    y_t = W x_t + sum_s M[t, s] * (alpha_s / r_s) * B_s A_s x_t          (LoRA, arXiv 2106.09685)

`W x` is computed with the backbone's own weight, untouched; a `LoRALinear` in front of it adds the sum.
A and B live in the slots of a `Bank`, a `Plan` is one batch's M made ready for the kernels, and `activate`
chooses the plan for the calling thread alone. Legend: S slots, R rank bucket, J members of a site,
N rows, T tokens of a row, G groups (distinct slots in use).
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapterhub_chat.kernels import Form, choose, in_place, site_products, terms
from adapterhub_chat.weights import AdapterWeights

SHARED_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("w1", "w3"),
)
"""Last names of sibling modules that read the same tensor: together they are one site."""


@dataclass(frozen=True, slots=True)
class Site:
    """Linears that share an input, so that their shrink products `A x` are one product."""

    name: str
    members: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) features of a linear layer (GPT-2's Conv1D too), None for anything else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx"):
        return int(str(module.nx)), int(str(module.nf))
    return None


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """Return the sites of `model`: all its linear layers but the output head, in module order."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    shapes = {
        name: shape
        for name, module in model.named_modules()
        if module is not head and (shape := linear_shape(module)) is not None
    }
    grouped_names: dict[tuple[str, object], list[str]] = defaultdict(list)
    for name in shapes:
        parent, _, last = name.rpartition(".")
        family = next((f for f in SHARED_INPUT if last in f), last)
        grouped_names[parent, (family, shapes[name][0])].append(name)
    return tuple(
        Site("|".join(names), tuple(names), shapes[names[0]][0], tuple(shapes[n][1] for n in names))
        for names in grouped_names.values()
    )


class Bank:
    """A fixed number of slots for adapters: loading one copies numbers, shapes never change.

    A slot is one row of `flat` (S, P): A (J*R, in) of every site, then B^T (R, out) of every module, with
    the scale folded in, and zeros where its adapter has no weights or a smaller rank. `A` and `B` are the
    views (S, J*R, in) and (S, R, out) that the products use. With `trainable` they are leaves whose
    gradients are views of one such matrix; the numbers that an optimizer moves are kept elsewhere, in
    fp32, as vectors of this layout with B unscaled.
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
    ) -> None:
        """Allocate `slots` x `rank` for the given sites."""
        self.sites = {site.name: site for site in sites}
        self.slots, self.rank, self.trainable = slots, rank, trainable
        self.dtype, self.device = dtype, torch.device(device)
        self.home = {m: (s.name, j) for s in sites for j, m in enumerate(s.members)}
        self._a = {s.name: (len(s.members) * rank, s.in_features) for s in sites}
        outs = {m: o for s in sites for m, o in zip(s.members, s.out_features, strict=True)}
        self._b = {m: (rank, out) for m, out in outs.items()}
        self._sizes = [n * m for n, m in (*self._a.values(), *self._b.values())]
        self._num_a = sum(self._sizes[: len(self._a)])
        self.flat = torch.zeros(slots, sum(self._sizes), dtype=dtype, device=device)
        self.A, self.B = self._views(self.flat)
        self.slopes: Tensor | None = None
        if trainable:
            # Rows of one matrix are not what autograd expects; nothing gets slower by it here.
            warnings.filterwarnings("ignore", message="grad and param do not obey")
            self.scratch = torch.zeros(self.flat.shape[1], device=device)
            """One vector (P,), for whoever looks at a gradient."""
            self.slopes = torch.zeros_like(self.flat)
            slopes_a, slopes_b = self._views(self.slopes)
            for leaves, slopes in ((self.A, slopes_a), (self.B, slopes_b)):
                for name, leaf in leaves.items():
                    leaf.requires_grad_().grad = slopes[name]

    @torch.no_grad()
    def write(self, slot: int, weights: AdapterWeights) -> None:
        """Put an adapter into a slot; the slot's former content is gone."""
        self.flat[slot].zero_()
        for module, (a, b) in weights.factors.items():
            first, second = self._places(self.A, self.B, module, weights.rank(module))
            first[slot].copy_(a)
            second[slot].copy_((b.float() * weights.scale(module)).T)

    @torch.no_grad()
    def put(self, slot: int, vector: Tensor, scale: float) -> None:
        """Put a vector (P,) of this layout into a slot, its B times `scale`."""
        self.flat[slot].copy_(vector)
        self.flat[slot, self._num_a :].mul_(scale)

    @torch.no_grad()
    def gradient(self, slot: int, scale: float, out: Tensor) -> Tensor:
        """Fill `out` (P,) with the gradient of the vector that was put into a slot."""
        assert self.slopes is not None
        out.copy_(self.slopes[slot])
        out[self._num_a :].mul_(scale)
        return out

    def zero_gradients(self) -> None:
        """Start to collect gradients anew."""
        if self.slopes is not None:
            self.slopes.zero_()

    @torch.no_grad()
    def vector(self, weights: AdapterWeights) -> Tensor:
        """Return an adapter's numbers, B unscaled, as a vector (P,) of this layout, fp32."""
        vector = torch.zeros(self.flat.shape[1], device=self.device)
        first, second = self._views(vector[None])
        for module, (a, b) in weights.factors.items():
            at_a, at_b = self._places(first, second, module, weights.rank(module))
            at_a[0].copy_(a)
            at_b[0].copy_(b.T)
        return vector

    @torch.no_grad()
    def weights(self, vector: Tensor, like: AdapterWeights) -> AdapterWeights:
        """Return a vector (P,) as an adapter with the modules, ranks and alphas of `like`; a copy."""
        first, second = self._views(vector[None])
        factors = {}
        for module in like.factors:
            a, b = self._places(first, second, module, like.rank(module))
            factors[module] = (a[0].cpu().clone(), b[0].T.cpu().contiguous())
        return like.with_factors(factors)

    def nbytes(self) -> int:
        """Return the bytes that the factors take."""
        return self.flat.nbytes

    def _views(self, flat: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the factors inside `flat` (n, P): A by site, B by module."""
        if not self._sizes:
            return {}, {}
        parts = flat.split(self._sizes, dim=1)
        shapes = (*self._a.values(), *self._b.values())
        views = [p.unflatten(1, shape).detach() for p, shape in zip(parts, shapes, strict=True)]
        count = len(self._a)
        first = dict(zip(self._a, views[:count], strict=True))
        return first, dict(zip(self._b, views[count:], strict=True))

    def _places(
        self, first: dict[str, Tensor], second: dict[str, Tensor], module: str, rank: int
    ) -> tuple[Tensor, Tensor]:
        """Return where A (n, r, in) and B (n, r, out) of a module lie in views of this layout."""
        site, j = self.home[module]
        start = j * self.rank
        return first[site][:, start : start + rank], second[module][:, :rank]


@dataclass(frozen=True, slots=True)
class _Term:
    """A part of a mix that one form computes."""

    form: Form
    slots: Sequence[int]
    rows: Tensor | None
    """The rows that take part; None is all of them."""


class Plan:
    """One batch's mix M (N, S), with everything that the kernels need worked out once.

    Rows of zeros are left out of every product: their output is the backbone's own, bit for bit.
    A plan is used by one thread at a time.
    """

    def __init__(self, bank: Bank, mix: Tensor) -> None:
        """Analyse `mix` (N, S), a CPU tensor of weights."""
        self.bank, self.num_rows = bank, len(mix)
        self._terms = [self._term(part) for part in terms(mix)]
        self._shrunk: dict[str, tuple[Tensor, list[Tensor]]] = {}
        self._outputs: dict[str, tuple[Tensor, tuple[Tensor, ...]]] = {}
        self._factors: dict[tuple[str, int], tuple[Tensor, ...]] = {}

    @property
    def _whole(self) -> bool:
        """Whether one form takes all rows, in groups that lie side by side, each with weight 1."""
        only = self._terms[0]
        return len(self._terms) == 1 and only.rows is None and in_place(only.form)

    @property
    def empty(self) -> bool:
        """Whether no row has an adapter."""
        return not self._terms

    def apply(
        self, layers: Layers, member: int, x: Tensor, base: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the layer's output under this mix: base(x) and the update."""
        site = layers.site
        if self.empty or site.name not in self.bank.A:
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
        if self.empty or site.name not in self.bank.A:
            return y
        rank = self.bank.rank
        shrunk = self._shrink(site, member, x)
        for n, (term, h) in enumerate(zip(self._terms, shrunk, strict=True)):
            own = h[..., member * rank : (member + 1) * rank].to(y.dtype)
            b = self._site_factors(site, n, x.dtype)[1 + member].to(y.dtype)
            if term.rows is None:
                y = term.form.add(y, own, b)
                continue
            rows = y.reshape(self.num_rows, -1, y.shape[-1])
            added = term.form.add(rows.index_select(0, term.rows), own, b)
            y = rows.index_copy(0, term.rows, added).view(y.shape)
        return y

    def release(self) -> None:
        """Forget the last forward's intermediate tensors."""
        self._shrunk.clear()
        self._outputs.clear()

    def _term(self, mix: Tensor) -> _Term:
        used, device = mix != 0, self.bank.device
        rows = used.any(1).nonzero().flatten()
        slots = used.any(0).nonzero().flatten().tolist()
        form = choose(mix[rows][:, slots], device)
        return _Term(form, slots, None if len(rows) == len(mix) else rows.to(device))

    def _shrink(self, site: Site, member: int, x: Tensor) -> list[Tensor]:
        """Return each term's h for x: the site's first member computes it, the last one lets it go."""
        kept = self._shrunk.pop(site.name, None)
        if kept is None or kept[0] is not x:
            rows = x.reshape(self.num_rows, -1, x.shape[-1])
            shrunk = []
            for n, term in enumerate(self._terms):
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
        bank, slots = self.bank, self._terms[term].slots
        whole = slots == list(range(bank.slots))
        first, last = slots[0], slots[-1] + 1
        adjoining = slots == list(range(first, last))

        def pick(tensor: Tensor) -> Tensor:
            if whole:
                return tensor.to(dtype)
            return (tensor[first:last] if adjoining else tensor[slots]).to(dtype)

        factors = (pick(bank.A[site.name]), *(pick(bank.B[m]) for m in site.members))
        self._factors[key] = factors
        return factors


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


@dataclass(frozen=True, slots=True)
class Layers:
    """A site's linear layers themselves."""

    site: Site
    linears: tuple[nn.Module, ...]
    plain: bool
    """Whether all are ordinary linear layers with frozen weights, whose products can be done together."""

    @property
    def weights(self) -> list[tuple[Any, Any]]:
        """Each layer's weight (out, in) and bias (out,) or None."""
        return [(linear.weight, linear.bias) for linear in self.linears]


class LoRALinear:
    """The equation at one linear layer: stands in for its `forward`, the layer itself stays as it was.

    The backbone keeps its modules, names and bytes (transformers, PEFT and bitsandbytes all see their own
    classes); with no plan active it is the layer's own forward.
    """

    def __init__(self, layers: Layers, member: int) -> None:
        """Stand in for member number `member` of a site."""
        self.layers, self.member = layers, member
        self.base: Callable[[Tensor], Tensor] = layers.linears[member].forward

    def __call__(self, x: Tensor) -> Tensor:
        """Return y + sum_s M[., s] scale_s B_s A_s x under the active plan."""
        plan = _ACTIVE.get()
        if plan is None:
            return self.base(x)
        return plan.apply(self.layers, self.member, x, self.base)


def attach(model: nn.Module, sites: Sequence[Site]) -> Callable[[], None]:
    """Let a LoRALinear stand in for every member of `sites`; return what takes them off again."""
    taken: list[nn.Module] = []
    for site in sites:
        linears = tuple(model.get_submodule(name) for name in site.members)
        layers = Layers(site, linears, all(_is_plain(linear) for linear in linears))
        for member, linear in enumerate(linears):
            linear.forward = LoRALinear(layers, member)
            taken.append(linear)

    def detach() -> None:
        for linear in taken:
            linear.__dict__.pop("forward", None)

    return detach


def _is_plain(linear: nn.Module) -> bool:
    weight = getattr(linear, "weight", None)
    return type(linear) is nn.Linear and weight is not None and not weight.requires_grad
