"""An adapter as files: PEFT's folder format, both ways.

`adapter_config.json` and `adapter_model.safetensors` are what peft, vLLM, LoRAX and SGLang read. Foreign
folders are read strictly: only plain LoRA, only tensors that belong to it, every misfit in one message.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import re
import threading
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load, save

from adapterhub_chat.errors import AdapterError, join_misfits
from adapterhub_chat.weights import AdapterWeights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
KEY = re.compile(r"base_model\.model\.(?P<module>[A-Za-z0-9_.]+)\.lora_(?P<factor>[AB])\.weight")
PLAIN_NAME = re.compile(r"[A-Za-z0-9_.]+")
DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Numbers that a factor may be made of, by their names in a safetensors file."""
MAX_HEADER = 100_000_000
"""Bytes of a safetensors header, as the library bounds them."""
SIZES = "between 0 and a million"

REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "use_dora": (
        (False, None),
        "DoRA rescales the backbone's own weights, so rows cannot be mixed",
    ),
    "bias": (("none", None), "trained biases belong to the backbone"),
    "lora_bias": ((False, None), "a bias beside B is not part of the update B A x"),
    "modules_to_save": ((None, []), "replaced modules would change the backbone for every adapter"),
    "layer_replication": ((None, []), "copied layers make another backbone"),
    "trainable_token_indices": ((None, [], {}), "changed embeddings belong to the backbone"),
    "use_qalora": ((False, None), "QALoRA pools the input and needs its own layer"),
    "arrow_config": ((None,), "an Arrow router is not an adapter"),
    "alora_invocation_tokens": ((None, []), "aLoRA switches on inside a row"),
    "target_parameters": ((None, []), "only linear layers carry adapters here"),
    "use_rslora": ((False, True, None), "it must be true or false"),
    "init_lora_weights": (
        (True, False, None, "gaussian", "orthogonal", "eva", "mica"),
        "this start takes a part out of the backbone's own weights; let PEFT convert the adapter to plain "
        "LoRA with save_pretrained(..., path_initial_model_for_weight_conversion=...)",
    ),
}
"""Setting -> the values that mean plain LoRA, and why any other is refused."""

