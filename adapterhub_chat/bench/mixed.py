"""`bench mixed`: decoding by the backbone alone and by batches of different adapters, beside the peers.

Every way continues the same prompts by the same number of tokens, greedily and past every end of turn, with
random adapters on all linear layers. here: one mixed batch. peft: `generate` with `adapter_names`.
generate: transformers alone. vllm, llamacpp: where they are installed (peers.py), else their ratios are null.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from adapterhub_chat.bench.harness import Worker, machine, median, serve
from adapterhub_chat.bench.peers import NAMES, able
from adapterhub_chat.inference.engine import Engine
from adapterhub_chat.inference.requests import Request
from adapterhub_chat.inference.sampling import Sampling
from adapterhub_chat.lora.weights import AdapterWeights, initial_weights
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.backbone import load_backbone
from adapterhub_chat.types import as_mix

CASES = ((1, 0), (16, 0), (16, 1), (16, 8), (16, 16), (32, 0), (32, 32))
"""Rows and adapters of a batch; 0 adapters is the backbone."""
PROMPT, LONG_PROMPT = 16, 128
"""Tokens of a prompt, and of one whose reading is timed."""
ASIDE = {"rank8": 8, "rank64": 64, "prefill": 16}
"""Further ways here, with their ranks; they are measured with 16 rows only."""
PEER_WORKERS = "adapterhub_chat.bench.peer_workers"
"""The module of the workers that are other engines' servers."""
BESIDE = {"mixed8": (16, 8), "mixed32": (32, 32), "backbone": (16, 0), "single": (1, 0)}
"""The cases whose ratios over the peers are shown."""

Decode = Callable[[int, int], None]


def bench_mixed(
    *,
    backbone: str = "smollm2-135m",
    rank: int = 16,
    tokens: int = 64,
    repeats: int = 3,
    cases: Sequence[tuple[int, int]] = CASES,
    peers: str | Path | None = None,
    graphs: bool = False,
) -> dict[str, Any]:
    """Return tokens per second of every way at every case, and the ratios.

    `peers` is the folder of `scripts/install_peers`; None takes ADAPTERHUB_PEERS, if it is set. `graphs`:
    here also with recorded steps, for which a case's first run takes minutes where they are compiled.
    """
    most = max(adapters for _, adapters in cases)
    settings = {"backbone": backbone, "rank": rank, "tokens": tokens, "adapters": most}
    kinds = ["here", *["graphs"] * graphs, *ASIDE, "generate"]
    kinds += ["peft"] * (importlib.util.find_spec("peft") is not None)
    served = able(peers, backbone)
    theirs = {**settings, "rows": max(rows for rows, _ in cases), "peers": peers and str(peers)}
    found: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        workers = []
        for module, kind in [*((__name__, k) for k in kinds), *((PEER_WORKERS, k) for k in served)]:
            workers.append(Worker(module, kind, settings if module == __name__ else theirs))
            stack.callback(workers[-1].close)
        for _ in range(repeats):
            for rows, adapters in cases:
                for worker in workers:
                    if _does(worker.kind, rows, adapters):
                        done = worker.measure(json.dumps([rows, adapters]))
                        found.setdefault((worker.kind, rows, adapters), []).append(done)
    speeds = {
        key: key[1] * done[0].get("tokens", tokens) / median(done, "seconds")
        for key, done in found.items()
    }
    return {
        "bench": "mixed",
        "machine": machine(),
        "settings": {**settings, "repeats": repeats},
        "peers": served,
        "rows": [
            {"kind": kind, "rows": rows, "adapters": adapters, "tokens_per_second": speed}
            for (kind, rows, adapters), speed in speeds.items()
        ],
        "ratios": _ratios(speeds),
    }


def _does(kind: str, rows: int, adapters: int) -> bool:
    """Return whether a way is measured: transformers without adapters, PEFT with, all others both."""
    if kind in ASIDE:
        return (rows, adapters) in ((16, 0), (16, 8))
    return {"generate": adapters == 0, "peft": adapters > 0}.get(kind, True)


def _ratios(speeds: Mapping[tuple[str, int, int], float]) -> dict[str, float | None]:
    def ratio(one: tuple[str, int, int], other: tuple[str, int, int]) -> float | None:
        return speeds[one] / speeds[other] if one in speeds and other in speeds else None

    return {
        "mixed8_over_backbone": ratio(("here", 16, 8), ("here", 16, 0)),
        "mixed32_over_backbone": ratio(("here", 32, 32), ("here", 32, 0)),
        "rank8_over_backbone": ratio(("rank8", 16, 8), ("rank8", 16, 0)),
        "rank64_over_backbone": ratio(("rank64", 16, 8), ("rank64", 16, 0)),
        "prefill8_over_backbone": ratio(("prefill", 16, 8), ("prefill", 16, 0)),
        "mixed8_over_peft": ratio(("here", 16, 8), ("peft", 16, 8)),
        "graphs8_over_mixed8": ratio(("graphs", 16, 8), ("here", 16, 8)),
        "single_over_generate": ratio(("here", 1, 0), ("generate", 1, 0)),
        **{
            f"{name}_over_{peer}": ratio(("here", *case), (peer, *case))
            for peer in NAMES
            for name, case in BESIDE.items()
        },
    }


