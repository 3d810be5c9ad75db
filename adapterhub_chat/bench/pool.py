"""`bench pool`: serving many adapters with memory for few of them, compared with all in memory.

A process fills a pool with adapters; two others answer the same requests in turn: `resident` holds all
adapters in memory, `budget` as many as its budget allows. uniform: each request names a random adapter. zipf:
the n-th adapter is requested 1/n times as often as the first. There is no prefix cache. Memory is a process's
peak minus its memory without adapters at the end; from that of `budget`, the memory that `resident` needs for
the requests is subtracted.
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

NUM_PROMPT_TOKENS = 16
"""Tokens of a prompt."""
TRAFFIC_KINDS = ("uniform", "zipf")
REST_COMMAND = "rest"
"""Command to a worker: report its memory without adapters, and the bytes of its adapters."""


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
    """Return tokens per second with a `budget` (in adapters), relative to all in memory."""
    settings = {
        "backbone": backbone,
        "rank": rank,
        "adapters": adapters,
        "requests": requests,
        "rows": rows,
        "tokens": tokens,
    }
    with tempfile.TemporaryDirectory() as pool:
        worker_settings = {**settings, "pool": pool}
        saver = Worker("adapterhub_chat.bench.swap", "save", worker_settings)
        saver.close()
        size = saver.ready["parameters"] * saver.ready["itemsize"]
        kinds = {"resident": None, "budget": budget * size}
        workers = [
            Worker(__name__, kind, {**worker_settings, "bytes": b}) for kind, b in kinds.items()
        ]
        answers: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for turn in range(repeats):
            for traffic in TRAFFIC_KINDS:
                for worker in workers:
                    answer = worker.measure(json.dumps([traffic, turn]))
                    answers.setdefault((worker.kind, traffic), []).append(answer)
        rest = {worker.kind: worker.measure(REST_COMMAND) for worker in workers}
        for worker in workers:
            worker.close()
    result_rows = [
        _row(kind, traffic, answer, requests * tokens)
        for (kind, traffic), answer in answers.items()
    ]
    speed = {(row["kind"], row["traffic"]): row["tokens_per_second"] for row in result_rows}
    peak_bytes = {
        kind: max(row["bytes"] for row in result_rows if row["kind"] == kind) for kind in kinds
    }
    adapter_bytes = {kind: peak_bytes[kind] - rest[kind]["bytes"] for kind in kinds}
    request_bytes = adapter_bytes["resident"] - rest["resident"]["adapters"]
    return {
        "bench": "pool",
        "machine": machine(),
        "settings": {
            **settings,
            "budget": budget,
            "budget_bytes": budget * size,
            "repeats": repeats,
        },
        "rows": result_rows,
        "ratios": {
            **{
                f"{traffic}_over_resident": speed["budget", traffic] / speed["resident", traffic]
                for traffic in TRAFFIC_KINDS
            },
            "memory_over_budget": (adapter_bytes["budget"] - request_bytes) / (budget * size),
        },
    }


def _row(kind: str, traffic: str, answers: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    seconds = median(answers, "seconds")
    return {
        "kind": kind,
        "traffic": traffic,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "loads": median(answers, "loads"),
        "bytes": max(answer["bytes"] for answer in answers),
    }


# ---- the workers ---------------------------------------------------------------------------------


def pool_worker() -> None:
    """Run as the worker whose kind the command line names."""
    settings = json.loads(sys.argv[2])
    work = answering(settings)
    serve(work, {})


def answering(settings: Mapping[str, Any]) -> Callable[[str], Mapping[str, Any]]:
    """Return a worker's function that answers described requests within `settings["bytes"]` of adapters."""
    hub = AdapterHub(settings["backbone"], settings["pool"], adapter_bytes=settings["bytes"])
    engine = Engine(hub.model, rows=settings["rows"], prefix_bytes=0)
    vocabulary = hub.backbone.model.config.vocab_size
    first = [f"a{n % settings['rows'] // 2}" for n in range(settings["requests"])]
    _answer(engine, first, vocabulary, settings["tokens"], 0)  # once to set up shapes
    if settings["bytes"] is None:
        for name in hub.pool.names():
            hub.load(name)

    def answer(what: str) -> Mapping[str, Any]:
        if what == REST_COMMAND:
            slots = hub.model.slots.nbytes
            return {"bytes": _trimmed_memory() - slots, "adapters": slots}
        traffic, turn = json.loads(what)
        names = draw(traffic, settings["adapters"], settings["requests"], turn)
        loads = hub.model.slots.num_loads
        with _PeakMemory() as peak:
            started = time.perf_counter()
            _answer(engine, names, vocabulary, settings["tokens"], turn)
            seconds = time.perf_counter() - started
        return {
            "seconds": seconds,
            "loads": hub.model.slots.num_loads - loads,
            "bytes": peak.most,
        }

    return answer


def draw(traffic: str, adapters: int, requests: int, seed: int) -> list[str]:
    """Return the adapter name of each request."""
    weights = [1.0 if traffic == "uniform" else 1 / (n + 1) for n in range(adapters)]
    chosen = random.Random(f"{traffic} {seed}").choices(range(adapters), weights, k=requests)
    return [f"a{n}" for n in chosen]


def _answer(engine: Engine, names: list[Any], vocabulary: int, tokens: int, seed: int) -> None:
    rng = random.Random(seed)
    sampling = Sampling(max_new_tokens=tokens, ignore_eos=True)
    tickets = []
    for name in names:
        prompt = tuple(rng.randrange(10, vocabulary) for _ in range(NUM_PROMPT_TOKENS))
        tickets.append(engine.submit(Request(prompt, as_mix(name), sampling)))
    for ticket in tickets:
        ticket.result()


def _trimmed_memory() -> int:
    """Return this process's memory after freed memory was returned to the system, if the C library can."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return resident_memory()


class _PeakMemory:
    """The peak memory of this process during the block, sampled every 10 ms."""

    def __enter__(self) -> _PeakMemory:
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
