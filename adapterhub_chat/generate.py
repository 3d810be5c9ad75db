"""Generate: texts for a list of requests, decoded together by the model's engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from adapterhub_chat.batches import pack
from adapterhub_chat.engine import Engine
from adapterhub_chat.errors import UsageError
from adapterhub_chat.model import AdapterModel
from adapterhub_chat.requests import Request
from adapterhub_chat.sampling import Sampling
from adapterhub_chat.template import Encoded

_making = threading.Lock()


def engine_of(model: AdapterModel) -> Engine:
    """Return the model's engine; the first call makes it. Raises UsageError for an encoder."""
    check_writes(model)
    with _making:
        if model.engine is None:
            model.engine = Engine(model, graphs=model.graphs)
        engine: Engine = model.engine
    return engine


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
    """Return the text that continues each request, all of them decoded in mixed batches.

    `on_text(row, piece)` hears of every new piece of text as it comes (streaming). When one request
    fails, or the caller is interrupted, all are cancelled.
    """
    engine = engine_of(model)
    engine.check(requests)
    tickets = []
    try:
        for row, request in enumerate(requests):
            listener = None if on_text is None else partial(on_text, row)
            tickets.append(engine.submit(request, listener, patient=True))
        return [ticket.result().text for ticket in tickets]
    finally:
        for ticket in tickets:
            ticket.cancel()
        engine.drive(
            lambda: all(ticket.done for ticket in tickets)
        )  # they let go of their adapters


@torch.inference_mode()
def next_token_logits(model: AdapterModel, requests: Sequence[Request]) -> Tensor:
    """Return float32 logits (rows, vocab) of the token after each prompt, on the CPU.

    They are transformers' own modules', under each row's mix. On an encoder, whose answer is a label's
    number, they are the label logits (rows, labels).
    """
    if not requests:
        return torch.zeros(0, model.backbone.model.config.vocab_size)
    if empty := [str(i) for i, request in enumerate(requests) if not request.prompt]:
        raise UsageError(f"prompt {', '.join(empty)} is empty: give at least one token of text")
    order = sorted(range(len(requests)), key=lambda i: str(requests[i].mix))
    rows = [[Encoded(requests[i].prompt, ((0,),))] for i in order]  # adapters side by side
    with model.mixing([requests[i].mix for i in order]):
        batch = pack(rows, max(len(row[0].prompt) for row in rows))
        logits = model.answer_logits(batch).float().cpu()
    return logits[torch.tensor(order).argsort()]


__all__ = ["Request", "Sampling", "check_writes", "engine_of", "generate", "next_token_logits"]
