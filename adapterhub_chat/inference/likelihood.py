"""Likelihoods: -log p of continuations and of labels, and next-token logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn import functional

from adapterhub_chat.data.encoding import Encoded, encode_choices, encode_labels
from adapterhub_chat.data.packing import Batch, in_order
from adapterhub_chat.errors import UsageError
from adapterhub_chat.inference.requests import Request
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.types import Example, Mix, PromptContract

CHUNK_POSITIONS = 512
"""Positions whose float32 logits are held at a time: 100 MB for a vocabulary of 49k."""


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return -log p of each target, float32 (P,), for `logits` (P, V) in any dtype."""
    parts = [
        functional.cross_entropy(part.float(), target, reduction="none")
        for part, target in zip(
            logits.split(CHUNK_POSITIONS), targets.split(CHUNK_POSITIONS), strict=True
        )
    ]
    return torch.cat(parts)


def sum_by_owner(values: Tensor, owners: Tensor, num_owners: int) -> Tensor:
    """Return the sum of `values` (P,) for each owner, (num_owners,)."""
    return values.new_zeros(num_owners).index_add(0, owners, values)


@torch.no_grad()
def token_loss_sums(
    model: AdapterModel,
    batches: Iterable[Batch],
    mixing: Callable[[int], AbstractContextManager[object]],
) -> Tensor:
    """Return the sum of -log p over all answers' tokens, and their number: (2,) float64.

    `mixing(num_rows)` is the context in which the rows of a batch have their mixes.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=model.backbone.device)
    for batch in batches:
        with mixing(batch.num_rows):
            logits = model.answer_logits(batch)
        sums[0] += token_losses(logits, batch.targets.to(logits.device)).sum()
        sums[1] += len(batch.targets)
    return sums


ROW_LENGTH, ROWS = 256, 8
"""Shape of a scoring batch, in tokens and rows."""
ROW_STEP = 64
"""Rows for many labels are longer, by multiples of this."""


Progress = Callable[[int], None]


def sequence_losses(
    model: AdapterModel,
    encoded: Sequence[Encoded],
    mix: Mix,
    *,
    row_length: int = ROW_LENGTH,
    on_progress: Progress = lambda _n: None,
) -> Tensor:
    """Return -log p of every continuation given its prompt, (examples, continuations), float32."""
    width = len(encoded[0].continuations) if encoded else 0
    losses = torch.zeros(len(encoded), width)
    for rows, indices in in_order(encoded, num_rows=ROWS, length=row_length):
        batch = model.pack(rows, row_length)
        with torch.inference_mode(), model.mixing([mix] * batch.num_rows):
            logits = model.answer_logits(batch)
            by_token = token_losses(logits, batch.targets.to(logits.device)).cpu()
        sums = sum_by_owner(by_token, batch.owners, len(indices) * width)
        losses[indices] = sums.view(len(indices), width)
        on_progress(len(indices))
    return losses


def label_scores(
    model: AdapterModel,
    contract: PromptContract,
    examples: Sequence[Example],
    mix: Mix,
    on_progress: Progress = lambda _n: None,
) -> Tensor:
    """Return the labels' likelihoods scaled to a sum of 1 for each example, (examples, labels)."""
    tokenizer = model.backbone.tokenizer
    label_ids = encode_labels(tokenizer, contract)
    # labels take at most half a row, so that none is cut
    min_length = 2 * len(label_ids) * (1 + max(map(len, label_ids)))
    length = max(ROW_LENGTH, -(-min_length // ROW_STEP) * ROW_STEP)
    length = min(length, model.backbone.max_length or length)
    encoded = encode_choices(tokenizer, contract, examples, max_length=length)
    losses = sequence_losses(model, encoded, mix, row_length=length, on_progress=on_progress)
    return (-losses).softmax(-1)


@torch.inference_mode()
def next_token_logits(model: AdapterModel, requests: Sequence[Request]) -> Tensor:
    """Return float32 logits (rows, vocab) of the token after each prompt, on the CPU.

    Transformers' own modules compute them, under each row's mix. Of an encoder they are the label logits
    (rows, labels). Raises UsageError for an empty prompt.
    """
    if not requests:
        return torch.zeros(0, model.backbone.model.config.vocab_size)
    if empty := [str(i) for i, request in enumerate(requests) if not request.prompt]:
        raise UsageError(f"prompt {', '.join(empty)} is empty: give at least one token of text")
    order = sorted(range(len(requests)), key=lambda i: str(requests[i].mix))
    rows = [[Encoded(requests[i].prompt, ((0,),))] for i in order]  # rows of one mix together
    with model.mixing([requests[i].mix for i in order]):
        batch = model.pack(rows, max(len(row[0].prompt) for row in rows))
        logits = model.answer_logits(batch).float().cpu()
    return logits[torch.tensor(order).argsort()]
