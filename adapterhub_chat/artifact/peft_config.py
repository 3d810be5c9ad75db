"""`adapter_config.json`: PEFT's settings of plain LoRA, written, and read from anybody.

A stranger's file is checked setting by setting and then built anew from what was understood; nobody sees
the file itself. Whatever PEFT would take for a regular expression is refused unread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from adapterhub_chat.artifact.untrusted import shown
from adapterhub_chat.types import HEAD

CONFIG = "adapter_config.json"
MAX_RANK = 1024
"""Ranks in use end at 256. Not bound by a layer's sizes: a sum of adapters may have more."""
NAME = r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+){0,15}"
"""A module's name, or the end of one."""
PLAIN_NAME, PART = re.compile(NAME), re.compile("[A-Za-z0-9_]+")
ALL_LINEAR = "all-linear"
LIBRARY = re.compile(r"transformers(_modules)?(\.[A-Za-z0-9_]+)*")

# ---- what a setting may be -----------------------------------------------------------------------


def _one_of(*values: Any) -> Callable[[Any], bool]:
    """Return a test for these very values: 0 is not False here."""
    return lambda value: any(type(value) is type(v) and value == v for v in values)


def _off(value: Any) -> bool:
    """Return whether a setting that nobody needs is switched off."""
    return value is None or value is False or value in ("", [], {})


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e6


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_index(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1e6


def _is_text(value: Any) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= 1000 and value.isprintable())


def _is_names(value: Any, pattern: re.Pattern[str] = PLAIN_NAME) -> bool:
    return isinstance(value, list) and all(
        isinstance(name, str) and pattern.fullmatch(name) for name in value
    )


def _is_mapping(value: Any) -> bool:
    """Return whether it is what PEFT notes about the backbone's class, which is of no use here."""
    return value is None or (
        isinstance(value, dict)
        and all(isinstance(v, str) for v in value.values())
        and set(value) <= {"base_model_class", "parent_library"}
        and LIBRARY.fullmatch(value.get("parent_library", "transformers")) is not None
        and PART.fullmatch(value.get("base_model_class", "Model")) is not None
    )


def _is_target(value: Any) -> bool:
    if isinstance(value, str):
        return value.lower() == ALL_LINEAR
    return _is_names(value) and bool(value)


def _is_head(value: Any) -> bool:
    """Return whether it is off, or the head of a classifying model, as PEFT writes it by itself."""
    return _off(value) or (
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
    # what makes another equation
    "use_dora": (_off, "DoRA rescales the backbone's own weights, so rows cannot be mixed"),
    "bias": (_one_of("none", None), "trained biases belong to the backbone"),
    "lora_bias": (_off, "a bias beside B is not part of the update B A x"),
    "modules_to_save": (
        _is_head,
        f"replaced modules would change the backbone for every adapter; only a head, ['{HEAD}'], comes along",
    ),
    "layer_replication": (_off, "copied layers make another backbone"),
    "trainable_token_indices": (_off, "changed embeddings belong to the backbone"),
    "use_qalora": (_off, "QALoRA pools the input and needs its own layer"),
    "arrow_config": (_off, "an Arrow router is not an adapter"),
    "alora_invocation_tokens": (_off, "aLoRA switches on inside a row"),
    "target_parameters": (_off, "only linear layers carry adapters here"),
    "megatron_config": (_off, "Megatron's layers are not the backbone's"),
    "megatron_core": (_one_of(None, "megatron.core"), "Megatron's layers are not the backbone's"),
    "init_lora_weights": (
        _one_of(True, False, None, "gaussian", "orthogonal", "eva", "mica"),
        "this start takes a part out of the backbone's own weights; let PEFT convert the adapter to plain "
        "LoRA with save_pretrained(..., path_initial_model_for_weight_conversion=...)",
    ),
    # what the equation needs
    "r": (_is_rank, f"it must be a whole number from 1 to {MAX_RANK}"),
    "lora_alpha": (_is_number, "it must be a number between 0 and a million"),
    "use_rslora": _SWITCH,
    # which modules are meant
    "target_modules": (
        _is_target,
        f"it must be {ALL_LINEAR!r} or a list of plain module names, such as ['q_proj', 'v_proj']; a text is "
        "a regular expression in PEFT, and those are never matched: name the modules that the weights hold",
    ),
    "exclude_modules": (lambda value: _off(value) or _is_names(value), _PLAIN_LIST),
    "layers_to_transform": (
        lambda v: v is None or _is_index(v) or (isinstance(v, list) and all(map(_is_index, v))),
        "it must be a list of layer numbers",
    ),
    "layers_pattern": (
        lambda value: _off(value) or _is_names([value] if isinstance(value, str) else value, PART),
        _PLAIN_LIST,
    ),
    # what is said about the adapter
    "task_type": (
        _one_of("CAUSAL_LM", "SEQ_CLS", None),
        "only 'CAUSAL_LM' and, with a head on an encoder, 'SEQ_CLS' are served here",
    ),
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
    "peft_version": _TEXT,
    "auto_mapping": (_is_mapping, "it must name a class of transformers"),
    # what only mattered in training
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
"""Setting -> what it may be, and why nothing else: the settings of plain LoRA.

PEFT's next kind of LoRA will have another: it is refused until known, unless it is off.
"""

PATTERNS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "rank_pattern": PEFT_SETTINGS["r"],
    "alpha_pattern": PEFT_SETTINGS["lora_alpha"],
}
"""Setting that has a value for each of some modules -> what those may be."""


