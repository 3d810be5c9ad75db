"""GraphDecoder: a step of one token a row with static shapes, recorded once and replayed.

The inputs of a step (tokens, positions and each row's adapter factors) are copied to static memory, so that
another adapter needs no new recording. On CUDA a recording is a CUDA graph, one launch in place of hundreds;
elsewhere it is the step as compiled by torch.compile, which on the CPUs that were measured is slower than the
native products (docs/performance.md). Prompts, and rows that mix several adapters, go through the fused
decoder. Legend: N rows, padded; C capacity of the cache.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import config as dynamo
from torch.nn import functional

from adapterhub_chat.errors import UsageError, warn
from adapterhub_chat.inference.decoder import StepInput, causal_mask
from adapterhub_chat.inference.fused_decoder import FusedDecoder, apply_rope
from adapterhub_chat.inference.kv_cache import KVCache
from adapterhub_chat.lora.bank import Bank
from adapterhub_chat.lora.plan import BankSlot, Plan
from adapterhub_chat.lora.sites import Site
from adapterhub_chat.model.adapter_model import AdapterModel

MAX_RECORDINGS = 1000
"""Limit of torch.compile's recompilations: one for each size of batch and cache."""
WARM_UP_RUNS = 3
"""Runs before a CUDA graph is captured: libraries choose their kernels in the first ones."""

_capture_lock = threading.Lock()
"""torch captures one graph at a time."""
DecodeStep = Callable[[], Tensor]


@dataclass
class _StaticInputs:
    """The memory that the recordings of N rows read."""

    ids: Tensor
    """(N,)."""
    positions: Tensor
    """(N,)."""
    cos: Tensor
    """(N, 1, head width), like sin."""
    sin: Tensor
    bank: Bank | None
    """Slot n holds row n's factors; None: no row has an adapter."""
    weights: Tensor
    """(N, 1, 1): 0 for a row without an adapter."""
    loaded_plan: Callable[[], Plan | None] = lambda: None
    """A weak reference to the plan whose factors are in the bank: a strong one would keep its slots."""


class GraphDecoder:
    """A Decoder that records steps; `num_recordings` counts them."""

    def __init__(self, model: AdapterModel, inner: object, *, backend: Any = "inductor") -> None:
        """Wrap a fused decoder; `backend` is torch.compile's, where that is used.

        Raises UsageError for a backbone whose step cannot be recorded.
        """
        if not isinstance(inner, FusedDecoder) or model.backbone.quantize is not None:
            raise UsageError(
                f"graphs: steps of {model.backbone.name} cannot be recorded; they can for an unquantized "
                "backbone of the Llama, Mistral and Qwen2 families. Leave graphs out"
            )
        self.inner, self.backbone = inner, model.backbone
        self.max_length, self.takes_chunks = inner.max_length, inner.takes_chunks
        self.new_cache, self.recompute_length = inner.new_cache, inner.recompute_length
        self.early_states = inner.early_states
        self.num_recordings = 0
        self._sites = model.sites
        self._rank = 0
        # keys: number of rows, and whether there are adapters
        self._static: dict[tuple[int, bool], _StaticInputs] = {}
        self._recordings: dict[tuple[int, bool], DecodeStep] = {}
        self._unrecordable: set[tuple[int, bool]] = set()
        self._cache_memory: Tensor | None = None  # that the recordings read
        self._compiled = torch.compile(_call, backend=backend, fullgraph=True, dynamic=False)

    def forward(self, cache: KVCache, inputs: StepInput, plan: Plan | None) -> Tensor:
        """See Decoder."""
        rows, width = inputs.ids.shape
        places = [] if plan is None else plan.single()
        if width > 1 or inputs.first_row or places is None:
            return self.inner.forward(cache, inputs, plan)
        if self._cache_memory is not cache.keys[0]:
            self._recordings.clear()
            self._cache_memory = cache.keys[0]
        size = min(1 << (rows - 1).bit_length(), cache.num_rows)
        if (size, plan is not None) in self._unrecordable:
            return self.inner.forward(cache, inputs, plan)
        with torch.inference_mode():
            static = self._prepared(size, plan, places)
            self._copy_inputs(static, cache, inputs)
            key = size, plan is not None
            try:
                if key not in self._recordings:
                    self._recordings[key] = self._record(partial(self._step, static, cache, size))
                return self._recordings[key]()[:rows]
            except Exception as error:  # out of memory, or an operation that cannot be recorded
                warn(f"a step of {size} rows is not recorded: {error!s:.200}")
                self._recordings.pop(key, None)
                self._unrecordable.add(key)
        return self.inner.forward(cache, inputs, plan)

    def _prepared(
        self, size: int, plan: Plan | None, places: Sequence[tuple[BankSlot, float] | None]
    ) -> _StaticInputs:
        """Return the static memory for `size` rows, with the plan's factors in it."""
        rank = max((place[0].rank for place, _ in filter(None, places)), default=0)
        if rank > self._rank:
            self._rank = rank
            for key in [key for key in self._static if key[1]]:
                del self._static[key]
                self._recordings.pop(key, None)
        key = size, plan is not None
        if key not in self._static:
            self._static[key] = self._allocated(*key)
        static = self._static[key]
        if plan is not None and static.loaded_plan() is not plan:
            assert static.bank is not None
            weights = [0.0 if place is None else place[1] for place in places]
            static.weights.zero_()[: len(places), 0, 0] = torch.tensor(weights)
            for row in range(size):
                _copy_factors(static.bank, row, places[row] if row < len(places) else None)
            static.loaded_plan = weakref.ref(plan)
        return static

    def _allocated(self, size: int, has_adapters: bool) -> _StaticInputs:
        device, dtype = self.backbone.device, self.backbone.dtype
        ids, positions = torch.zeros(2, size, dtype=torch.long, device=device)
        cos, sin = torch.zeros(2, size, 1, self.inner.shape[2], dtype=dtype, device=device)
        weights = torch.zeros(size, 1, 1, dtype=dtype, device=device)
        bank = None
        if has_adapters:
            bank = Bank(self._sites, slots=size, rank=self._rank, dtype=dtype, device=device)
        return _StaticInputs(ids, positions, cos, sin, bank, weights)

    def _copy_inputs(self, static: _StaticInputs, cache: KVCache, inputs: StepInput) -> None:
        """Copy a step's tokens and positions to the static memory.

        Padding rows write to the last position of the cache, which no request uses.
        """
        rows = len(inputs.ids)
        static.ids.zero_()[:rows] = inputs.ids[:, 0]
        static.positions.fill_(cache.capacity - 1)[:rows] = inputs.positions[:, 0]
        # padding rows left out: some kinds of RoPE depend on the largest position
        cos, sin = self.inner.rotary(static.cos, inputs.positions)
        static.cos[:rows].copy_(cos)
        static.sin[:rows].copy_(sin)

    def _record(self, step: DecodeStep) -> DecodeStep:
        self.num_recordings += 1
        if self.backbone.device.type == "cuda":
            return _cuda_graph(step, self.backbone.device)
        return partial(self._run_compiled, step)

    def _run_compiled(self, step: DecodeStep) -> Tensor:
        """Run a step as torch.compile has compiled it, once for each recording."""
        limits = {"recompile_limit": MAX_RECORDINGS, "accumulated_recompile_limit": MAX_RECORDINGS}
        with dynamo.patch(limits):
            return self._compiled(step)

    def _step(self, static: _StaticInputs, cache: KVCache, size: int) -> Tensor:
        """Return the logits (N, V) after each row's token."""
        inner = self.inner
        mask = causal_mask(static.positions[:, None], cache.capacity, static.cos.dtype)
        index = torch.arange(size, device=static.positions.device)
        x = inner.embed(static.ids)
        for layer, block in enumerate(inner.blocks):
            keys, values = cache.keys[layer][:size], cache.values[layer][:size]
            q, k, v = (
                part.view(size, 1, -1, inner.shape[2]).transpose(1, 2)
                for part in _adapted_outputs(block.qkv, block.norm(x), static)
            )
            keys[index, :, static.positions] = apply_rope(k, static.cos, static.sin)[:, :, 0]
            values[index, :, static.positions] = v[:, :, 0]
            attended = functional.scaled_dot_product_attention(
                apply_rope(q, static.cos, static.sin),
                keys,
                values,
                mask,
                scale=inner.scale,
                enable_gqa=True,
            )
            (delta,) = _adapted_outputs(block.out, attended.reshape(size, -1), static)
            x = x + delta
            gate, up = _adapted_outputs(block.gate_up, block.second_norm(x), static)
            (delta,) = _adapted_outputs(block.down, functional.silu(gate) * up, static)
            x = x + delta
        return functional.linear(inner.last_norm(x), inner.head.weight, inner.head.bias)


