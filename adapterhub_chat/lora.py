"""The one equation, for every linear layer of the backbone that carries adapters:

    y_t = W x_t + sum_s M[t, s] * (alpha_s / r_s) * B_s A_s x_t          (LoRA, arXiv 2106.09685)

`W x` is computed by the backbone's own module, untouched; a `LoRALinear` attached to it adds the sum.
A and B live in the slots of a `Bank`, a `Plan` is one batch's M made ready for the kernels, and `activate`
chooses the plan for the calling thread alone. Legend: S slots, R rank bucket, J members of a site,
N rows, T tokens of a row, G groups (distinct slots in use).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adapterhub_chat.kernels import Form, choose, terms
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

    Per site one `A` of (S, J*R, in), per member one `B` of (S, out, R), with the scale folded into B. A
    slot holds zeros where its adapter has no weights or a smaller rank. With `trainable`, A and B are
    leaves that collect gradients; the numbers that an optimizer moves are kept elsewhere, in fp32, and
    come in through `places` (FlatWeights).
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

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device, requires_grad=trainable)

        self.A = {s.name: zeros(slots, len(s.members) * rank, s.in_features) for s in sites}
        self.B = {
            m: zeros(slots, out, rank)
            for s in sites
            for m, out in zip(s.members, s.out_features, strict=True)
        }

    @torch.no_grad()
    def write(self, slot: int, weights: AdapterWeights) -> None:
        """Put an adapter into a slot; the slot's former content is gone."""
        self.clear(slot)
        places = self.places(slot, {m: weights.rank(m) for m in weights.factors})
        for (module, (a, b)), at in zip(weights.factors.items(), places, strict=True):
            at[0].copy_(a)
            at[1].copy_(b.float() * weights.scale(module))

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Zero a slot."""
        for tensor in (*self.A.values(), *self.B.values()):
            tensor[slot].zero_()

    @torch.no_grad()
    def places(
        self, slot: int, ranks: Mapping[str, int], *, gradients: bool = False
    ) -> list[tuple[Tensor, Tensor]]:
        """Return where a slot keeps A (r, in) and B (out, r) of each module, or their gradients.

        A gradient that no forward asked for is None in the bank; it is made as zeros.
        """
        found = []
        for module, rank in ranks.items():
            site, j = self.home[module]
            first, second = self.A[site], self.B[module]
            if gradients:
                first, second = _gradient(first), _gradient(second)
            start = j * self.rank
            found.append((first[slot, start : start + rank], second[slot, :, :rank]))
        return found

    def drop_gradients(self) -> None:
        """Forget all gradients."""
        for tensor in (*self.A.values(), *self.B.values()):
            tensor.grad = None

    def nbytes(self) -> int:
        """Return the bytes that the factors take."""
        return sum(t.nbytes for t in (*self.A.values(), *self.B.values()))


def _gradient(tensor: Tensor) -> Tensor:
    if tensor.grad is None:
        tensor.grad = torch.zeros_like(tensor)
    return tensor.grad


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
        self._factors: dict[tuple[str, int], tuple[Tensor, ...]] = {}

    @property
    def empty(self) -> bool:
        """Whether no row has an adapter."""
        return not self._terms

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
        """Return A (G, J*R, in) and each member's B (G, out, R) of the slots that a term uses."""
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
class LoRALinear:
    """The equation at one linear layer: a forward hook, so that the layer itself stays as it was.

    The backbone keeps its modules, names and bytes (transformers, PEFT and bitsandbytes all see their own
    classes); with no plan active the layer's output passes through untouched.
    """

    site: Site
    member: int

    def __call__(self, linear: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
        """Return y + sum_s M[., s] scale_s B_s A_s x under the active plan."""
        plan = _ACTIVE.get()
        return None if plan is None else plan.add(self.site, self.member, inputs[0], y)


def attach(model: nn.Module, sites: Sequence[Site]) -> list[RemovableHandle]:
    """Attach a LoRALinear to every member of `sites`; removing the handles detaches them."""
    return [
        model.get_submodule(name).register_forward_hook(LoRALinear(site, j))
        for site in sites
        for j, name in enumerate(site.members)
    ]
