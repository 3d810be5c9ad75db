"""Read and write adapter folders in PEFT's format.

peft, vLLM, LoRAX and SGLang read the same `adapter_config.json` and `adapter_model.safetensors`. Every folder
that is read passes the guard's checks, wherever it comes from.
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

from adapterhub_chat.artifact.guard import (
    MAX_CONFIG,
    MAX_WEIGHTS,
    CheckedAdapter,
    LayerShapes,
    check_files,
)
from adapterhub_chat.artifact.peft_config import CONFIG, plain_config
from adapterhub_chat.artifact.safetensors_header import (
    HEAD_KEYS,
    PEFT_PREFIX,
    WEIGHTS,
    TensorSpan,
)
from adapterhub_chat.artifact.untrusted import open_regular_file, read_bytes
from adapterhub_chat.errors import AdapterError
from adapterhub_chat.lora.weights import AdapterWeights, Factors, Head, PackedFactors
from adapterhub_chat.types import HEAD

TORCH_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Allowed dtypes of a factor, by their names in a safetensors file."""
MAX_SPARE_BYTES = 64 * 2**20
"""Largest buffer, in bytes, that is kept for the next file."""

Allocator = Callable[[int], torch.Tensor]
"""Maps a number of bytes to a uint8 vector of that size."""
OnWeights = Callable[[AdapterWeights], object]
"""Called with weights that passed the guard, before their file's sha256 is known."""


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
    """Return last names (`q_proj`) when they identify exactly the adapter's modules, else full names."""
    last_names = {m.rpartition(".")[2] for m in weights.factors}
    matching = {m for m in shapes if m.rpartition(".")[2] in last_names}
    return sorted(last_names if matching == set(weights.factors) else weights.factors)


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


def new_buffer(size: int) -> torch.Tensor:
    """Return a new uint8 vector of this size."""
    return torch.empty(size, dtype=torch.uint8)


class BufferPool:
    """Reuses one buffer for reading files: page faults of new memory cost more than the read itself."""

    def __init__(self) -> None:
        """Start without a buffer."""
        self._spare: list[torch.Tensor] = []

    @contextmanager
    def lent(self) -> Iterator[Allocator]:
        """Yield an allocator for one file; its memory must not be used after the block."""
        buffer = self._spare.pop() if self._spare else new_buffer(0)

        def allocate(size: int) -> torch.Tensor:
            nonlocal buffer
            if len(buffer) < size:
                buffer = new_buffer(size)
            return buffer[:size]

        try:
            yield allocate
        finally:
            if len(buffer) <= MAX_SPARE_BYTES:
                self._spare[:] = [buffer]


@dataclass(frozen=True)
class ReadTarget:
    """Where an adapter's weights are read to, and a callback for when they are complete."""

    allocate: Allocator = new_buffer
    on_weights: OnWeights = lambda _: None


DEFAULT_TARGET = ReadTarget()


def read_folder(
    folder: Path, layers: LayerShapes | None = None, target: ReadTarget = DEFAULT_TARGET
) -> tuple[AdapterWeights, dict[str, Any], str]:
    """Return a folder's weights, its rebuilt config (plain LoRA), and the sha256 of the weights file.

    Raises AdapterError naming all misfits; with a backbone's `layers`, modules and sizes are checked too. No
    other file in the folder is opened. The weights are views of memory from `target.allocate`;
    `target.on_weights` is called with them while the hash is still being computed.
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
    data = _read_numbers(folder / WEIGHTS, target.allocate)
    digest = hashlib.sha256()
    # In a thread, by one call: hashing in pieces would wait for the GIL before each of them.
    hasher = Thread(target=digest.update, args=(_buffer(data),))
    hasher.start()
    try:
        checked = check_files(f"{folder} cannot be loaded", config, _buffer(data), layers)
        weights = _weights(data, checked)
        target.on_weights(weights)
    finally:
        hasher.join()
    return weights, dict(checked.config), digest.hexdigest()


def _read_numbers(path: Path, allocate: Allocator) -> torch.Tensor:
    """Return a file's bytes as a copy: a memory-mapped file could change or shrink while it is used."""
    with open_regular_file(path, MAX_WEIGHTS) as (file, size):
        data, num_read = allocate(size), 0
        view = _buffer(data)
        while count := file.readinto(view[num_read:]):
            num_read += count
        return data[:num_read]


def _buffer(data: torch.Tensor) -> memoryview:
    """Return a uint8 vector as a memoryview."""
    array: Any = data.numpy()
    return memoryview(array)


def _weights(data: torch.Tensor, checked: CheckedAdapter) -> AdapterWeights:
    """Return the factors of a checked file, as views of its bytes where these are aligned."""
    layout, numbers_start = checked.layout, checked.start
    dtype = TORCH_DTYPES[layout.runs[0].dtype]
    factors: Factors
    if len(layout.runs) == 1 and numbers_start % dtype.itemsize == 0:
        factors = PackedFactors(data[numbers_start:].view(dtype), layout.shapes, layout.offsets)
    else:
        factors = {
            m: (_tensor(data, numbers_start, a), _tensor(data, numbers_start, b))
            for m, (a, b) in layout.pairs.items()
        }
    alphas = {m: float(alpha) for m, alpha in checked.alphas.items()}
    head_tensors = [
        _tensor(data, numbers_start, layout.spans[p]).float() for p in HEAD_KEYS if layout.head
    ]
    head = Head(*head_tensors) if head_tensors else None
    return AdapterWeights(factors, alphas, checked.config["use_rslora"], head, checked=True)


def _tensor(data: torch.Tensor, start: int, span: TensorSpan) -> torch.Tensor:
    begin, dtype = start + span.start, TORCH_DTYPES[span.dtype]
    raw = data[begin : start + span.end]
    return (raw if begin % dtype.itemsize == 0 else raw.clone()).view(dtype).view(span.shape)
