"""`bench kernels`: times of the three forms of the LoRA product, the basis of lora/kernels.py."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from adapterhub_chat.lora.kernels import Batched, Dense, Form, Ragged
from adapterhub_chat.model.devices import pick_device, pick_dtype

WIDTH = 576
SHAPES = ((16, 1), (16, 8), (32, 32), (512, 1), (512, 8), (1024, 4), (2048, 16))
"""(rows, adapters): decode, prefill and training shapes of the default backbone."""
RANK = 16


def bench_kernels(*, repeats: int = 15) -> dict[str, Any]:
    """Return the median microseconds of each form and of the linear layer at each shape."""
    device = pick_device(None)
    kind = pick_dtype(None, device)
    rows: list[dict[str, Any]] = []
    for dtype in dict.fromkeys((kind, torch.float32)):
        for train in (False, True):
            for num_rows, groups in SHAPES:
                times_by_form = _case(num_rows, groups, dtype, device, train=train, repeats=repeats)
                name = f"{str(dtype)[6:]} {'train' if train else 'infer'} rows={num_rows} adapters={groups}"
                rows.append({"case": name, **times_by_form})
    ratios = {f"{r['case']} ragged/batched": r["ragged"] / r["batched"] for r in rows}
    return {
        "bench": "kernels",
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "device": str(device),
            "torch": torch.__version__,
        },
        "settings": {"width": WIDTH, "rank": RANK, "repeats": repeats},
        "rows": rows,
        "ratios": ratios,
    }


def _case(
    rows: int,
    groups: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    train: bool,
    repeats: int,
) -> dict[str, float]:

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    x = normal(rows, 1, WIDTH).requires_grad_(train)
    a = normal(groups, RANK, WIDTH).requires_grad_(train)
    b = normal(groups, RANK, WIDTH).requires_grad_(train)
    w = normal(WIDTH, WIDTH)
    rows_per_group = rows // groups
    order = torch.arange(rows, device=device)
    ends = torch.arange(1, groups + 1, device=device, dtype=torch.int32) * rows_per_group
    mask = torch.zeros(rows, 1, groups, 1, dtype=dtype, device=device)
    mask[order, 0, order // rows_per_group] = 1
    forms: dict[str, Form] = {
        "batched": Batched(groups, rows_per_group, None, None, None),
        "ragged": Ragged(order, order, ends, None),
        "dense": Dense(mask),
    }
    calls: dict[str, Callable[[], torch.Tensor]] = {"linear": lambda: x @ w.T}
    for name, form in forms.items():
        calls[name] = lambda form=form: form.add(zeros.clone(), form.shrink(x, a), b)  # type: ignore[misc, has-type]
    gradient, zeros = normal(rows, 1, WIDTH), torch.zeros_like(x)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            with torch.set_grad_enabled(train):
                y = call()
                if train:
                    y.backward(gradient.view_as(y))
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) * 1e6)
    return {name: statistics.median(t[2:]) for name, t in times.items()}
