"""Texts for a list of requests, decoded together by the model's engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from adapterhub_chat.data.chat_template import encode_prompts
from adapterhub_chat.data.encoding import messages_of
from adapterhub_chat.errors import UsageError
from adapterhub_chat.inference.engine import Engine
from adapterhub_chat.inference.likelihood import Progress
from adapterhub_chat.inference.requests import Request
from adapterhub_chat.inference.sampling import Sampling
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.types import Example, Mix, PromptContract


def engine_of(model: AdapterModel) -> Engine:
    """Return the model's engine, made at the first call. Raises UsageError for an encoder."""
    check_writes(model)
    return model.cached(_make_engine)


def _make_engine(model: AdapterModel) -> Engine:
    options = model.options
    return Engine(
        model,
        rows=options.rows,
        queue=options.queue,
        chunk=options.chunk,
        cache_bytes=options.cache_bytes,
        prefix_bytes=options.prefix_bytes,
        graphs=options.graphs,
    )


def check_writes(model: AdapterModel) -> None:
    """Raise UsageError for an encoder: it has no next tokens."""
    if model.backbone.encodes:
        raise UsageError(
            f"{model.backbone.name} is an encoder: it writes no text and has no next tokens; use predict or "
            "chat with an adapter that chooses among labels, or a language model as the backbone"
        )


def generate(
    model: AdapterModel,
    requests: Sequence[Request],
    *,
    on_text: Callable[[int, str], None] | None = None,
) -> list[str]:
    """Return the text that continues each request's prompt, decoded in mixed batches.

    `on_text(row, piece)` is called with each new piece of text (streaming). When one request fails, or
    the caller is interrupted, all are cancelled.
    """
    engine = engine_of(model)
    engine.check(requests)
    tickets = []
    try:
        for row, request in enumerate(requests):
            on_piece = None if on_text is None else partial(on_text, row)
            tickets.append(engine.submit(request, on_piece, block=True))
        return [ticket.result().text for ticket in tickets]
    finally:
        for ticket in tickets:
            ticket.cancel()
        # until the cancelled ones have released their adapters
        engine.drive(lambda: all(ticket.done for ticket in tickets))


GENERATE_BATCH = 32
"""Requests that `answers` submits at a time."""


def answers(
    model: AdapterModel,
    contract: PromptContract,
    examples: Sequence[Example],
    mixes: Sequence[Mix],
    *,
    seed: int | None = None,
    on_progress: Progress = lambda _n: None,
) -> list[str]:
    """Return the text generated for each example under its contract, row i under mix i.

    With a `seed`, the sampling of an example depends on its index in the list alone.
    """
    prompts = encode_prompts(model.backbone.tokenizer, [messages_of(contract, e) for e in examples])
    samplings = [
        sampling_of(e.contract or contract, None if seed is None else seed + i)
        for i, e in enumerate(examples)
    ]
    requests = [Request(*row) for row in zip(prompts, mixes, samplings, strict=True)]
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
    texts = [""] * len(requests)
    for start in range(0, len(order), GENERATE_BATCH):
        indices = order[start : start + GENERATE_BATCH]
        batch = generate(model, [requests[i] for i in indices])
        for i, text in zip(indices, batch, strict=True):
            texts[i] = text
        on_progress(len(indices))
    return texts


def sampling_of(contract: PromptContract, seed: int | None = None) -> Sampling:
    """Return the sampling that a contract asks for."""
    return Sampling(
        max_new_tokens=contract.max_new_tokens,
        temperature=contract.temperature,
        top_p=contract.top_p,
        stop=contract.stop,
        seed=seed,
        strip=True,
    )
