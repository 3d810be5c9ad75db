"""Auxiliary losses in the training loop: which examples, hidden states and logits are whose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapterhub_chat.data.encoding import Encoded
from adapterhub_chat.data.packing import Batch
from adapterhub_chat.model.features import mean_pooled
from adapterhub_chat.training.family import StepRows
from adapterhub_chat.training.job import HiddenStates


def auxiliary_losses(
    parts: Sequence[StepRows],
    rows: Sequence[Sequence[Sequence[Encoded]]],
    batch: Batch,
    logits: Tensor,
    heard: Mapping[int, Tensor],
) -> list[Tensor]:
    """Return the auxiliary loss of every part whose job has one, weighted as the part is.

    `rows` are each part's packed rows, in the batch's order; `heard` the blocks' outputs (N, L, H).
    """
    counts = torch.unique_consecutive(batch.owners, return_counts=True)[1]
    begins = (counts.cumsum(0) - counts).to(logits.device)  # an example in training has one answer
    losses = []
    first = 0
    for part, own in zip(parts, rows, strict=True):
        examples = [example for row in own for example in row]
        mine = slice(first, first := first + len(examples))
        if (auxiliary := part.learner.job.auxiliary) and examples:
            hidden = mean_pooled(heard[auxiliary.layer], batch)[mine]
            seen = HiddenStates(examples, hidden, logits[begins[mine]])
            losses.append(part.weight * auxiliary.loss(seen))
    return losses
