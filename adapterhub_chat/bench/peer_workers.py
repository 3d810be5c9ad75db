"""Workers of `bench mixed` that run other engines' servers: vLLM and llama.cpp, over HTTP.

They get the same prompts, as token ids, and the same adapters, in each engine's file format. All rows of a
case are requested at once, row i for adapter i % adapters, greedily, ignoring the end of turn, without a
prefix cache. Each engine runs two servers, since adapters slow down its backbone even for requests without
one: one server without adapters, and one with all of them. A server runs only during its own measurements and
is stopped (SIGSTOP) during all others, since an idle one uses the cores.

vllm: the backbone in bf16. llamacpp: the backbone's GGUF file, 4-bit if that is; llama.cpp computes requests
for different adapters one adapter after another.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import torch

from adapterhub_chat.artifact.folder import config_of, write_weights
from adapterhub_chat.artifact.peft_config import CONFIG
from adapterhub_chat.artifact.safetensors_header import WEIGHTS
from adapterhub_chat.bench.harness import serve
from adapterhub_chat.bench.mixed import PROMPT_TOKENS, prompts_of, random_adapter
from adapterhub_chat.bench.peers import Server, free_port, gguf_of, installed, python_of
from adapterhub_chat.export.gguf_adapter import write_gguf
from adapterhub_chat.lora.weights import AdapterWeights
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.backbone import Backbone, load_backbone

LLAMACPP = """
import json, sys, threading, xllamacpp
settings = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path = settings["model"]
params.port = settings["port"]
params.n_parallel = settings["rows"]
params.n_ctx = settings["cells"]
params.kv_unified = True  # mixed batches are half as fast again with it
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
params.n_threads_http = settings["rows"] + 2
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in settings["adapters"]]
params.lora_init_without_apply = True
server = xllamacpp.Server(params)
threading.Event().wait()
"""
"""The program that runs in llama.cpp's environment: its server, as a library."""