def config_misfits(config: Mapping[str, Any]) -> list[str]:
    """Return a sentence for all in a stranger's config that is not plain LoRA."""
    if (kind := config.get("peft_type")) != "LORA":
        return [f"its peft_type is {shown(kind)}; only 'LORA' can be mixed row by row"]
    found = [
        f"{setting} = {shown(config.get(setting))} is refused: {why}"
        for setting, (fits, why) in PEFT_SETTINGS.items()
        if not fits(config.get(setting))
    ]
    for setting, (fits, why) in PATTERNS.items():
        found += _pattern_misfits(setting, config.get(setting), fits, why)
    for setting in sorted(config.keys() - PEFT_SETTINGS.keys() - PATTERNS.keys() - {"peft_type"}):
        if not _off(config[setting]):
            found.append(
                f"{shown(setting)} = {shown(config[setting])} is unknown here and may change what the "
                "adapter computes; if it only concerned training, take it out of the file"
            )
    return found or _choice_misfits(config)


def _pattern_misfits(
    setting: str, pattern: Any, fits: Callable[[Any], bool], why: str
) -> list[str]:
    if _off(pattern):
        return []
    if not isinstance(pattern, dict):
        return [f"{setting} must be an object, not {shown(pattern)}"]
    found = []
    for key, value in pattern.items():
        if not PLAIN_NAME.fullmatch(key):
            found.append(f"{setting}: {shown(key)} is refused: plain module names only")
        elif not fits(value):
            found.append(f"{setting}: {key} = {shown(value)} is refused: {why}")
    return found


def _choice_misfits(config: Mapping[str, Any]) -> list[str]:
    """Return why PEFT could not tell which modules are meant, or whether there is a head."""
    if (config.get("task_type") == "SEQ_CLS") != (not _off(config.get("modules_to_save"))):
        return [
            f"task_type 'SEQ_CLS' and modules_to_save ['{HEAD}'] go together: an encoder's adapter and its "
            "head"
        ]
    given = [s for s in ("layers_to_transform", "layers_pattern") if not _off(config.get(s))]
    if given and isinstance(config["target_modules"], str):
        return [f"{' and '.join(given)}: only a list of target_modules can be narrowed by layers"]
    if given == ["layers_pattern"]:
        return ["layers_pattern says where layers are numbered, and layers_to_transform names none"]
    return []


# ---- the config that is handed on ----------------------------------------------------------------


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
    """Return PEFT's LoraConfig for plain LoRA: nothing in it is chosen by anybody but these values."""
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


