"""The one equation, for every linear layer of the backbone that carries adapters:

    y_t = W x_t + sum_s M[t, s] * (alpha_s / r_s) * B_s A_s x_t          (LoRA, arXiv 2106.09685)

`W x` is computed by the backbone's own module, untouched; a `LoRALinear` attached to it adds the sum.
A and B live in the slots of a `Bank`, a `Plan` is one batch's M made ready for the kernels, and `activate`
chooses the plan for the calling thread alone. Legend: S slots, R rank bucket, J members of a site,
N rows, T tokens of a row, G groups (distinct slots in use).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adapterhub_chat.kernels import choose
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

    Per site one `A` of (S, J*R, in), per member one `B` of (S, out, R). A slot holds zeros where its
    adapter has no weights or a smaller rank; zeros stay zeros in training, since each factor's gradient
    is a multiple of the other. With `trainable`, A and B are leaves whose gradients are allocated once,
    B is kept unscaled and the scale applied in the forward, as in PEFT; else the scale is folded into B.
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
            tensor = torch.zeros(*shape, dtype=dtype, device=device, requires_grad=trainable)
            if trainable:
                tensor.grad = torch.zeros_like(tensor, requires_grad=False)
            return tensor

        self.A = {s.name: zeros(slots, len(s.members) * rank, s.in_features) for s in sites}
        self.B = {
            m: zeros(slots, out, rank)
            for s in sites
            for m, out in zip(s.members, s.out_features, strict=True)
        }
        self.scale = {m: torch.ones(slots, 1, 1, device=device) for m in self.B}

    @torch.no_grad()
    def write(self, slot: int, weights: AdapterWeights) -> None:
        """Put an adapter into a slot; the slot's former content is gone."""
        self.clear(slot)
        for module, (a, b) in weights.factors.items():
            site, j = self.home[module]
            rank, scale = a.shape[0], weights.scale(module)
            self.A[site][slot, j * self.rank : j * self.rank + rank].copy_(a)
            if self.trainable:
                self.scale[module][slot] = scale
                self.B[module][slot, :, :rank].copy_(b)
            else:
                self.B[module][slot, :, :rank].copy_(b.float() * scale)

    @torch.no_grad()
    def read(self, slot: int, like: AdapterWeights) -> AdapterWeights:
        """Return a copy of a trainable slot as fp32 weights with the modules and ranks of `like`."""
        factors = {}
        for module, (a, _) in like.factors.items():
            site, j = self.home[module]
            rank = a.shape[0]
            first = self.A[site][slot, j * self.rank : j * self.rank + rank]
            second = self.B[module][slot, :, :rank]
            factors[module] = (first.float().cpu().clone(), second.float().cpu().clone())
        return like.with_factors(factors)

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Zero a slot."""
        for tensor in (*self.A.values(), *self.B.values()):
            tensor[slot].zero_()

    def parameters(self, slot: int) -> list[nn.Parameter]:
        """Return a slot's share of every A and B as parameters: views, gradients included."""
        shares = []
        for tensor in (*self.A.values(), *self.B.values()):
            share = nn.Parameter(tensor.detach()[slot])
            if tensor.grad is not None:
                share.grad = tensor.grad[slot]
            shares.append(share)
        return shares

    def zero_grad(self) -> None:
        """Zero all gradients in place: the slots' shares keep pointing at them."""
        for tensor in (*self.A.values(), *self.B.values()):
            if tensor.grad is not None:
                tensor.grad.zero_()

    def nbytes(self) -> int:
        """Return the bytes that the factors take."""
        return sum(t.nbytes for t in (*self.A.values(), *self.B.values()))


class Plan:
    """One batch's mix M (N, S), with everything that the kernels need worked out once.

    Rows of zeros are left out of every product: their output is the backbone's own, bit for bit.
    A plan is used by one thread at a time.
    """

    def __init__(self, bank: Bank, mix: Tensor) -> None:
        """Analyse `mix` (N, S), a CPU tensor of weights."""
        self.bank, self.num_rows = bank, len(mix)
        used = mix != 0
        rows = used.any(1).nonzero().flatten()
        self.slots: list[int] = used.any(0).nonzero().flatten().tolist()
        self.rows = None if len(rows) == len(mix) else rows.to(bank.device)
        self.form = choose(mix[rows][:, self.slots], bank.device) if self.slots else None
        self._all_slots = self.slots == list(range(bank.slots))
        self._shrunk: dict[str, tuple[Tensor, Tensor]] = {}
        self._factors: dict[str, tuple[Tensor, ...]] = {}

    def add(self, site: Site, member: int, x: Tensor, y: Tensor) -> Tensor:
        """Return y plus the mixed low-rank product of x; the rows are the first dimension of both."""
        if self.form is None or site.name not in self.bank.A:
            return y
        a, *b = self._site_factors(site, x.dtype)
        h = self._shrink(site, member, x, a)
        rank = self.bank.rank
        delta = self.form.expand(h[..., member * rank : (member + 1) * rank], b[member])
        if self.rows is None:
            return y + delta.reshape(y.shape).to(y.dtype)
        flat = y.reshape(self.num_rows, -1)
        delta = delta.reshape(len(self.rows), -1).to(y.dtype)
        return flat.index_add(0, self.rows, delta).reshape(y.shape)

    def release(self) -> None:
        """Forget the last forward's intermediate tensors."""
        self._shrunk.clear()

    def _shrink(self, site: Site, member: int, x: Tensor, a: Tensor) -> Tensor:
        """Return h for x: the site's first member computes it, the last one lets it go."""
        kept = self._shrunk.pop(site.name, None)
        if kept is None or kept[0] is not x:
            rows = x.reshape(self.num_rows, -1, x.shape[-1])
            rows = rows if self.rows is None else rows.index_select(0, self.rows)
            assert self.form is not None
            kept = (x, self.form.shrink(rows, a))
        if member + 1 < len(site.members):
            self._shrunk[site.name] = kept
        return kept[1]

    def _site_factors(self, site: Site, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return A (G, J*R, in) and each member's B (G, out, R) of the slots in use, scaled."""
        if (cached := self._factors.get(site.name)) is not None:
            return cached
        bank = self.bank

        def pick(tensor: Tensor) -> Tensor:
            return tensor if self._all_slots else tensor[self.slots]

        first = pick(bank.A[site.name]).to(dtype)
        if bank.trainable:  # changes every step, and its graph with it: never kept
            scaled = (pick(bank.B[m]) * pick(bank.scale[m]) for m in site.members)
            return (first, *(b.to(dtype) for b in scaled))
        factors = (first, *(pick(bank.B[m]).to(dtype) for m in site.members))
        self._factors[site.name] = factors
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
