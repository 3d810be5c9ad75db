"""Checks on untrusted adapters: what a folder from outside must be before anything else looks at it.

Strict by construction. The header of the weights is read here, with own limits; every tensor must be one
factor of plain LoRA, of the rank that the config says, on a module that it means; every number must be
finite and of a size that a trained adapter can have. The config is read by peft_config.py. Neither torch nor
PEFT is asked, no regular expression of a stranger is compiled, and what is handed on was built here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from adapterhub_chat.errors import AdapterError, join_misfits
from adapterhub_chat.peft_config import (
    CONFIG,
    NAME,
    absent_misfits,
    by_module,
    config_misfits,
    rebuilt,
    spare_misfits,
    with_modules,
)
from adapterhub_chat.strict import parse_json, shown

WEIGHTS = "adapter_model.safetensors"
MAX_CONFIG, MAX_HEADER, MAX_WEIGHTS = 64 * 2**10, 4 * 2**20, 2 * 2**30
"""Bytes of the config, of the header of the weights, and of the weights."""
MAX_TENSORS, MAX_DIMENSIONS = 4096, 8
"""Of a file, and of a tensor. A model of 126 layers with seven targets each has 1764 factors."""
MAX_COMMAS = 8 * MAX_TENSORS
"""In a header: a tensor takes six. They bound what JSON can hold before any of it is built."""
MAX_CACHED = 256 * 2**10
"""Bytes of a header whose layout is kept: four times what 32 layers with seven targets each take."""
MAX_VALUE = 65504.0
"""The largest number of half precision, in which a backbone may run."""
MAX_GAIN = 1000.0
"""Of scale * |A| * |B| (Frobenius norms: no change that B A makes is larger) over the square root of the
layer's larger side, which is about the norm of a layer that keeps the size of its input. The adapters that
ship here reach 0.14. Two random factors of deviation 0.3 and rank 64, at scale 2 on 4096 x 4096, reach 740:
far more than any training leaves, and far less than it takes to make numbers overflow."""
MAX_PADDING = 64
"""How many times its numbers an adapter may take once loaded, when all its modules get its largest rank."""
PREFIX = "base_model.model."
KEY = re.compile(rf"base_model\.model\.(?P<module>{NAME})\.lora_(?P<factor>[AB])\.weight")
KINDS = {
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
    "F32": (4, 0x7F80 << 16),
    "F64": (8, 0x7FF0 << 48),
}
"""Type of the numbers in a factor -> bytes of one, and the bits of infinity."""

Layers = Mapping[str, tuple[int, int]]
"""A backbone's linear layers, each with its numbers of inputs and outputs."""
Factor = tuple[str, str]
"""A module's name, and A or B."""
Bytes = npt.NDArray[np.uint8]


class Place(NamedTuple):
    """What a tensor is, and where its numbers lie, in bytes behind the header."""

    kind: str
    shape: tuple[int, ...]
    start: int
    end: int


class Run(NamedTuple):
    """Factors of one type of number that lie one behind the other."""

    kind: str
    start: int
    end: int
    factors: Sequence[Factor]


@dataclass(frozen=True)
class Layout:
    """What the header of a weights file says."""

    places: Mapping[Factor, Place]
    pairs: Mapping[str, tuple[Place, Place]]
    """Modules that have both factors, as matrices, and the places of these."""
    misfits: Sequence[str]
    runs: Sequence[Run]
    """None where there are misfits."""


@dataclass(frozen=True)
class Checked:
    """What the two files of an adapter say; nothing about it is left to check but the backbone."""

    config: Mapping[str, Any]
    """PEFT's LoraConfig, built anew."""
    alphas: Mapping[str, float]
    layout: Layout
    start: int
    """Where the numbers begin in the weights file."""