KNOWN = {
    *REFUSED, "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern",
    # these matter in training, or choose the modules: what came of them is in the tensors
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
"""The settings of plain LoRA. PEFT's next kind of LoRA will have another: it is refused until known."""


def config_of(
    weights: AdapterWeights, base_model: str, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, Any]:
    """Return PEFT's LoraConfig for these weights on a backbone with the given linear layers."""
    ranks = {m: weights.rank(m) for m in weights.factors}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(weights.alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": weights.rslora,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": _target_modules(weights, shapes),
        "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {m: a for m, a in weights.alphas.items() if a != alpha},
    }


def _target_modules(weights: AdapterWeights, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Return last names (`q_proj`) when they say exactly which modules are meant, else full names."""
    last = {m.rpartition(".")[2] for m in weights.factors}
    meant = {m for m in shapes if m.rpartition(".")[2] in last}
    return sorted(last if meant == set(weights.factors) else weights.factors)


def write_weights(path: Path, weights: AdapterWeights) -> None:
    """Write the tensors under PEFT's names."""
    tensors = {}
    for module, (a, b) in weights.factors.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a.clone(memory_format=torch.contiguous_format)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b.clone(memory_format=torch.contiguous_format)
    path.write_bytes(save(tensors, metadata={"format": "pt"}))  # save_file hides the OSError


def read_folder(folder: Path) -> tuple[AdapterWeights, dict[str, Any], str]:
    """Return a folder's weights, its config, and the sha256 of the very bytes that the weights came from.

    Raises AdapterError naming everything that does not fit.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder} is not a folder")
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise AdapterError(
            f"{folder} is no adapter: {' and '.join(missing)} not found"
            " (pickled .bin weights are never opened; save with safetensors)"
        )
    config = _read_config(folder / CONFIG)
    if (kind := config.get("peft_type")) != "LORA":
        raise AdapterError(
            f"{folder} cannot be loaded: its peft_type is {kind!r}; only 'LORA' can be mixed row by row"
        )
    data = _read_bytes(folder / WEIGHTS)
    digest = hashlib.sha256()
    hashing = threading.Thread(target=digest.update, args=(_buffer(data),))  # on another core
    hashing.start()
    try:
        weights = _weights(folder, data, config)
        weights.finite()  # remembered: whoever asks later need not wait
    finally:
        hashing.join()
    return weights, config, digest.hexdigest()


def _weights(folder: Path, data: torch.Tensor, config: Mapping[str, Any]) -> AdapterWeights:
    """Return what the bytes of a weights file say; raise AdapterError for all that is not plain LoRA."""
    tensors, buffer = _tensors(folder / WEIGHTS, data)
    pairs, foreign = _pairs(tensors)
    found = _config_misfits(config) + _pair_misfits(pairs)
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        listed = ", ".join(map(repr, foreign[:3]))
        found.append(f"its weights hold what is not a LoRA factor: {listed}{more}")
    if not found:
        found = _rank_misfits(config, pairs)
    if found:
        raise AdapterError(join_misfits(f"{folder} cannot be loaded", found))
    factors = {m: (pair["A"], pair["B"]) for m, pair in pairs.items()}
    alphas = {
        m: float(_pattern(config.get("alpha_pattern"), m, config["lora_alpha"])) for m in pairs
    }
    return AdapterWeights(factors, alphas, bool(config.get("use_rslora")), buffer)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path} must hold a JSON object, not a {type(config).__name__}")
    return config


def _read_bytes(path: Path) -> torch.Tensor:
    """Return a file's bytes in memory of their own: a mapped file could change, or end, under us."""
    try:
        with path.open("rb") as file:
            data = torch.empty(path.stat().st_size, dtype=torch.uint8)
            return data[: file.readinto(_buffer(data))]
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error


def _buffer(data: torch.Tensor) -> memoryview:
    """Return the memory of a vector of bytes, for calls that do not know torch."""
    array: Any = data.numpy()
    return memoryview(array)


def _tensors(path: Path, data: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Return the tensors of a safetensors file; as views of a vector, and that, where it is simple."""
    start = 8 + int.from_bytes(_buffer(data[:8]), "little")
    if 8 < start <= min(len(data), MAX_HEADER):
        layout = _layout(bytes(_buffer(data[8:start])), len(data) - start)
        if layout is not None and start % layout[0].itemsize == 0:
            dtype, sizes, shapes = layout
            buffer = data[start:].view(dtype)
            parts = zip(shapes.items(), buffer.split(sizes), strict=True)
            return {name: part.view(shape) for (name, shape), part in parts}, buffer
    try:
        return load(bytes(_buffer(data))), None
    except KeyError as error:
        raise AdapterError(f"{path} holds numbers of type {error}, which LoRA has not") from error
    except safetensors.SafetensorError as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error


@lru_cache(maxsize=16)  # the adapters of one backbone mostly have one header
def _layout(
    header: bytes, size: int
) -> tuple[torch.dtype, list[int], dict[str, tuple[int, ...]]] | None:
    """Return dtype, sizes and shapes of the tensors in a safetensors file of `size` bytes of numbers.

    None where it is not quite simple: numbers of one type that a factor may have, every byte in exactly
    one tensor. Such a file is left to the library, which also finds the words for what is wrong with it.
    """
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        (kind,) = {entry["dtype"] for entry in entries.values()}
        dtype, place, sizes, shapes = DTYPES[kind], 0, [], {}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            shapes[name] = shape = tuple(map(operator.index, entry["shape"]))
            sizes.append(math.prod(shape))
            end = place + sizes[-1] * dtype.itemsize
            if entry["data_offsets"] != [place, end] or min(shape) < 1:
                return None
            place = end
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return (dtype, sizes, shapes) if place == size else None


def _config_misfits(config: Mapping[str, Any]) -> list[str]:
    found = [
        f"{setting} = {config[setting]!r} is refused: {why}"
        for setting, (plain, why) in REFUSED.items()
        if config.get(setting) not in plain
    ]
    for setting in sorted(set(config) - KNOWN):
        if config[setting]:  # empty and false mean off in all of PEFT's settings
            found.append(
                f"{setting} = {config[setting]!r} is unknown here and may change what the adapter "
                "computes; if it only concerned training, take it out of the file"
            )
    for setting in ("r", "lora_alpha"):
        if not _is_size(config.get(setting)):
            found.append(f"{setting} = {config.get(setting)!r} must be a number {SIZES}")
    for setting in ("rank_pattern", "alpha_pattern"):
        found += _pattern_misfits(setting, config.get(setting) or {})
    return found


def _pattern_misfits(setting: str, pattern: Any) -> list[str]:
    if not isinstance(pattern, dict):
        return [f"{setting} must be an object, not {pattern!r}"]
    found = []
    for key, value in pattern.items():
        if not PLAIN_NAME.fullmatch(key):
            found.append(f"{setting}: {key!r} is refused: plain module names only")
        elif not _is_size(value):
            found.append(f"{setting}: {key} = {value!r} must be a number {SIZES}")
    return found


def _is_size(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6


def _pairs(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, dict[str, torch.Tensor]], list[str]]:
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    foreign = []
    for key, tensor in tensors.items():
        if match := KEY.fullmatch(key):
            pairs.setdefault(match["module"], {})[match["factor"]] = tensor
        else:
            foreign.append(key)
    return pairs, foreign


def _pair_misfits(pairs: Mapping[str, Mapping[str, torch.Tensor]]) -> list[str]:
    found = [] if pairs else ["there is not one LoRA factor in it"]
    allowed = set(DTYPES.values())
    for module, pair in pairs.items():
        kinds = {str(tensor.dtype) for tensor in pair.values() if tensor.dtype not in allowed}
        if set(pair) != {"A", "B"}:
            found.append(f"{module} has lora_{next(iter(pair))} but not the other factor")
        elif pair["A"].ndim != 2 or pair["B"].ndim != 2:
            found.append(f"{module}: factors must be matrices")
        elif kinds:
            found.append(f"{module}: factors of {' and '.join(sorted(kinds))} are no LoRA factors")
    return found


def _rank_misfits(
    config: Mapping[str, Any], pairs: Mapping[str, Mapping[str, torch.Tensor]]
) -> list[str]:
    found = []
    for module, pair in pairs.items():
        rank = _pattern(config.get("rank_pattern"), module, config["r"])
        if pair["A"].shape[0] != rank or pair["B"].shape[1] != rank:
            shapes = f"A {tuple(pair['A'].shape)}, B {tuple(pair['B'].shape)}"
            found.append(f"{module}: the config says rank {rank}, the tensors are {shapes}")
    return found


def _pattern(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    """Return the value whose key is `module` or ends it at a dot, as PEFT matches its patterns."""
    for key, value in (pattern or {}).items():
        if module == key or module.endswith(f".{key}"):
            return value
    return default
