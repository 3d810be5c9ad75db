"""The Llama family's own forward: the layers of a site as one product, one pass over every weight.

In a step of one token a row the native products do the rest, where they exist. Legend: N rows, T new tokens
of a row, W hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapterhub_chat.inference.decoder import (
    Decoder,
    ModuleDecoder,
    StepInput,
    View,
    head_shape,
    limit_of,
)
from adapterhub_chat.inference.kv_cache import Heads, KeyValues
from adapterhub_chat.lora import native
from adapterhub_chat.lora.plan import Plan, activate
from adapterhub_chat.lora.sites import Site
from adapterhub_chat.model.adapter_model import AdapterModel

FUSED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
COPY_LIMIT = 2 * 2**30
"""Largest backbone, in bytes, whose weights are copied into the order that its products like best."""
PACKED_ROWS = 16
FEW_TOKENS = 128
"""Tokens of an adapter's rows up to which the native products are the faster ones."""

_Add = Callable[[Site, Tensor, Tensor], Tensor]
_Attend = Callable[["_Block", Tensor], Tensor]


def make_decoder(model: AdapterModel, folder: Path) -> Decoder:
    """Return the fastest decoder for the model's backbone; `folder` keeps compiled products."""
    return FusedDecoder(model, folder) if _is_fusible(model) else ModuleDecoder(model)


def _is_fusible(model: AdapterModel) -> bool:
    backbone: Any = model.backbone.model
    config = backbone.config
    windowed = getattr(config, "sliding_window", None) and getattr(
        config, "use_sliding_window", True
    )
    return (
        type(backbone).__name__ in FUSED
        and config.hidden_act == "silu"
        and not windowed
        and not any("forward" in block.__dict__ for block in backbone.model.layers)
    )


class _Fused:
    """The frozen products of a site, as one."""

    def __init__(self, site: Site, linears: Sequence[nn.Module], packing: bool) -> None:
        self.site = site
        self.linears: list[Any] = list(linears)
        self._weight = self._bias = None
        plain = all(type(linear) is nn.Linear for linear in linears)
        if plain and packing:
            weight = torch.cat([linear.weight.detach() for linear in self.linears])
            biases = [linear.bias for linear in self.linears]
            if any(bias is not None for bias in biases):
                self._bias = torch.cat(
                    [
                        linear.weight.new_zeros(linear.out_features) if b is None else b.detach()
                        for linear, b in zip(self.linears, biases, strict=True)
                    ]
                )
            self._weight, self._product = _packed(weight)

    def __call__(self, x: Tensor) -> Tensor:
        """Return W x of all members side by side, (M, sum of outs), contiguous."""
        if self._weight is not None:
            out: Tensor = self._product(x, self._weight, self._bias)
            return out
        with activate(None):  # the layers' own products, whatever the calling thread's default is
            outs = [linear(x) for linear in self.linears]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)


def _packed(weight: Tensor) -> tuple[Tensor, Any]:
    """Return a weight in the order that oneDNN's products like best, and the product that takes it.

    On a CPU a plain product of few rows orders its weight anew each time: in bf16 half of what 16 rows take,
    in fp32 a third (docs/performance.md). Where oneDNN is missing or refuses the dtype, the plain product
    does it.
    """
    if weight.device.type != "cpu" or not _orders(weight.dtype):
        return weight, functional.linear
    ordered = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_ROWS)
    return ordered, _onednn


def _orders(dtype: torch.dtype) -> bool:
    """Return whether oneDNN takes a weight of this dtype here; with AVX2 alone it refuses bf16."""
    ops: Any = getattr(torch.ops, "mkldnn", None)
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and bool(ops._is_mkldnn_bf16_supported())
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


