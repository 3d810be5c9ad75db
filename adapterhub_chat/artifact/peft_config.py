"""`adapter_config.json`: writes PEFT's LoraConfig for plain LoRA, and validates untrusted ones.

An untrusted config is checked field by field and rebuilt from the validated fields. Texts that PEFT would use
as regular expressions are never compiled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from adapterhub_chat.artifact.untrusted import short_repr
from adapterhub_chat.types import HEAD

CONFIG = "adapter_config.json"
MAX_RANK = 1024
"""Usual ranks are at most 256. Not bounded by a layer's sizes: a sum of adapters may have a larger rank."""
MODULE_NAME = r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+){0,15}"
"""Regular expression of a module's name, or of its last parts."""
PLAIN_NAME, NAME_PART = re.compile(MODULE_NAME), re.compile("[A-Za-z0-9_]+")
ALL_LINEAR = "all-linear"
MAX_PATTERN = 10_000
"""Characters of a text in target_modules: Unsloth writes regular expressions of some hundred."""
LIBRARY = re.compile(r"transformers(_modules)?(\.[A-Za-z0-9_]+)*")

# ---- allowed values of settings ------------------------------------------------------------------


def _one_of(*values: Any) -> Callable[[Any], bool]:
    """Return a predicate for these values, compared by type too: 0 is not False."""
    return lambda value: any(type(value) is type(v) and value == v for v in values)


def _is_off(value: Any) -> bool:
    """Return whether an unsupported setting is switched off."""
    return value is None or value is False or value in ("", [], {})


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e6


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_index(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1e6


def _is_text(value: Any) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= 1000 and value.isprintable())


def _is_name_list(value: Any, pattern: re.Pattern[str] = PLAIN_NAME) -> bool:
    return isinstance(value, list) and all(
        isinstance(name, str) and pattern.fullmatch(name) for name in value
    )


def _is_auto_mapping(value: Any) -> bool:
    """Return whether a value is PEFT's `auto_mapping` (the backbone's class), which is ignored here."""
    return value is None or (
        isinstance(value, dict)
        and set(value) <= {"base_model_class", "parent_library", "unsloth_fixed"}
        and isinstance(value.get("unsloth_fixed", True), bool)
        and LIBRARY.fullmatch(str(value.get("parent_library", "transformers"))) is not None
        and NAME_PART.fullmatch(str(value.get("base_model_class", "Model"))) is not None
    )


def _is_target_modules(value: Any) -> bool:
    """Return whether a value is all-linear, a list of names, or a text, which is never matched."""
    if isinstance(value, str):
        return 0 < len(value) <= MAX_PATTERN
    return _is_name_list(value) and bool(value)


def _is_modules_to_save(value: Any) -> bool:
    """Return whether `modules_to_save` is off or the classification head, as PEFT writes it."""
    return _is_off(value) or (
        isinstance(value, list) and HEAD in value and set(value) <= {HEAD, "score"}
    )


_CHOICE = _one_of(True, False, None)
_TRAINING = (
    lambda value: value is None or isinstance(value, dict),
    "it must be an object: it only matters in training",
)
_SWITCH = (_CHOICE, "it must be true or false")
_TEXT = (_is_text, "it must be a text of at most 1000 printable characters")
_PLAIN_LIST = "it must be a list of plain module names; regular expressions are never matched"

