"""Device and dtype of a backbone, and the memory that the process uses."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from adapterhub_chat.errors import UsageError
from adapterhub_chat.model.native_speed import DtypeChoice, Timings, choose_dtype, cpu_timings

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of the GPU, else of this process (0 if unavailable).

    Linux' VmHWM is preferred to `ru_maxrss`, which a process inherits from the one that started it.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return _max_rss()
    lines = (line.split() for line in status.splitlines() if line.startswith("VmHWM"))
    return next((int(kib) * 1024 for _, kib, *_ in lines), 0)


def _max_rss() -> int:
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_memory() -> int:
    """Return the resident memory of this process in bytes."""
    return int(psutil.Process().memory_info().rss)


def pick_device(device: torch.device | str | None) -> torch.device:
    """Return the device asked for, else CUDA if available (by LOCAL_RANK under torchrun), else the CPU."""
    if device is None and not torch.cuda.is_available():
        return torch.device("cpu")
    if device is None:
        rank = os.environ.get("LOCAL_RANK")  # set by torchrun
        return torch.device("cuda" if rank is None else f"cuda:{rank}")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device={str(device)!r} cannot be used here: {error}") from error
    return chosen


def pick_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """Return the dtype asked for, else the default of the device; see explain_dtype."""
    return explain_dtype(dtype, device).dtype


def explain_dtype(
    dtype: torch.dtype | str | None,
    device: torch.device,
    measure: Callable[[], Timings | None] = cpu_timings,
) -> DtypeChoice:
    """Return the dtype asked for, else the default of the device, and the reason.

    On CUDA that is bf16 where it is native, else fp32. On a CPU without bf16 instructions it is fp32;
    with them, `measure` times both (once for each machine), and `choose_dtype` decides.
    """
    if isinstance(dtype, torch.dtype):
        return DtypeChoice(dtype)
    if dtype is not None:
        if dtype not in DTYPES:
            raise UsageError(f"dtype={dtype!r}: allowed are {', '.join(DTYPES)}, or None to choose")
        return DtypeChoice(DTYPES[dtype])
    if device.type == "cuda":
        return DtypeChoice(torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32)
    timings = measure()
    return DtypeChoice(torch.float32) if timings is None else choose_dtype(timings)
