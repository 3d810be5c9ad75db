"""The faster dtype on this CPU, fp32 or bf16: a short measurement, kept in the cache folder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from adapterhub_chat.assets.fetch import cache_dir, locked_entry
from adapterhub_chat.files import replaced_file
from adapterhub_chat.lora.processor import cpu_fields, processor_name

TRAINING_ROWS, DECODING_ROWS = (512,), (1, 16)
"""Rows of the measured products: an adapter's share of a training step, and decoding steps."""
IN_FEATURES, OUT_FEATURES = 576, 1536
NUM_WEIGHTS = 12
"""Weights in the decoding measurement: more than a CPU cache holds, as decoding reads them from memory."""
MAX_REPEATS, MAX_SECONDS = 5, 0.05
"""Repeats of a measurement, and the seconds after which no further repeat begins."""
MIN_SPEEDUP = 1.1
"""Speed-up from which fp32 is chosen in spite of twice the memory."""
DTYPES_BY_NAME = {"fp32": torch.float32, "bf16": torch.bfloat16}

Timings = Mapping[str, Mapping[int, float]]
"""`fp32` and `bf16` -> rows of a product -> seconds."""


@dataclass(frozen=True)
class DtypeChoice:
    """A dtype and the reason for it."""

    dtype: torch.dtype
    reason: str = ""
    """A few words for the command line; empty if nothing was measured."""


def choose_dtype(timings: Timings) -> DtypeChoice:
    """Return bf16, unless fp32 is clearly faster.

    A backbone has one dtype for training and for decoding: the geometric mean of fp32's speed-ups in both
    must exceed MIN_SPEEDUP. In a near tie bf16, which takes half the memory, is preferred.
    """
    training, decoding = (_fp32_speedup(timings, rows) for rows in (TRAINING_ROWS, DECODING_ROWS))
    if math.sqrt(training * decoding) > MIN_SPEEDUP:
        speedups = f"{training:.1f} x as fast as bf16 in training, {decoding:.1f} x in decoding"
        return DtypeChoice(torch.float32, f"measured {speedups}")
    speedups = f"{1 / training:.1f} x as fast as fp32 in training, {1 / decoding:.1f} x in decoding"
    return DtypeChoice(torch.bfloat16, f"measured {speedups}, half the memory")


def _fp32_speedup(timings: Timings, rows: tuple[int, ...]) -> float:
    """Return the geometric mean of bf16's seconds over fp32's, for products of these rows."""
    return statistics.geometric_mean(timings["bf16"][n] / timings["fp32"][n] for n in rows)


def measure_products() -> dict[str, dict[int, float]]:
    """Return the median seconds of products in both dtypes, measured alternately."""
    weights = {
        name: [
            torch.full((OUT_FEATURES, IN_FEATURES), 0.01, dtype=dtype) for _ in range(NUM_WEIGHTS)
        ]
        for name, dtype in DTYPES_BY_NAME.items()
    }
    medians: dict[str, dict[int, float]] = {name: {} for name in DTYPES_BY_NAME}
    for rows in (*TRAINING_ROWS, *DECODING_ROWS):
        seconds: dict[str, list[float]] = {name: [] for name in DTYPES_BY_NAME}
        started = time.perf_counter()
        for repeat in range(1 + MAX_REPEATS):
            if repeat > 1 and time.perf_counter() - started > MAX_SECONDS:
                break
            for name, dtype in DTYPES_BY_NAME.items():
                num_weights = 1 if rows in TRAINING_ROWS else NUM_WEIGHTS
                x = torch.full((rows, IN_FEATURES), 0.01, dtype=dtype)
                mean = _mean_seconds(x, weights[name][:num_weights])
                if repeat:  # the first run compiles the kernel
                    seconds[name].append(mean)
        for name, times in seconds.items():
            medians[name][rows] = statistics.median(times)
    return medians


def _mean_seconds(x: Tensor, weights: list[Tensor]) -> float:
    """Return the mean seconds of the products of `x` with each of the weights."""
    started = time.perf_counter()
    for weight in weights:
        functional.linear(x, weight)
    return (time.perf_counter() - started) / len(weights)


def cached_timings(
    path: Path, measure: Callable[[], dict[str, dict[int, float]]] = measure_products
) -> Timings:
    """Return the timings in the file `path`; if it cannot be read, measure and write it.

    Nothing is written to a read-only folder. Of processes that start together one measures, so that all
    of them choose the same dtype.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(locked_entry(path))
        timings = _read(path)
        if timings is None:
            timings = measure()
            with contextlib.suppress(OSError):
                _write(path, timings)
        return timings


def _read(path: Path) -> Timings | None:
    """Return the timings in a file, None where it is missing or damaged."""
    try:
        saved = json.loads(path.read_text("utf-8"))["seconds"]
        timings = {
            name: {int(rows): float(s) for rows, s in saved[name].items()}
            for name in DTYPES_BY_NAME
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    expected = {*TRAINING_ROWS, *DECODING_ROWS}
    is_valid = all(
        by_rows.keys() == expected and all(0 < s < math.inf for s in by_rows.values())
        for by_rows in timings.values()
    )
    return timings if is_valid else None


def _write(path: Path, timings: Timings) -> None:
    """Write the timings beside `path`, then rename: whatever bears the name is whole."""
    with replaced_file(path) as scratch:
        scratch.write_text(json.dumps({**machine(), "seconds": timings}, indent=2) + "\n", "utf-8")


def machine() -> dict[str, str | int]:
    """Return what decides the speed of products: when it changes, they are measured again."""
    flags = hashlib.sha256(cpu_fields().get("flags", "").encode()).hexdigest()[:16]
    return {
        "processor": processor_name(),
        "flags": flags,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
    }


def cpu_timings() -> Timings | None:
    """Return the timings of this processor, None if it has no bf16 instructions."""
    if not _cpu_has_bf16():
        return None
    key = hashlib.sha256(json.dumps(machine(), sort_keys=True).encode()).hexdigest()[:16]
    return _timings_of_file(cache_dir() / "native_speed" / f"{key}.json")


_timings_of_file = functools.cache(cached_timings)


def _cpu_has_bf16() -> bool:
    """Return whether matrix products in bf16 are native (AVX512-BF16 or AMX), not emulated."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, check, lambda: False)()) for check in checks)