PEFT_SETTINGS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    # settings that change the equation
    "use_dora": (_is_off, "DoRA rescales the backbone's own weights, so rows cannot be mixed"),
    "bias": (_one_of("none", None), "trained biases belong to the backbone"),
    "lora_bias": (_is_off, "a bias beside B is not part of the update B A x"),
    "modules_to_save": (
        _is_modules_to_save,
        f"replaced modules would change the backbone for every adapter; only a head, ['{HEAD}'], comes along",
    ),
    "layer_replication": (_is_off, "copied layers make another backbone"),
    "trainable_token_indices": (_is_off, "changed embeddings belong to the backbone"),
    "use_qalora": (_is_off, "QALoRA pools the input and needs its own layer"),
    "arrow_config": (_is_off, "an Arrow router is not an adapter"),
    "alora_invocation_tokens": (_is_off, "aLoRA switches on inside a row"),
    "target_parameters": (
        _is_off,
        "it adapts the experts of a mixture of experts, and only linear layers carry adapters here: train it "
        "without them, or merge it with PEFT and use the result as the backbone",
    ),
    "megatron_config": (_is_off, "Megatron's layers are not the backbone's"),
    "megatron_core": (_one_of(None, "megatron.core"), "Megatron's layers are not the backbone's"),
    "init_lora_weights": (
        _one_of(True, False, None, "gaussian", "orthogonal", "eva", "mica"),
        "this start takes a part out of the backbone's own weights; let PEFT convert the adapter to plain "
        "LoRA with save_pretrained(..., path_initial_model_for_weight_conversion=...)",
    ),
    # parameters of the equation
    "r": (_is_rank, f"it must be a whole number from 1 to {MAX_RANK}"),
    "lora_alpha": (_is_number, "it must be a number between 0 and a million"),
    "use_rslora": _SWITCH,
    # targeted modules
    "target_modules": (
        _is_target_modules,
        f"it must be {ALL_LINEAR!r} or a list of plain module names, such as ['q_proj', 'v_proj']; of another"
        f" text, at most {MAX_PATTERN} characters, the modules are taken from the weights",
    ),
    "exclude_modules": (lambda value: _is_off(value) or _is_name_list(value), _PLAIN_LIST),
    "layers_to_transform": (
        lambda v: v is None or _is_index(v) or (isinstance(v, list) and all(map(_is_index, v))),
        "it must be a list of layer numbers",
    ),
    "layers_pattern": (
        lambda value: (
            _is_off(value) or _is_name_list([value] if isinstance(value, str) else value, NAME_PART)
        ),
        _PLAIN_LIST,
    ),
    # metadata
    "task_type": (
        _one_of("CAUSAL_LM", "SEQ_CLS", None),
        "only 'CAUSAL_LM' and, with a head on an encoder, 'SEQ_CLS' are served here",
    ),
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
    "peft_version": _TEXT,
    "auto_mapping": (_is_auto_mapping, "it must name a class of transformers"),
    # settings that only matter in training
    "lora_dropout": (
        lambda v: v is None or (type(v) in (int, float) and 0 <= v <= 1),
        "it must be a number from 0 to 1",
    ),
    "inference_mode": _SWITCH,
    "fan_in_fan_out": _SWITCH,
    "ensure_weight_tying": _SWITCH,
    "qalora_group_size": (lambda v: v is None or _is_index(v), "it must be a whole number"),
    "corda_config": _TRAINING,
    "eva_config": _TRAINING,
    "lora_ga_config": _TRAINING,
    "loftq_config": _TRAINING,
    "runtime_config": _TRAINING,
}
"""Setting of plain LoRA -> predicate of allowed values, and the reason for a refusal.

Unknown settings, as of future LoRA variants in PEFT, are refused unless they are off.
"""

PATTERNS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "rank_pattern": PEFT_SETTINGS["r"],
    "alpha_pattern": PEFT_SETTINGS["lora_alpha"],
}
"""Setting with values by module -> predicate of allowed values, and the reason for a refusal."""


def config_misfits(config: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each setting of an untrusted config that is not plain LoRA."""
    if (kind := config.get("peft_type")) != "LORA":
        return [f"its peft_type is {short_repr(kind)}; only 'LORA' can be mixed row by row"]
    misfits = [
        f"{setting} = {short_repr(config.get(setting))} is refused: {why}"
        for setting, (fits, why) in PEFT_SETTINGS.items()
        if not fits(config.get(setting))
    ]
    for setting, (fits, why) in PATTERNS.items():
        misfits += _pattern_misfits(setting, config.get(setting), fits, why)
    for setting in sorted(config.keys() - PEFT_SETTINGS.keys() - PATTERNS.keys() - {"peft_type"}):
        if not _is_off(config[setting]):
            misfits.append(
                f"{short_repr(setting)} = {short_repr(config[setting])} is unknown here and may change what "
                "the adapter computes; if it only concerned training, take it out of the file"
            )
    return misfits or _choice_misfits(config)


def _pattern_misfits(
    setting: str, pattern: Any, fits: Callable[[Any], bool], why: str
) -> list[str]:
    if _is_off(pattern):
        return []
    if not isinstance(pattern, dict):
        return [f"{setting} must be an object, not {short_repr(pattern)}"]
    misfits = []
    for key, value in pattern.items():
        if not PLAIN_NAME.fullmatch(key):
            misfits.append(f"{setting}: {short_repr(key)} is refused: plain module names only")
        elif not fits(value):
            misfits.append(f"{setting}: {key} = {short_repr(value)} is refused: {why}")
    return misfits


def _choice_misfits(config: Mapping[str, Any]) -> list[str]:
    """Return misfits between settings: task type and head, or layers without a list of targets."""
    if (config.get("task_type") == "SEQ_CLS") != (not _is_off(config.get("modules_to_save"))):
        return [
            f"task_type 'SEQ_CLS' and modules_to_save ['{HEAD}'] go together: an encoder's adapter and its "
            "head"
        ]
    layer_settings = [
        s for s in ("layers_to_transform", "layers_pattern") if not _is_off(config.get(s))
    ]
    if layer_settings and isinstance(config["target_modules"], str):
        return [
            f"{' and '.join(layer_settings)}: only a list of target_modules can be narrowed by layers"
        ]
    if layer_settings == ["layers_pattern"]:
        return ["layers_pattern says where layers are numbered, and layers_to_transform names none"]
    return []


# ---- the rebuilt config --------------------------------------------------------------------------


def plain_config(
    *,
    base_model: str | None,
    rank: int,
    alpha: float,
    rslora: bool,
    targets: Sequence[str] | str,
    narrowed: Mapping[str, list[Any]] | None = None,
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
    head: bool = False,
) -> dict[str, Any]:
    """Return PEFT's LoraConfig for plain LoRA with these values."""
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if head else "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": rslora,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": [HEAD] if head else None,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        **(narrowed or {}),
        "rank_pattern": dict(ranks or {}),
        "alpha_pattern": dict(alphas or {}),
    }


