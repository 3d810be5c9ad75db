"""Checks on untrusted adapters: what a folder from outside must be before anything else looks at it.

Strict by construction. The header of the weights is read by safetensors_header.py, with own limits; every
tensor must be one factor of plain LoRA, of the rank that the config says, on a module that it means, or an
encoder's head; every number must be finite and of a size that a trained adapter can have. The config is
read by peft_config.py. Neither torch nor PEFT is asked, no regular expression of a stranger is compiled,
and what is handed on was built here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from adapterhub_chat.artifact.peft_config import (
    CONFIG,
    absent_misfits,
    by_module,
    config_misfits,
    rebuilt,
    spare_misfits,
    with_modules,
)
from adapterhub_chat.artifact.safetensors_header import (
    FILE_DTYPES,
    WEIGHTS,
    Bytes,
    FileLayout,
    TensorSpan,
    header_end,
    layout_of,
)
from adapterhub_chat.artifact.untrusted import parse_json
from adapterhub_chat.errors import AdapterError, join_misfits
from adapterhub_chat.types import HEAD

MAX_CONFIG, MAX_WEIGHTS = 64 * 2**10, 2 * 2**30
"""Bytes of the config and of the weights."""
MAX_VALUE = 65504.0
"""The largest number of half precision, in which a backbone may run."""
MAX_GAIN = 1000.0
"""Of scale * |A| * |B| (Frobenius norms: no change that B A makes is larger) over the square root of the
layer's larger side, which is about the norm of a layer that keeps the size of its input. The adapters that
ship here reach 0.14. Two random factors of deviation 0.3 and rank 64, at scale 2 on 4096 x 4096, reach 740:
far more than any training leaves, and far less than it takes to make numbers overflow."""
MAX_PADDING = 64
"""How many times its numbers an adapter may take once loaded, when all its modules get its largest rank."""
LayerShapes = Mapping[str, tuple[int, int]]
"""A backbone's linear layers, each with its numbers of inputs and outputs."""


@dataclass(frozen=True)
class Checked:
    """What the two files of an adapter say; nothing about it is left to check but the backbone."""

    config: Mapping[str, Any]
    """PEFT's LoraConfig, built anew."""
    alphas: Mapping[str, float]
    layout: FileLayout
    start: int
    """Where the numbers begin in the weights file."""


def check(
    source: str, config: bytes, weights: memoryview, layers: LayerShapes | None = None
) -> Checked:
    """Return what an adapter's config and weights say; raise AdapterError naming everything that is wrong.

    With a backbone's `layers`, the modules and their sizes must be those of some, and none may be missing.
    """
    data: Bytes = np.frombuffer(weights, np.uint8)
    settings, found = _settings(config)
    layout, more = layout_of(data)
    found += more
    if layout is not None:
        numbers = data[header_end(data) :]
        largest = _largest(layout, numbers)
        found += layout.misfits
        if largest > MAX_VALUE:
            found += _value_misfits(layout, numbers)
        if settings is not None and not found:
            found += _agreement_misfits(settings, layout, numbers, largest)
        if layers is not None:
            found += _layer_misfits(settings, layout, layers)
    if found or settings is None or layout is None:
        raise AdapterError(join_misfits(source, found), found)
    alphas = by_module(settings["alpha_pattern"], layout.pairs, settings["lora_alpha"])
    return Checked(with_modules(settings, layout.pairs), alphas, layout, header_end(data))


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


# ---- the config and the tensors ------------------------------------------------------------------


def _agreement_misfits(
    config: Mapping[str, Any], layout: FileLayout, numbers: Bytes, largest: float
) -> list[str]:
    """Return where the tensors are not what the config says, or an update is larger than one can be."""
    ranks = by_module(config["rank_pattern"], layout.pairs, config["r"])
    alphas = by_module(config["alpha_pattern"], layout.pairs, config["lora_alpha"])
    found = spare_misfits(config, layout.pairs) + _spread_misfits(ranks, layout)
    if layout.head != bool(config["modules_to_save"]):
        found.append(
            f"{WEIGHTS} {'holds' if layout.head else 'lacks'} a head ({HEAD}), and {CONFIG} says otherwise: "
            f"task_type 'SEQ_CLS' and modules_to_save ['{HEAD}'] go with one"
        )
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


def _layer_misfits(
    config: Mapping[str, Any] | None, layout: FileLayout, layers: LayerShapes
) -> list[str]:
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


def _spread_misfits(ranks: Mapping[str, int], layout: FileLayout) -> list[str]:
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
    module: str, scale: float, pair: tuple[TensorSpan, TensorSpan], numbers: Bytes, largest: float
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


def _largest(layout: FileLayout, numbers: Bytes) -> float:
    """Return the size of the largest number, infinity when that cannot be said at one look."""
    sizes = (_size(run.kind, numbers[run.start : run.end]) for run in layout.runs)
    return max(sizes, default=math.inf)


def _size(kind: str, numbers: Bytes) -> float:
    """Return the size of the largest of some numbers, infinity where one is not finite.

    Without its sign, a larger number has larger bits. Read as whole numbers without sign, the largest is a
    negative one; read with sign, it is a positive one.
    """
    width, infinite = FILE_DTYPES[kind]
    negative = int(numbers.view(f"<u{width}").max()) - (1 << (8 * width - 1))
    bits = max(negative, int(numbers.view(f"<i{width}").max()))
    return math.inf if bits >= infinite else float(_floats(kind, np.array([bits], f"<u{width}"))[0])


def _floats(kind: str, bits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return numbers by their bits; numpy has no bfloat16, which is the upper half of a float32."""
    if kind == "BF16":
        return (bits.astype("<u4") << 16).view("<f4")
    return bits.view(f"<f{bits.itemsize}")


def _value_misfits(layout: FileLayout, numbers: Bytes) -> list[str]:
    found: dict[str, None] = {}
    for (module, factor), place in layout.places.items():
        if place.kind not in FILE_DTYPES:
            continue
        size = _size(place.kind, numbers[place.start : place.end])
        if size == math.inf:
            found[f"{module}: some numbers are not finite"] = None
        elif size > MAX_VALUE:
            part = f"lora_{factor}" if factor in "AB" else factor
            found[f"{module}: {part} holds {size:.3g}; at most {MAX_VALUE:.0f} is allowed"] = None
    return list(found)


def _norm(place: TensorSpan, numbers: Bytes, step: int = 2**20) -> float:
    """Return the Frobenius norm of a factor, decoding a piece at a time."""
    bits = numbers[place.start : place.end].view(f"<u{FILE_DTYPES[place.kind][0]}")
    total = 0.0
    for first in range(0, len(bits), step):
        piece = _floats(place.kind, bits[first : first + step]).astype("<f8", copy=False)
        total += float(np.dot(piece, piece))
    return math.sqrt(total)
