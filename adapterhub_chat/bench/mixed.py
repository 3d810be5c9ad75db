"""`bench mixed`: decoding speed of the backbone and of mixed batches of adapters, compared with peers.

Every kind of worker continues the same prompts by the same number of tokens, greedily and ignoring the end of
turn, with random adapters on all linear layers. here: one mixed batch. peft: `generate` with `adapter_names`.
generate: transformers alone. vllm, llamacpp: if installed (peers.py), else their ratios are null.
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
from adapterhub_chat.bench.peers import PEER_NAMES, usable_peers
from adapterhub_chat.inference.engine import Engine
from adapterhub_chat.inference.requests import Request
from adapterhub_chat.inference.sampling import Sampling
from adapterhub_chat.lora.weights import AdapterWeights, initial_weights
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.backbone import load_backbone
from adapterhub_chat.types import as_mix

CASES = ((1, 0), (16, 0), (16, 1), (16, 8), (16, 16), (32, 0), (32, 32))
"""(rows, adapters) of a batch; 0 adapters is the backbone."""
PROMPT_TOKENS, LONG_PROMPT_TOKENS = 16, 128
"""Tokens of a prompt, and of the long prompt of `prefill`."""
VARIANT_RANKS = {"rank8": 8, "rank64": 64, "prefill": 16}
"""Further kinds of workers of this project -> rank; they are measured with 16 rows only."""
PEER_WORKERS = "adapterhub_chat.bench.peer_workers"
"""The module of the workers that run other engines' servers."""
PEER_RATIO_CASES = {"mixed8": (16, 8), "mixed32": (32, 32), "backbone": (16, 0), "single": (1, 0)}
"""Ratio name -> the (rows, adapters) at which this project is compared with each peer."""

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
    """Return tokens per second of each kind at each case, and the ratios.

    `peers` is the folder of `scripts/install_peers`; None takes ADAPTERHUB_PEERS, if it is set. With `graphs`
    this project is also measured with recorded steps; their compilation on a CPU takes minutes a case.
    """
    max_adapters = max(adapters for _, adapters in cases)
    settings = {"backbone": backbone, "rank": rank, "tokens": tokens, "adapters": max_adapters}
    kinds = ["here", *["graphs"] * graphs, *VARIANT_RANKS, "generate"]
    kinds += ["peft"] * (importlib.util.find_spec("peft") is not None)
    available_peers = usable_peers(peers, backbone)
    peer_settings = {
        **settings,
        "rows": max(rows for rows, _ in cases),
        "peers": peers and str(peers),
    }
    answers: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        workers = []
        for module, kind in [
            *((__name__, k) for k in kinds),
            *((PEER_WORKERS, k) for k in available_peers),
        ]:
            workers.append(Worker(module, kind, settings if module == __name__ else peer_settings))
            stack.callback(workers[-1].close)
        for _ in range(repeats):
            for rows, adapters in cases:
                for worker in workers:
                    if _is_measured(worker.kind, rows, adapters):
                        answer = worker.measure(json.dumps([rows, adapters]))
                        answers.setdefault((worker.kind, rows, adapters), []).append(answer)
    speeds = {
        key: key[1] * answer[0].get("tokens", tokens) / median(answer, "seconds")
        for key, answer in answers.items()
    }
    return {
        "bench": "mixed",
        "machine": machine(),
        "settings": {**settings, "repeats": repeats},
        "peers": available_peers,
        "rows": [
            {"kind": kind, "rows": rows, "adapters": adapters, "tokens_per_second": speed}
            for (kind, rows, adapters), speed in speeds.items()
        ],
        "ratios": _ratios(speeds),
    }


def _is_measured(kind: str, rows: int, adapters: int) -> bool:
    """Return whether a case is measured: by transformers without adapters, by PEFT with, by others always."""
    if kind in VARIANT_RANKS:
        return (rows, adapters) in ((16, 0), (16, 8))
    return {"generate": adapters == 0, "peft": adapters > 0}.get(kind, True)


