"""AdapterModel: one frozen backbone plus a bank of slots; who is in which slot, and forwards under a mix."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from adapterhub_chat.backbone import Backbone
from adapterhub_chat.bank import Bank, Site, find_sites, linear_shapes
from adapterhub_chat.batches import Batch
from adapterhub_chat.errors import AdapterError, UnknownNameError, UsageError
from adapterhub_chat.errors import join_misfits as joined
from adapterhub_chat.lora import Plan, activate, active, attach
from adapterhub_chat.types import BACKBONE, Mix
from adapterhub_chat.weights import AdapterWeights, misfits

RANK_STEP = 8
"""Ranks are rounded up to a multiple of this: products of such widths are fast, and slots are reused."""

KEEP_STEP = 64
"""The number of positions that reach the head is rounded up to a multiple of this."""

Among = Callable[[Sequence[int]], AbstractContextManager[None]]

_KEEP: ContextVar[Tensor | None] = ContextVar("adapterhub_keep", default=None)


@dataclass
class _Table:
    """One bank and who lives in it. A bank that grows is a new table; running plans keep the old one."""

    bank: Bank
    slot_of: dict[str, int] = field(default_factory=dict)
    in_use: Counter[int] = field(default_factory=Counter)

    def free_slot(self) -> int | None:
        taken = set(self.slot_of.values()) | set(self.in_use)
        return next((s for s in range(self.bank.slots) if s not in taken), None)


class AdapterModel:
    """A frozen backbone whose linear layers listen to a mix of loaded adapters.

    Loading, unloading and running are safe from several threads: a slot that a running forward reads is
    never overwritten; it is reused when the last reader has left.
    """

    def __init__(self, backbone: Backbone) -> None:
        """Attach the (inactive) LoRA layers to the backbone."""
        self.backbone = backbone
        self.sites = find_sites(backbone.model)
        self.shapes = linear_shapes(backbone.model)
        self._detach = attach(backbone.model, self.sites)
        head = backbone.model.get_output_embeddings()
        self._head = head.register_forward_pre_hook(_keep_positions)
        self._lock = threading.RLock()
        self._weights: dict[str, AdapterWeights] = {}
        self._table = _Table(self.new_bank((), slots=0, rank=0, dtype=backbone.dtype))

    @property
    def names(self) -> tuple[str, ...]:
        """The loaded adapters, in the order of loading."""
        return tuple(self._weights)

    def weights(self, name: str) -> AdapterWeights:
        """Return a loaded adapter's numbers as they were given."""
        self._require([name])
        return self._weights[name]

    def load(self, name: str, weights: AdapterWeights) -> None:
        """Put an adapter into a slot; under a name in use it replaces that adapter for new forwards.

        Raises AdapterError, before anything changes, when modules or shapes do not fit the backbone.
        """
        if name == BACKBONE:
            raise AdapterError(
                f"{BACKBONE!r} is reserved: it means no adapter; choose another name"
            )
        if found := misfits(weights, self.shapes):
            raise AdapterError(joined(f"adapter {name!r} does not fit {self.backbone.name}", found))
        with self._lock:
            wanted = {**self._weights, name: weights}
            slot = self._table.free_slot()
            if slot is None or not self._fits(weights):
                self._table = self._rebuilt(wanted)
            else:
                self._table.bank.write(slot, weights)
                self._table.slot_of[name] = slot
            self._weights = wanted

    def unload(self, name: str) -> None:
        """Free an adapter's slot; forwards that are running end undisturbed."""
        with self._lock:
            self._require([name])
            self._weights = {n: w for n, w in self._weights.items() if n != name}
            del self._table.slot_of[name]

    @contextmanager
    def mixing(self, mixes: Sequence[Mix]) -> Iterator[None]:
        """Let the calling thread's forwards inside the block give row i the mix `mixes[i]`.

        Raises UnknownNameError for an adapter that is not loaded.
        """
        with self.holding(mixes) as among, among(range(len(mixes))):
            yield

    @contextmanager
    def holding(self, mixes: Sequence[Mix]) -> Iterator[Among]:
        """Keep the adapters of `mixes` as they are now, whatever is loaded or unloaded meanwhile.

        Gives `among(rows)`: a block in which the calling thread's forwards have these rows of `mixes`,
        in this order. Raises UnknownNameError for an adapter that is not loaded.
        """
        with self._lock:
            self._require(dict.fromkeys(name for mix in mixes for name in mix.names))
            table = self._table
            matrix = torch.zeros(len(mixes), table.bank.slots)
            for row, mix in enumerate(mixes):
                for name, weight in mix.weights:
                    matrix[row, table.slot_of[name]] += weight
            held = Counter((matrix != 0).any(0).nonzero().flatten().tolist())
            table.in_use.update(held)

        def among(rows: Sequence[int]) -> AbstractContextManager[None]:
            plan = Plan(table.bank, matrix[list(rows)])
            return activate(None if plan.empty else plan)

        try:
            yield among
        finally:
            with self._lock:
                table.in_use.subtract(held)
                table.in_use += Counter()  # drop what nobody uses any more

    def answer_logits(self, batch: Batch) -> Tensor:
        """Return logits (P, V) at the batch's predicting positions alone, under the active mix.

        The head never sees the other positions: for a 49k vocabulary it is a quarter of all the work.
        """
        batch = batch.to(self.backbone.device)
        spare = -len(batch.keep) % KEEP_STEP  # few shapes: a new one costs a CPU set-up time
        with keeping(functional.pad(batch.keep, (0, spare))):
            out = self.backbone.model(
                input_ids=batch.ids,
                attention_mask=self._mask(batch),
                position_ids=batch.positions,
                use_cache=False,
            )
        logits: Tensor = out.logits
        return logits[: len(batch.keep)]

    @contextmanager
    def checkpointing(self, on: bool = True) -> Iterator[None]:
        """Keep no activations inside the backbone's blocks: the backward pass computes them again.

        Training then needs memory for one block at a time, and a third more work (arXiv 1604.06174).
        """
        blocks: list[Any] = list(self.backbone.blocks) if on else []
        for block in blocks:
            block.forward = partial(_recomputed, block.forward)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    def shard(self) -> None:
        """Spread every block's frozen weights over the processes of the run, for good (FSDP2).

        Each process keeps its share and gathers a block's weights for as long as the block runs. All
        processes must run the same forwards from now on. Raises UsageError for a quantized backbone.
        """
        if self.backbone.quantize is not None:
            raise UsageError("a quantized backbone cannot be sharded; leave out shard or quantize")
        mesh = init_device_mesh(self.backbone.device.type, (torch.distributed.get_world_size(),))
        for block in self.backbone.blocks:
            fully_shard(block, mesh=mesh)

    def _mask(self, batch: Batch) -> Tensor:
        """Return the batch's mask; for the CPU's training attention, once for every head."""
        mask = batch.mask(self.backbone.dtype)
        if not torch.is_grad_enabled() or mask.device.type != "cpu":
            return mask
        heads = getattr(self.backbone.model.config, "num_attention_heads", 1)
        return mask.expand(-1, heads, -1, -1).contiguous()

    def new_bank(
        self,
        modules: Sequence[str],
        *,
        slots: int,
        rank: int,
        dtype: torch.dtype,
        trainable: bool = False,
    ) -> Bank:
        """Return an empty bank over the sites that have one of `modules`, rank rounded up."""
        sites = [s for s in self.sites if not set(modules).isdisjoint(s.members)]
        rank = -(-rank // RANK_STEP) * RANK_STEP
        device = self.backbone.device
        return Bank(sites, slots=slots, rank=rank, dtype=dtype, device=device, trainable=trainable)

    def close(self) -> None:
        """Detach from the backbone, which is then as it was."""
        self._detach()
        self._head.remove()

    def _fits(self, weights: AdapterWeights) -> bool:
        bank = self._table.bank
        return weights.max_rank <= bank.rank and all(m in bank.home for m in weights.factors)

    def _rebuilt(self, wanted: Mapping[str, AdapterWeights]) -> _Table:
        """Return a table with room for all of `wanted`: twice the slots when they ran out."""
        modules = {m for w in wanted.values() for m in w.factors}
        slots = max(4, self._table.bank.slots)
        while slots < len(wanted):
            slots *= 2
        rank = max(w.max_rank for w in wanted.values())
        bank = self.new_bank(tuple(modules), slots=slots, rank=rank, dtype=self.backbone.dtype)
        for slot, weights in enumerate(wanted.values()):
            bank.write(slot, weights)
        return _Table(bank, {name: slot for slot, name in enumerate(wanted)})

    def _require(self, names: Sequence[str] | Mapping[str, None]) -> None:
        for name in names:
            if name not in self._weights:
                cure = "Load it first with hub.load(name)."
                raise UnknownNameError("adapter", name, [*self._weights, BACKBONE], cure)


def _recomputed(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Run a block without keeping its activations; it is run again under the same plan."""
    if not torch.is_grad_enabled():
        return function(*arguments, **options)
    plan = active()
    return checkpoint(
        function,
        *arguments,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), activate(plan)),
        **options,
    )


@contextmanager
def keeping(positions: Tensor | None) -> Iterator[None]:
    """Let the output head inside the block see only these flat (row * length + column) positions."""
    token = _KEEP.set(positions)
    try:
        yield
    finally:
        _KEEP.reset(token)


def _keep_positions(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Gather the wanted positions (P, width) before the head: a 2-D product, forward and backward."""
    keep = _KEEP.get()
    if keep is None:
        return None
    hidden = inputs[0]
    return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, keep),)


__all__ = ["AdapterModel", "Site", "keeping"]