def rebuilt(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checked config anew, out of nothing but its values that mean something here."""
    targets = config["target_modules"]
    narrowing = ("exclude_modules", "layers_to_transform", "layers_pattern")
    given = {key: config[key] for key in narrowing if not _off(config.get(key))}
    return plain_config(
        base_model=config.get("base_model_name_or_path"),
        rank=config["r"],
        alpha=config["lora_alpha"],
        rslora=bool(config.get("use_rslora")),
        targets=ALL_LINEAR if isinstance(targets, str) else list(dict.fromkeys(targets)),
        narrowed={k: list(v) if isinstance(v, list) else [v] for k, v in given.items()},
        ranks=config.get("rank_pattern"),
        alphas=config.get("alpha_pattern"),
        head=config.get("task_type") == "SEQ_CLS",
    )


# ---- what its names mean -------------------------------------------------------------------------


def by_module(pattern: Mapping[str, Any], modules: Iterable[str], default: Any) -> dict[str, Any]:
    """Return each module's value: that of the first key that is its name or ends it, as PEFT matches them."""
    place = {key: number for number, key in enumerate(pattern)}
    found = {}
    for module in modules:
        keys = [tail for tail in _tails(module) if tail in place] if place else []
        found[module] = pattern[min(keys, key=place.__getitem__)] if keys else default
    return found


def with_modules(config: Mapping[str, Any], modules: Collection[str]) -> dict[str, Any]:
    """Return a checked config whose patterns name whole modules, each that differs from the default.

    PEFT reads a pattern's key as the end of a regular expression, in which a dot is any letter: `q.proj`
    would mean `q_proj` to it, and nothing here.
    """
    found = dict(config)
    for setting, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        values = by_module(config[setting], modules, config[default])
        order = dict.fromkeys([*(m for m in config[setting] if m in values), *values])
        found[setting] = {m: values[m] for m in order if values[m] != config[default]}
    return found


def absent_misfits(
    config: Mapping[str, Any], modules: Collection[str], known: Iterable[str]
) -> list[str]:
    """Return a sentence where a checked config means modules of those that are `known`, without factors."""
    absent = [m for m in _meant(config, known) if m not in modules]
    return [f"target_modules mean {_few(absent)}, which the weights do not hold"] if absent else []


def spare_misfits(config: Mapping[str, Any], modules: Collection[str]) -> list[str]:
    """Return a sentence where the weights hold modules that a checked config does not mean."""
    meant = set(_meant(config, modules))
    spare = [m for m in modules if m not in meant]
    return [f"the weights hold {_few(spare)}, which target_modules do not mean"] if spare else []


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _meant(config: Mapping[str, Any], known: Iterable[str]) -> list[str]:
    """Return the modules that target_modules mean, after exclude_modules and layers_to_transform."""
    targets = config["target_modules"]
    names = targets if targets == ALL_LINEAR else frozenset(targets)
    settings = ("exclude_modules", "layers_to_transform", "layers_pattern")
    return list(_named_by(names, *(tuple(config.get(s, ())) for s in settings), tuple(known)))


@lru_cache(maxsize=16)  # the adapters of one pool mostly mean the same
def _named_by(
    names: str | frozenset[str],
    exclude: tuple[str, ...],
    numbers: tuple[int, ...],
    pattern: tuple[str, ...],
    known: tuple[str, ...],
) -> list[str]:
    excluded, layers = frozenset(exclude), frozenset(numbers)
    if isinstance(names, str):
        return [m for m in known if not _is_named(m, excluded)]
    return [
        m
        for m in known
        if (m in names or (_is_named(m, names) and (not layers or _layer(m, pattern) in layers)))
        and not _is_named(m, excluded)
    ]


def _tails(module: str) -> Iterator[str]:
    """Yield a module's name, and what is left of it after each dot."""
    while module:
        yield module
        module = module.partition(".")[2]


def _is_named(module: str, names: frozenset[str]) -> bool:
    return bool(names) and any(tail in names for tail in _tails(module))


def _layer(module: str, pattern: Collection[str]) -> int | None:
    """Return the number of a module's layer: the first after a name in `pattern`, or after any two names."""
    parts = module.split(".")
    numbers = [n for n in range(1, len(parts) - 1) if parts[n].isdigit()]
    if not pattern:
        return next((int(parts[n]) for n in numbers if n > 1), None)
    hits = (n for name in pattern for n in numbers if parts[n - 1] == name)
    return next((int(parts[n]) for n in hits), None)