def _ratios(speeds: Mapping[tuple[str, int, int], float]) -> dict[str, float | None]:
    def ratio(numerator: tuple[str, int, int], denominator: tuple[str, int, int]) -> float | None:
        return (
            speeds[numerator] / speeds[denominator]
            if numerator in speeds and denominator in speeds
            else None
        )

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
            for peer in PEER_NAMES
            for name, case in PEER_RATIO_CASES.items()
        },
    }


# ---- the workers ---------------------------------------------------------------------------------


def mixed_worker() -> None:
    """Run as the worker whose kind the command line names."""
    kind, settings = sys.argv[1], json.loads(sys.argv[2])
    backbone = load_backbone(settings["backbone"])
    if kind in VARIANT_RANKS:
        settings["rank"], settings["adapters"] = VARIANT_RANKS[kind], 8
    if kind == "prefill":
        settings["prompt"], settings["tokens"] = LONG_PROMPT_TOKENS, 1
    settings["graphs"] = kind == "graphs"
    decode = MIXED_WORKERS[kind](backbone, settings)
    prepared_cases: set[str] = set()

    def answer(case: str) -> Mapping[str, Any]:
        rows, adapters = json.loads(case)
        if case not in prepared_cases:
            decode(rows, adapters)  # a first run sets up shapes
            prepared_cases.add(case)
        started = time.perf_counter()
        decode(rows, adapters)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": settings.get("prompt", settings["tokens"])}

    serve(answer, {"dtype": str(backbone.dtype)})


def prompts_of(backbone: Any, rows: int, length: int = PROMPT_TOKENS) -> torch.Tensor:
    """Return prompts (rows, length) of random token ids; equal arguments give equal prompts."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(10, backbone.model.config.vocab_size, (rows, length), generator=generator)


def random_adapter(model: AdapterModel, rank: int, seed: int) -> AdapterWeights:
    """Return an adapter on all linear layers with a non-zero update."""
    start = initial_weights(model.shapes, rank=rank, alpha=2.0 * rank, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return start.with_factors(
        {
            m: (a, torch.randn(b.shape, generator=generator) * 0.01)
            for m, (a, b) in start.factors.items()
        }
    )


def engine_decoder(backbone: Any, settings: Mapping[str, Any]) -> Decode:
    """Decode one mixed batch with this project's engine, without a prefix cache."""
    model = AdapterModel(backbone)
    engine = Engine(model, prefix_bytes=0, graphs=settings.get("graphs", False))
    length = settings.get("prompt", PROMPT_TOKENS)
    for n in range(settings["adapters"]):
        model.load(f"a{n}", random_adapter(model, settings["rank"], n))
    sampling = Sampling(max_new_tokens=settings["tokens"], ignore_eos=True)

    def decode(rows: int, adapters: int) -> None:
        prompts = prompts_of(backbone, rows, length).tolist()
        names = [f"a{row % adapters}" if adapters else None for row in range(rows)]
        requests = [
            Request(tuple(p), as_mix(n), sampling) for p, n in zip(prompts, names, strict=True)
        ]
        for ticket in [engine.submit(request) for request in requests]:
            ticket.result()

    return decode


def transformers_decoder(backbone: Any, settings: Mapping[str, Any]) -> Decode:
    """Decode with transformers alone."""
    backbone.model.set_attn_implementation("sdpa")

    def decode(rows: int, _adapters: int) -> None:
        _generate(backbone.model, backbone, rows, settings["tokens"])

    return decode


def peft_decoder(backbone: Any, settings: Mapping[str, Any]) -> Decode:
    """Decode a mixed batch with PEFT."""
    peft: Any = importlib.import_module("peft")
    backbone.model.set_attn_implementation("sdpa")
    rank = settings["rank"]
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear"
    )
    model = peft.get_peft_model(
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
    "here": engine_decoder,
    "graphs": engine_decoder,
    **dict.fromkeys(VARIANT_RANKS, engine_decoder),
    "generate": transformers_decoder,
    "peft": peft_decoder,
}

if __name__ == "__main__":
    mixed_worker()
