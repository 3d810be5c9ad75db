"""`bench swap`: latency of switching to another adapter, resident and cold.

A separate process fills a pool with random adapters on all linear layers, with probes. Then, interleaved:
here: `hub.load` of one adapter after another, all of which stay loaded; peft: `load_adapter` of some of the
same folders. Every second file is in the system's cache when it is loaded, the others are read from the disk
(if the system can drop a file from its cache). At the end, here: `with hub.use(name)` among the loaded
adapters.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adapterhub_chat.api import AdapterHub
from adapterhub_chat.artifact.manifest import Manifest
from adapterhub_chat.artifact.safetensors_header import WEIGHTS
from adapterhub_chat.bench.harness import Worker, machine, median, serve
from adapterhub_chat.bench.mixed import random_adapter
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.backbone import load_backbone
from adapterhub_chat.model.devices import pick_dtype
from adapterhub_chat.pool.pool import Pool
from adapterhub_chat.pool.registry import Registry
from adapterhub_chat.types import PromptContract

NUM_COMPARED_LOADS = 10
"""Number of first and of last loads that are compared."""

ROW_NAMES = {"here": ("cached", "disk"), "peft": ("peft, cached", "peft, disk")}
"""Kind of worker -> names of its loads with the file in the system's cache, and from the disk."""

SwapWork = Callable[[str], Mapping[str, Any]]


