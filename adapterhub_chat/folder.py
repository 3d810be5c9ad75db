"""An adapter as files: PEFT's folder format, both ways.

`adapter_config.json` and `adapter_model.safetensors` are what peft, vLLM, LoRAX and SGLang read. Foreign
folders are read strictly: only plain LoRA, only tensors that belong to it, every misfit in one message.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from adapterhub_chat.errors import AdapterError
from adapterhub_chat.guard import CONFIG_BYTES, ITEM_BYTES, WEIGHTS_BYTES, Checked, Layers, check
from adapterhub_chat.lora_config import pattern_value, plain_config
from adapterhub_chat.strict import read_regular
from adapterhub_chat.weights import AdapterWeights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""The guard's names of what a factor may be made of."""


def config_of(
    weights: AdapterWeights, base_model: str, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, Any]:
    """Return PEFT's LoraConfig for these weights on a backbone with the given linear layers."""
    ranks = {m: weights.rank(m) for m in weights.factors}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(weights.alphas.values()).most_common(1)[0][0]
    return plain_config(
        rank=rank,
        alpha=alpha,
        targets=_target_modules(weights, shapes),
        base_model=base_model,
        rslora=weights.rslora,
        ranks={m: r for m, r in ranks.items() if r != rank},
        alphas={m: a for m, a in weights.alphas.items() if a != alpha},
    )


def _target_modules(weights: AdapterWeights, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Return last names (`q_proj`) when they say exactly which modules are meant, else full names."""
    last = {m.rpartition(".")[2] for m in weights.factors}
    meant = {m for m in shapes if m.rpartition(".")[2] in last}
    return sorted(last if meant == set(weights.factors) else weights.factors)


def write_weights(path: Path, weights: AdapterWeights) -> None:
    """Write the tensors under PEFT's names."""
    tensors = {}
    for module, (a, b) in weights.factors.items():
        tensors[f"{PREFIX}{module}{A}"] = a.clone(memory_format=torch.contiguous_format)
        tensors[f"{PREFIX}{module}{B}"] = b.clone(memory_format=torch.contiguous_format)
    path.write_bytes(save(tensors, metadata={"format": "pt"}))  # save_file hides the OSError


def read_folder(
    folder: Path, layers: Layers | None = None
) -> tuple[AdapterWeights, dict[str, Any], str]:
    """Return a folder's weights, its config, and the sha256 of the very bytes that the weights came from.

    The config is written anew from what the guard understood of it. With a backbone's `layers`, a
    stranger's numbers are held to those before they become tensors. Raises AdapterError naming everything
    that does not fit.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder} is not a folder")
    missing = [name for name in (CONFIG, WEIGHTS) if not os.path.lexists(folder / name)]
    if missing:
        raise AdapterError(
            f"{folder} is no adapter: {' and '.join(missing)} not found"
            " (pickled .bin weights are never opened; save with safetensors)"
        )
    config = read_regular(folder / CONFIG, CONFIG_BYTES)
    data = read_regular(folder / WEIGHTS, WEIGHTS_BYTES, _room)
    digest = hashlib.sha256()
    hashing = threading.Thread(target=digest.update, args=(data,))  # on another core
    hashing.start()
    try:
        checked = check(folder, config, data, layers)
        weights = _weights(torch.frombuffer(data, dtype=torch.uint8), checked)
    finally:
        hashing.join()
    weights.finite()  # remembered: whoever asks later need not wait; torch needs both cores for it
    return weights, checked.config, digest.hexdigest()


def _weights(data: torch.Tensor, checked: Checked) -> AdapterWeights:
    """Return the tensors that a checked file holds, as views of its bytes wherever those are aligned."""
    tensors, buffer = _tensors(data[checked.start :], checked)
    config = checked.config
    modules = [key.removeprefix(PREFIX)[: -len(A)] for key in tensors if key.endswith(A)]
    factors = {m: (tensors[f"{PREFIX}{m}{A}"], tensors[f"{PREFIX}{m}{B}"]) for m in modules}
    alphas = {
        m: float(pattern_value(config["alpha_pattern"], m, config["lora_alpha"])) for m in factors
    }
    return AdapterWeights(factors, alphas, config["use_rslora"], buffer)


def _tensors(
    data: torch.Tensor, checked: Checked
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Return the tensors; and the vector whose views they are, where all numbers are of one type."""
    kinds = {tensor.dtype for tensor in checked.tensors.values()}
    order = sorted(checked.tensors.items(), key=lambda item: item[1].begin)
    if len(kinds) == 1 and checked.start % ITEM_BYTES[kind := kinds.pop()] == 0:
        buffer = data.view(DTYPES[kind])
        parts = buffer.split([math.prod(tensor.shape) for _, tensor in order])
        return {n: p.view(t.shape) for (n, t), p in zip(order, parts, strict=True)}, buffer
    found = {}
    for name, tensor in order:
        own = data[tensor.begin : tensor.end].clone()
        found[name] = own.view(DTYPES[tensor.dtype]).view(tensor.shape)
    return found, None


def _room(size: int) -> memoryview:
    """Return memory that is not cleared first."""
    array: Any = torch.empty(size, dtype=torch.uint8).numpy()
    return memoryview(array)
