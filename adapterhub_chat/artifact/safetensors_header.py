"""A weights file's header, from a stranger: what tensors it holds, and what is no part of an adapter."""

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

from adapterhub_chat.artifact.peft_config import NAME
from adapterhub_chat.artifact.untrusted import parse_json, shown
from adapterhub_chat.types import HEAD

WEIGHTS = "adapter_model.safetensors"
MAX_HEADER = 4 * 2**20
"""Bytes of the header of the weights."""
MAX_TENSORS, MAX_DIMENSIONS = 4096, 8
"""Of a file, and of a tensor. A model of 126 layers with seven targets each has 1764 factors."""
MAX_COMMAS = 8 * MAX_TENSORS
"""In a header: a tensor takes six. They bound what JSON can hold before any of it is built."""
MAX_CACHED = 256 * 2**10
"""Bytes of a header whose layout is kept: four times what 32 layers with seven targets each take."""
PEFT_PREFIX = "base_model.model."
KEY = re.compile(rf"base_model\.model\.(?P<module>{NAME})\.lora_(?P<factor>[AB])\.weight")
HEAD_KEY = re.compile(rf"base_model\.model\.{HEAD}\.(?P<part>weight|bias)")
HEAD_PLACES = (HEAD, "weight"), (HEAD, "bias")
"""An encoder's head among the places of a layout."""
MAX_LABELS = 4096
"""Of a head."""
FILE_DTYPES = {
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
    "F32": (4, 0x7F80 << 16),
    "F64": (8, 0x7FF0 << 48),
}
"""Type of the numbers in a factor -> bytes of one, and the bits of infinity."""

Factor = tuple[str, str]
"""A module's name, and A or B."""
Bytes = npt.NDArray[np.uint8]


class TensorSpan(NamedTuple):
    """What a tensor is, and where its numbers lie, in bytes behind the header."""

    kind: str
    shape: tuple[int, ...]
    start: int
    end: int


class TypeRun(NamedTuple):
    """One type of number as far as it goes, in bytes behind the header."""

    kind: str
    start: int
    end: int


