"""A decoder for layers that carry a state: recurrences, linear attention, short convolutions.

Such a state cannot be cut at a token, and rows of different lengths cannot share it, so every row has a cache
of transformers' own and goes through the backbone alone. A prompt is fed in one piece, and nothing of an
ended row is used again. Legend as in decoder.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from adapterhub_chat.inference.decoder import StepInput, max_length_of
from adapterhub_chat.inference.kv_cache import KVCache, Prefix
from adapterhub_chat.lora.plan import Plan, activate
from adapterhub_chat.model.adapter_model import AdapterModel, head_positions


@dataclass(frozen=True)
class _RowState(Prefix):
    """A row's tokens with its cache, moved from one index to another."""

    state: Any = None


class StateCache(KVCache):
    """One cache of transformers for each row, moved as a whole."""

    def __init__(self, config: Any, token_bytes: int) -> None:
        """Start without rows; `token_bytes` estimates the size of a token."""
        self.num_rows, self.capacity, self.token_bytes = 0, 0, token_bytes
        self._config = config
        self._states: list[Any] = []

    @property
    def nbytes(self) -> int:
        """An estimate of the size in bytes."""
        return self.num_rows * self.capacity * self.token_bytes

    def reserve(self, num_rows: int, length: int) -> None:
        """Reserve `num_rows` rows."""
        self._states += [None] * (num_rows - len(self._states))
        self.num_rows, self.capacity = max(num_rows, self.num_rows), max(length, self.capacity)

    def state(self, row: int, start: int) -> Any:
        """Return a row's cache, a new one for a row of which no token is computed."""
        if not start:
            self._states[row] = transformers.DynamicCache(config=self._config)
        return self._states[row]

    def clear(self) -> None:
        """Remove all rows."""
        self._states, self.num_rows, self.capacity = [], 0, 0

    def zero_row(self, row: int) -> None:
        """Remove a row's state."""
        self._states[row] = None

    def read_prefix(self, row: int, tokens: Sequence[int]) -> Prefix:
        """Return a row's cache, not copied."""
        return _RowState(tuple(tokens), (), (), self._states[row])

    def write_prefix(self, row: int, prefix: Prefix, length: int) -> None:
        """Give a row the cache that `read_prefix` returned, whole."""
        assert isinstance(prefix, _RowState)
        assert length == len(prefix.tokens)
        self._states[row] = prefix.state


class StatefulDecoder:
    """A Decoder that runs transformers' own modules and caches, one row at a time."""

    takes_chunks = False
    recompute_length: int | None = None

    def __init__(self, model: AdapterModel) -> None:
        """Prepare the decoder of the model's backbone."""
        self.backbone = model.backbone
        self.early_states = model.early_states
        self.max_length = max_length_of(self.backbone.text_config)

    def new_cache(self) -> KVCache:
        """See Decoder."""
        config = self.backbone.text_config
        itemsize = torch.empty(0, dtype=self.backbone.dtype).element_size()
        token_bytes = 2 * config.hidden_size * config.num_hidden_layers * itemsize
        return StateCache(config, token_bytes)

    @torch.inference_mode()
    def forward(self, cache: KVCache, inputs: StepInput, plan: Plan | None) -> Tensor:
        """See Decoder."""
        assert isinstance(cache, StateCache)
        return torch.cat([self._row(cache, inputs, n, plan) for n in range(len(inputs.ids))])

    def _row(self, cache: StateCache, inputs: StepInput, n: int, plan: Plan | None) -> Tensor:
        """Return the logits (1, V) after the last new token of row n."""
        length, start = inputs.lengths[n], inputs.starts[n]
        state = cache.state(inputs.first_row + n, start)
        device = inputs.ids.device
        positions = torch.arange(start, start + length, device=device)[None]
        last = torch.tensor([length - 1], device=device)
        with activate(None if plan is None else plan.row(n)), head_positions(last):
            out = self.backbone.model(
                input_ids=inputs.ids[n : n + 1, :length],
                position_ids=positions,
                use_cache=True,
                **{self.backbone.cache_argument: state},
            )
        logits: Tensor = out.logits
        return logits
