"""FusedDecoder: the Llama family's forward with the linear layers of a site as one product.

In a step of one token a row the native products compute norms, attention and adapters, where they exist.
Legend: N rows, T new tokens of a row, W hidden width, D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapterhub_chat.assets.fetch import cache_dir
from adapterhub_chat.inference.decoder import (
    CacheView,
    Decoder,
    ModuleDecoder,
    StepInput,
    head_shape,
    max_length_of,
)
from adapterhub_chat.inference.kv_cache import KVCache
from adapterhub_chat.inference.stateful_decoder import StatefulDecoder
from adapterhub_chat.lora import native
from adapterhub_chat.lora.plan import Plan, activate
from adapterhub_chat.lora.sites import Site
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.kv_shapes import KVShapes

FUSED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
MAX_REORDERED_BYTES = 2 * 2**30
"""Largest backbone, in bytes, whose weights are copied into the layout of oneDNN's products."""
REORDER_ROWS = 16
"""Batch size for which oneDNN chooses its layout."""
MAX_NATIVE_TOKENS = 128
"""Up to this number of tokens an adapter, native products are faster than torch's."""

_AddUpdate = Callable[[Site, Tensor, Tensor], Tensor]
"""(site, x (N*T, in), y) -> y plus the adapters' update of x."""
_Attend = Callable[["_Block", Tensor], Tensor]
"""(block, qkv) -> the attention's output (N*T, W)."""


def make_decoder(model: AdapterModel, folder: Path | None = None) -> Decoder:
    """Return the fastest decoder for the model's backbone; `folder` holds compiled native products."""
    if _is_fusible(model):
        return FusedDecoder(model, folder or cache_dir() / "native")
    shapes = model.backbone.kv_shapes
    return StatefulDecoder(model) if shapes is None else ModuleDecoder(model, shapes)


def _is_fusible(model: AdapterModel) -> bool:
    backbone: Any = model.backbone.model
    config = backbone.config
    has_window = getattr(config, "sliding_window", None) and getattr(
        config, "use_sliding_window", True
    )
    return (
        type(backbone).__name__ in FUSED_ARCHITECTURES
        and config.hidden_act == "silu"
        and not has_window
        and not model.backbone.length_matters
        and not any("forward" in block.__dict__ for block in backbone.model.layers)
    )


class _FusedLinear:
    """The frozen linear layers of a site, as one product."""

    def __init__(self, site: Site, linears: Sequence[nn.Module], reorder: bool) -> None:
        self.site = site
        self.linears: list[Any] = list(linears)
        self._weight = self._bias = None
        if reorder and all(type(linear) is nn.Linear for linear in linears):
            weight = torch.cat([linear.weight.detach() for linear in self.linears])
            biases = [linear.bias for linear in self.linears]
            if any(bias is not None for bias in biases):
                self._bias = torch.cat(
                    [
                        linear.weight.new_zeros(linear.out_features) if b is None else b.detach()
                        for linear, b in zip(self.linears, biases, strict=True)
                    ]
                )
            self._weight, self._product = _reordered(weight)

    def __call__(self, x: Tensor) -> Tensor:
        """Return W x of all members concatenated, (M, sum of outs), contiguous, for x (M, in)."""
        if self._weight is not None:
            out: Tensor = self._product(x, self._weight, self._bias)
            return out
        with activate(None):  # without adapters, whatever plan the calling thread follows
            outs = [linear(x) for linear in self.linears]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)


def _reordered(weight: Tensor) -> tuple[Tensor, Any]:
    """Return a weight in the layout of oneDNN's products, and the product that takes it.

    On a CPU `functional.linear` of few rows reorders its weight each time: in bf16 half of what 16 rows
    take, in fp32 a third (docs/performance.md). Without oneDNN, or where it refuses the dtype, the weight
    stays as it is and `functional.linear` is returned.
    """
    if weight.device.type != "cpu" or not _can_reorder(weight.dtype):
        return weight, functional.linear
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), REORDER_ROWS)
    return reordered, _onednn_linear


def _can_reorder(dtype: torch.dtype) -> bool:
    """Return whether oneDNN takes a weight of this dtype on this machine; with AVX2 alone it refuses bf16."""
    ops: Any = getattr(torch.ops, "mkldnn", None)
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and bool(ops._is_mkldnn_bf16_supported())
    )


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


