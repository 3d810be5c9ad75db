"""Decoders: new tokens of several rows through the backbone, over a static key-value cache.

`ModuleDecoder` runs transformers' own modules, whatever the architecture. `FusedDecoder` runs the Llama
family itself: the layers of a site as one product, one pass over every weight, and in a step of one token a
row the native products where they exist. Legend: N rows, T new tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapterhub_chat import native
from adapterhub_chat.bank import Site
from adapterhub_chat.cache import Heads, KeyValues, rounded
from adapterhub_chat.lora import Plan, activate
from adapterhub_chat.model import AdapterModel, keeping

FUSED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
COPY_LIMIT = 2 * 2**30
"""Largest backbone, in bytes, whose weights are copied into the order that its products like best."""
PACKED_ROWS = 16
FEW_TOKENS = 128
"""Tokens of an adapter's rows up to which the native products are the faster ones."""

_Add = Callable[[Site, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Feed:
    """New tokens of rows that lie side by side in the cache."""

    first: int
    """Place of the first row."""
    ids: Tensor
    """(N, T); a row's own are its first ones."""
    starts: Sequence[int]
    """How many tokens of each row are in the cache, which must have room for T more."""
    lengths: Sequence[int]
    """How many of each row's T tokens are its own."""

    @property
    def positions(self) -> Tensor:
        """Where every token stands in its row, (N, T)."""
        begin = torch.tensor(self.starts, device=self.ids.device)
        return begin[:, None] + torch.arange(self.ids.shape[1], device=self.ids.device)

    @property
    def last(self) -> Tensor:
        """The flat (row * T + column) place of every row's last own token, (N,)."""
        rows, width = self.ids.shape
        places = torch.arange(rows) * width + torch.tensor(self.lengths) - 1
        return places.to(self.ids.device)


class Decoder(Protocol):
    """What an engine asks of a backbone."""

    heads: Heads
    limit: int
    """The longest row, in tokens."""

    def forward(self, cache: KeyValues, feed: Feed, plan: Plan | None) -> Tensor:
        """Return the logits (N, V) after each row's last new token."""
        ...


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


def _head_shape(config: Any) -> tuple[int, int, int]:
    """Return heads, key-value heads, head width."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def _limit(config: Any) -> int:
    """Return the longest row: what the positions allow, and a sliding window, beyond which all differs."""
    limits = [getattr(config, "max_position_embeddings", None)]
    if getattr(config, "use_sliding_window", True):
        limits.append(getattr(config, "sliding_window", None))
    return min((limit for limit in limits if limit), default=2**31)


class _View:
    """The cache as transformers' modules see it during one forward."""

    def __init__(self, cache: KeyValues, feed: Feed) -> None:
        rows, width = feed.ids.shape
        self.cache, self.positions = cache, feed.positions
        self.seen = min(rounded(max(feed.starts) + width), cache.length)
        self.rows = slice(feed.first, feed.first + rows)
        self.index = torch.arange(rows, device=feed.ids.device)[:, None]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Return the additive mask (N, 1, T, seen): a token sees what stands at its position or before."""
        columns = torch.arange(self.seen, device=self.positions.device)
        hidden = columns > self.positions[:, None, :, None]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return mask.masked_fill_(hidden, torch.finfo(dtype).min)

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values (N, K, T, D); return all of them (N, K, seen, D)."""
        own = self.cache.keys[layer][self.rows], self.cache.values[layer][self.rows]
        for tensor, new in zip(own, (keys, values), strict=True):
            tensor[self.index, :, self.positions] = new.transpose(1, 2)
        return own[0][:, :, : self.seen], own[1][:, :, : self.seen]

    def get_seq_length(self, *_: Any) -> int:
        """Return the length of the longest row; every row has its own positions."""
        return self.seen


class ModuleDecoder:
    """See Decoder: transformers' own modules."""

    def __init__(self, model: AdapterModel) -> None:
        """Prepare for the model's backbone."""
        self.backbone = model.backbone
        config = self.backbone.model.config
        self.limit = _limit(config)
        _, kv_heads, width = _head_shape(config)
        self.heads: Heads = [(kv_heads, width)] * config.num_hidden_layers

    @torch.inference_mode()
    def forward(self, cache: KeyValues, feed: Feed, plan: Plan | None) -> Tensor:
        """See Decoder."""
        view = _View(cache, feed)
        with activate(plan), keeping(feed.last):
            out = self.backbone.model(
                input_ids=feed.ids,
                attention_mask=view.mask(self.backbone.dtype),
                position_ids=view.positions.clamp(max=self.limit - 1),
                use_cache=True,
                **{self.backbone.cache_name: view},
            )
        logits: Tensor = out.logits
        return logits


class _Fused:
    """The frozen products of a site, as one."""

    def __init__(self, site: Site, linears: Sequence[nn.Module], packing: bool) -> None:
        self.site = site
        self._linears: list[Any] = list(linears)
        self._weight = self._bias = None
        plain = all(type(linear) is nn.Linear for linear in linears)
        if plain and packing:
            weight = torch.cat([linear.weight.detach() for linear in self._linears])
            biases = [linear.bias for linear in self._linears]
            if any(bias is not None for bias in biases):
                self._bias = torch.cat(
                    [
                        linear.weight.new_zeros(linear.out_features) if b is None else b.detach()
                        for linear, b in zip(self._linears, biases, strict=True)
                    ]
                )
            self._weight, self._product = _packed(weight)

    def __call__(self, x: Tensor) -> Tensor:
        """Return W x of all members side by side, (M, sum of outs), contiguous."""
        if self._weight is not None:
            out: Tensor = self._product(x, self._weight, self._bias)
            return out
        # no plan is active: these are the layers' own products
        outs = [linear(x) for linear in self._linears]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)


def _packed(weight: Tensor) -> tuple[Tensor, Any]:
    """Return a weight in the order that oneDNN's products like best, and the product that takes it.

    In bf16 on a CPU a plain product orders its weight anew each time: for 16 rows that is half its time.
    """
    ops = getattr(torch.ops, "mkldnn", None)
    if (
        weight.device.type != "cpu"
        or weight.dtype != torch.bfloat16
        or not hasattr(ops, "_linear_pointwise")
    ):
        return weight, functional.linear
    ordered = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_ROWS)
    return ordered, _onednn


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
        self.limit = _limit(config)
        self.shape = _head_shape(config)
        self.heads: Heads = [self.shape[1:]] * config.num_hidden_layers
        self.scale = self.shape[2] ** -0.5
        packing = self.backbone.quantize is None and self.backbone.nbytes <= COPY_LIMIT
        self.blocks = [_Block(model, block, packing) for block in whole.model.layers]
        self._embed, self._last_norm = whole.model.embed_tokens, whole.model.norm
        self._rotary = whole.model.rotary_emb
        head = whole.get_output_embeddings()
        self._head, self._head_product = head.weight.detach(), functional.linear
        if packing and head.bias is None:
            self._head, self._head_product = _packed(self._head)
        self._head_bias = head.bias
        self._folder = folder
        self._step: tuple[tuple[int, int], native.Step] | None = None
        self._entries: tuple[Plan, list[native.Entries]] | None = None

    @cached_property
    def _products(self) -> native.Products | None:
        """The native products, where they exist and fit."""
        usable = native.available(self.backbone.device, self.backbone.dtype, self._folder)
        if not usable or self.shape[2] > native.WIDEST_HEAD or self.shape[2] % 2:
            return None
        return native.Products(self.backbone.dtype, self._folder)

    @torch.inference_mode()
    def forward(self, cache: KeyValues, feed: Feed, plan: Plan | None) -> Tensor:
        """See Decoder."""
        rows, width = feed.ids.shape
        if width == 1 and self._products is not None:
            return self._one_token(self._products, cache, feed, plan)
        view = _View(cache, feed)
        mask = view.mask(self.backbone.dtype)
        x = self._embed(feed.ids).flatten(0, 1)
        cos, sin = self._rotary(x, view.positions)
        add = self._adding(plan, rows, width)
        delta = None
        for layer, block in enumerate(self.blocks):
            qkv = _mixed(block.qkv, self._norm(block.norm, x, delta), add)
            q, k, v = (
                part.view(rows, width, -1, self.shape[2]).transpose(1, 2)
                for part in qkv.split(block.qkv.site.out_features, dim=-1)
            )
            keys, values = view.update(_rotated(k, cos, sin), v, layer)
            out = functional.scaled_dot_product_attention(
                _rotated(q, cos, sin), keys, values, mask, scale=self.scale, enable_gqa=True
            )
            delta = _mixed(block.out, out.transpose(1, 2).reshape(rows * width, -1), add)
            both = _mixed(block.gate_up, self._norm(block.second_norm, x, delta), add)
            delta = _mixed(block.down, self._silu(both), add)
        if plan is not None:
            plan.release()
        assert delta is not None
        x, delta = x.index_select(0, feed.last), delta.index_select(0, feed.last)
        return self._logits(self._norm(self._last_norm, x, delta))

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
        logits: Tensor = self._head_product(x, self._head, self._head_bias)
        return logits

    # -- a step of one token a row, by native products -----------------------------------------------

    def _one_token(
        self, products: native.Products, cache: KeyValues, feed: Feed, plan: Plan | None
    ) -> Tensor:
        rows = len(feed.ids)
        x = self._embed(feed.ids[:, 0])
        step = self._prepared(cache, rows)
        positions = feed.positions
        cos, sin = self._rotary(x.new_empty(0, dtype=torch.float32), positions)
        step.at(positions, cos.contiguous(), sin.contiguous())
        entries = self._entries_of(plan)
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
        return self._logits(self._norm(self._last_norm, x, delta))

    def _prepared(self, cache: KeyValues, rows: int) -> native.Step:
        key = (cache.length, rows)
        if self._step is None or self._step[0] != key:
            self._step = key, native.Step(self.shape, self.scale, cache.length, rows)
        return self._step[1]

    def _entries_of(self, plan: Plan | None) -> list[native.Entries]:
        if plan is None:
            return []
        if self._entries is None or self._entries[0] is not plan:
            self._entries = plan, plan.entries()
        return self._entries[1]


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


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (N, heads, T, D) by its positions (RoPE, arXiv 2104.09864); cos and sin are (N, T, D)."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    out: Tensor = x * cos[:, None] + turned * sin[:, None]
    return out