def rebuild_config(config: Mapping[str, Any], modules: Iterable[str] = ()) -> dict[str, Any]:
    """Return a config that is rebuilt from the supported fields of a checked one.

    A text in target_modules is a regular expression to PEFT. None is matched here: the targets are then the
    `modules` that the weights hold.
    """
    targets = config["target_modules"]
    if isinstance(targets, str) and targets.lower() != ALL_LINEAR:
        targets = list(modules)
    settings = ("exclude_modules", "layers_to_transform", "layers_pattern")
    narrowed = {key: config[key] for key in settings if not _is_off(config.get(key))}
    return plain_config(
        base_model=config.get("base_model_name_or_path"),
        rank=config["r"],
        alpha=config["lora_alpha"],
        rslora=bool(config.get("use_rslora")),
        targets=ALL_LINEAR if isinstance(targets, str) else list(dict.fromkeys(targets)),
        narrowed={k: list(v) if isinstance(v, list) else [v] for k, v in narrowed.items()},
        ranks=config.get("rank_pattern"),
        alphas=config.get("alpha_pattern"),
        head=config.get("task_type") == "SEQ_CLS",
    )


# ---- matching of module names --------------------------------------------------------------------


def values_by_module(
    pattern: Mapping[str, Any], modules: Iterable[str], default: Any
) -> dict[str, Any]:
    """Return each module's value: that of the first key that equals its name or is a suffix, as in PEFT."""
    positions = {key: number for number, key in enumerate(pattern)}
    values = {}
    for module in modules:
        keys = [tail for tail in _suffixes(module) if tail in positions] if positions else []
        values[module] = pattern[min(keys, key=positions.__getitem__)] if keys else default
    return values


def with_full_names(config: Mapping[str, Any], modules: Collection[str]) -> dict[str, Any]:
    """Return a checked config whose patterns have full module names, for values other than the default.

    PEFT uses a pattern's key as the end of a regular expression, in which a dot matches any letter: `q.proj`
    would match `q_proj` there, and nothing here.
    """
    result = dict(config)
    for setting, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        values = values_by_module(config[setting], modules, config[default])
        order = dict.fromkeys([*(m for m in config[setting] if m in values), *values])
        result[setting] = {m: values[m] for m in order if values[m] != config[default]}
    return result


def missing_module_misfits(
    config: Mapping[str, Any], modules: Collection[str], backbone_modules: Iterable[str]
) -> list[str]:
    """Return a misfit if the config targets modules of the backbone for which there are no weights."""
    absent = [m for m in _targeted_modules(config, backbone_modules) if m not in modules]
    return (
        [f"target_modules mean {_short_list(absent)}, which the weights do not hold"]
        if absent
        else []
    )


def surplus_module_misfits(config: Mapping[str, Any], modules: Collection[str]) -> list[str]:
    """Return a misfit if there are weights of modules that the config does not target."""
    meant = set(_targeted_modules(config, modules))
    spare = [m for m in modules if m not in meant]
    return (
        [f"the weights hold {_short_list(spare)}, which target_modules do not mean"]
        if spare
        else []
    )


def _short_list(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def _targeted_modules(config: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """Return the modules that match target_modules, exclude_modules and layers_to_transform."""
    targets = config["target_modules"]
    names = targets if targets == ALL_LINEAR else frozenset(targets)
    settings = ("exclude_modules", "layers_to_transform", "layers_pattern")
    return list(
        _match_modules(names, *(tuple(config.get(s, ())) for s in settings), tuple(modules))
    )


@lru_cache(maxsize=16)  # adapters of one pool mostly target the same modules
def _match_modules(
    names: str | frozenset[str],
    exclude: tuple[str, ...],
    numbers: tuple[int, ...],
    pattern: tuple[str, ...],
    modules: tuple[str, ...],
) -> list[str]:
    excluded, layers = frozenset(exclude), frozenset(numbers)
    if isinstance(names, str):
        return [m for m in modules if not _has_suffix(m, excluded)]
    return [
        m
        for m in modules
        if (
            m in names
            or (_has_suffix(m, names) and (not layers or _layer_number(m, pattern) in layers))
        )
        and not _has_suffix(m, excluded)
    ]


def _suffixes(module: str) -> Iterator[str]:
    """Yield a module's name and its suffixes after each dot."""
    while module:
        yield module
        module = module.partition(".")[2]


def _has_suffix(module: str, names: frozenset[str]) -> bool:
    return bool(names) and any(tail in names for tail in _suffixes(module))


def _layer_number(module: str, pattern: Collection[str]) -> int | None:
    """Return a module's layer number: the first after a name in `pattern`, or after any two names."""
    parts = module.split(".")
    numbers = [n for n in range(1, len(parts) - 1) if parts[n].isdigit()]
    if not pattern:
        return next((int(parts[n]) for n in numbers if n > 1), None)
    hits = (n for name in pattern for n in numbers if parts[n - 1] == name)
    return next((int(parts[n]) for n in hits), None)
