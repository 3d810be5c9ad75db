"""Is fp32 or bf16 faster on this processor? A short measurement, kept in the cache folder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from adapterhub_chat.assets.fetch import cache_dir, locked_entry

TRAINING, DECODING = (512,), (1, 16)
"""Rows of the measured products: an adapter's share of a training step, and decoding steps."""
WIDTH, HEIGHT = 576, 1536
NUM_WEIGHTS = 12
"""Decoding reads every weight from memory, so it is measured on more of them than a cache keeps."""
ROUNDS, PATIENCE = 5, 0.05
"""Times that a pair of products is measured, and the seconds after which fewer must do."""
MARGIN = 1.1
"""How many times as fast fp32 must be to make up for twice the memory."""
DTYPE_KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}

Timings = Mapping[str, Mapping[int, float]]
"""`fp32` and `bf16` -> rows of a product -> its seconds."""


@dataclass(frozen=True)
class Choice:
    """A dtype, and why it was taken."""

    dtype: torch.dtype
    why: str = ""
    """A few words for the command line; empty where nothing was measured."""


def choose_dtype(timings: Timings) -> Choice:
    """Return bf16, unless fp32 is clearly faster.

    A backbone has one dtype for training and for decoding. Each of the two is judged by how many times
    as fast fp32 is there, and the geometric mean of both must exceed MARGIN: in a near tie bf16, which
    takes half the memory, is preferred.
    """
    training, decoding = (_gain(timings, rows) for rows in (TRAINING, DECODING))
    if math.sqrt(training * decoding) > MARGIN:
        shown = f"{training:.1f} x as fast as bf16 in training, {decoding:.1f} x in decoding"
        return Choice(torch.float32, f"measured {shown}")
    shown = f"{1 / training:.1f} x as fast as fp32 in training, {1 / decoding:.1f} x in decoding"
    return Choice(torch.bfloat16, f"measured {shown}, half the memory")


def _gain(timings: Timings, rows: tuple[int, ...]) -> float:
    """Return how many times as fast fp32 is, the geometric mean over products of these rows."""
    return statistics.geometric_mean(timings["bf16"][n] / timings["fp32"][n] for n in rows)


def measure_products() -> dict[str, dict[int, float]]:
    """Return the median seconds of products in both dtypes, measured in turn."""
    weights = {
        name: [torch.full((HEIGHT, WIDTH), 0.01, dtype=kind) for _ in range(NUM_WEIGHTS)]
        for name, kind in DTYPE_KINDS.items()
    }
    found: dict[str, dict[int, float]] = {name: {} for name in DTYPE_KINDS}
    for rows in (*TRAINING, *DECODING):
        taken: dict[str, list[float]] = {name: [] for name in DTYPE_KINDS}
        started = time.perf_counter()
        for turn in range(1 + ROUNDS):
            if turn > 1 and time.perf_counter() - started > PATIENCE:
                break
            for name, kind in DTYPE_KINDS.items():
                own = weights[name][: 1 if rows in TRAINING else NUM_WEIGHTS]
                seconds = _seconds(torch.full((rows, WIDTH), 0.01, dtype=kind), own)
                taken[name] += [seconds] if turn else []  # the first one makes its kernel
        for name, times in taken.items():
            found[name][rows] = statistics.median(times)
    return found


def _seconds(x: Tensor, weights: list[Tensor]) -> float:
    """Return the mean seconds of the products of `x` with each of the weights."""
    started = time.perf_counter()
    for weight in weights:
        functional.linear(x, weight)
    return (time.perf_counter() - started) / len(weights)


def kept_timings(
    path: Path, measure: Callable[[], dict[str, dict[int, float]]] = measure_products
) -> Timings:
    """Return the timings kept in `path`; where there are none that can be read, measure and keep them.

    A folder that cannot be written keeps nothing. Of processes that start together one measures, so
    that all of them choose the same dtype.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(locked_entry(path))
        found = _read(path)
        if found is None:
            found = measure()
            with contextlib.suppress(OSError):
                _write(path, found)
        return found


def _read(path: Path) -> Timings | None:
    """Return the timings in a file, None where it is missing or damaged."""
    try:
        kept = json.loads(path.read_text("utf-8"))["seconds"]
        found = {
            name: {int(rows): float(s) for rows, s in kept[name].items()} for name in DTYPE_KINDS
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    wanted = {*TRAINING, *DECODING}
    whole = all(
        found[name].keys() == wanted and all(0 < s < math.inf for s in found[name].values())
        for name in DTYPE_KINDS
    )
    return found if whole else None


def _write(path: Path, timings: Timings) -> None:
    """Write the timings beside `path`, then rename: whatever bears the name is whole."""
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.tmp-", dir=path.parent) as scratch:
        file = Path(scratch, path.name)
        file.write_text(json.dumps({**machine(), "seconds": timings}, indent=2) + "\n", "utf-8")
        file.replace(path)


def machine() -> dict[str, str | int]:
    """Return all that decides how fast products are here: a change of it measures anew."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    fields = dict(reversed([_field(line) for line in text.splitlines()]))  # the first one stays
    flags = hashlib.sha256(fields.get("flags", "").encode()).hexdigest()[:16]
    return {
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "flags": flags,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
    }


def _field(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip(), value.strip()


def timings_here() -> Timings | None:
    """Return the timings of this processor, None where it computes no products in bf16 by itself."""
    if not _cpu_has_bf16():
        return None
    key = hashlib.sha256(json.dumps(machine(), sort_keys=True).encode()).hexdigest()[:16]
    return _once(cache_dir() / "native_speed" / f"{key}.json")


_once = functools.cache(kept_timings)


def _cpu_has_bf16() -> bool:
    """Return whether matrix products in bf16 are native (AVX512-BF16 or AMX), not emulated."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, check, lambda: False)()) for check in checks)
