"""Recorded: a step of one token a row whose shapes never change, recorded once and played again.

What changes from step to step lies in memory that stays where it is: tokens, positions and each row's own
factors, which are copied there when the batch changes, so that a swap records nothing anew. On CUDA the
record is a CUDA graph, one launch in place of hundreds; elsewhere it is what torch.compile makes of the step,
which on the CPUs that were measured is slower than the native products (docs/performance.md). Prompts, and
rows that mix several adapters, go through the fused decoder. Legend: N rows, padded; C capacity of the cache.
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
from adapterhub_chat.inference.decoder import StepInput, mask_of
from adapterhub_chat.inference.fused_decoder import FusedDecoder, rotated
from adapterhub_chat.inference.kv_cache import KeyValues
from adapterhub_chat.lora.bank import Bank
from adapterhub_chat.lora.plan import BankSlot, Plan
from adapterhub_chat.lora.sites import Site
from adapterhub_chat.model.adapter_model import AdapterModel

MOST_RECORDS = 1000
"""Sizes of batch and cache for which torch.compile may make its form of the step."""
WARM_UP = 3
"""Runs before a CUDA graph is captured, as libraries choose their kernels in the first ones."""

_capturing = threading.Lock()
"""torch captures one graph at a time."""
DecodeStep = Callable[[], Tensor]


@dataclass
class _Stage:
    """The memory that the records of N rows read."""

    ids: Tensor
    """(N,)."""
    positions: Tensor
    """(N,)."""
    cos: Tensor
    """(N, 1, head width), as sin."""
    sin: Tensor
    bank: Bank | None
    """Slot n has row n's factors; None: no row has an adapter."""
    weights: Tensor
    """(N, 1, 1): 0 for a row without an adapter."""
    filled: Callable[[], Plan | None] = lambda: None
    """Whose factors are in the bank, as long as it is anybody's: a plan keeps slots that others may need."""


class GraphDecoder:
    """See Decoder and the module. `records` counts what was recorded."""

    def __init__(self, model: AdapterModel, inner: object, *, backend: Any = "inductor") -> None:
        """Stand before a fused decoder; `backend` is torch.compile's, where that is used.

        Raises UsageError for a backbone whose step cannot be recorded.
        """
        if not isinstance(inner, FusedDecoder) or model.backbone.quantize is not None:
            raise UsageError(
                f"graphs: steps of {model.backbone.name} cannot be recorded; they can for an unquantized "
                "backbone of the Llama, Mistral and Qwen2 families. Leave graphs out"
            )
        self.inner, self.backbone = inner, model.backbone
        self.heads, self.limit, self.early_states = inner.heads, inner.limit, inner.early_states
        self.records = 0
        self._sites = model.sites
        self._rank = 0
        self._stages: dict[tuple[int, bool], _Stage] = {}
        self._played: dict[tuple[int, bool], DecodeStep] = {}
        self._refused: set[tuple[int, bool]] = set()
        self._memory: Tensor | None = None  # of the cache that the records know
        self._compiled = torch.compile(_call, backend=backend, fullgraph=True, dynamic=False)

    def forward(self, cache: KeyValues, feed: StepInput, plan: Plan | None) -> Tensor:
        """See Decoder."""
        rows, width = feed.ids.shape
        own = [] if plan is None else plan.single()
        if width > 1 or feed.first or own is None:
            return self.inner.forward(cache, feed, plan)
        if self._memory is not cache.keys[0]:
            self._played.clear()
            self._memory = cache.keys[0]
        size = min(1 << (rows - 1).bit_length(), cache.rows)
        if (size, plan is not None) in self._refused:
            return self.inner.forward(cache, feed, plan)
        with torch.inference_mode():
            stage = self._staged(size, plan, own)
            self._set(stage, cache, feed)
            key = size, plan is not None
            try:
                if key not in self._played:
                    self._played[key] = self._record(partial(self._step, stage, cache, size))
                return self._played[key]()[:rows]
            except Exception as error:  # no memory for it, or something that cannot be recorded
                warn(f"a step of {size} rows is not recorded: {error!s:.200}")
                self._played.pop(key, None)
                self._refused.add(key)
        return self.inner.forward(cache, feed, plan)

    def _staged(
        self, size: int, plan: Plan | None, own: Sequence[tuple[BankSlot, float] | None]
    ) -> _Stage:
        """Return the memory for so many rows, with the plan's factors in it."""
        rank = max((place[0].rank for place, _ in filter(None, own)), default=0)
        if rank > self._rank:
            self._rank = rank
            for key in [key for key in self._stages if key[1]]:
                del self._stages[key]
                self._played.pop(key, None)
        key = size, plan is not None
        if key not in self._stages:
            self._stages[key] = self._stage(*key)
        stage = self._stages[key]
        if plan is not None and stage.filled() is not plan:
            assert stage.bank is not None
            weights = [0.0 if one is None else one[1] for one in own]
            stage.weights.zero_()[: len(own), 0, 0] = torch.tensor(weights)
            for row in range(size):
                _fill(stage.bank, row, own[row] if row < len(own) else None)
            stage.filled = weakref.ref(plan)
        return stage

    def _stage(self, size: int, adapted: bool) -> _Stage:
        device, dtype = self.backbone.device, self.backbone.dtype
        ids, positions = torch.zeros(2, size, dtype=torch.long, device=device)
        cos, sin = torch.zeros(2, size, 1, self.inner.shape[2], dtype=dtype, device=device)
        weights = torch.zeros(size, 1, 1, dtype=dtype, device=device)
        bank = None
        if adapted:
            bank = Bank(self._sites, slots=size, rank=self._rank, dtype=dtype, device=device)
        return _Stage(ids, positions, cos, sin, bank, weights)

    def _set(self, stage: _Stage, cache: KeyValues, feed: StepInput) -> None:
        """Put a step's tokens and positions where its record reads them.

        Spare rows write behind all tokens that a row may ever have.
        """
        rows = len(feed.ids)
        stage.ids.zero_()[:rows] = feed.ids[:, 0]
        stage.positions.fill_(cache.length - 1)[:rows] = feed.positions[:, 0]
        # of these positions alone: some kinds of rotation depend on the largest one
        cos, sin = self.inner.rotary(stage.cos, feed.positions)
        stage.cos[:rows].copy_(cos)
        stage.sin[:rows].copy_(sin)

    def _record(self, step: DecodeStep) -> DecodeStep:
        self.records += 1
        if self.backbone.device.type == "cuda":
            return _captured(step, self.backbone.device)
        return partial(self._played_back, step)

    def _played_back(self, step: DecodeStep) -> Tensor:
        """Run what torch.compile made of a step: as many forms of it as there are records."""
        limits = {"recompile_limit": MOST_RECORDS, "accumulated_recompile_limit": MOST_RECORDS}
        with dynamo.patch(limits):
            return self._compiled(step)

    def _step(self, stage: _Stage, cache: KeyValues, size: int) -> Tensor:
        """Return the logits (N, V) after each row's token."""
        inner = self.inner
        mask = mask_of(stage.positions[:, None], cache.length, stage.cos.dtype)
        index = torch.arange(size, device=stage.positions.device)
        x = inner.embed(stage.ids)
        for layer, block in enumerate(inner.blocks):
            keys, values = cache.keys[layer][:size], cache.values[layer][:size]
            q, k, v = (
                part.view(size, 1, -1, inner.shape[2]).transpose(1, 2)
                for part in _products(block.qkv, block.norm(x), stage)
            )
            keys[index, :, stage.positions] = rotated(k, stage.cos, stage.sin)[:, :, 0]
            values[index, :, stage.positions] = v[:, :, 0]
            attended = functional.scaled_dot_product_attention(
                rotated(q, stage.cos, stage.sin),
                keys,
                values,
                mask,
                scale=inner.scale,
                enable_gqa=True,
            )
            (delta,) = _products(block.out, attended.reshape(size, -1), stage)
            x = x + delta
            gate, up = _products(block.gate_up, block.second_norm(x), stage)
            (delta,) = _products(block.down, functional.silu(gate) * up, stage)
            x = x + delta
        return functional.linear(inner.last_norm(x), inner.head.weight, inner.head.bias)