def check(source: str, config: bytes, weights: memoryview, layers: Layers | None = None) -> Checked:
    """Return what an adapter's config and weights say; raise AdapterError naming everything that is wrong.

    With a backbone's `layers`, the modules and their sizes must be those of some, and none may be missing.
    """
    data: Bytes = np.frombuffer(weights, np.uint8)
    settings, found = _settings(config)
    layout, more = _layout(data)
    found += more
    if layout is not None:
        numbers = data[_header_end(data) :]
        largest = _largest(layout, numbers)
        found += layout.misfits
        if largest > MAX_VALUE:
            found += _value_misfits(layout, numbers)
        if settings is not None and not found:
            found += _agreement_misfits(settings, layout, numbers, largest)
        if layers is not None:
            found += _layer_misfits(settings, layout, layers)
    if found or settings is None or layout is None:
        raise AdapterError(join_misfits(source, found))
    alphas = by_module(settings["alpha_pattern"], layout.pairs, settings["lora_alpha"])
    return Checked(with_modules(settings, layout.pairs), alphas, layout, _header_end(data))


def _settings(config: bytes) -> tuple[dict[str, Any] | None, list[str]]:
    """Return a config built anew, or what is wrong with it."""
    if len(config) > MAX_CONFIG:
        return None, [f"{CONFIG} has {len(config):,} bytes; at most {MAX_CONFIG:,} are read"]
    try:
        settings = parse_json(config)
    except ValueError as error:
        return None, [f"{CONFIG} is not valid JSON: {error}"]
    if not isinstance(settings, dict):
        return None, [f"{CONFIG} must hold a JSON object, not a {type(settings).__name__}"]
    if found := config_misfits(settings):
        return None, found
    return rebuilt(settings), []


# ---- the header ----------------------------------------------------------------------------------


def _header_end(data: Bytes) -> int:
    return 8 + int.from_bytes(data[:8].tobytes(), "little")


def _layout(data: Bytes) -> tuple[Layout | None, list[str]]:
    """Return what a weights file holds, or why that cannot be told."""
    end = _header_end(data)
    try:
        if len(data) < 8:
            raise ValueError(f"it has {len(data)} bytes, which is no safetensors file")
        if end - 8 > MAX_HEADER:
            raise ValueError(f"its header has {end - 8:,} bytes; at most {MAX_HEADER:,} are read")
        if end > len(data):
            raise ValueError("it ends inside its header")
        parsed = _parsed if end <= MAX_CACHED else _parsed.__wrapped__
        return parsed(data[8:end].tobytes(), len(data) - end), []
    except ValueError as error:
        return None, [f"{WEIGHTS} cannot be read: {error}"]


@lru_cache(maxsize=16)  # the adapters of one backbone mostly have one header
def _parsed(header: bytes, size: int) -> Layout:
    """Return the layout of `size` bytes of numbers; raise ValueError when it cannot be one."""
    if not header.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    if header.count(b",") > MAX_COMMAS:
        raise ValueError(f"its header describes more than {MAX_TENSORS} tensors")
    entries = parse_json(header)
    _check_metadata(entries.pop("__metadata__", {}))
    if len(entries) > MAX_TENSORS:
        raise ValueError(f"its header describes more than {MAX_TENSORS} tensors")
    found = [(name, _place(name, entry, size)) for name, entry in entries.items()]
    found.sort(key=lambda item: (item[1].start, item[1].end))
    _check_cover(found, size)
    places: dict[Factor, Place] = {}
    foreign = []
    for name, place in found:
        if match := KEY.fullmatch(name):
            places[match["module"], match["factor"]] = place
        else:
            foreign.append(name)
    misfits = _foreign_misfits(foreign) + _pair_misfits(places)
    return Layout(places, _pairs(places), misfits, [] if misfits else _runs(places))


def _check_metadata(metadata: Any) -> None:
    texts = [*metadata, *metadata.values()] if isinstance(metadata, dict) else [None]
    if not all(isinstance(t, str) and len(t) <= 1000 and t.isprintable() for t in texts):
        raise ValueError("its __metadata__ must be short printable texts by name")


