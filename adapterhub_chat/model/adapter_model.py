"""AdapterModel: a frozen backbone, the slots of its loaded adapters, and forwards under a mix."""

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
from adapterhub_chat.data.encoding import Encoded
from adapterhub_chat.data.packing import Batch, isolated, longest, pack
from adapterhub_chat.errors import AdapterError, UsageError, join_misfits
from adapterhub_chat.lora import native
from adapterhub_chat.lora.bank import Bank
from adapterhub_chat.lora.layer import attach
from adapterhub_chat.lora.plan import activate, active
from adapterhub_chat.lora.sites import find_sites, linear_shapes
from adapterhub_chat.lora.slots import Slots, StagedSlot, plan_for
from adapterhub_chat.lora.weights import AdapterWeights, misfits
from adapterhub_chat.model.backbone import Backbone
from adapterhub_chat.model.encoders import first_position, pooled
from adapterhub_chat.model.masks import RowLayout, laid_out
from adapterhub_chat.model.source import AdapterSource, LoadedOnly
from adapterhub_chat.types import BACKBONE, NO_ADAPTER, Mix

RANK_STEP = 8
"""Ranks of slots are multiples of this: products of such widths are fast, and slots are reused."""

POSITION_STEP = 64
"""The number of positions that reach the output head is rounded up to a multiple of this."""

EARLY_SHARE = 0.27
"""Share of the blocks that `early_states` runs."""

DEFAULT_OPTIONS = EngineOptions()

_T = TypeVar("_T")

_HEAD_POSITIONS: ContextVar[Tensor | None] = ContextVar("adapterhub_positions", default=None)
_STOPS_EARLY: ContextVar[bool] = ContextVar("adapterhub_early", default=False)


