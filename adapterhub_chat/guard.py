"""Checks on adapters that strangers made, before torch, PEFT or a backbone sees anything of them.

Strict by construction: a config is read for the few settings that plain LoRA has, and written anew from them;
a weights file is a header and the numbers of exactly the factors that belong to it. All misfits come at once.
numpy alone, and nothing that takes longer than a look at every byte.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub_chat.errors import AdapterError, join_misfits
from adapterhub_chat.lora_config import config_misfits, pattern_value, rebuilt
from adapterhub_chat.strict import SHOWN, parse_json, shown

CONFIG_BYTES = 64 * 2**10
HEADER_BYTES, WEIGHTS_BYTES = 2**20, 2 * 2**30
CACHED_BYTES = 256 * 2**10
"""Headers up to this length are remembered: the adapters of one backbone mostly have one."""
MOST_TENSORS, MOST_DIMENSIONS = 6_000, 8
MOST_SQUARE = 1e12
"""Sum of the squares of a factor's numbers: beyond it they are no numbers in the backbone's own type."""
MOST_CHANGE = 10.0
"""Root mean square of the numbers of an update, as scale * |A| * |B| / sqrt(out * in) bounds it. Backbones'
own weights have 0.02 to 0.1; an honest update has less."""

KEY = re.compile(r"base_model\.model\.(?P<module>[A-Za-z0-9_.]+)\.lora_(?P<factor>[AB])\.weight")
ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
"""Numbers that a factor may be made of, by their names in a safetensors file."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor's numbers lie behind the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


Layers = Mapping[str, tuple[int, int]]
"""A backbone's linear layers, each with its numbers of inputs and outputs."""


@dataclass(frozen=True)
class Checked:
    """An adapter's files, understood: what may be handed on."""

    config: dict[str, Any]
    """PEFT's LoraConfig, written anew."""
    tensors: Mapping[str, Tensor]
    start: int
    """Length of the header: the numbers begin there."""


# ---- an adapter ----------------------------------------------------------------------------------


def check(
    where: Path, config: memoryview, weights: memoryview, layers: Layers | None = None
) -> Checked:
    """Return what an adapter's two files say; raise AdapterError listing all that is not plain LoRA.

    `where` is the folder that messages name. A stranger's adapter is held to a backbone's `layers` and
    its numbers are looked at, too: finite, and no larger than those of an update can honestly be. (Those of
    the pool were when they came in; None.)
    """
    settings = parse_json(config, where / "adapter_config.json")
    if not isinstance(settings, dict):
        kind = type(settings).__name__
        raise AdapterError(f"{where / 'adapter_config.json'} must hold a JSON object, not a {kind}")
    if (peft_type := settings.get("peft_type")) != "LORA":
        raise AdapterError(
            f"{where} cannot be loaded: its peft_type is {shown(peft_type)}; only 'LORA' can be mixed row "
            "by row"
        )
    start, tensors, misread = _header(weights)
    found = [
        *config_misfits(settings),
        *(f"{where / 'adapter_model.safetensors'} {misfit}" for misfit in misread),
    ]
    pairs, foreign = _pairs(tensors)
    if not misread:
        found += _pair_misfits(pairs)
    if foreign:
        found.append(f"its weights hold what is not a LoRA factor: {_some(foreign)}")
    if not found:
        found = _rank_misfits(settings, pairs)
    if not found and layers is not None:
        found = _layer_misfits(layers, pairs) + _number_misfits(settings, pairs, weights[start:])
    if found:
        raise AdapterError(join_misfits(f"{where} cannot be loaded", found))
    return Checked(rebuilt(settings, pairs), tensors, start)


# ---- the weights ---------------------------------------------------------------------------------


def _header(data: memoryview) -> tuple[int, Mapping[str, Tensor], list[str]]:
    """Return where the numbers begin, the tensors, and what is wrong with the file."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= len(data) - 8:
        return (
            0,
            {},
            [f"is no safetensors file: a header of {length:,} bytes in {len(data):,}"],
        )
    if length > HEADER_BYTES:
        return (
            0,
            {},
            [f"has a header of {length:,} bytes; at most {HEADER_BYTES:,} are read"],
        )
    parse = _parsed if length <= CACHED_BYTES else _parsed.__wrapped__
    return 8 + length, *parse(bytes(data[8 : 8 + length]), len(data) - 8 - length)


@lru_cache(maxsize=16)
def _parsed(header: bytes, size: int) -> tuple[Mapping[str, Tensor], list[str]]:
    try:
        entries = parse_json(header, "its header:")
    except AdapterError as error:
        return {}, [str(error)]
    if not isinstance(entries, dict) or len(entries) > MOST_TENSORS:
        return {}, [f"has a header that must name at most {MOST_TENSORS:,} tensors"]
    note = entries.pop("__metadata__", {})
    found = []
    if not isinstance(note, dict) or not all(isinstance(v, str) for v in note.values()):
        found.append("has a header whose __metadata__ must hold texts")
    tensors = {}
    for name, entry in entries.items():
        tensor = _tensor(entry)
        if isinstance(tensor, str):
            found.append(f"has a tensor {shown(name)} that {tensor}")
        else:
            tensors[name] = tensor
    if not found and _covered(tensors.values()) != size:
        found.append(
            f"has tensors that do not fill the {size:,} bytes behind the header one by one, without gaps "
            "and overlaps: it is cut, or not what it says"
        )
    return tensors, found[: 4 * SHOWN]


def _tensor(entry: Any) -> Tensor | str:
    """Return a tensor of the header, or what is wrong with it."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "must have dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        return f"holds numbers of type {shown(dtype)}, which LoRA has not"
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or len(numbers) > MOST_DIMENSIONS:
            return f"has the {what} {shown(numbers)}"
        if not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
            return f"has the {what} {shown(numbers)}"
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * ITEM_BYTES[dtype]:
        return f"has the shape {shape} and the place {shown(offsets)}, which do not fit"
    return Tensor(dtype, tuple(shape), offsets[0], offsets[1])