def _place(name: str, entry: Any, size: int) -> Place:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown(name)} needs dtype, shape and data_offsets, and nothing else")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or not _are_sizes(offsets, 0, size) or len(offsets) != 2:
        raise ValueError(f"{shown(name)} cannot lie at {shown(offsets)} of {size:,} bytes")
    if not _are_sizes(shape, 1, size) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{shown(name)} cannot have the shape {shown(shape)}")
    place = Place(kind, tuple(shape), *offsets)
    if kind in KINDS and math.prod(shape) * KINDS[kind][0] != place.end - place.start:
        raise ValueError(
            f"{shown(name)} has {place.end - place.start:,} bytes, which are no {kind} numbers of the shape "
            f"{shown(shape)}"
        )
    return place


def _are_sizes(value: Any, least: int, most: int) -> bool:
    return isinstance(value, list) and all(type(v) is int and least <= v <= most for v in value)


def _check_cover(found: Sequence[tuple[str, Place]], size: int) -> None:
    """Raise ValueError unless every byte is in exactly one tensor."""
    end = 0
    for name, place in found:
        if place.start != end:
            raise ValueError(
                f"{shown(name)} begins at byte {place.start:,}, and what lies before it ends at {end:,}"
            )
        end = place.end
    if end != size:
        raise ValueError(f"its tensors take {end:,} bytes, and it has {size:,}")


def _pairs(places: Mapping[Factor, Place]) -> dict[str, tuple[Place, Place]]:
    found = {}
    for (module, factor), a in places.items():
        b = places.get((module, "B"))
        if factor == "A" and b is not None and len(a.shape) == len(b.shape) == 2:
            found[module] = a, b
    return found


def _runs(places: Mapping[Factor, Place]) -> list[Run]:
    runs = []
    for kind, items in groupby(places.items(), key=lambda item: item[1].kind):
        run = list(items)
        runs.append(Run(kind, run[0][1].start, run[-1][1].end, [factor for factor, _ in run]))
    return runs


def _foreign_misfits(foreign: Sequence[str]) -> list[str]:
    if not foreign:
        return []
    more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
    listed = ", ".join(map(shown, foreign[:3]))
    return [f"{WEIGHTS} holds what is not a LoRA factor: {listed}{more}"]


def _pair_misfits(places: Mapping[Factor, Place]) -> list[str]:
    found = [] if places else ["there is not one LoRA factor in it"]
    for module in dict.fromkeys(module for module, _ in places):
        pair = {f: places[module, f] for f in "AB" if (module, f) in places}
        if len(pair) < 2:
            found.append(f"{module} has lora_{next(iter(pair))} but not the other factor")
        if any(len(place.shape) != 2 for place in pair.values()):
            found.append(f"{module}: factors must be matrices")
        if kinds := sorted({place.kind for place in pair.values()} - KINDS.keys()):
            listed = " and ".join(map(shown, kinds))
            found.append(
                f"{module}: numbers of type {listed} are no LoRA factors: {', '.join(KINDS)}"
            )
    return found


# ---- the config and the tensors ------------------------------------------------------------------


def _agreement_misfits(
    config: Mapping[str, Any], layout: Layout, numbers: Bytes, largest: float
) -> list[str]:
    """Return where the tensors are not what the config says, or an update is larger than one can be."""
    ranks = by_module(config["rank_pattern"], layout.pairs, config["r"])
    alphas = by_module(config["alpha_pattern"], layout.pairs, config["lora_alpha"])
    found = spare_misfits(config, layout.pairs) + _spread_misfits(ranks, layout)
    for module, (a, b) in layout.pairs.items():
        rank = ranks[module]
        if a.shape[0] != rank or b.shape[1] != rank:
            found.append(
                f"{module}: the config says rank {rank}, the tensors are A {a.shape}, B {b.shape}"
            )
            continue
        scale = alphas[module] / (math.sqrt(rank) if config["use_rslora"] else rank)
        found += _norm_misfits(module, scale, (a, b), numbers, largest)
    return found