class _Block:
    """A block's parts, in the order of the work."""

    def __init__(self, model: AdapterModel, block: Any, packing: bool) -> None:
        sites = {member: site for site in model.sites for member in site.members}
        names = {module: name for name, module in model.backbone.model.named_modules()}
        attention, mlp = block.self_attn, block.mlp

        def fused(*linears: Any) -> _Fused:
            site = sites[names[linears[0]]]
            assert site.members == tuple(names[linear] for linear in linears)
            return _Fused(site, linears, packing)

        self.norm, self.second_norm = block.input_layernorm, block.post_attention_layernorm
        self.qkv = fused(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = fused(attention.o_proj)
        self.gate_up = fused(mlp.gate_proj, mlp.up_proj)
        self.down = fused(mlp.down_proj)


class FusedDecoder:
    """See Decoder: the Llama family's forward, over fused sites."""

    def __init__(self, model: AdapterModel, folder: Path) -> None:
        """Copy the backbone's weights where it is small enough; `folder` keeps compiled products."""
        self.backbone = model.backbone
        whole: Any = self.backbone.model
        config = whole.config
        self.limit = limit_of(config)
        self.shape = head_shape(config)
        self.heads: Heads = [self.shape[1:]] * config.num_hidden_layers
        self.scale = self.shape[2] ** -0.5
        packing = self.backbone.quantize is None and self.backbone.nbytes <= COPY_LIMIT
        self.blocks = [_Block(model, block, packing) for block in whole.model.layers]
        self._early = model.num_early
        self.embed, self.last_norm = whole.model.embed_tokens, whole.model.norm
        self.rotary = whole.model.rotary_emb
        self.head = whole.get_output_embeddings()
        self._head, self._head_product = self.head.weight.detach(), functional.linear
        if packing and self.head.bias is None:
            self._head, self._head_product = _packed(self._head)
        self._folder = folder
        self._step: tuple[tuple[int, int], native.NativeStep] | None = None

    @cached_property
    def _products(self) -> native.Products | None:
        """The native products, where they exist and fit."""
        usable = native.available(self.backbone.device, self.backbone.dtype, self._folder)
        if not usable or self.shape[2] > native.MAX_HEAD_WIDTH or self.shape[2] % 2:
            return None
        return native.Products(self.backbone.dtype, self._folder)

    @torch.inference_mode()
    def forward(self, cache: KeyValues, feed: StepInput, plan: Plan | None) -> Tensor:
        """See Decoder."""
        rows, width = feed.ids.shape
        if width == 1 and self._products is not None:
            return self._one_token(self._products, cache, feed, plan)
        view = View(cache, feed)
        mask = view.mask(self.backbone.dtype)
        x = self.embed(feed.ids).flatten(0, 1)
        cos, sin = self.rotary(x, view.positions)
        add = self._adding(plan, rows, width)
        delta = None
        for layer, block in enumerate(self.blocks):
            keep = partial(view.update, layer=layer)
            delta = self._through(
                block, x, delta, partial(self._attended, cos, sin, mask, keep), add
            )
        if plan is not None:
            plan.release()
        assert delta is not None
        x, delta = x.index_select(0, feed.last), delta.index_select(0, feed.last)
        return self._logits(self._norm(self.last_norm, x, delta))

    @torch.inference_mode()
    def early_states(self, ids: Tensor) -> Tensor:
        """See Decoder."""
        rows, width = ids.shape
        x = self.embed(ids).flatten(0, 1)
        positions = torch.arange(width, device=ids.device).expand(rows, width)
        cos, sin = self.rotary(x, positions)
        attend = partial(self._attended, cos, sin, None, lambda k, v: (k, v))
        delta = None
        for block in self.blocks[: self._early]:
            delta = self._through(block, x, delta, attend, lambda _site, _x, y: y)
        states: Tensor = x if delta is None else x + delta
        return states.view(rows, width, -1)

    def _through(
        self, block: _Block, x: Tensor, delta: Tensor | None, attend: _Attend, add: _Add
    ) -> Tensor:
        """Take x + delta (N*T, W) through a block: add delta to x in place, return the next one."""
        qkv = _mixed(block.qkv, self._norm(block.norm, x, delta), add)
        delta = _mixed(block.out, attend(block, qkv), add)
        both = _mixed(block.gate_up, self._norm(block.second_norm, x, delta), add)
        return _mixed(block.down, self._silu(both), add)

    def _attended(
        self,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        keep: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        block: _Block,
        qkv: Tensor,
    ) -> Tensor:
        """Return what each token attends to, (N*T, W); `keep` gives all keys and values for the new ones.

        Without a mask a token sees the tokens before it.
        """
        rows, width = cos.shape[:2]
        q, k, v = (
            part.view(rows, width, -1, self.shape[2]).transpose(1, 2)
            for part in qkv.split(block.qkv.site.out_features, dim=-1)
        )
        keys, values = keep(rotated(k, cos, sin), v)
        out = functional.scaled_dot_product_attention(
            rotated(q, cos, sin),
            keys,
            values,
            mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=True,
        )
        return out.transpose(1, 2).reshape(rows * width, -1)

    def _norm(self, norm: Any, x: Tensor, delta: Tensor | None) -> Tensor:
        """Add `delta` to x (N, W) in place; return its norm."""
        if self._products is not None:
            return self._products.norm(x, delta, norm.weight, norm.variance_epsilon)
        if delta is not None:
            x += delta
        out: Tensor = norm(x)
        return out

    def _silu(self, both: Tensor) -> Tensor:
        """Return silu(gate) * up for `both` (N, 2 W), gate and up side by side."""
        if self._products is not None:
            return self._products.silu(both)
        gate, up = both.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def _adding(self, plan: Plan | None, rows: int, width: int) -> _Add:
        """Return what adds a plan's update to a site's outputs: (site, x (N*T, in), y) -> y.

        Few tokens an adapter are memory's work, as in a step of one token; many are arithmetic, for which
        torch's products are better than native ones without matrix tiles.
        """
        if plan is None:
            return lambda _site, _x, y: y
        products = self._products
        few = rows * width <= FEW_TOKENS * plan.num_places
        if products is None or not (products.has_tiles or few):
            return lambda site, x, y: plan.add_site(site, x.view(rows, -1, x.shape[-1]), y)
        entries = plan.entries(width)
        return lambda site, x, y: _plus(y, site, x, entries, products)

    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self._head_product(x, self._head, self.head.bias)
        return logits

    # -- a step of one token a row, by native products -----------------------------------------------

    def _one_token(
        self, products: native.Products, cache: KeyValues, feed: StepInput, plan: Plan | None
    ) -> Tensor:
        rows = len(feed.ids)
        x = self.embed(feed.ids[:, 0])
        step = self._prepared(cache, rows)
        positions = feed.positions
        cos, sin = self.rotary(x.new_empty(0, dtype=torch.float32), positions)
        step.at(positions, cos.contiguous(), sin.contiguous())
        entries = [] if plan is None else plan.entries()
        attended = x.new_empty(rows, self.shape[0] * self.shape[2])
        delta = None
        for layer, block in enumerate(self.blocks):
            keys, values = cache.keys[layer][feed.first :], cache.values[layer][feed.first :]
            own = self._norm(block.norm, x, delta)
            qkv = _plus(block.qkv(own), block.qkv.site, own, entries, products)
            products.attend(step, qkv, keys, values, attended)
            delta = _plus(block.out(attended), block.out.site, attended, entries, products)
            own = self._norm(block.second_norm, x, delta)
            both = _plus(block.gate_up(own), block.gate_up.site, own, entries, products)
            own = products.silu(both)
            delta = _plus(block.down(own), block.down.site, own, entries, products)
        return self._logits(self._norm(self.last_norm, x, delta))

    def _prepared(self, cache: KeyValues, rows: int) -> native.NativeStep:
        key = (cache.length, rows)
        if self._step is None or self._step[0] != key:
            self._step = key, native.NativeStep(self.shape, self.scale, cache.length, rows)
        return self._step[1]


def _mixed(fused: _Fused, x: Tensor, add: _Add) -> Tensor:
    """Return the site's outputs under a plan, x (M, in) -> (M, outs of all members side by side)."""
    return add(fused.site, x, fused(x))


def _plus(
    y: Tensor, site: Site, x: Tensor, entries: Sequence[native.Entries], products: native.Products
) -> Tensor:
    """Return y (N, outs) plus the mixed update of x (N, in)."""
    for own in entries:
        own.add(products, site.name, x, y)
    return y


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (N, heads, T, D) by its positions (RoPE, arXiv 2104.09864); cos and sin are (N, T, D)."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    out: Tensor = x * cos[:, None] + turned * sin[:, None]
    return out
