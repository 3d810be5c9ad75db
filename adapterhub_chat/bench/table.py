"""The benches by name, and their results as lines of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from adapterhub_chat.bench.kernels import bench_kernels
from adapterhub_chat.bench.mixed import bench_mixed
from adapterhub_chat.bench.pool import bench_pool
from adapterhub_chat.bench.swap import bench_swap
from adapterhub_chat.bench.train import bench_train

BENCHES: Mapping[str, Callable[..., dict[str, Any]]] = {
    "kernels": bench_kernels,
    "mixed": bench_mixed,
    "pool": bench_pool,
    "swap": bench_swap,
    "train": bench_train,
}


def format_rows(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each row of a bench's result, then its ratios."""
    for row in result["rows"]:
        columns = [(n, v) for n, v in row.items() if isinstance(v, int | float | str)]
        yield "  ".join(f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}" for n, v in columns)
    for name, ratio in result["ratios"].items():
        yield f"{name}: {'not measured' if ratio is None else f'{ratio:.3f}'}"
