"""AdapterModel: one frozen backbone plus a bank of slots; who is in which slot, and forwards under a mix."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from adapterhub_chat.assets.fetch import cache_dir
from adapterhub_chat.config import EngineOptions
from adapterhub_chat.data.packing import Batch
from adapterhub_chat.errors import AdapterError, UsageError
from adapterhub_chat.errors import join_misfits as joined
from adapterhub_chat.lora import native
from adapterhub_chat.lora.bank import Bank
from adapterhub_chat.lora.layer import attach
from adapterhub_chat.lora.plan import activate, active
from adapterhub_chat.lora.sites import find_sites, linear_shapes
from adapterhub_chat.lora.slots import Slots, StagedSlot, plan_for
from adapterhub_chat.lora.weights import AdapterWeights, misfits
from adapterhub_chat.model.backbone import Backbone
from adapterhub_chat.model.encoders import first_position, pooled
from adapterhub_chat.model.source import AdapterSource, LoadedOnly
from adapterhub_chat.types import BACKBONE, NO_ADAPTER, Mix

RANK_STEP = 8
"""Ranks are rounded up to a multiple of this: products of such widths are fast, and slots are reused."""

KEEP_STEP = 64
"""The number of positions that reach the head is rounded up to a multiple of this."""

EARLY = 0.27
"""How far up, as a share of the blocks, `early_states` goes."""

DEFAULT_OPTIONS = EngineOptions()

_T = TypeVar("_T")

_KEEP: ContextVar[Tensor | None] = ContextVar("adapterhub_keep", default=None)
_EARLY: ContextVar[bool] = ContextVar("adapterhub_early", default=False)


class AdapterModel:
    """A frozen backbone whose linear layers listen to a mix of loaded adapters.

    Loading, unloading and running are safe from several threads: a slot that a running forward reads is
    never overwritten; it is reused when the last reader has left.
    """

    def __init__(self, backbone: Backbone, options: EngineOptions = DEFAULT_OPTIONS) -> None:
        """Attach the (inactive) LoRA layers to the backbone; `options` bound loaded adapters and decoding."""
        self.backbone, self.options = backbone, options
        self.sites = find_sites(backbone.model)
        self.shapes = linear_shapes(backbone.model)
        self._detach = attach(backbone.model, self.sites)
        self._hooks = []
        if not backbone.encodes:
            head = backbone.model.get_output_embeddings()
            self._hooks.append(head.register_forward_pre_hook(_keep_positions))
        self.early_block = ""
        """The block at which `early_states` stops; empty where the backbone is not made of blocks."""
        self.num_early = 0
        """How many blocks lie below that one."""
        if blocks := backbone.blocks:
            self.num_early = min(len(blocks) - 1, max(1, round(EARLY * len(blocks))))
            block = blocks[self.num_early]
            self.early_block = next(n for n, m in backbone.model.named_modules() if m is block)
            self._hooks.append(block.register_forward_pre_hook(_stop_early, with_kwargs=True))
        self.slots = Slots(
            self._new_slots, options.adapter_bytes, partial(native.write, cache_dir() / "native")
        )
        self.source: AdapterSource = LoadedOnly(self.slots)
        """Where forwards and engines take a mix's adapters from."""
        self._made: dict[Callable[[AdapterModel], Any], Any] = {}
        self._making = threading.Lock()

    def use_source(self, source: AdapterSource) -> None:
        """Take adapters from `source` from now on; without one, only what was loaded can be used."""
        self.source = source

    def once(self, make: Callable[[AdapterModel], _T]) -> _T:
        """Return `make(self)`, made at the first call and kept as long as the model."""
        with self._making:
            if make not in self._made:
                self._made[make] = make(self)
            made: _T = self._made[make]
        return made

    @property
    def names(self) -> tuple[str, ...]:
        """The loaded adapters."""
        return self.slots.names

    def holds(self, mix: Mix) -> bool:
        """Return whether all that a mix needs is loaded."""
        here = all(name in self.slots for name in mix.names)
        return here and all(name in self.slots for name in self.source.with_stack_bases(mix).names)

    def weights(self, name: str) -> AdapterWeights:
        """Return a copy of a loaded adapter's numbers, rounded as they are in its slot."""
        return self.slots.weights(name)

    def ahead(self) -> AbstractContextManager[StagedSlot]:
        """Give who fills a slot with weights that fit before `load` is called with them; see Slots.stage."""
        return self.slots.stage(lambda own: not misfits(own, self.shapes, self.backbone.width))

    def load(
        self,
        name: str,
        weights: AdapterWeights,
        identity: str | None = None,
        ahead: StagedSlot | None = None,
    ) -> None:
        """Put an adapter into a slot; under a name in use it replaces that adapter for new forwards.

        `identity` is the hash of its content, where there is one; `ahead` may have filled the slot. Raises
        AdapterError when modules or shapes do not fit the backbone, NoRoomError when the budget is all in
        use; nothing has changed then.
        """
        if name == BACKBONE:
            raise AdapterError(
                f"{BACKBONE!r} is reserved: it means no adapter; choose another name"
            )
        if found := misfits(weights, self.shapes, self.backbone.width):
            message = joined(f"adapter {name!r} does not fit {self.backbone.name}", found)
            raise AdapterError(message, found)
        self.slots.load(name, weights, identity, ahead)

    def unload(self, name: str) -> None:
        """Free an adapter's slot; forwards that are running end undisturbed."""
        self.slots.unload(name)

    @contextmanager
    def temporarily_loaded(
        self, weights: AdapterWeights, label: str = "candidate"
    ) -> Iterator[str]:
        """Load weights under a name that nobody else uses, for as long as the block runs; give that name.

        The name is pinned: no load of another adapter evicts it.
        """
        name = f"{label} on trial {uuid4().hex}"
        self.slots.pinned.add(name)
        try:
            self.load(name, weights)
            try:
                yield name
            finally:
                self.unload(name)
        finally:
            self.slots.pinned.discard(name)

    @contextmanager
    def mixing(self, mixes: Sequence[Mix]) -> Iterator[None]:
        """Let the calling thread's forwards inside the block give row i the mix `mixes[i]`.

        Raises UnknownNameError for an adapter that is not loaded.
        """
        with ExitStack() as stack:
            held = {
                mix: stack.enter_context(self.slots.releasing(self.source.acquire(mix)))
                for mix in dict.fromkeys(mixes)
            }
            with activate(plan_for([held[mix] for mix in mixes])):
                yield

    def answer_logits(self, batch: Batch) -> Tensor:
        """Return logits (P, V) at the batch's predicting positions alone, under the active mix.

        The head never sees the other positions: for a 49k vocabulary it is a quarter of all the work. On an
        encoder, the vocabulary is the labels' numbers, and a text's logits come from its adapter's head.
        """
        batch = batch.to(self.backbone.device)
        if self.backbone.encodes:
            return self._label_logits(batch)
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

    def features(self, batch: Batch) -> Tensor:
        """Return what the text around each predicting position is to the backbone, (P, W), float32.

        An encoder's own features; of a language model, the mean of the last hidden states.
        """
        batch = batch.to(self.backbone.device)
        base = self.backbone.model.base_model
        start = first_position(self.backbone.model.config)
        options = {} if self.backbone.encodes else {"use_cache": False}
        hidden = base(
            input_ids=batch.ids,
            attention_mask=self._mask(batch),
            position_ids=batch.positions + start,
            **options,
        ).last_hidden_state
        return pooled(base, hidden, batch, self.backbone.pooling or "mean")

    def _label_logits(self, batch: Batch) -> Tensor:
        """Return logits (P, labels), float32, by the heads of each row's mix; without any, all are alike."""
        features, plan = self.features(batch), active()
        width = int(batch.targets.max()) + 1
        if plan is None:
            return features.new_zeros(len(features), width)
        return plan.label_logits(features, batch.keep // batch.ids.shape[1], width)

    def early_states(self, ids: Tensor) -> Tensor:
        """Return the hidden states (N, _T, H) that enter a block a quarter of the way up, with no adapter.

        `ids` (N, _T) are padded on the right. What lies above is not run. Raises UsageError for a backbone
        that is not made of blocks.
        """
        token = _EARLY.set(True)
        try:
            with torch.inference_mode(), self.mixing([NO_ADAPTER] * len(ids)):
                self.backbone.model(input_ids=ids, use_cache=False)
        except _ReachedError as reached:
            return reached.states
        finally:
            _EARLY.reset(token)
        raise UsageError(f"{self.backbone.name} is not made of blocks that can be run one by one")

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
        mask = batch.mask(self.backbone.dtype, causal=not self.backbone.encodes)
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
        labels: int = 0,
        trainable: bool = False,
    ) -> Bank:
        """Return an empty bank over the sites that have one of `modules`, rank rounded up.

        With `labels`, it also holds heads for so many.
        """
        sites = [s for s in self.sites if not set(modules).isdisjoint(s.members)]
        rank = -(-rank // RANK_STEP) * RANK_STEP
        device = self.backbone.device
        width = self.backbone.width
        # a load inside inference mode must leave slots that others can write to
        with torch.inference_mode(False):
            return Bank(
                sites,
                slots=slots,
                rank=rank,
                dtype=dtype,
                device=device,
                head=(labels, width) if labels and width else None,
                trainable=trainable,
            )

    @property
    def slot_dtype(self) -> torch.dtype:
        """The type of numbers in slots: the backbone's own, but an encoder's adapters keep a head in fp32."""
        return torch.float32 if self.backbone.encodes else self.backbone.dtype

    def _new_slots(self, modules: Sequence[str], slots: int, rank: int, labels: int = 0) -> Bank:
        return self.new_bank(modules, slots=slots, rank=rank, dtype=self.slot_dtype, labels=labels)

    def close(self) -> None:
        """Detach from the backbone, which is then as it was."""
        self._detach()
        for hook in self._hooks:
            hook.remove()


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


class _ReachedError(Exception):
    """The block that `early_states` asks for has been reached."""

    def __init__(self, states: Tensor) -> None:
        """Carry what enters it."""
        super().__init__()
        self.states = states


def _stop_early(_block: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    """End the forwards of `early_states`, in its thread alone."""
    if _EARLY.get():
        raise _ReachedError(given[0] if given else named["hidden_states"])


def _keep_positions(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Gather the wanted positions (P, width) before the head: a 2-D product, forward and backward."""
    keep = _KEEP.get()
    if keep is None:
        return None
    hidden = inputs[0]
    return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, keep),)