def _covered(tensors: Collection[Tensor]) -> int:
    """Return how many bytes tensors fill, side by side from 0; -1 where there is a gap or an overlap."""
    place = 0
    for tensor in sorted(tensors, key=lambda one: (one.begin, one.end)):
        if tensor.begin != place:
            return -1
        place = tensor.end
    return place


Pairs = Mapping[str, Mapping[str, Tensor]]


def _pairs(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Return the factors by module, and the names of what is none."""
    pairs: dict[str, dict[str, Tensor]] = {}
    foreign = []
    for key, tensor in tensors.items():
        if len(key) <= 500 and (match := KEY.fullmatch(key)):
            pairs.setdefault(match["module"], {})[match["factor"]] = tensor
        else:
            foreign.append(key)
    return pairs, foreign


def _pair_misfits(pairs: Pairs) -> list[str]:
    found = [] if pairs else ["there is not one LoRA factor in it"]
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            found.append(f"{module} has lora_{next(iter(pair))} but not the other factor")
        elif any(len(tensor.shape) != 2 or min(tensor.shape) < 1 for tensor in pair.values()):
            found.append(f"{module}: factors must be matrices")
    return found[: 4 * SHOWN]


def _layer_misfits(layers: Layers, pairs: Pairs) -> list[str]:
    """Return which factors are not those of a backbone's layers."""
    found = []
    for module, pair in pairs.items():
        own = pair["A"].shape[1], pair["B"].shape[0]
        if module not in layers:
            found.append(f"the backbone has no linear layer {module!r}")
        elif own != tuple(layers[module]):
            found.append(
                f"{module}: the adapter maps {own[0]} -> {own[1]}, "
                f"the backbone {layers[module][0]} -> {layers[module][1]}"
            )
    return found[: 4 * SHOWN]


def _rank_misfits(settings: Mapping[str, Any], pairs: Pairs) -> list[str]:
    found = []
    for module, pair in pairs.items():
        rank = pattern_value(settings.get("rank_pattern"), module, settings["r"])
        a, b = pair["A"].shape, pair["B"].shape
        if a[0] != rank or b[1] != rank:
            found.append(f"{module}: the config says rank {rank}, the tensors are A {a}, B {b}")
    return found[: 4 * SHOWN]


def _number_misfits(settings: Mapping[str, Any], pairs: Pairs, data: memoryview) -> list[str]:
    """Return which factors hold numbers that are none, or are too large for an update."""
    found = []
    for module, pair in pairs.items():
        squares = {
            factor: _square_sum(data[t.begin : t.end], t.dtype) for factor, t in pair.items()
        }
        bad = [f"lora_{factor}" for factor, square in squares.items() if not square < MOST_SQUARE]
        if bad:
            found.append(f"{module}: some numbers of {' and '.join(bad)} are not finite")
            continue
        rank = pair["A"].shape[0]
        alpha = pattern_value(settings.get("alpha_pattern"), module, settings["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        size = pair["A"].shape[1] * pair["B"].shape[0]
        change = scale * math.sqrt(squares["A"]) * math.sqrt(squares["B"]) / math.sqrt(size)
        if change > MOST_CHANGE:
            found.append(
                f"{module}: its update may change weights by {change:.3g} in the mean; at most "
                f"{MOST_CHANGE:g} is taken"
            )
    return found[: 4 * SHOWN]


def _square_sum(data: memoryview, dtype: str) -> float:
    """Return the sum of squares, infinite or NaN where a number is."""
    if dtype == "BF16":
        numbers = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        numbers = np.frombuffer(data, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype])
    with np.errstate(over="ignore", invalid="ignore"):
        wide = numbers.astype(np.float32) if dtype == "F16" else numbers
        return float(np.dot(wide, wide))


def _some(names: Collection[str]) -> str:
    listed = ", ".join(shown(name) for name in list(names)[:3])
    return f"{listed} and {len(names) - 3} more" if len(names) > 3 else listed