class _Block:
    """A decoder block's norms and fused linear layers, in order of use."""

    def __init__(self, model: AdapterModel, block: Any, reorder: bool) -> None:
        sites = {member: site for site in model.sites for member in site.members}
        names = {module: name for name, module in model.backbone.model.named_modules()}
        attention, mlp = block.self_attn, block.mlp

        def fused(*linears: Any) -> _FusedLinear:
            site = sites[names[linears[0]]]
            assert site.members == tuple(names[linear] for linear in linears)
            return _FusedLinear(site, linears, reorder)

        self.norm, self.second_norm = block.input_layernorm, block.post_attention_layernorm
        self.qkv = fused(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = fused(attention.o_proj)
        self.gate_up = fused(mlp.gate_proj, mlp.up_proj)
        self.down = fused(mlp.down_proj)


class FusedDecoder:
    """A Decoder for the Llama family, over fused sites."""

    takes_chunks = True
    recompute_length: int | None = None

    def __init__(self, model: AdapterModel, folder: Path) -> None:
        """Copy the backbone's weights if it is small enough; `folder` holds compiled native products."""
        self.backbone = model.backbone
        language_model: Any = self.backbone.model
        config = language_model.config
        self.max_length = max_length_of(config)
        self.shape = head_shape(config)
        _, kv_heads, head_width = self.shape
        layer = (kv_heads, head_width, head_width)
        self.kv_shapes: KVShapes = [layer] * config.num_hidden_layers
        self.scale = self.shape[2] ** -0.5
        reorder = self.backbone.quantize is None and self.backbone.nbytes <= MAX_REORDERED_BYTES
        self.blocks = [_Block(model, block, reorder) for block in language_model.model.layers]
        self._num_early_blocks = model.num_early_blocks
        self.embed, self.last_norm = language_model.model.embed_tokens, language_model.model.norm
        self.rotary = language_model.model.rotary_emb
        self.head = language_model.get_output_embeddings()
        self._head, self._head_product = self.head.weight.detach(), functional.linear
        if reorder and self.head.bias is None:
            self._head, self._head_product = _reordered(self._head)
        self._folder = folder
        self._native_step: tuple[tuple[int, int], native.NativeStep] | None = None

    def new_cache(self) -> KVCache:
        """See Decoder."""
        return KVCache(self.kv_shapes, self.backbone.dtype, self.backbone.device)

    @cached_property
    def _products(self) -> native.Products | None:
        """The native products; None where they do not exist or do not support the head width."""
        usable = native.available(self.backbone.device, self.backbone.dtype, self._folder)
        if not usable or self.shape[2] > native.MAX_HEAD_WIDTH or self.shape[2] % 2:
            return None
        return native.Products(self.backbone.dtype, self._folder)

    @torch.inference_mode()
    def forward(self, cache: KVCache, inputs: StepInput, plan: Plan | None) -> Tensor:
        """See Decoder."""
        rows, width = inputs.ids.shape
        if width == 1 and self._products is not None:
            return self._forward_one_token(self._products, cache, inputs, plan)
        view = CacheView(cache, inputs)
        mask = view.mask(self.backbone.dtype)
        x = self.embed(inputs.ids).flatten(0, 1)
        cos, sin = self.rotary(x, view.positions)
        add_update = self._update_adder(plan, rows, width)
        delta = None
        for layer, block in enumerate(self.blocks):
            attend = partial(self._attend, cos, sin, mask, partial(view.update, layer=layer))
            delta = self._run_block(block, x, delta, attend, add_update)
        if plan is not None:
            plan.release()
        assert delta is not None
        x, delta = x.index_select(0, inputs.last_tokens), delta.index_select(0, inputs.last_tokens)
        return self._logits(self._norm(self.last_norm, x, delta))

    @torch.inference_mode()
    def early_states(self, ids: Tensor) -> Tensor:
        """See Decoder."""
        rows, width = ids.shape
        x = self.embed(ids).flatten(0, 1)
        positions = torch.arange(width, device=ids.device).expand(rows, width)
        cos, sin = self.rotary(x, positions)
        attend = partial(self._attend, cos, sin, None, lambda k, v: (k, v))
        delta = None
        for block in self.blocks[: self._num_early_blocks]:
            delta = self._run_block(block, x, delta, attend, lambda _site, _x, y: y)
        states: Tensor = x if delta is None else x + delta
        return states.view(rows, width, -1)

    def _run_block(
        self,
        block: _Block,
        x: Tensor,
        delta: Tensor | None,
        attend: _Attend,
        add_update: _AddUpdate,
    ) -> Tensor:
        """Run a block on x + delta (N*T, W): add delta to x in place, return the next delta."""
        qkv = _adapted(block.qkv, self._norm(block.norm, x, delta), add_update)
        delta = _adapted(block.out, attend(block, qkv), add_update)
        gate_up = _adapted(block.gate_up, self._norm(block.second_norm, x, delta), add_update)
        return _adapted(block.down, self._silu(gate_up), add_update)

    def _attend(
        self,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        update_cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        block: _Block,
        qkv: Tensor,
    ) -> Tensor:
        """Return the attention's output (N*T, W).

        `update_cache` takes the new keys and values and returns all of them. Without a mask a token sees
        the tokens before it.
        """
        rows, width = cos.shape[:2]
        q, k, v = (
            part.view(rows, width, -1, self.shape[2]).transpose(1, 2)
            for part in qkv.split(block.qkv.site.out_features, dim=-1)
        )
        keys, values = update_cache(apply_rope(k, cos, sin), v)
        out = functional.scaled_dot_product_attention(
            apply_rope(q, cos, sin),
            keys,
            values,
            mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=True,
        )
        return out.transpose(1, 2).reshape(rows * width, -1)

    def _norm(self, norm: Any, x: Tensor, delta: Tensor | None) -> Tensor:
        """Add `delta` to x (N, W) in place; return the normalized x."""
        if self._products is not None:
            return self._products.norm(x, delta, norm.weight, norm.variance_epsilon)
        if delta is not None:
            x += delta
        out: Tensor = norm(x)
        return out

    def _silu(self, gate_up: Tensor) -> Tensor:
        """Return silu(gate) * up for `gate_up` (N, 2 * inner width), gate and up concatenated."""
        if self._products is not None:
            return self._products.silu(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def _update_adder(self, plan: Plan | None, rows: int, width: int) -> _AddUpdate:
        """Return the function that adds a plan's update to a site's outputs.

        Few tokens an adapter are bound by memory, as in a step of one token; many are bound by arithmetic,
        for which torch's products are better than native ones without matrix tiles.
        """
        if plan is None:
            return lambda _site, _x, y: y
        products = self._products
        few_tokens = rows * width <= MAX_NATIVE_TOKENS * plan.num_places
        if products is None or not (products.has_tiles or few_tokens):
            return lambda site, x, y: plan.add_site(site, x.view(rows, -1, x.shape[-1]), y)
        entries = plan.entries(width)
        return lambda site, x, y: _add_updates(y, site, x, entries, products)

    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self._head_product(x, self._head, self.head.bias)
        return logits

    # -- a step of one token a row, by native products -----------------------------------------------

    def _forward_one_token(
        self, products: native.Products, cache: KVCache, inputs: StepInput, plan: Plan | None
    ) -> Tensor:
        rows = len(inputs.ids)
        x = self.embed(inputs.ids[:, 0])
        step = self._prepared_step(cache, rows)
        positions = inputs.positions
        cos, sin = self.rotary(x.new_empty(0, dtype=torch.float32), positions)
        step.at(positions, cos.contiguous(), sin.contiguous())
        entries = [] if plan is None else plan.entries()
        attended = x.new_empty(rows, self.shape[0] * self.shape[2])
        delta = None
        for layer, block in enumerate(self.blocks):
            keys, values = (
                cache.keys[layer][inputs.first_row :],
                cache.values[layer][inputs.first_row :],
            )
            hidden = self._norm(block.norm, x, delta)
            qkv = _add_updates(block.qkv(hidden), block.qkv.site, hidden, entries, products)
            products.attend(step, qkv, keys, values, attended)
            delta = _add_updates(block.out(attended), block.out.site, attended, entries, products)
            hidden = self._norm(block.second_norm, x, delta)
            gate_up = _add_updates(
                block.gate_up(hidden), block.gate_up.site, hidden, entries, products
            )
            hidden = products.silu(gate_up)
            delta = _add_updates(block.down(hidden), block.down.site, hidden, entries, products)
        return self._logits(self._norm(self.last_norm, x, delta))

    def _prepared_step(self, cache: KVCache, rows: int) -> native.NativeStep:
        key = (cache.capacity, rows)
        if self._native_step is None or self._native_step[0] != key:
            self._native_step = key, native.NativeStep(self.shape, self.scale, cache.capacity, rows)
        return self._native_step[1]


def _adapted(fused: _FusedLinear, x: Tensor, add_update: _AddUpdate) -> Tensor:
    """Return the site's outputs with the adapters' update, x (M, in) -> (M, sum of outs)."""
    return add_update(fused.site, x, fused(x))


def _add_updates(
    y: Tensor, site: Site, x: Tensor, entries: Sequence[native.Entries], products: native.Products
) -> Tensor:
    """Add the update of x (N, in) to y (N, outs) in place and return it."""
    for entry in entries:
        entry.add(products, site.name, x, y)
    return y


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (N, heads, T, D) by its positions (RoPE, arXiv 2104.09864); cos and sin are (N, T, D)."""
    half = x.shape[-1] // 2
    rotated = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    out: Tensor = x * cos[:, None] + rotated * sin[:, None]
    return out
