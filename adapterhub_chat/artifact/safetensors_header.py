"""Parser of an untrusted safetensors header: the tensors' dtypes, shapes and spans, and all misfits."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from adapterhub_chat.artifact.peft_config import MODULE_NAME
from adapterhub_chat.artifact.untrusted import parse_json, short_repr
from adapterhub_chat.types import HEAD

WEIGHTS = "adapter_model.safetensors"
MAX_HEADER = 4 * 2**20
"""Maximal size of the header, in bytes."""
MAX_TENSORS, MAX_DIMENSIONS = 4096, 8
"""Limits per file and per tensor. A model of 126 layers with seven targets each has 1764 factors."""
MAX_COMMAS = 8 * MAX_TENSORS
"""Limit on the commas of a header, six per tensor: it bounds the JSON's size before it is parsed."""
MAX_CACHED_HEADER = 256 * 2**10
"""Largest header, in bytes, whose layout is cached: four times that of 32 layers with seven targets each."""
PEFT_PREFIX = "base_model.model."
FACTOR_TENSOR_NAME = re.compile(
    rf"base_model\.model\.(?P<module>{MODULE_NAME})\.lora_(?P<factor>[AB])\.weight"
)
HEAD_TENSOR_NAME = re.compile(rf"base_model\.model\.{HEAD}\.(?P<part>weight|bias)")
HEAD_KEYS = (HEAD, "weight"), (HEAD, "bias")
"""Keys of an encoder's head in `FileLayout.spans`."""
MAX_LABELS = 4096
"""Largest number of labels of a head."""
FILE_DTYPES = {
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
    "F32": (4, 0x7F80 << 16),
    "F64": (8, 0x7FF0 << 48),
}
"""Dtype -> (bytes per number, bits of infinity)."""

TensorKey = tuple[str, str]
"""(module name, "A" or "B"), or a head's key."""
Bytes = npt.NDArray[np.uint8]


