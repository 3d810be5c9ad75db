"""An adapter as files: PEFT's folder format, both ways.

`adapter_config.json` and `adapter_model.safetensors` are what peft, vLLM, LoRAX and SGLang read. Foreign
folders are read strictly: only plain LoRA, only tensors that belong to it, every misfit in one message.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file

from adapterhub_chat.errors import AdapterError, join_misfits
from adapterhub_chat.weights import AdapterWeights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
KEY = re.compile(r"base_model\.model\.(?P<module>[A-Za-z0-9_.]+)\.lora_(?P<factor>[AB])\.weight")
PLAIN_NAME = re.compile(r"[A-Za-z0-9_.]+")

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
    "corda_config": ((None,), "CorDA changes the backbone's weights on load"),
    "eva_config": ((None,), "EVA initialises from data; convert the adapter to plain LoRA first"),
    "loftq_config": ((None, {}), "LoftQ changes the backbone's weights on load"),
    "arrow_config": ((None,), "an Arrow router is not an adapter"),
    "alora_invocation_tokens": ((None, []), "aLoRA switches on inside a row"),
    "target_parameters": ((None, []), "only linear layers carry adapters here"),
}
"""Setting -> the values that mean plain LoRA, and why any other is refused."""


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
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b.contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def read_folder(folder: Path) -> tuple[AdapterWeights, dict[str, Any]]:
    """Return a folder's weights and its config; raise AdapterError naming everything that does not fit."""
    if not folder.is_dir():
        raise AdapterError(f"{folder} is not a folder")
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise AdapterError(
            f"{folder} is no adapter: {' and '.join(missing)} not found"
            " (pickled .bin weights are never opened; save with safetensors)"
        )
    config = _read_config(folder / CONFIG)
    found = _config_misfits(config)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (safetensors.SafetensorError, OSError) as error:
        raise AdapterError(f"{folder / WEIGHTS} cannot be read: {error}") from error
    pairs, foreign = _pairs(tensors)
    found += [f"tensor {key!r} is not a LoRA factor" for key in foreign]
    found += _pair_misfits(pairs)
    if not found:
        found += _rank_misfits(config, pairs)
    if found:
        raise AdapterError(join_misfits(f"{folder} cannot be loaded", found))
    factors = {m: (pair["A"], pair["B"]) for m, pair in pairs.items()}
    alphas = {
        m: float(_pattern(config.get("alpha_pattern"), m, config["lora_alpha"])) for m in pairs
    }
    return AdapterWeights(factors, alphas, bool(config.get("use_rslora"))), config


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path} must hold a JSON object, not a {type(config).__name__}")
    return config


def _config_misfits(config: Mapping[str, Any]) -> list[str]:
    found = []
    kind = config.get("peft_type")
    if kind != "LORA":
        found.append(f"peft_type is {kind!r}; only 'LORA' can be mixed row by row")
    for setting, (plain, why) in REFUSED.items():
        if config.get(setting) not in plain:
            found.append(f"{setting} = {config[setting]!r} is refused: {why}")
    for setting in ("r", "lora_alpha"):
        value = config.get(setting)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
            found.append(f"{setting} = {value!r} must be a number between 0 and a million")
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
        elif isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            found.append(f"{setting}: {key} = {value!r} must be a positive number")
    return found


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
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            found.append(f"{module} has lora_{next(iter(pair))} but not the other factor")
        elif pair["A"].ndim != 2 or pair["B"].ndim != 2:
            found.append(f"{module}: factors must be matrices")
        elif not (pair["A"].is_floating_point() and pair["B"].is_floating_point()):
            found.append(f"{module}: factors must be floating point, not {pair['A'].dtype}")
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
