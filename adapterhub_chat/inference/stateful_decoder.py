"""A decoder for layers that carry a state: recurrences, linear attention, short convolutions.

Such a state cannot be cut at a token, and rows of different lengths cannot share it, so every row has a cache
of transformers' own and goes through the backbone alone. A prompt is fed in one piece, and nothing of an
ended row is used again. Legend as in decoder.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from adapterhub_chat.inference.decoder import StepInput, limit_of
from adapterhub_chat.inference.kv_cache import KeyValues, Prefix
from adapterhub_chat.lora.plan import Plan, activate
from adapterhub_chat.model.adapter_model import AdapterModel, keeping


class RowStates(KeyValues):
    """One cache of transformers for each row, moved as a whole."""

    def __init__(self, config: Any, token_bytes: int) -> None:
        """Start with no row; `token_bytes` is an estimate of what a token takes."""
        self.rows, self.length, self.token_bytes = 0, 0, token_bytes
        self.states: list[Any] = []
        self._config = config

    @property
    def nbytes(self) -> int:
        """Unknown: 0."""
        return 0

    def reserve(self, rows: int, length: int) -> None:
        """Have places for `rows` rows."""
        self.states += [None] * (rows - len(self.states))
        self.rows, self.length = max(rows, self.rows), max(length, self.length)

    def state(self, row: int, started: int) -> Any:
        """Return a row's cache; a new one where `started` tokens are none."""
        if not started:
            self.states[row] = transformers.DynamicCache(config=self._config)
        return self.states[row]

    def clear(self) -> None:
        """Forget all rows."""
        self.states, self.rows, self.length = [], 0, 0

    def wipe(self, row: int) -> None:
        """Forget a row."""
        self.states[row] = None

    def take(self, row: int, tokens: Sequence[int]) -> Prefix:
        """Return a row's cache, to be put elsewhere."""
        return _Moved(tuple(tokens), (), (), self.states[row])

    def put(self, row: int, prefix: Prefix, length: int) -> None:
        """Give a row the cache that was taken, whole."""
        assert isinstance(prefix, _Moved)
        assert length == len(prefix.tokens)
        self.states[row] = prefix.state


class _Moved(Prefix):
    """A row's cache on its way to another place."""

    def __init__(
        self, tokens: tuple[int, ...], keys: Sequence[Tensor], values: Sequence[Tensor], state: Any
    ) -> None:
        super().__init__(tokens, keys, values)
        object.__setattr__(self, "state", state)

    state: Any


class StatefulDecoder:
    """See Decoder: transformers' own modules and caches, a row at a time."""

    takes_chunks = False

    def __init__(self, model: AdapterModel) -> None:
        """Prepare for the model's backbone."""
        self.backbone = model.backbone
        self.early_states = model.early_states
        self.limit = limit_of(self.backbone.text_config)

    def new_cache(self) -> KeyValues:
        """See Decoder."""
        config = self.backbone.text_config
        width = torch.empty(0, dtype=self.backbone.dtype).element_size() * config.hidden_size
        return RowStates(config, 2 * width * config.num_hidden_layers)

    @torch.inference_mode()
    def forward(self, cache: KeyValues, feed: StepInput, plan: Plan | None) -> Tensor:
        """See Decoder."""
        assert isinstance(cache, RowStates)
        logits = [self._row(cache, feed, n, plan) for n in range(len(feed.ids))]
        return torch.cat(logits)

    def _row(self, cache: RowStates, feed: StepInput, n: int, plan: Plan | None) -> Tensor:
        """Return the logits (1, V) after row n's last new token."""
        length, start = feed.lengths[n], feed.starts[n]
        state = cache.state(feed.first + n, start)
        positions = torch.arange(start, start + length, device=feed.ids.device)[None]
        last = torch.tensor([length - 1], device=feed.ids.device)
        with activate(None if plan is None else plan.row(n)), keeping(last):
            out = self.backbone.model(
                input_ids=feed.ids[n : n + 1, :length],
                position_ids=positions,
                use_cache=True,
                **{self.backbone.cache_name: state},
            )
        logits: Tensor = out.logits
        return logits
