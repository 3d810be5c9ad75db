"""The harness of benches: a process for each way of doing the work, interleaved repeats, medians.

Separate processes keep memory, caches and settings apart; interleaving spreads a drift of the machine's speed
over all of them. Only one process works at a time.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from adapterhub_chat.lora.processor import processor_name


class Worker:
    """A process that does the work of one kind for each request."""

    def __init__(self, module: str, kind: str, settings: Mapping[str, Any]) -> None:
        """Start `python -m module kind settings`, and wait until it is ready."""
        self.kind = kind
        command = [sys.executable, "-m", module, kind, json.dumps(dict(settings))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
        )
        self.ready = self._answer()

    def measure(self, what: str = "run") -> dict[str, Any]:
        """Have the work done once; return the measurements that the process reports."""
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            raise RuntimeError(f"the {self.kind} process ended with code {code}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def serve(work: Callable[[str], Mapping[str, Any]], ready: Mapping[str, Any]) -> None:
    """Run as a worker: print `ready`, then do the work for each line of standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # prints of libraries go to standard error
    print(json.dumps(dict(ready)), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(dict(work(line.strip()))), file=answers, flush=True)


def interleaved(workers: Sequence[Worker], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Have every worker work `repeats` times, interleaved; return the answers by kind."""
    answers_by_kind: dict[str, list[dict[str, Any]]] = {worker.kind: [] for worker in workers}
    for _ in range(repeats):
        for worker in workers:
            answers_by_kind[worker.kind].append(worker.measure())
    return answers_by_kind


def median(answers: Sequence[Mapping[str, Any]], key: str) -> float:
    """Return the median of the answers' values of `key`."""
    return float(statistics.median(answer[key] for answer in answers))


def machine() -> dict[str, Any]:
    """Return processor, threads, device and versions, for the report."""
    return {
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
