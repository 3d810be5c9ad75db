"""Writes an adapter as llama.cpp's GGUF file: tensors `blk.N.attn_q.weight.lora_a`, one alpha for all.

llama.cpp stores the rows of q and k of llama models in another order: the two halves of a head, which are
rotated against each other, are interleaved. The rows of B follow the backbone's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from adapterhub_chat.errors import AdapterError
from adapterhub_chat.lora.weights import AdapterWeights

ROTATED: Mapping[str, str] = {
    "q_proj": "num_attention_heads",
    "k_proj": "num_key_value_heads",
}
"""Layer whose rows llama.cpp interleaves -> key of its number of heads in `config.json`."""


def write_gguf(path: Path, weights: AdapterWeights, config: Mapping[str, Any]) -> None:
    """Write the adapter in fp16 for a backbone with this config (its `config.json`).

    Raises AdapterError for an encoder's adapter, and if llama.cpp has no such architecture or layer.
    """
    if weights.head:
        raise AdapterError("llama.cpp's adapters have no head: an encoder's cannot be written")
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if (model_type := str(config.get("model_type"))) not in kinds:
        raise AdapterError(f"llama.cpp has no architecture {model_type!r}: no GGUF can be written")
    names = gguf.get_tensor_name_map(kinds[model_type], int(config["num_hidden_layers"]))
    alpha = Counter(weights.alphas.values()).most_common(1)[0][0]
    writer = gguf.GGUFWriter(path, model_type)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for module, (a, b) in weights.factors.items():
        if (name := names.get_name(module)) is None:
            raise AdapterError(
                f"llama.cpp has no name for the layer {module!r}: no GGUF is written"
            )
        # llama.cpp scales by alpha / rank; the ratio to this layer's scale is multiplied into B
        b = b.float() * (weights.scale(module) * weights.rank(module) / alpha)
        if model_type == "llama" and (key := ROTATED.get(module.rpartition(".")[2])):
            b = interleaved(b, int(config[key]))
        for factor, tensor in (("a", a), ("b", b)):
            writer.add_tensor(f"{name}.weight.lora_{factor}", tensor.to(torch.float16).numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def interleaved(rows: Tensor, num_heads: int) -> Tensor:
    """Return the rows (num_heads * width, ...) with the two halves of each head interleaved."""
    halves = rows.unflatten(0, (num_heads, 2, -1))
    interleaved_rows: Tensor = halves.transpose(1, 2).flatten(0, 2).contiguous()
    return interleaved_rows