def _products(fused: Any, x: Tensor, stage: _Stage) -> list[Tensor]:
    """Return each member's W x + w B A x for x (N, in), every row with its own factors."""
    site: Site = fused.site
    outs = [functional.linear(x, linear.weight, linear.bias) for linear in fused.linears]
    if stage.bank is None:
        return outs
    rank = stage.bank.rank
    h = torch.bmm(x[:, None], stage.bank.A[site.name].mT) * stage.weights
    return [
        y + torch.bmm(h[..., j * rank : (j + 1) * rank], stage.bank.B[member])[:, 0]
        for j, (member, y) in enumerate(zip(site.members, outs, strict=True))
    ]


def _fill(bank: Bank, row: int, one: tuple[BankSlot, float] | None) -> None:
    """Put a row's factors into slot `row`: whole where the layouts agree, else piece by piece."""
    if one is None:
        bank.flat[row].zero_()
        return
    own, slot = one[0]
    if own.layout[:2] == bank.layout[:2]:
        bank.flat[row].copy_(own.flat[slot])
        return
    bank.flat[row].zero_()
    for site in own.sites.values():
        for j, member in enumerate(site.members):
            part = own.A[site.name][slot, j * own.rank : (j + 1) * own.rank]
            bank.A[site.name][row, j * bank.rank : j * bank.rank + own.rank].copy_(part)
            bank.B[member][row, : own.rank].copy_(own.B[member][slot])


def _captured(step: DecodeStep, device: torch.device) -> DecodeStep:
    """Return what plays a CUDA graph of the step; it reads and writes the memory that the step did.

    Other threads may load adapters meanwhile: what they do is no part of it.
    """
    before = torch.cuda.current_stream(device)
    # entering the stream that is current anyway has it back whatever fails inside
    with _capturing, torch.cuda.device(device), torch.cuda.stream(before):
        side = torch.cuda.Stream(device)
        side.wait_stream(before)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                step()
        before.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            out = step()

    def play() -> Tensor:
        with torch.cuda.device(device):
            graph.replay()
        return out

    return play


def _call(step: DecodeStep) -> Tensor:
    return step()
