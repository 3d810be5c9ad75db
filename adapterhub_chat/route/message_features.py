"""What a message looks like to the frozen backbone, at a glance and closely. No adapter acts.

A look is the mean over the message's tokens of the states that enter a block a quarter of the way up, each
token scaled to one size. A glance is the mean of what the tokens are before any block, the frequent ones
counting less (smooth inverse frequency, openreview.net/forum?id=SyK00v5xx): it costs hardly anything. Both
are followed by shares of scripts and signs (the first B numbers), and by the words. Legend: N messages, W
width, H hidden, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from adapterhub_chat.inference.generate import engine_of
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.pooling import group_means
from adapterhub_chat.route.text_features import NUM_LETTERS, NUM_WORDS, letters, words

WIDEST = 1024
"""Wider hidden states are folded to this width, so that what a manifest keeps stays small."""
TOKENS, CHARACTERS = 128, 4_000
"""Of a longer message, the beginning and the end are looked at."""
FEATURE_BATCH = 32
FREQUENT, FIRST = 3000, 30
"""A token's weight in a glance is 1 / (1 + FREQUENT / (id + FIRST)): tokenizers number their tokens by how
frequent they are, about, and Zipf's law makes a frequency of the place."""

Part = TypeVar("Part", str, list[int])


@dataclass(frozen=True)
class TokenizedMessage:
    """A message as a user types it, read: its tokens, and what its text tells without any model."""

    ids: list[int]
    """After one that stands before all; the first token's states tell nothing."""
    told: Tensor
    """(NUM_LETTERS + NUM_WORDS,) float64"""


def tokenize_messages(model: AdapterModel, texts: Sequence[str]) -> list[TokenizedMessage]:
    """Return each text's tokens, letters and words."""
    cut = [_ends(text, CHARACTERS) for text in texts]
    rows = [_ends(ids, TOKENS) for ids in _ids(model, cut)] if cut else []
    told = (torch.cat([torch.tensor(letters(t)).double(), words(t)]) for t in cut)
    return [TokenizedMessage(ids, numbers) for ids, numbers in zip(rows, told, strict=True)]


def token_features(model: AdapterModel, messages: Sequence[TokenizedMessage]) -> Tensor:
    """Return a vector of each message by its tokens alone, (N, W) float64 on the CPU."""
    seen = torch.zeros(len(messages), min(_hidden(model), WIDEST), dtype=torch.float64)
    for row, message in zip(seen, messages, strict=True):
        row[:] = _folded(_token_mean(model, message.ids[1:]))
    return _beside(seen, messages)


def early_layer_features(model: AdapterModel, messages: Sequence[TokenizedMessage]) -> Tensor:
    """Return a vector of each message by the backbone's early states, (N, W) float64 on the CPU."""
    rows = [message.ids for message in messages]
    seen = torch.zeros(len(rows), min(_hidden(model), WIDEST), dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), FEATURE_BATCH):
        chosen = order[start : start + FEATURE_BATCH]
        seen[chosen] = _folded(_means(model, [rows[i] for i in chosen]))
    return _beside(seen, messages)


def message_states(model: AdapterModel, text: str) -> Tensor:
    """Return the states of a message's tokens, (T, H), in the backbone's dtype."""
    (row,) = _ids(model, [_ends(text, CHARACTERS)])
    ids = torch.tensor([_ends(row, TOKENS)], device=model.backbone.device)
    return model.early_states(ids)[0, 1:]


def width(model: AdapterModel) -> int:
    """Return W, the length of a message's vector."""
    return wordless(model) + NUM_WORDS


def wordless(model: AdapterModel) -> int:
    """Return B, how many numbers stand before the words."""
    return min(_hidden(model), WIDEST) + NUM_LETTERS


def _ends(whole: Part, most: int) -> Part:
    """Return `whole`, or where it is longer than `most` its two ends."""
    return whole if len(whole) <= most else whole[: most // 2] + whole[-(most // 2) :]


def _hidden(model: AdapterModel) -> int:
    return int(model.backbone.model.get_input_embeddings().weight.shape[1])


def _ids(model: AdapterModel, texts: Sequence[str]) -> list[list[int]]:
    """Return each text's tokens after one that stands before all: the first token's states tell nothing."""
    tokenizer = model.backbone.tokenizer
    special = ("bos", "eos", "cls", "pad")  # BERT's tokenizers have none of the first two
    known = (getattr(tokenizer, f"{kind}_token_id", None) for kind in special)
    before = [next((i for i in known if i is not None), 0)]
    rows = tokenizer(list(texts), add_special_tokens=False).input_ids
    return [before + row for row in rows]


def _means(model: AdapterModel, rows: Sequence[list[int]]) -> Tensor:
    """Return the mean state of each row's tokens but the first, (rows, H) float32."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [row[0]] * (longest - len(row)) for row in rows])
    states = _even(engine_of(model).decoder.early_states(ids.to(model.backbone.device)))
    lengths = torch.tensor([len(row) for row in rows], device=states.device)[:, None]
    columns = torch.arange(longest, device=states.device)
    groups, places = ((columns > 0) & (columns < lengths)).nonzero().unbind(1)
    return group_means(states[groups, places], groups, len(rows))


@torch.inference_mode()
def _token_mean(model: AdapterModel, ids: Sequence[int]) -> Tensor:
    """Return the weighted mean of tokens before any block, (1, H) float32; zeros without tokens."""
    own = torch.tensor([ids], device=model.backbone.device, dtype=torch.long)
    weights = (1 / (1 + FREQUENT / (own + FIRST))).float()
    states = _even(model.backbone.model.get_input_embeddings()(own))
    return torch.einsum("nth,nt->nh", states, weights) / weights.sum().clamp_min(1e-6)


def _even(states: Tensor) -> Tensor:
    """Return states (N, T, H) in float32, each token's scaled to a mean square of one."""
    states = states.float()
    return states / states.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-6)


def _beside(seen: Tensor, messages: Sequence[TokenizedMessage]) -> Tensor:
    """Return what the backbone sees in messages with what their texts tell."""
    told = seen.new_zeros(len(seen), NUM_LETTERS + NUM_WORDS)
    for row, message in zip(told, messages, strict=True):
        row[:] = message.told
    return torch.cat([seen, told], 1)


def _folded(vectors: Tensor) -> Tensor:
    """Return vectors in float64 on the CPU; what is beyond WIDEST is added on under fixed random signs."""
    vectors = vectors.cpu().double()
    surplus = -vectors.shape[1] % WIDEST
    if vectors.shape[1] <= WIDEST:
        return vectors
    signs = (
        torch.randint(0, 2, vectors.shape[1:], generator=torch.Generator().manual_seed(0)) * 2 - 1
    )
    padded = torch.nn.functional.pad(vectors * signs, (0, surplus))
    return padded.reshape(len(vectors), -1, WIDEST).sum(1)