def _adapted_outputs(fused: Any, x: Tensor, static: _StaticInputs) -> list[Tensor]:
    """Return each member's W x + w B A x for x (N, in), with each row's factors and weight."""
    site: Site = fused.site
    outs = [functional.linear(x, linear.weight, linear.bias) for linear in fused.linears]
    if static.bank is None:
        return outs
    rank = static.bank.rank
    h = torch.bmm(x[:, None], static.bank.A[site.name].mT) * static.weights
    return [
        y + torch.bmm(h[..., j * rank : (j + 1) * rank], static.bank.B[member])[:, 0]
        for j, (member, y) in enumerate(zip(site.members, outs, strict=True))
    ]


def _copy_factors(bank: Bank, row: int, place: tuple[BankSlot, float] | None) -> None:
    """Copy the factors of a place to slot `row`; zeros without a place."""
    if place is None:
        bank.flat[row].zero_()
        return
    source, slot = place[0]
    if source.layout[:2] == bank.layout[:2]:
        bank.flat[row].copy_(source.flat[slot])
        return
    bank.flat[row].zero_()
    for site in source.sites.values():
        for j, member in enumerate(site.members):
            a = source.A[site.name][slot, j * source.rank : (j + 1) * source.rank]
            bank.A[site.name][row, j * bank.rank : j * bank.rank + source.rank].copy_(a)
            bank.B[member][row, : source.rank].copy_(source.B[member][slot])


def _cuda_graph(step: DecodeStep, device: torch.device) -> DecodeStep:
    """Capture a step as a CUDA graph; return the function that replays it on the same memory.

    Other threads may load adapters meanwhile: their work is not captured.
    """
    current = torch.cuda.current_stream(device)
    # entering the current stream restores it whatever fails inside
    with _capture_lock, torch.cuda.device(device), torch.cuda.stream(current):
        side = torch.cuda.Stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_RUNS):
                step()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            out = step()

    def replay() -> Tensor:
        with torch.cuda.device(device):
            graph.replay()
        return out

    return replay


def _call(step: DecodeStep) -> Tensor:
    return step()