def _layer_misfits(config: Mapping[str, Any] | None, layout: Layout, layers: Layers) -> list[str]:
    """Return which modules are not those of a backbone, or not all that the config means."""
    found = []
    for module, (a, b) in layout.pairs.items():
        own = a.shape[1], b.shape[0]
        if module not in layers:
            found.append(f"the backbone has no linear layer {module!r}")
        elif own != layers[module]:
            found.append(
                f"{module}: the adapter maps {own[0]} -> {own[1]}, "
                f"the backbone {layers[module][0]} -> {layers[module][1]}"
            )
    if config is not None and not layout.misfits:
        found += absent_misfits(config, layout.pairs, layers)
    return found


def _spread_misfits(ranks: Mapping[str, int], layout: Layout) -> list[str]:
    """Return whether one large rank would make a small file large in memory."""
    widths = {m: a.shape[1] + b.shape[0] for m, (a, b) in layout.pairs.items()}
    largest, held = max(ranks.values()), sum(ranks[m] * width for m, width in widths.items())
    if (padding := largest * sum(widths.values()) / held) <= MAX_PADDING:
        return []
    return [
        f"its largest rank, {largest}, is far above the rest: loaded, it would take {padding:.0f} times its "
        f"numbers; at most {MAX_PADDING} times is allowed"
    ]


def _norm_misfits(
    module: str, scale: float, pair: tuple[Place, Place], numbers: Bytes, largest: float
) -> list[str]:
    (rank, width_in), (width_out, _) = (place.shape for place in pair)
    limit = MAX_GAIN * math.sqrt(max(width_in, width_out))
    if scale * largest**2 * rank * math.sqrt(width_in * width_out) <= limit:
        return []  # whatever the other numbers are
    norm = scale * math.prod(_norm(place, numbers) for place in pair)
    if norm <= limit:
        return []
    return [
        f"{module}: its update may have a norm of {norm:.3g}; that of a trained adapter stays below "
        f"{limit:.3g}"
    ]


# ---- the numbers ---------------------------------------------------------------------------------


def _largest(layout: Layout, numbers: Bytes) -> float:
    """Return the size of the largest number, infinity when that cannot be said at one look."""
    sizes = (_size(run.kind, numbers[run.start : run.end]) for run in layout.runs)
    return max(sizes, default=math.inf)


def _size(kind: str, numbers: Bytes) -> float:
    """Return the size of the largest of some numbers, infinity where one is not finite.

    Without its sign, a larger number has larger bits. Read as whole numbers without sign, the largest is a
    negative one; read with sign, it is a positive one.
    """
    width, infinite = KINDS[kind]
    negative = int(numbers.view(f"<u{width}").max()) - (1 << (8 * width - 1))
    bits = max(negative, int(numbers.view(f"<i{width}").max()))
    return math.inf if bits >= infinite else float(_floats(kind, np.array([bits], f"<u{width}"))[0])


def _floats(kind: str, bits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return numbers by their bits; numpy has no bfloat16, which is the upper half of a float32."""
    if kind == "BF16":
        return (bits.astype("<u4") << 16).view("<f4")
    return bits.view(f"<f{bits.itemsize}")


def _value_misfits(layout: Layout, numbers: Bytes) -> list[str]:
    found: dict[str, None] = {}
    for (module, factor), place in layout.places.items():
        if place.kind not in KINDS:
            continue
        size = _size(place.kind, numbers[place.start : place.end])
        if size == math.inf:
            found[f"{module}: some numbers are not finite"] = None
        elif size > MAX_VALUE:
            found[
                f"{module}: lora_{factor} holds {size:.3g}; at most {MAX_VALUE:.0f} is allowed"
            ] = None
    return list(found)


def _norm(place: Place, numbers: Bytes, step: int = 2**20) -> float:
    """Return the Frobenius norm of a factor, decoding a piece at a time."""
    bits = numbers[place.start : place.end].view(f"<u{KINDS[place.kind][0]}")
    total = 0.0
    for first in range(0, len(bits), step):
        piece = _floats(place.kind, bits[first : first + step]).astype("<f8", copy=False)
        total += float(np.dot(piece, piece))
    return math.sqrt(total)