class AdapterModel:
    """A frozen backbone whose linear layers add the update of a mix of loaded adapters.

    Loading, unloading and running are safe from several threads: a slot that a running forward reads is
    not overwritten; it is reused when its last reader has released it.
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
            self._hooks.append(head.register_forward_pre_hook(_select_positions))
        self.early_block = ""
        """Name of the block at which `early_states` stops; empty for a backbone without blocks."""
        self.num_early_blocks = 0
        """Number of blocks that `early_states` runs."""
        if blocks := backbone.blocks:
            self.num_early_blocks = min(len(blocks) - 1, max(1, round(EARLY_SHARE * len(blocks))))
            block = blocks[self.num_early_blocks]
            self.early_block = next(n for n, m in backbone.model.named_modules() if m is block)
            self._hooks.append(block.register_forward_pre_hook(_stop_early, with_kwargs=True))
        self.slots = Slots(
            self._new_slots, options.adapter_bytes, partial(native.write, cache_dir() / "native")
        )
        self.source: AdapterSource = LoadedOnly(self.slots)
        """Loads the adapters of a mix for forwards and engines."""
        self._cached: dict[Callable[[AdapterModel], Any], Any] = {}
        self._cache_lock = threading.Lock()

    def use_source(self, source: AdapterSource) -> None:
        """Load adapters from `source` from now on; by default only those that are loaded can be used."""
        self.source = source

    def cached(self, make: Callable[[AdapterModel], _T]) -> _T:
        """Return `make(self)`, made at the first call and kept as long as the model."""
        with self._cache_lock:
            if make not in self._cached:
                self._cached[make] = make(self)
            value: _T = self._cached[make]
        return value

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return self.slots.names

    def has_loaded(self, mix: Mix) -> bool:
        """Return whether all adapters of a mix are loaded, with those that its stacks were trained on."""
        if not all(name in self.slots for name in mix.names):
            return False
        return all(name in self.slots for name in self.source.with_stack_bases(mix).names)

    def weights(self, name: str) -> AdapterWeights:
        """Return a copy of a loaded adapter's weights, rounded to the dtype of its slot."""
        return self.slots.weights(name)

    def ahead(self) -> AbstractContextManager[StagedSlot]:
        """Yield a slot to fill with weights before `load` is called with them; see Slots.stage."""
        width = self.backbone.width
        return self.slots.stage(lambda weights: not misfits(weights, self.shapes, width))

    def load(
        self,
        name: str,
        weights: AdapterWeights,
        identity: str | None = None,
        ahead: StagedSlot | None = None,
    ) -> None:
        """Put an adapter into a slot; under a name in use it replaces that adapter for new forwards.

        `identity` is the hash of its content, if known; `ahead` is a slot that may hold the weights already.
        Raises AdapterError when modules or shapes do not fit the backbone, and NoRoomError when all slots
        of the budget are in use; nothing has changed then.
        """
        if name == BACKBONE:
            raise AdapterError(
                f"{BACKBONE!r} is reserved: it means no adapter; choose another name"
            )
        if problems := misfits(weights, self.shapes, self.backbone.width):
            summary = f"adapter {name!r} does not fit {self.backbone.name}"
            raise AdapterError(join_misfits(summary, problems), problems)
        self.slots.load(name, weights, identity, ahead)

    def unload(self, name: str) -> None:
        """Free an adapter's slot; running forwards keep it until they end."""
        self.slots.unload(name)

    @contextmanager
    def temporarily_loaded(
        self, weights: AdapterWeights, label: str = "candidate"
    ) -> Iterator[str]:
        """Load weights under a unique name while the block runs; yield that name.

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
        """Apply the mix `mixes[i]` to row i in the calling thread's forwards inside the block.

        Raises UnknownNameError for an adapter that is not loaded.
        """
        with ExitStack() as stack:
            leases = {
                mix: stack.enter_context(self.slots.releasing(self.source.acquire(mix)))
                for mix in dict.fromkeys(mixes)
            }
            with activate(plan_for([leases[mix] for mix in mixes])):
                yield

    def arranged(self, rows: Sequence[Sequence[Encoded]]) -> list[Sequence[Encoded]]:
        """Return packed rows as they are, or where layers carry a state, each continuation in its own."""
        return list(rows) if self.backbone.packs else isolated(rows)

    def pack(self, rows: Sequence[Sequence[Encoded]], length: int) -> Batch:
        """Return rows of at most `length` tokens as one Batch, arranged as the backbone needs them."""
        if self.backbone.packs:
            return pack(rows, length)
        apart = isolated(rows)
        return pack(apart, min(length, longest(apart)))

    def answer_logits(self, batch: Batch) -> Tensor:
        """Return logits (P, V) at the batch's predicting positions, under the active mix.

        The output head is not run at other positions: for a 49k vocabulary it is a quarter of all the work.
        For an encoder, V is the number of labels, and the logits come from the adapters' heads.
        """
        batch = batch.to(self.backbone.device)
        if self.backbone.encodes:
            return self._label_logits(batch)
        padding = -len(batch.keep) % POSITION_STEP  # few shapes: each costs set-up time on a CPU
        kept = functional.pad(batch.keep, (0, padding))
        with head_positions(kept), self._laid_out(batch) as mask:
            out = self.backbone.model(
                input_ids=batch.ids,
                attention_mask=mask,
                position_ids=batch.positions,
                use_cache=False,
            )
        logits: Tensor = out.logits
        return logits[: len(batch.keep)]

    def features(self, batch: Batch) -> Tensor:
        """Return features (P, W), float32, of the text around each predicting position.

        They are an encoder's pooled features; of a language model, the mean of the last hidden states.
        """
        batch = batch.to(self.backbone.device)
        base = self.backbone.model.base_model
        start = first_position(self.backbone.model.config)
        options = {} if self.backbone.encodes else {"use_cache": False}
        with self._laid_out(batch) as mask:
            hidden = base(
                input_ids=batch.ids,
                attention_mask=mask,
                position_ids=batch.positions + start,
                **options,
            ).last_hidden_state
        return pooled(base, hidden, batch, self.backbone.pooling or "mean")

    def _label_logits(self, batch: Batch) -> Tensor:
        """Return logits (P, labels), float32, of the heads of each row's mix; zeros without a plan."""
        features, plan = self.features(batch), active()
        width = int(batch.targets.max()) + 1
        if plan is None:
            return features.new_zeros(len(features), width)
        return plan.label_logits(features, batch.keep // batch.ids.shape[1], width)

    def early_states(self, ids: Tensor) -> Tensor:
        """Return the hidden states (N, T, H) that enter block `early_block`, without adapters.

        `ids` (N, T) are padded on the right. Later blocks are not run. Raises UsageError for a backbone
        that is not made of blocks.
        """
        token = _STOPS_EARLY.set(True)
        try:
            with torch.inference_mode(), self.mixing([NO_ADAPTER] * len(ids)):
                self.backbone.model(input_ids=ids, use_cache=False)
        except _EarlyStopError as stop:
            return stop.states
        finally:
            _STOPS_EARLY.reset(token)
        raise UsageError(f"{self.backbone.name} is not made of blocks that can be run one by one")

    @contextmanager
    def checkpointing(self, on: bool = True) -> Iterator[None]:
        """Checkpoint activations: the backward pass recomputes those inside the backbone's blocks.

        Training then stores the activations of one block at a time, and computes a third more
        (arXiv 1604.06174).
        """
        blocks: list[Any] = list(self.backbone.blocks) if on else []
        for block in blocks:
            block.forward = partial(_checkpointed, block.forward)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    def shard(self) -> None:
        """Shard every block's frozen weights over the processes of the run, for good (FSDP2).

        Each process keeps its shard and gathers a block's weights while the block runs. All processes must
        run the same forwards from now on. Raises UsageError for a quantized backbone.
        """
        if self.backbone.quantize is not None:
            raise UsageError("a quantized backbone cannot be sharded; leave out shard or quantize")
        mesh = init_device_mesh(self.backbone.device.type, (torch.distributed.get_world_size(),))
        for block in self.backbone.blocks:
            fully_shard(block, mesh=mesh)

    @contextmanager
    def _laid_out(self, batch: Batch) -> Iterator[Tensor | None]:
        """Hide the batch's examples from each other; yield the mask to call the backbone with.

        For the CPU's training attention there is one mask a head.
        """
        backbone = self.backbone
        training = torch.is_grad_enabled() and batch.ids.device.type == "cpu"
        heads = getattr(backbone.text_config, "num_attention_heads", 1) if training else 1
        if backbone.asks_for_masks:
            layout = RowLayout(batch.positions, batch.positions, batch.visible(), heads)
            with laid_out(layout):
                yield torch.ones_like(batch.ids)
        elif backbone.encodes:
            mask = batch.mask(backbone.dtype, causal=False)
            yield mask if heads == 1 else mask.expand(-1, heads, -1, -1).contiguous()
        else:  # one example a row, padded on the right: the model's own causal mask is right
            yield None

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
        """Return an empty bank over the sites that have one of `modules`, its rank rounded up.

        With `labels`, its slots also have classification heads for up to that many labels.
        """
        sites = [s for s in self.sites if not set(modules).isdisjoint(s.members)]
        rank = -(-rank // RANK_STEP) * RANK_STEP
        device = self.backbone.device
        width = self.backbone.width
        # else a load inside inference mode would leave slots that cannot be written outside
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
        """The dtype of slots: the backbone's; fp32 for an encoder, whose adapters have a head in fp32."""
        return torch.float32 if self.backbone.encodes else self.backbone.dtype

    def _new_slots(self, modules: Sequence[str], slots: int, rank: int, labels: int = 0) -> Bank:
        return self.new_bank(modules, slots=slots, rank=rank, dtype=self.slot_dtype, labels=labels)

    def close(self) -> None:
        """Remove all hooks from the backbone, which is then as before."""
        self._detach()
        for hook in self._hooks:
            hook.remove()


def _checkpointed(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Run a block without storing its activations; it is recomputed under the same plan."""
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
def head_positions(positions: Tensor | None) -> Iterator[None]:
    """Run the output head only at these flat (row * length + column) positions inside the block."""
    token = _HEAD_POSITIONS.set(positions)
    try:
        yield
    finally:
        _HEAD_POSITIONS.reset(token)


class _EarlyStopError(Exception):
    """Ends a forward of `early_states`, with the states that enter the block."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def _stop_early(_block: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """End a forward of `early_states`; forwards of other threads go on."""
    if _STOPS_EARLY.get():
        raise _EarlyStopError(arguments[0] if arguments else options["hidden_states"])


def _select_positions(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Select the positions of `head_positions` before the head runs: (P, width)."""
    positions = _HEAD_POSITIONS.get()
    if positions is None:
        return None
    hidden = inputs[0]
    return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions),)