# ---- the workers ---------------------------------------------------------------------------------


def mixed_worker() -> None:
    """Be a worker of the kind that the command line names."""
    kind, settings = sys.argv[1], json.loads(sys.argv[2])
    backbone = load_backbone(settings["backbone"])
    if kind in ASIDE:
        settings["rank"], settings["adapters"] = ASIDE[kind], 8
    if kind == "prefill":
        settings["prompt"], settings["tokens"] = LONG_PROMPT, 1
    settings["graphs"] = kind == "graphs"
    decode = MIXED_WORKERS[kind](backbone, settings)
    done: set[str] = set()

    def told(what: str) -> Mapping[str, Any]:
        rows, adapters = json.loads(what)
        if what not in done:
            decode(rows, adapters)  # once to set up shapes
            done.add(what)
        started = time.perf_counter()
        decode(rows, adapters)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": settings.get("prompt", settings["tokens"])}

    serve(told, {"dtype": str(backbone.dtype)})


def prompts_of(backbone: Any, rows: int, length: int = PROMPT) -> torch.Tensor:
    """Return prompts (rows, length), the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(10, backbone.model.config.vocab_size, (rows, length), generator=generator)


def random_adapter(model: AdapterModel, rank: int, seed: int) -> AdapterWeights:
    """Return an adapter on all linear layers that changes what is said."""
    start = initial_weights(model.shapes, rank=rank, alpha=2.0 * rank, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return start.with_factors(
        {
            m: (a, torch.randn(b.shape, generator=generator) * 0.01)
            for m, (a, b) in start.factors.items()
        }
    )


def ours_mixed(backbone: Any, settings: Mapping[str, Any]) -> Decode:
    """Decode one mixed batch with this project; nothing is remembered of earlier prompts."""
    model = AdapterModel(backbone)
    engine = Engine(model, prefix_bytes=0, graphs=settings.get("graphs", False))
    length = settings.get("prompt", PROMPT)
    for n in range(settings["adapters"]):
        model.load(f"a{n}", random_adapter(model, settings["rank"], n))
    rules = Sampling(max_new_tokens=settings["tokens"], ignore_eos=True)

    def decode(rows: int, adapters: int) -> None:
        prompts = prompts_of(backbone, rows, length).tolist()
        names = [f"a{row % adapters}" if adapters else None for row in range(rows)]
        asked = [Request(tuple(p), as_mix(n), rules) for p, n in zip(prompts, names, strict=True)]
        for ticket in [engine.submit(request) for request in asked]:
            ticket.result()

    return decode


def transformers_mixed(backbone: Any, settings: Mapping[str, Any]) -> Decode:
    """Decode with transformers alone."""
    backbone.model.set_attn_implementation("sdpa")

    def decode(rows: int, _adapters: int) -> None:
        _generate(backbone.model, backbone, rows, settings["tokens"])

    return decode


def peft_mixed(backbone: Any, settings: Mapping[str, Any]) -> Decode:
    """Decode a mixed batch with `peft_mixed`."""
    library: Any = importlib.import_module("peft")
    backbone.model.set_attn_implementation("sdpa")
    rank = settings["rank"]
    lora = library.LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear"
    )
    model = library.get_peft_model(
        backbone.model, lora, adapter_name="a0", autocast_adapter_dtype=False
    )
    for n in range(1, settings["adapters"]):
        model.add_adapter(f"a{n}", lora, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
    model.eval()

    def decode(rows: int, adapters: int) -> None:
        names = [f"a{row % adapters}" for row in range(rows)]
        _generate(model, backbone, rows, settings["tokens"], adapter_names=names)

    return decode


@torch.inference_mode()
def _generate(model: Any, backbone: Any, rows: int, tokens: int, **options: Any) -> None:
    ids = prompts_of(backbone, rows).to(backbone.device)
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=backbone.tokenizer.pad_token_id,
        **options,
    )


MIXED_WORKERS: Mapping[str, Callable[[Any, Mapping[str, Any]], Decode]] = {
    "here": ours_mixed,
    "graphs": ours_mixed,
    **dict.fromkeys(ASIDE, ours_mixed),
    "generate": transformers_mixed,
    "peft": peft_mixed,
}

if __name__ == "__main__":
    mixed_worker()