def bench_swap(
    *,
    backbone: str = "smollm2-135m",
    rank: int = 16,
    adapters: int = 200,
    switches: int = 500,
    peft_every: int = 20,
    repeats: int = 1,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Return the milliseconds of a switch and of a load, and the ratio of the last loads to the first.

    `adapters` is at least 2; PEFT, whose loads are slow, loads two of every `peft_every` adapters. Each
    repeat starts with nothing loaded. `cold_ms` is a load from the disk of an adapter without a slot, and
    `cold_read_ms` the disk's part of it; the file of a `cached_ms` is in the system's cache. `dtype` is that
    of backbone and adapters, None the fastest; fp32 has twice the bytes to hash.
    """
    pick_dtype(dtype, torch.device("cpu"))  # raises for an unknown dtype, before any process starts
    settings = {"backbone": backbone, "rank": rank, "adapters": adapters, "switches": switches}
    settings["dtype"] = dtype
    with tempfile.TemporaryDirectory() as pool:
        worker_settings = {**settings, "pool": pool}
        saver = Worker(__name__, "save", worker_settings)
        saver.close()
        runs = [_run(worker_settings, peft_every) for _ in range(repeats)]
    seconds_by_kind = {kind: [s for run in runs for s in run[kind]] for kind in runs[0]}
    ends = [_first_and_last(run["cached"]) for run in runs]
    size = {name: saver.ready[name] for name in ("parameters", "itemsize")}
    first_and_last = {
        "first_ms": 1000 * statistics.median(first for first, _ in ends),
        "last_ms": 1000 * statistics.median(last for _, last in ends),
    }
    by_kind = {
        kind: {"kind": kind, **_milliseconds(times)} for kind, times in seconds_by_kind.items()
    }
    by_kind["cached"] |= {**size, **first_and_last}
    ms_by_kind = {kind: row["ms"] for kind, row in by_kind.items()}
    return {
        "bench": "swap",
        "machine": machine(),
        "settings": {**settings, "peft_every": peft_every, "repeats": repeats},
        "rows": list(by_kind.values()),
        "ratios": {
            "resident_ms": ms_by_kind["resident"],
            "cold_ms": ms_by_kind["disk"],
            "cold_read_ms": ms_by_kind["disk, read only"],
            "cold_peft_ms": ms_by_kind.get("peft, disk"),
            "cached_ms": ms_by_kind["cached"],
            "cached_peft_ms": ms_by_kind.get("peft, cached"),
            "cached_last_over_first": statistics.median(last / first for first, last in ends),
        },
    }


def _run(settings: Mapping[str, Any], peft_every: int) -> dict[str, list[float]]:
    """Return the seconds of every load and switch, in new processes."""
    workers = {"here": Worker(__name__, "here", settings)}
    if importlib.util.find_spec("peft") is not None:
        workers["peft"] = Worker(__name__, "peft", settings)
    seconds_by_kind: dict[str, list[float]] = defaultdict(list, cached=[])
    for n in range(0, settings["adapters"] - 1, 2):
        kinds = [kind for kind in workers if kind == "here" or n % peft_every == 0]
        cached_file, disk_file = (Path(settings["pool"]) / f"a{m}" / WEIGHTS for m in (n, n + 1))
        cached_file.read_bytes()  # into memory; the time before its load flushes processor caches
        drop_from_cache(disk_file)
        seconds_by_kind["disk, read only"].append(_timed(disk_file.read_bytes))
        for kind in kinds:
            drop_from_cache(disk_file)
            seconds_by_kind[ROW_NAMES[kind][1]].append(
                workers[kind].measure(f"a{n + 1}")["seconds"]
            )
        for kind in kinds:
            seconds_by_kind[ROW_NAMES[kind][0]].append(workers[kind].measure(f"a{n}")["seconds"])
    seconds_by_kind["resident"] = workers["here"].measure("switch")["seconds"]
    for worker in workers.values():
        worker.close()
    return seconds_by_kind


def drop_from_cache(file: Path) -> None:
    """Have the system drop a file from its cache, if the platform can."""
    if not hasattr(os, "posix_fadvise"):
        return
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def _first_and_last(seconds: Sequence[float]) -> tuple[float, float]:
    """Return the medians of the first loads and of the last ones."""
    count = min(NUM_COMPARED_LOADS, len(seconds))
    return statistics.median(seconds[:count]), statistics.median(seconds[-count:])


def _milliseconds(seconds: Sequence[float]) -> dict[str, Any]:
    return {
        "times": len(seconds),
        "ms": 1000 * median([{"seconds": s} for s in seconds], "seconds"),
        "worst_ms": 1000 * max(seconds),
    }


# ---- the workers ---------------------------------------------------------------------------------


def swap_worker() -> None:
    """Run as the worker whose kind the command line names."""
    kind, settings = sys.argv[1], json.loads(sys.argv[2])
    if kind == "save":
        sizes = save_adapters(settings)
        serve(sizes.__getitem__, sizes)  # the work is done before
    else:
        serve(SWAP_WORKERS[kind](settings), {})


def save_adapters(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fill the pool with random adapters in the backbone's dtype; return the size of one."""
    backbone = load_backbone(settings["backbone"], dtype=settings.get("dtype"))
    registry = Registry(AdapterModel(backbone), Pool(settings["pool"]))
    size = 0
    for n in range(settings["adapters"]):
        weights = random_adapter(registry.model, settings["rank"], n).to(backbone.dtype)
        size = weights.num_parameters
        manifest = Manifest(
            name=f"a{n}",
            backbone=backbone.name,
            fingerprint=backbone.fingerprint,
            contract=PromptContract(),
        )
        registry.save_new(weights, manifest)
        registry.unload(f"a{n}")
    return {"parameters": size, "itemsize": backbone.dtype.itemsize}


def hub_loader(settings: Mapping[str, Any]) -> SwapWork:
    """Return a worker's function: load a named adapter, or for "switch" use the loaded ones in turn."""
    hub = AdapterHub(settings["backbone"], settings["pool"], dtype=settings.get("dtype"))

    def answer(what: str) -> Mapping[str, Any]:
        if what != "switch":
            return {"seconds": _timed(lambda: hub.load(what))}
        names = hub.model.names
        switch_names = [names[n % len(names)] for n in range(settings["switches"])]
        return {"seconds": [_timed(partial(_switch, hub, name)) for name in switch_names]}

    return answer


def _switch(hub: AdapterHub, name: str) -> None:
    with hub.use(name):
        pass


def peft_loader(settings: Mapping[str, Any]) -> SwapWork:
    """Return a worker's function that loads a named adapter with PEFT, by its fastest options."""
    peft: Any = importlib.import_module("peft")
    backbone = load_backbone(settings["backbone"], dtype=settings.get("dtype"))
    backbone.model.set_attn_implementation("sdpa")
    folder, options = Path(settings["pool"]), {"low_cpu_mem_usage": True}
    model = peft.PeftModel.from_pretrained(
        backbone.model, folder / "a0", adapter_name="start", autocast_adapter_dtype=False, **options
    )

    def answer(what: str) -> Mapping[str, Any]:
        def load() -> None:
            model.load_adapter(folder / what, what, autocast_adapter_dtype=False, **options)

        return {"seconds": _timed(load)}

    return answer


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


SWAP_WORKERS: Mapping[str, Callable[[Mapping[str, Any]], SwapWork]] = {
    "here": hub_loader,
    "peft": peft_loader,
}

if __name__ == "__main__":
    swap_worker()
