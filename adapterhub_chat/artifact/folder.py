"""An adapter as files: PEFT's folder format, both ways.

`adapter_config.json` and `adapter_model.safetensors` are what peft, vLLM, LoRAX and SGLang read. What is read
has passed the guard, wherever it comes from.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors.torch import save

from adapterhub_chat.artifact.guard import MAX_CONFIG, MAX_WEIGHTS, Checked, LayerShapes, check
from adapterhub_chat.artifact.peft_config import CONFIG, plain_config
from adapterhub_chat.artifact.safetensors_header import (
    HEAD_PLACES,
    PEFT_PREFIX,
    WEIGHTS,
    TensorSpan,
)
from adapterhub_chat.artifact.untrusted import opened, read_bytes
from adapterhub_chat.errors import AdapterError
from adapterhub_chat.lora.weights import AdapterWeights, Factors, Head, Packed
from adapterhub_chat.types import HEAD

TORCH_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Numbers that a factor may be made of, by their names in a safetensors file."""
MOST_SPARE = 64 * 2**20
"""Bytes of the memory that is kept for the next file."""

Allocator = Callable[[int], torch.Tensor]
"""Gives a vector of so many bytes, uint8."""
Arrived = Callable[[AdapterWeights], object]
"""Is given weights whose form was checked; whether their file is the right one is not known yet."""


def config_of(
    weights: AdapterWeights, base_model: str, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, Any]:
    """Return PEFT's LoraConfig for these weights on a backbone with the given linear layers."""
    ranks = {m: weights.rank(m) for m in weights.factors}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(weights.alphas.values()).most_common(1)[0][0]
    return plain_config(
        base_model=base_model,
        rank=rank,
        alpha=int(alpha) if float(alpha).is_integer() else alpha,
        rslora=weights.rslora,
        targets=_target_modules(weights, shapes),
        ranks={m: r for m, r in ranks.items() if r != rank},
        alphas={m: a for m, a in weights.alphas.items() if a != alpha},
        head=weights.head is not None,
    )


def _target_modules(weights: AdapterWeights, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Return last names (`q_proj`) when they say exactly which modules are meant, else full names."""
    last = {m.rpartition(".")[2] for m in weights.factors}
    meant = {m for m in shapes if m.rpartition(".")[2] in last}
    return sorted(last if meant == set(weights.factors) else weights.factors)


def write_weights(path: Path, weights: AdapterWeights) -> None:
    """Write the tensors under PEFT's names."""
    tensors = {}
    for module, (a, b) in weights.factors.items():
        tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"] = a.clone(
            memory_format=torch.contiguous_format
        )
        tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"] = b.clone(
            memory_format=torch.contiguous_format
        )
    if weights.head:
        tensors[f"{PEFT_PREFIX}{HEAD}.weight"] = weights.head.weight.float().contiguous()
        tensors[f"{PEFT_PREFIX}{HEAD}.bias"] = weights.head.bias.float().contiguous()
    path.write_bytes(save(tensors, metadata={"format": "pt"}))  # save_file hides the OSError


def fresh(size: int) -> torch.Tensor:
    """Return memory for so many bytes."""
    return torch.empty(size, dtype=torch.uint8)


class BufferPool:
    """Memory that files are read into again and again: new memory's pages cost more than the bytes."""

    def __init__(self) -> None:
        """Start with none."""
        self._spare: list[torch.Tensor] = []

    @contextmanager
    def lent(self) -> Iterator[Allocator]:
        """Lend memory for one file at a time; nothing may look at what was read when the block has ended."""
        held = self._spare.pop() if self._spare else fresh(0)

        def memory(size: int) -> torch.Tensor:
            nonlocal held
            if len(held) < size:
                held = fresh(size)
            return held[:size]

        try:
            yield memory
        finally:
            if len(held) <= MOST_SPARE:
                self._spare[:] = [held]


@dataclass(frozen=True)
class ReadTarget:
    """Where an adapter's numbers go while its file is read."""

    memory: Allocator = fresh
    arrived: Arrived = lambda _: None


DEFAULT_TARGET = ReadTarget()


def read_folder(
    folder: Path, layers: LayerShapes | None = None, landing: ReadTarget = DEFAULT_TARGET
) -> tuple[AdapterWeights, dict[str, Any], str]:
    """Return a folder's weights, its config built anew, and the sha256 of the very bytes that were read.

    Raises AdapterError naming everything that does not fit, with a backbone's `layers` also those. No other
    file in the folder is looked at. The weights are views of what `landing.memory` gives; `landing.arrived`
    has them while the hash is still worked out.
    """
    if not os.path.isdir(folder):
        raise AdapterError(f"{folder} is not a folder")
    missing = [name for name in (CONFIG, WEIGHTS) if not os.path.lexists(folder / name)]
    if missing:
        raise AdapterError(
            f"{folder} is no adapter: {' and '.join(missing)} not found"
            " (pickled .bin weights are never opened; save with safetensors)"
        )
    config = read_bytes(folder / CONFIG, MAX_CONFIG)
    data = _read_numbers(folder / WEIGHTS, landing.memory)
    digest = hashlib.sha256()
    # On another core, in one call: for each piece it would wait for its turn at the interpreter.
    hasher = Thread(target=digest.update, args=(_buffer(data),))
    hasher.start()
    try:
        checked = check(f"{folder} cannot be loaded", config, _buffer(data), layers)
        weights = _weights(data, checked)
        landing.arrived(weights)
    finally:
        hasher.join()
    return weights, dict(checked.config), digest.hexdigest()


def _read_numbers(path: Path, memory: Allocator) -> torch.Tensor:
    """Return a file's bytes in memory of their own: a mapped file could change, or end, under us."""
    with opened(path, MAX_WEIGHTS) as (file, size):
        data, read = memory(size), 0
        whole = _buffer(data)
        while count := file.readinto(whole[read:]):
            read += count
        return data[:read]


def _buffer(data: torch.Tensor) -> memoryview:
    """Return the memory of a vector of bytes, for calls that do not know torch."""
    array: Any = data.numpy()
    return memoryview(array)


def _weights(data: torch.Tensor, checked: Checked) -> AdapterWeights:
    """Return the factors of a checked file, as views of its bytes where these lie on their boundary."""
    layout, start = checked.layout, checked.start
    dtype = TORCH_DTYPES[layout.runs[0].kind]
    factors: Factors
    if len(layout.runs) == 1 and start % dtype.itemsize == 0:
        factors = Packed(data[start:].view(dtype), layout.shapes, layout.offsets)
    else:
        factors = {
            m: (_tensor(data, start, a), _tensor(data, start, b))
            for m, (a, b) in layout.pairs.items()
        }
    alphas = {m: float(alpha) for m, alpha in checked.alphas.items()}
    parts = [_tensor(data, start, layout.places[p]).float() for p in HEAD_PLACES if layout.head]
    head = Head(*parts) if parts else None
    return AdapterWeights(factors, alphas, checked.config["use_rslora"], head, checked=True)


def _tensor(data: torch.Tensor, start: int, place: TensorSpan) -> torch.Tensor:
    first, dtype = start + place.start, TORCH_DTYPES[place.kind]
    part = data[first : start + place.end]
    return (part if first % dtype.itemsize == 0 else part.clone()).view(dtype).view(place.shape)
