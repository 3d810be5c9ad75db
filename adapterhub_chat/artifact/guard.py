"""Guard: checks an untrusted adapter's config and weights before anything else uses them.

safetensors_header.py parses the header of the weights under limits of its own; every tensor must be a factor
of plain LoRA, of the config's rank and on a module that the config targets, or an encoder's head; every
number must be finite and of a size that a trained adapter can have. peft_config.py parses the config. Neither
torch nor PEFT reads the files, no regular expression from them is compiled, and the returned config is
rebuilt from validated fields.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from adapterhub_chat.artifact.peft_config import (
    CONFIG,
    config_misfits,
    missing_module_misfits,
    rebuild_config,
    surplus_module_misfits,
    values_by_module,
    with_full_names,
)
from adapterhub_chat.artifact.safetensors_header import (
    FILE_DTYPES,
    WEIGHTS,
    Bytes,
    FileLayout,
    TensorSpan,
    header_end,
    parse_layout,
)
from adapterhub_chat.artifact.untrusted import parse_json
from adapterhub_chat.errors import AdapterError, join_misfits
from adapterhub_chat.lora.weights import no_such_layer
from adapterhub_chat.types import HEAD

MAX_CONFIG, MAX_WEIGHTS = 64 * 2**10, 2 * 2**30
"""Largest sizes of the config and the weights file, in bytes."""
MAX_VALUE = 65504.0
"""The largest finite float16, since a backbone may run in half precision."""
MAX_GAIN = 1000.0
"""Limit of scale * |A| * |B| (Frobenius norms, an upper bound of the update's norm) over the square root of
the layer's larger side, which is about the norm of a layer that preserves the size of its input. The shipped
adapters reach 0.14. Two random factors of deviation 0.3 and rank 64, at scale 2 on 4096 x 4096, reach 740:
far more than training produces, and far less than it takes to overflow."""
MAX_PADDING = 64
"""Largest factor by which an adapter may grow when all its modules are padded to its largest rank."""
LayerShapes = Mapping[str, tuple[int, int]]
"""A backbone's linear layers: name -> (in_features, out_features)."""


@dataclass(frozen=True)
class CheckedAdapter:
    """An adapter's config and weights layout after all checks that need no backbone."""

    config: Mapping[str, Any]
    """PEFT's LoraConfig, rebuilt from validated fields."""
    alphas: Mapping[str, float]
    layout: FileLayout
    start: int
    """Offset of the tensor data in the weights file, in bytes."""


def check_files(
    source: str, config: bytes, weights: memoryview, layers: LayerShapes | None = None
) -> CheckedAdapter:
    """Check an adapter's config and weights; raise AdapterError naming all misfits.

    With a backbone's `layers`, modules and sizes must match them, and no targeted module may be missing.
    """
    data: Bytes = np.frombuffer(weights, np.uint8)
    layout, header_misfits = parse_layout(data)
    settings, misfits = _settings(config, () if layout is None else layout.pairs)
    misfits += header_misfits
    if layout is not None:
        numbers = data[header_end(data) :]
        largest = _max_abs_of_file(layout, numbers)
        misfits += layout.misfits
        if largest > MAX_VALUE:
            misfits += _value_misfits(layout, numbers)
        if settings is not None and not misfits:
            misfits += _agreement_misfits(settings, layout, numbers, largest)
        if layers is not None:
            misfits += _layer_misfits(settings, layout, layers)
    if misfits or settings is None or layout is None:
        raise AdapterError(join_misfits(source, misfits), misfits)
    alphas = values_by_module(settings["alpha_pattern"], layout.pairs, settings["lora_alpha"])
    return CheckedAdapter(with_full_names(settings, layout.pairs), alphas, layout, header_end(data))


def _settings(config: bytes, modules: Iterable[str]) -> tuple[dict[str, Any] | None, list[str]]:
    """Return a config rebuilt from validated fields, or its misfits; `modules` are those of the weights."""
    if len(config) > MAX_CONFIG:
        return None, [f"{CONFIG} has {len(config):,} bytes; at most {MAX_CONFIG:,} are read"]
    try:
        settings = parse_json(config)
    except ValueError as error:
        return None, [f"{CONFIG} is not valid JSON: {error}"]
    if not isinstance(settings, dict):
        return None, [f"{CONFIG} must hold a JSON object, not a {type(settings).__name__}"]
    if misfits := config_misfits(settings):
        return None, misfits
    return rebuild_config(settings, modules), []


# ---- the config and the tensors ------------------------------------------------------------------


def _agreement_misfits(
    config: Mapping[str, Any], layout: FileLayout, numbers: Bytes, largest: float
) -> list[str]:
    """Return misfits between tensors and config, and updates that are too large."""
    ranks = values_by_module(config["rank_pattern"], layout.pairs, config["r"])
    alphas = values_by_module(config["alpha_pattern"], layout.pairs, config["lora_alpha"])
    misfits = surplus_module_misfits(config, layout.pairs) + _padding_misfits(ranks, layout)
    if layout.head != bool(config["modules_to_save"]):
        misfits.append(
            f"{WEIGHTS} {'holds' if layout.head else 'lacks'} a head ({HEAD}), and {CONFIG} says otherwise: "
            f"task_type 'SEQ_CLS' and modules_to_save ['{HEAD}'] go with one"
        )
    for module, (a, b) in layout.pairs.items():
        rank = ranks[module]
        if a.shape[0] != rank or b.shape[1] != rank:
            misfits.append(
                f"{module}: the config says rank {rank}, the tensors are A {a.shape}, B {b.shape}"
            )
            continue
        scale = alphas[module] / (math.sqrt(rank) if config["use_rslora"] else rank)
        misfits += _norm_misfits(module, scale, (a, b), numbers, largest)
    return misfits


def _layer_misfits(
    config: Mapping[str, Any] | None, layout: FileLayout, layers: LayerShapes
) -> list[str]:
    """Return modules that do not match the backbone, and targeted modules that are missing."""
    misfits = []
    for module, (a, b) in layout.pairs.items():
        shape = a.shape[1], b.shape[0]
        if module not in layers:
            misfits.append(no_such_layer(module))
        elif shape != layers[module]:
            misfits.append(
                f"{module}: the adapter maps {shape[0]} -> {shape[1]}, "
                f"the backbone {layers[module][0]} -> {layers[module][1]}"
            )
    if config is not None and not layout.misfits:
        misfits += missing_module_misfits(config, layout.pairs, layers)
    return misfits


def _padding_misfits(ranks: Mapping[str, int], layout: FileLayout) -> list[str]:
    """Return a misfit when padding to the largest rank would need too much memory."""
    widths = {m: a.shape[1] + b.shape[0] for m, (a, b) in layout.pairs.items()}
    largest, num_values = max(ranks.values()), sum(ranks[m] * width for m, width in widths.items())
    if (padding := largest * sum(widths.values()) / num_values) <= MAX_PADDING:
        return []
    return [
        f"its largest rank, {largest}, is far above the rest: loaded, it would take {padding:.0f} times its "
        f"numbers; at most {MAX_PADDING} times is allowed"
    ]


def _norm_misfits(
    module: str, scale: float, pair: tuple[TensorSpan, TensorSpan], numbers: Bytes, largest: float
) -> list[str]:
    (rank, width_in), (width_out, _) = (span.shape for span in pair)
    limit = MAX_GAIN * math.sqrt(max(width_in, width_out))
    if scale * largest**2 * rank * math.sqrt(width_in * width_out) <= limit:
        return []  # within the limit even if all numbers were as large
    norm = scale * math.prod(_norm(span, numbers) for span in pair)
    if norm <= limit:
        return []
    return [
        f"{module}: its update may have a norm of {norm:.3g}; that of a trained adapter stays below "
        f"{limit:.3g}"
    ]


# ---- the numbers ---------------------------------------------------------------------------------


def _max_abs_of_file(layout: FileLayout, numbers: Bytes) -> float:
    """Return the largest absolute value in the file; infinity where the layout has misfits."""
    sizes = (_max_abs(run.dtype, numbers[run.start : run.end]) for run in layout.runs)
    return max(sizes, default=math.inf)


def _max_abs(kind: str, numbers: Bytes) -> float:
    """Return the largest absolute value, infinity where a number is not finite.

    The bits of floats of one sign are ordered as integers. As unsigned integers the largest is the negative
    number of largest size; as signed integers it is the largest positive number.
    """
    width, infinite = FILE_DTYPES[kind]
    negative = int(numbers.view(f"<u{width}").max()) - (1 << (8 * width - 1))
    bits = max(negative, int(numbers.view(f"<i{width}").max()))
    return (
        math.inf
        if bits >= infinite
        else float(_decode_floats(kind, np.array([bits], f"<u{width}"))[0])
    )


def _decode_floats(kind: str, bits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the floats with these bits; bfloat16, which numpy lacks, is the upper half of a float32."""
    if kind == "BF16":
        return (bits.astype("<u4") << 16).view("<f4")
    return bits.view(f"<f{bits.itemsize}")


def _value_misfits(layout: FileLayout, numbers: Bytes) -> list[str]:
    misfits: dict[str, None] = {}
    for (module, factor), span in layout.spans.items():
        if span.dtype not in FILE_DTYPES:
            continue
        size = _max_abs(span.dtype, numbers[span.start : span.end])
        if size == math.inf:
            misfits[f"{module}: some numbers are not finite"] = None
        elif size > MAX_VALUE:
            tensor_name = f"lora_{factor}" if factor in "AB" else factor
            misfits[
                f"{module}: {tensor_name} holds {size:.3g}; at most {MAX_VALUE:.0f} is allowed"
            ] = None
    return list(misfits)


def _norm(span: TensorSpan, numbers: Bytes, step: int = 2**20) -> float:
    """Return the Frobenius norm of a factor, decoded in pieces of `step` numbers."""
    bits = numbers[span.start : span.end].view(f"<u{FILE_DTYPES[span.dtype][0]}")
    total = 0.0
    for first in range(0, len(bits), step):
        piece = _decode_floats(span.dtype, bits[first : first + step]).astype("<f8", copy=False)
        total += float(np.dot(piece, piece))
    return math.sqrt(total)
