"""Reference logits: the backbone and adapters in float32, whatever the backbone's dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from adapterhub_chat.data.packing import Batch
from adapterhub_chat.lora.weights import AdapterWeights
from adapterhub_chat.model.adapter_model import AdapterModel

CHUNK_SIZE = 2**24
"""Elements of a weight that are converted to float32 at a time: 64 MB."""
HALF_DTYPES = (torch.bfloat16, torch.float16)


def has_reference(model: AdapterModel) -> bool:
    """Return whether the reference applies: a language model in 16 bits that is not quantized."""
    backbone = model.backbone
    return backbone.dtype in HALF_DTYPES and backbone.quantize is None and not backbone.encodes


def reference_logits(
    model: AdapterModel, batch: Batch, updates: Sequence[tuple[AdapterWeights, float]]
) -> Tensor:
    """Return float32 logits (P, V) of a batch whose first row has the weighted adapters.

    Every product is computed by torch in float32 from the stored weights, a chunk at a time: neither the
    processor's 16-bit instructions nor this project's kernels are used. Other threads are not affected.
    """
    factors_by_weight: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for weights, mix_weight in updates:
        for module, (a, b) in weights.factors.items():
            weight = model.backbone.model.get_submodule(module).weight
            scaled = mix_weight * weights.scale(module) * b.to(weight.device).float()
            factors_by_weight.setdefault(id(weight), []).append(
                (a.to(weight.device).float(), scaled)
            )
    with torch.inference_mode(), _Float32(factors_by_weight):
        return model.answer_logits(batch).float()


class _Float32(TorchFunctionMode):
    """Calls every torch function of this thread with float32 copies of its 16-bit operands."""

    def __init__(self, updates: Mapping[int, list[tuple[Tensor, Tensor]]]) -> None:
        """`updates`: id of a weight -> factors A (r, in) and scaled B (out, r), applied to row 0."""
        super().__init__()
        self._updates = updates

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Return the function's result, in float32."""
        options = kwargs or {}
        if func is functional.embedding:  # a lookup is exact, and its table is large
            return _float32(func(*args, **options))
        if func is functional.linear:
            return self._linear(*args, **options)
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith(
            "__"
        ):  # in place: a copy would receive the change
            return func(*args, **options)
        return func(*tree_map(_float32, args), **tree_map(_float32, options))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        x = _float32(x)
        rows = max(1, CHUNK_SIZE // weight.shape[1])
        y = torch.cat([functional.linear(x, part.float()) for part in weight.split(rows)], -1)
        for a, b in self._updates.get(id(weight), ()):
            y[0] += functional.linear(functional.linear(x[0], a), b)
        return y if bias is None else y + bias.float()


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF_DTYPES else value
