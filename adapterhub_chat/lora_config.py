"""PEFT's LoraConfig: the few settings that plain LoRA has, read strictly, and written in one form.

Names are compared, never matched as patterns; what is not understood must be off.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from adapterhub_chat.strict import SHOWN, shown

MOST_MODULES, MOST_RANK, MOST_ALPHA = 50_000, 1024, 1e6
NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
TASK_TYPES = (
    None,
    "CAUSAL_LM",
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)

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
    "fan_in_fan_out": ((False, True, None), "it must be true or false"),
    "init_lora_weights": (
        (True, False, None, "gaussian", "orthogonal", "eva", "mica"),
        "this start takes a part out of the backbone's own weights; let PEFT convert the adapter to plain "
        "LoRA with save_pretrained(..., path_initial_model_for_weight_conversion=...)",
    ),
    "task_type": (TASK_TYPES, f"allowed are {', '.join(map(str, TASK_TYPES[1:]))}"),
}
"""Setting -> the values that mean plain LoRA, and why any other is refused."""

OF_TRAINING = {
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config",
}  # fmt: skip
"""Settings that mattered when the adapter was trained: they are not handed on."""
NARROWING = ("exclude_modules", "layers_pattern", "layers_to_transform")
"""Settings that choose among the targets: what came of them is in the tensors."""
KNOWN = {
    *REFUSED, *OF_TRAINING, *NARROWING,
    "peft_type", "base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern",
    "target_modules",
}  # fmt: skip
"""The settings of plain LoRA. PEFT's next kind of LoRA will have another: it is refused until known."""


def plain_config(
    *,
    rank: int,
    alpha: float,
    targets: Collection[str],
    base_model: str | None = None,
    task_type: str | None = "CAUSAL_LM",
    rslora: bool = False,
    fan_in_fan_out: bool = False,
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return PEFT's LoraConfig for plain LoRA: the one form in which configs are written here."""
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": rslora,
        "use_dora": False,
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": sorted(targets),
        "rank_pattern": dict(ranks or {}),
        "alpha_pattern": {module: _whole(value) for module, value in (alphas or {}).items()},
    }


def pattern_value(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    """Return the value whose key is `module` or ends it at a dot, as PEFT matches its patterns."""
    for key, value in (pattern or {}).items():
        if module == key or module.endswith(f".{key}"):
            return value
    return default


def missing_targets(
    config: Mapping[str, Any], modules: Collection[str], known: Collection[str]
) -> list[str]:
    """Return the layers of a backbone that a config names as targets and that have no factors."""
    targets = config.get("target_modules") or []
    meant = {m for m in known if any(m == t or m.endswith(f".{t}") for t in targets)}
    return sorted(meant - set(modules))


def config_misfits(settings: Mapping[str, Any]) -> list[str]:
    """Return why a config is not that of plain LoRA."""
    found = [
        f"{setting} = {shown(settings[setting])} is refused: {why}"
        for setting, (plain, why) in REFUSED.items()
        if not _is_one_of(settings.get(setting), plain)
    ]
    for setting in sorted(set(settings) - KNOWN):
        if settings[setting]:  # empty and false mean off in all of PEFT's settings
            found.append(
                f"{setting[:80]!r} = {shown(settings[setting])} is unknown here and may change what the "
                "adapter computes; if it only concerned training, take it out of the file"
            )
    found += _size_misfits("r", settings.get("r"), whole=True)
    found += _size_misfits("lora_alpha", settings.get("lora_alpha"))
    for setting, whole in (("rank_pattern", True), ("alpha_pattern", False)):
        found += _pattern_misfits(setting, settings.get(setting) or {}, whole)
    found += _target_misfits(settings.get("target_modules"))
    found += [
        f"{setting} = {shown(value)} is refused: PEFT reads a text as a pattern; give a list of names"
        for setting in NARROWING[:1]
        if isinstance(value := settings.get(setting), str) and value
    ]
    base = settings.get("base_model_name_or_path")
    if base is not None and not (isinstance(base, str) and len(base) <= 500 and base.isprintable()):
        found.append("base_model_name_or_path must be a name of at most 500 printable characters")
    return found


def _target_misfits(targets: Any) -> list[str]:
    if targets is None or targets == "all-linear":
        return []
    if isinstance(targets, str):
        return [
            f"target_modules = {shown(targets)} is refused: PEFT reads a text as a regular expression; give "
            "a list of plain module names, or 'all-linear'"
        ]
    if not isinstance(targets, list) or len(targets) > MOST_MODULES:
        return [f"target_modules must be a list of module names, not {shown(targets)}"]
    wrong = [t for t in targets if not (isinstance(t, str) and len(t) <= 500 and NAME.fullmatch(t))]
    return [
        f"target_modules: {shown(t)} is refused: plain module names only" for t in wrong[:SHOWN]
    ]


def _pattern_misfits(setting: str, pattern: Any, whole: bool) -> list[str]:
    if not isinstance(pattern, dict):
        return [f"{setting} must be an object, not {shown(pattern)}"]
    found = []
    for key, value in pattern.items():
        if len(key) > 500 or not NAME.fullmatch(key):
            found.append(f"{setting}: {shown(key)} is refused: plain module names only")
        else:
            found += _size_misfits(f"{setting}: {key}", value, whole=whole)
    return found[: 4 * SHOWN]


def _size_misfits(what: str, value: Any, *, whole: bool = False) -> list[str]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if whole and not (number and isinstance(value, int) and 1 <= value <= MOST_RANK):
        return [f"{what} = {shown(value)} must be a whole number between 1 and {MOST_RANK}"]
    if not (number and 0 < value < MOST_ALPHA):
        return [f"{what} = {shown(value)} must be a number between 0 and a million"]
    return []


def rebuilt(settings: Mapping[str, Any], pairs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config of the checked values alone."""
    targets = settings.get("target_modules")
    chosen = isinstance(targets, list) and not any(settings.get(name) for name in NARROWING)
    return plain_config(
        rank=settings["r"],
        alpha=settings["lora_alpha"],
        targets=set(targets) if chosen and isinstance(targets, list) else pairs,
        base_model=settings.get("base_model_name_or_path"),
        task_type=settings.get("task_type"),
        rslora=bool(settings.get("use_rslora")),
        fan_in_fan_out=bool(settings.get("fan_in_fan_out")),
        ranks=settings.get("rank_pattern"),
        alphas=settings.get("alpha_pattern"),
    )


def _is_one_of(value: Any, allowed: Collection[Any]) -> bool:
    """Return whether a value is one of these and of its type: 0 is not False."""
    return any(type(value) is type(one) and value == one for one in allowed)


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value