class TensorSpan(NamedTuple):
    """A tensor's dtype, shape and byte range, relative to the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class TypeRun(NamedTuple):
    """A byte range of adjacent tensors of one dtype, relative to the end of the header."""

    dtype: str
    start: int
    end: int


@dataclass(frozen=True)
class FileLayout:
    """The parsed header of a weights file."""

    spans: Mapping[TensorKey, TensorSpan]
    pairs: Mapping[str, tuple[TensorSpan, TensorSpan]]
    """Module -> spans of A and B, for modules that have both as matrices."""
    misfits: Sequence[str]
    runs: Sequence[TypeRun]
    """Empty where there are misfits."""

    @cached_property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """The shapes of each module's A and B."""
        return {module: (a.shape, b.shape) for module, (a, b) in self.pairs.items()}

    @cached_property
    def offsets(self) -> dict[str, tuple[int, int]]:
        """Where each module's A and B begin, counted in numbers; needs all tensors to have one dtype."""
        (run,) = self.runs
        size = FILE_DTYPES[run.dtype][0]
        return {module: (a.start // size, b.start // size) for module, (a, b) in self.pairs.items()}

    @property
    def head(self) -> bool:
        """Whether there is an encoder's head among the tensors."""
        return HEAD_KEYS[0] in self.spans


def header_end(data: Bytes) -> int:
    """Return where the tensor data begins, in bytes."""
    return 8 + int.from_bytes(data[:8].tobytes(), "little")


def parse_layout(data: Bytes) -> tuple[FileLayout | None, list[str]]:
    """Return the layout of a weights file, or None and the reason why it cannot be parsed."""
    end = header_end(data)
    try:
        if len(data) < 8:
            raise ValueError(f"it has {len(data)} bytes, which is no safetensors file")
        if end - 8 > MAX_HEADER:
            raise ValueError(f"its header has {end - 8:,} bytes; at most {MAX_HEADER:,} are read")
        if end > len(data):
            raise ValueError("it ends inside its header")
        parsed = _parse_header if end <= MAX_CACHED_HEADER else _parse_header.__wrapped__
        return parsed(data[8:end].tobytes(), len(data) - end), []
    except ValueError as error:
        return None, [f"{WEIGHTS} cannot be read: {error}"]


@lru_cache(maxsize=16)  # adapters of one backbone mostly have the same header
def _parse_header(header: bytes, size: int) -> FileLayout:
    """Return the layout of a header and `size` bytes of data; raise ValueError for an invalid header."""
    if not header.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    if header.count(b",") > MAX_COMMAS:
        raise ValueError(f"its header describes more than {MAX_TENSORS} tensors")
    entries = parse_json(header)
    _check_metadata(entries.pop("__metadata__", {}))
    if len(entries) > MAX_TENSORS:
        raise ValueError(f"its header describes more than {MAX_TENSORS} tensors")
    spans = [(name, _parse_span(name, entry, size)) for name, entry in entries.items()]
    spans.sort(key=lambda item: (item[1].start, item[1].end))
    _check_cover(spans, size)
    spans_by_key: dict[TensorKey, TensorSpan] = {}
    foreign = []
    for name, span in spans:
        if match := FACTOR_TENSOR_NAME.fullmatch(name):
            spans_by_key[match["module"], match["factor"]] = span
        elif match := HEAD_TENSOR_NAME.fullmatch(name):
            spans_by_key[HEAD, match["part"]] = span
        else:
            foreign.append(name)
    factors = {k: span for k, span in spans_by_key.items() if k not in HEAD_KEYS}
    misfits = _foreign_misfits(foreign) + _pair_misfits(factors) + _head_misfits(spans_by_key)
    return FileLayout(
        spans_by_key, _pairs(spans_by_key), misfits, [] if misfits else _runs(spans_by_key)
    )


def _check_metadata(metadata: Any) -> None:
    texts = [*metadata, *metadata.values()] if isinstance(metadata, dict) else [None]
    if not all(isinstance(t, str) and len(t) <= 1000 and t.isprintable() for t in texts):
        raise ValueError("its __metadata__ must be short printable texts by name")


def _parse_span(name: str, entry: Any, size: int) -> TensorSpan:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(
            f"{short_repr(name)} needs dtype, shape and data_offsets, and nothing else"
        )
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or not _are_sizes(offsets, 0, size) or len(offsets) != 2:
        raise ValueError(
            f"{short_repr(name)} cannot lie at {short_repr(offsets)} of {size:,} bytes"
        )
    if not _are_sizes(shape, 1, size) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{short_repr(name)} cannot have the shape {short_repr(shape)}")
    span = TensorSpan(kind, tuple(shape), *offsets)
    if kind in FILE_DTYPES and math.prod(shape) * FILE_DTYPES[kind][0] != span.end - span.start:
        raise ValueError(
            f"{short_repr(name)} has {span.end - span.start:,} bytes, which are no {kind} numbers of the "
            f"shape {short_repr(shape)}"
        )
    return span


def _are_sizes(value: Any, min_value: int, max_value: int) -> bool:
    return isinstance(value, list) and all(
        type(v) is int and min_value <= v <= max_value for v in value
    )


def _check_cover(spans: Sequence[tuple[str, TensorSpan]], size: int) -> None:
    """Raise ValueError unless every byte is in exactly one tensor."""
    end = 0
    for name, span in spans:
        if span.start != end:
            raise ValueError(
                f"{short_repr(name)} begins at byte {span.start:,}, and what lies before it ends at {end:,}"
            )
        end = span.end
    if end != size:
        raise ValueError(f"its tensors take {end:,} bytes, and it has {size:,}")


def _pairs(spans: Mapping[TensorKey, TensorSpan]) -> dict[str, tuple[TensorSpan, TensorSpan]]:
    pairs = {}
    for (module, factor), a in spans.items():
        b = spans.get((module, "B"))
        if factor == "A" and b is not None and len(a.shape) == len(b.shape) == 2:
            pairs[module] = a, b
    return pairs


def _runs(spans: Mapping[TensorKey, TensorSpan]) -> list[TypeRun]:
    runs = []
    for kind, items in groupby(spans.items(), key=lambda item: item[1].dtype):
        spans_of_run = [span for _, span in items]
        runs.append(TypeRun(kind, spans_of_run[0].start, spans_of_run[-1].end))
    return runs


def _foreign_misfits(foreign: Sequence[str]) -> list[str]:
    if not foreign:
        return []
    rest = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
    listed = ", ".join(map(short_repr, foreign[:3]))
    return [f"{WEIGHTS} holds what is not a LoRA factor: {listed}{rest}"]


def _pair_misfits(spans: Mapping[TensorKey, TensorSpan]) -> list[str]:
    misfits = [] if spans else ["there is not one LoRA factor in it"]
    for module in dict.fromkeys(module for module, _ in spans):
        pair = {f: spans[module, f] for f in "AB" if (module, f) in spans}
        if len(pair) < 2:
            misfits.append(f"{module} has lora_{next(iter(pair))} but not the other factor")
        if any(len(span.shape) != 2 for span in pair.values()):
            misfits.append(f"{module}: factors must be matrices")
        if kinds := sorted({span.dtype for span in pair.values()} - FILE_DTYPES.keys()):
            listed = " and ".join(map(short_repr, kinds))
            misfits.append(
                f"{module}: numbers of type {listed} are no LoRA factors: {', '.join(FILE_DTYPES)}"
            )
    return misfits


def _head_misfits(spans: Mapping[TensorKey, TensorSpan]) -> list[str]:
    """Return what is wrong with an encoder's head, if there is one."""
    weight, bias = (spans.get(key) for key in HEAD_KEYS)
    if weight is None and bias is None:
        return []
    if weight is None or bias is None:
        return [f"{HEAD} has {'no weight' if weight is None else 'no bias'}: a head has both"]
    misfits = []
    if len(weight.shape) != 2 or bias.shape != weight.shape[:1] or weight.shape[0] > MAX_LABELS:
        misfits.append(
            f"{HEAD}: a head of at most {MAX_LABELS} labels has a weight (labels, width) and a bias "
            f"(labels,), not {weight.shape} and {bias.shape}"
        )
    if kinds := sorted({weight.dtype, bias.dtype} - FILE_DTYPES.keys()):
        listed = " and ".join(map(short_repr, kinds))
        misfits.append(f"{HEAD}: numbers of type {listed} make no head: {', '.join(FILE_DTYPES)}")
    return misfits
