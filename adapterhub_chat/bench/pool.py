"""`bench pool`: many adapters on disk and memory for few, beside all of them in memory.

A process fills a pool with adapters; two others answer the same requests in turn: one holds all adapters in
memory, the other a budget's worth. uniform: each request names any adapter. zipf: the n-th adapter is
asked for 1/n as often as the first. Nothing is remembered of earlier prompts. Memory: what
a process had at its peak over what is left without adapters when all is done; of that, the process with a
budget is charged what the other one does not need as well, for the requests themselves.
"""

from __future__ import annotations

import ctypes
import gc
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from adapterhub_chat.api import AdapterHub
from adapterhub_chat.bench.harness import Worker, machine, median, serve
from adapterhub_chat.inference.engine import Engine
from adapterhub_chat.inference.requests import Request
from adapterhub_chat.inference.sampling import Sampling
from adapterhub_chat.model.devices import resident_memory
from adapterhub_chat.types import as_mix

PROMPT = 16
"""Tokens of a prompt."""
TRAFFIC = ("uniform", "zipf")
REST = "rest"
"""Asks a worker what memory it has without adapters, and with how many bytes of them."""


def bench_pool(
    *,
    backbone: str = "smollm2-135m",
    rank: int = 16,
    adapters: int = 500,
    budget: int = 16,
    requests: int = 160,
    rows: int = 16,
    tokens: int = 32,
    repeats: int = 3,
) -> dict[str, Any]:
    """Return tokens per second with a `budget` (in adapters) over those with all in memory."""
    settings = {
        "backbone": backbone,
        "rank": rank,
        "adapters": adapters,
        "requests": requests,
        "rows": rows,
        "tokens": tokens,
    }
    with tempfile.TemporaryDirectory() as pool:
        given = {**settings, "pool": pool}
        saver = Worker("adapterhub_chat.bench.swap", "save", given)
        saver.close()
        size = saver.ready["parameters"] * saver.ready["itemsize"]
        kinds = {"resident": None, "budget": budget * size}
        workers = [Worker(__name__, kind, {**given, "bytes": b}) for kind, b in kinds.items()]
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for turn in range(repeats):
            for traffic in TRAFFIC:
                for worker in workers:
                    done = worker.measure(json.dumps([traffic, turn]))
                    found.setdefault((worker.kind, traffic), []).append(done)
        left = {worker.kind: worker.measure(REST) for worker in workers}
        for worker in workers:
            worker.close()
    table = [
        _row(kind, traffic, done, requests * tokens) for (kind, traffic), done in found.items()
    ]
    speed = {(row["kind"], row["traffic"]): row["tokens_per_second"] for row in table}
    most = {kind: max(row["bytes"] for row in table if row["kind"] == kind) for kind in kinds}
    over = {kind: most[kind] - left[kind]["bytes"] for kind in kinds}
    requests_need = over["resident"] - left["resident"]["adapters"]
    return {
        "bench": "pool",
        "machine": machine(),
        "settings": {
            **settings,
            "budget": budget,
            "budget_bytes": budget * size,
            "repeats": repeats,
        },
        "rows": table,
        "ratios": {
            **{
                f"{traffic}_over_resident": speed["budget", traffic] / speed["resident", traffic]
                for traffic in TRAFFIC
            },
            "memory_over_budget": (over["budget"] - requests_need) / (budget * size),
        },
    }


def _row(kind: str, traffic: str, done: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    seconds = median(done, "seconds")
    return {
        "kind": kind,
        "traffic": traffic,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "loads": median(done, "loads"),
        "bytes": max(answer["bytes"] for answer in done),
    }


# ---- the workers ---------------------------------------------------------------------------------


def pool_worker() -> None:
    """Be a worker of the kind that the command line names."""
    settings = json.loads(sys.argv[2])
    work = answering(settings)
    serve(work, {})


def answering(settings: Mapping[str, Any]) -> Callable[[str], Mapping[str, Any]]:
    """Answer the requests that are described, with as many bytes for adapters as `settings` give."""
    hub = AdapterHub(settings["backbone"], settings["pool"], adapter_bytes=settings["bytes"])
    engine = Engine(hub.model, rows=settings["rows"], prefix_bytes=0)
    vocabulary = hub.backbone.model.config.vocab_size
    first = [f"a{n % settings['rows'] // 2}" for n in range(settings["requests"])]
    _answer(engine, first, vocabulary, settings["tokens"], 0)  # once to set up shapes
    if settings["bytes"] is None:
        for name in hub.pool.names():
            hub.load(name)

    def told(what: str) -> Mapping[str, Any]:
        if what == REST:
            slots = hub.model.slots.nbytes
            return {"bytes": _trimmed_memory() - slots, "adapters": slots}
        traffic, turn = json.loads(what)
        names = draw(traffic, settings["adapters"], settings["requests"], turn)
        loads = hub.model.slots.num_loads
        with _Peak() as peak:
            started = time.perf_counter()
            _answer(engine, names, vocabulary, settings["tokens"], turn)
            seconds = time.perf_counter() - started
        return {
            "seconds": seconds,
            "loads": hub.model.slots.num_loads - loads,
            "bytes": peak.most,
        }

    return told


def draw(traffic: str, adapters: int, requests: int, seed: int) -> list[str]:
    """Return the adapter that each request names."""
    weights = [1.0 if traffic == "uniform" else 1 / (n + 1) for n in range(adapters)]
    chosen = random.Random(f"{traffic} {seed}").choices(range(adapters), weights, k=requests)
    return [f"a{n}" for n in chosen]


def _answer(engine: Engine, names: list[Any], vocabulary: int, tokens: int, seed: int) -> None:
    rng = random.Random(seed)
    rules = Sampling(max_new_tokens=tokens, ignore_eos=True)
    tickets = []
    for name in names:
        prompt = tuple(rng.randrange(10, vocabulary) for _ in range(PROMPT))
        tickets.append(engine.submit(Request(prompt, as_mix(name), rules)))
    for ticket in tickets:
        ticket.result()


def _trimmed_memory() -> int:
    """Return this process's memory after what is free was given back, where the C library can do that."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return resident_memory()


class _Peak:
    """The most memory of this process while the block runs, looked at every few milliseconds."""

    def __enter__(self) -> _Peak:
        self.most, self._ended = resident_memory(), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.01):
            self.most = max(self.most, resident_memory())


if __name__ == "__main__":
    pool_worker()