@dataclass(frozen=True)
class FileLayout:
    """What the header of a weights file says."""

    places: Mapping[Factor, TensorSpan]
    pairs: Mapping[str, tuple[TensorSpan, TensorSpan]]
    """Modules that have both factors, as matrices, and the places of these."""
    misfits: Sequence[str]
    runs: Sequence[TypeRun]
    """None where there are misfits."""

    @cached_property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """The shapes of each module's A and B."""
        return {module: (a.shape, b.shape) for module, (a, b) in self.pairs.items()}

    @cached_property
    def offsets(self) -> dict[str, tuple[int, int]]:
        """Where each module's A and B begin, counted in numbers: there is one type of them."""
        (run,) = self.runs
        size = FILE_DTYPES[run.kind][0]
        return {module: (a.start // size, b.start // size) for module, (a, b) in self.pairs.items()}

    @property
    def head(self) -> bool:
        """Whether there is an encoder's head among the tensors."""
        return HEAD_PLACES[0] in self.places


def header_end(data: Bytes) -> int:
    """Return where the numbers begin."""
    return 8 + int.from_bytes(data[:8].tobytes(), "little")


def layout_of(data: Bytes) -> tuple[FileLayout | None, list[str]]:
    """Return what a weights file holds, or why that cannot be told."""
    end = header_end(data)
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
def _parsed(header: bytes, size: int) -> FileLayout:
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
    places: dict[Factor, TensorSpan] = {}
    foreign = []
    for name, place in found:
        if match := KEY.fullmatch(name):
            places[match["module"], match["factor"]] = place
        elif match := HEAD_KEY.fullmatch(name):
            places[HEAD, match["part"]] = place
        else:
            foreign.append(name)
    factors = {k: place for k, place in places.items() if k not in HEAD_PLACES}
    misfits = _foreign_misfits(foreign) + _pair_misfits(factors) + _head_misfits(places)
    return FileLayout(places, _pairs(places), misfits, [] if misfits else _runs(places))


def _check_metadata(metadata: Any) -> None:
    texts = [*metadata, *metadata.values()] if isinstance(metadata, dict) else [None]
    if not all(isinstance(t, str) and len(t) <= 1000 and t.isprintable() for t in texts):
        raise ValueError("its __metadata__ must be short printable texts by name")


def _place(name: str, entry: Any, size: int) -> TensorSpan:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown(name)} needs dtype, shape and data_offsets, and nothing else")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or not _are_sizes(offsets, 0, size) or len(offsets) != 2:
        raise ValueError(f"{shown(name)} cannot lie at {shown(offsets)} of {size:,} bytes")
    if not _are_sizes(shape, 1, size) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{shown(name)} cannot have the shape {shown(shape)}")
    place = TensorSpan(kind, tuple(shape), *offsets)
    if kind in FILE_DTYPES and math.prod(shape) * FILE_DTYPES[kind][0] != place.end - place.start:
        raise ValueError(
            f"{shown(name)} has {place.end - place.start:,} bytes, which are no {kind} numbers of the shape "
            f"{shown(shape)}"
        )
    return place


def _are_sizes(value: Any, least: int, most: int) -> bool:
    return isinstance(value, list) and all(type(v) is int and least <= v <= most for v in value)


def _check_cover(found: Sequence[tuple[str, TensorSpan]], size: int) -> None:
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


def _pairs(places: Mapping[Factor, TensorSpan]) -> dict[str, tuple[TensorSpan, TensorSpan]]:
    found = {}
    for (module, factor), a in places.items():
        b = places.get((module, "B"))
        if factor == "A" and b is not None and len(a.shape) == len(b.shape) == 2:
            found[module] = a, b
    return found


def _runs(places: Mapping[Factor, TensorSpan]) -> list[TypeRun]:
    runs = []
    for kind, items in groupby(places.items(), key=lambda item: item[1].kind):
        run = [place for _, place in items]
        runs.append(TypeRun(kind, run[0].start, run[-1].end))
    return runs


def _foreign_misfits(foreign: Sequence[str]) -> list[str]:
    if not foreign:
        return []
    more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
    listed = ", ".join(map(shown, foreign[:3]))
    return [f"{WEIGHTS} holds what is not a LoRA factor: {listed}{more}"]


def _pair_misfits(places: Mapping[Factor, TensorSpan]) -> list[str]:
    found = [] if places else ["there is not one LoRA factor in it"]
    for module in dict.fromkeys(module for module, _ in places):
        pair = {f: places[module, f] for f in "AB" if (module, f) in places}
        if len(pair) < 2:
            found.append(f"{module} has lora_{next(iter(pair))} but not the other factor")
        if any(len(place.shape) != 2 for place in pair.values()):
            found.append(f"{module}: factors must be matrices")
        if kinds := sorted({place.kind for place in pair.values()} - FILE_DTYPES.keys()):
            listed = " and ".join(map(shown, kinds))
            found.append(
                f"{module}: numbers of type {listed} are no LoRA factors: {', '.join(FILE_DTYPES)}"
            )
    return found


def _head_misfits(places: Mapping[Factor, TensorSpan]) -> list[str]:
    """Return what is wrong with an encoder's head, if there is one."""
    weight, bias = (places.get(place) for place in HEAD_PLACES)
    if weight is None and bias is None:
        return []
    if weight is None or bias is None:
        return [f"{HEAD} has {'no weight' if weight is None else 'no bias'}: a head has both"]
    found = []
    if len(weight.shape) != 2 or bias.shape != weight.shape[:1] or weight.shape[0] > MAX_LABELS:
        found.append(
            f"{HEAD}: a head of at most {MAX_LABELS} labels has a weight (labels, width) and a bias "
            f"(labels,), not {weight.shape} and {bias.shape}"
        )
    if kinds := sorted({weight.kind, bias.kind} - FILE_DTYPES.keys()):
        listed = " and ".join(map(shown, kinds))
        found.append(f"{HEAD}: numbers of type {listed} make no head: {', '.join(FILE_DTYPES)}")
    return found
