"""Linear layers that bitsandbytes keeps in 4 or 8 bits: their weights, and the rounding."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from adapterhub_chat.errors import UsageError

NF4, INT8 = "nf4", "int8"


def keep_gradients(model: nn.Module) -> None:
    """Switch off bitsandbytes' packed CPU weights, which drop the gradient after one eval forward.

    bitsandbytes 0.50's Linear4bit repacks itself for AVX512-BF16 in its first eval forward; from then on
    its product has no autograd. The flag must be set before that.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


def dense(linear: Any) -> Tensor:
    """Return the weight (out, in) of a linear layer, dequantized to float32 if it is quantized."""
    weight: Tensor = linear.weight.detach()
    if hasattr(linear.weight, "quant_state"):
        unpacked: Tensor = _functional().dequantize_4bit(weight, linear.weight.quant_state)
        return unpacked.float()
    if hasattr(linear.weight, "SCB"):
        scales: Tensor = linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB
        return weight.float() * (scales.float()[:, None] / 127)
    return weight


def rounded(weight: Tensor, quantize: str) -> Tensor:
    """Return a weight (out, in) quantized and dequantized again, in its dtype."""
    if quantize == INT8:
        scales = weight.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
        return ((weight.float() / scales).round() * scales).to(weight.dtype)
    packed, state = _functional().quantize_4bit(weight, quant_type=NF4, compress_statistics=True)
    out: Tensor = _functional().dequantize_4bit(packed, state).to(weight.dtype)
    return out


def _functional() -> Any:
    return importlib.import_module("bitsandbytes.functional")


def stored_quantization(name: str, config: Any) -> str | None:
    """Return how a folder's weights are packed, by its configuration: "nf4", "int8" or None.

    Raises UsageError for a packing that is not supported.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    values = settings if isinstance(settings, dict) else settings.to_dict()
    if values.get("load_in_8bit"):
        return "int8"
    if values.get("load_in_4bit") and values.get("bnb_4bit_quant_type") == "nf4":
        return "nf4"
    method = values.get("bnb_4bit_quant_type") or values.get("quant_method") or "an unknown method"
    raise UsageError(
        f"{name} is packed by {method}; allowed are bitsandbytes' nf4 and int8, or no packing"
    )
