"""Auxiliary losses of a training step: each job's further loss on its examples' hidden states and logits."""

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
    groups: Sequence[StepRows],
    rows: Sequence[Sequence[Sequence[Encoded]]],
    batch: Batch,
    logits: Tensor,
    block_outputs: Mapping[int, Tensor],
) -> list[Tensor]:
    """Return the auxiliary loss of every group whose job has one, times the group's weight.

    `rows` are each group's packed rows, in the batch's order. `block_outputs` maps a block's number to its
    output (N, L, H).
    """
    lengths = torch.unique_consecutive(batch.owners, return_counts=True)[1]
    first_targets = (lengths.cumsum(0) - lengths).to(logits.device)  # one answer per example
    losses = []
    start = 0
    for group, group_rows in zip(groups, rows, strict=True):
        examples = [example for row in group_rows for example in row]
        span = slice(start, start := start + len(examples))
        if (auxiliary := group.learner.job.auxiliary) and examples:
            pooled = mean_pooled(block_outputs[auxiliary.layer], batch)[span]
            states = HiddenStates(examples, pooled, logits[first_targets[span]])
            losses.append(group.weight * auxiliary.loss(states))
    return losses