class Peer(ABC):
    """An engine: its files, its command line and its requests."""

    route: str
    variables: Mapping[str, str] = {}

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Use `settings`, and write files into `folder`."""
        self.folder, self.settings = folder, settings
        self.python = python_of(settings["peers"], settings["kind"])

    @abstractmethod
    def write_backbone(self, backbone: Backbone) -> None:
        """Write the files of the backbone that the server needs."""

    @abstractmethod
    def write_adapter(self, n: int, weights: AdapterWeights, backbone: Backbone) -> None:
        """Write adapter number n."""

    @abstractmethod
    def command(self, port: int, adapters: int) -> list[str]:
        """Return the command line of a server with `adapters` adapters (0: none)."""

    @abstractmethod
    def body(self, prompt: Sequence[int], adapter: int | None, tokens: int) -> dict[str, Any]:
        """Return the request that continues `prompt` by `tokens` tokens."""

    @abstractmethod
    def count(self, answer: Mapping[str, Any]) -> int:
        """Return the number of tokens of an answer."""


class VLLM(Peer):
    """vLLM's OpenAI-compatible server."""

    route = "/v1/completions"

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Bind it to as many cores as this project uses; by default it leaves one free."""
        super().__init__(folder, settings)
        cores = sorted(os.sched_getaffinity(0))[: torch.get_num_threads()]
        self.variables = {
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; 32 rows take a tenth
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def write_backbone(self, backbone: Backbone) -> None:
        """Write a folder in transformers' format."""
        backbone.model.save_pretrained(self.folder / "backbone")
        backbone.tokenizer.save_pretrained(self.folder / "backbone")

    def write_adapter(self, n: int, weights: AdapterWeights, backbone: Backbone) -> None:
        """Write a folder in PEFT's format."""
        target = self.folder / f"a{n}"
        target.mkdir()
        shapes = {m: (a.shape[1], b.shape[0]) for m, (a, b) in weights.factors.items()}
        config = config_of(weights, "backbone", shapes)
        (target / CONFIG).write_text(json.dumps(config), "utf-8")
        write_weights(target / WEIGHTS, weights.to(backbone.dtype))

    def command(self, port: int, adapters: int) -> list[str]:
        """Start by module; the `vllm` command fails, since it looks for a package of another name."""
        tokens = PROMPT_TOKENS + self.settings["tokens"] + 1
        command = [self.python, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", "backbone", "--served-model-name", "backbone"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
        command += ["--max-model-len", str(tokens), "--max-num-seqs", str(self.settings["rows"])]
        command += ["--no-enable-prefix-caching"]
        if adapters:
            command += ["--enable-lora", "--max-loras", str(adapters)]
            command += ["--max-lora-rank", str(max(8, self.settings["rank"]))]
            command += ["--lora-modules", *(f"a{n}=a{n}" for n in range(adapters))]
        return command

    def body(self, prompt: Sequence[int], adapter: int | None, tokens: int) -> dict[str, Any]:
        """Return a request that names the adapter as the model."""
        return {
            "model": "backbone" if adapter is None else f"a{adapter}",
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
        }

    def count(self, answer: Mapping[str, Any]) -> int:
        """Return the number that the server reports."""
        return int(answer["usage"]["completion_tokens"])


class LlamaCpp(Peer):
    """llama.cpp's server."""

    route = "/completion"

    def write_backbone(self, backbone: Backbone) -> None:
        """Find the backbone's GGUF file."""
        path = gguf_of(backbone.name)
        assert path is not None, f"{backbone.name} is no GGUF file"
        self.model = path

    def write_adapter(self, n: int, weights: AdapterWeights, backbone: Backbone) -> None:
        """Write a GGUF file."""
        write_gguf(self.folder / f"a{n}.gguf", weights, backbone.model.config.to_dict())

    def command(self, port: int, adapters: int) -> list[str]:
        """Run LLAMACPP."""
        settings = {
            "model": str(self.model),
            "port": port,
            "rows": self.settings["rows"],
            "cells": self.settings["rows"] * (PROMPT_TOKENS + self.settings["tokens"] + 1),
            "threads": torch.get_num_threads(),
            "adapters": [f"a{n}.gguf" for n in range(adapters)],
        }
        return [self.python, "-c", LLAMACPP, json.dumps(settings)]

    def body(self, prompt: Sequence[int], adapter: int | None, tokens: int) -> dict[str, Any]:
        """Return a request that names the adapter by number; without `lora` all adapters would be active."""
        return {
            "prompt": list(prompt),
            "n_predict": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "lora": [{"id": adapter or 0, "scale": float(adapter is not None)}],
        }

    def count(self, answer: Mapping[str, Any]) -> int:
        """Return the number that the server reports."""
        return int(answer["tokens_predicted"])


PEERS: Mapping[str, type[Peer]] = {"vllm": VLLM, "llamacpp": LlamaCpp}


def ask_all(
    server: Server, peer: Peer, prompts: Sequence[Sequence[int]], adapters: int, tokens: int
) -> float:
    """Ask for all rows at once; return the seconds until the last answer."""
    bodies = [
        peer.body(prompt, row % adapters if adapters else None, tokens)
        for row, prompt in enumerate(prompts)
    ]
    with ThreadPoolExecutor(len(bodies)) as pool:
        started = time.perf_counter()
        answers = list(pool.map(lambda body: server.ask(peer.route, body), bodies))
        seconds = time.perf_counter() - started
    if wrong_counts := [n for n in map(peer.count, answers) if n != tokens]:
        raise RuntimeError(
            f"the {server.name} server made {wrong_counts[0]} tokens instead of {tokens}"
        )
    return seconds


def peer_worker() -> None:
    """Run as the worker whose kind the command line names."""
    kind, settings = sys.argv[1], json.loads(sys.argv[2])
    signal.signal(signal.SIGTERM, _exit_on_signal)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="adapterhub-peer-")))
        peer = PEERS[kind](folder, {**settings, "kind": kind})
        backbone = load_backbone(settings["backbone"], dtype="bf16", device="cpu")
        peer.write_backbone(backbone)
        model = AdapterModel(backbone)
        for n in range(settings["adapters"]):
            peer.write_adapter(n, random_adapter(model, settings["rank"], n), backbone)
        servers: dict[bool, Server] = {}
        for adapters in sorted({0, settings["adapters"]}):
            port = free_port()
            command = peer.command(port, adapters)
            server = stack.enter_context(Server(kind, command, port, folder, peer.variables))
            server.wait()
            server.pause()
            servers[adapters > 0] = server

        def answer(what: str) -> Mapping[str, Any]:
            rows, adapters = json.loads(what)
            prompts = prompts_of(backbone, rows).tolist()
            server = servers[adapters > 0]
            server.resume()
            try:
                ask_all(server, peer, prompts, adapters, settings["tokens"])  # to set up shapes
                seconds = ask_all(server, peer, prompts, adapters, settings["tokens"])
            finally:
                server.pause()
            return {"seconds": seconds}

        serve(answer, {"version": installed(settings["peers"])[kind]})


def _exit_on_signal(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # by way of the servers' ends


if __name__ == "__main__":
    peer_worker()
