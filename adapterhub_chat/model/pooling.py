"""Means of hidden states over groups of tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def group_means(states: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Return each group's mean state (G, H), float32; zeros for a group without tokens.

    `states` (T, H) in any dtype; `groups` (T,) is the group of each token, below `num_groups`.
    """
    sums = states.new_zeros(num_groups, states.shape[1], dtype=torch.float32)
    sums = sums.index_add(0, groups, states.float())
    return sums / groups.bincount(minlength=num_groups).clamp_min(1)[:, None]
