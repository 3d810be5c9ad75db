"""Features of a message from the frozen backbone alone: token features and early-layer features.

Early-layer features are the mean over the message's tokens of the hidden states that enter a block a quarter
of the way up, each token's state normalised to a mean square of one. Token features are the mean of the
tokens' input embeddings, with smaller weights for frequent ones (smooth inverse frequency,
openreview.net/forum?id=SyK00v5xx): they cost almost nothing. Both are followed by character features (up to
here the first B features) and by hashed n-grams. Legend: N messages, W width, B background width, H hidden
size, T tokens.
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
from adapterhub_chat.route.text_features import (
    NUM_CHARACTER_FEATURES,
    NUM_NGRAM_FEATURES,
    character_features,
    ngram_features,
)

MAX_WIDTH = 1024
"""Wider hidden states are folded to this width, to bound the size of a manifest."""
MAX_TOKENS, MAX_CHARACTERS = 128, 4_000
"""A longer message is cut to its beginning and its end."""
FEATURE_BATCH = 32
"""Messages in one forward pass."""
TOKEN_WEIGHT_SCALE, TOKEN_ID_OFFSET = 3000, 30
"""A token's weight is 1 / (1 + TOKEN_WEIGHT_SCALE / (id + TOKEN_ID_OFFSET)): tokenizers number their tokens
about by falling frequency, and by Zipf's law the frequency is the inverse of that rank."""

Text = TypeVar("Text", str, list[int])


@dataclass(frozen=True)
class TokenizedMessage:
    """A message's token ids and the features of its text."""

    ids: list[int]
    """After a start token, whose states are left out of all means."""
    text_features: Tensor
    """(NUM_CHARACTER_FEATURES + NUM_NGRAM_FEATURES,) float64"""


def tokenize_messages(model: AdapterModel, texts: Sequence[str]) -> list[TokenizedMessage]:
    """Return each text's token ids and text features."""
    cut = [_keep_ends(text, MAX_CHARACTERS) for text in texts]
    rows = [_keep_ends(ids, MAX_TOKENS) for ids in _token_ids(model, cut)] if cut else []
    features = (
        torch.cat([torch.tensor(character_features(t)).double(), ngram_features(t)]) for t in cut
    )
    return [TokenizedMessage(ids, numbers) for ids, numbers in zip(rows, features, strict=True)]


def token_features(model: AdapterModel, messages: Sequence[TokenizedMessage]) -> Tensor:
    """Return each message's token features, (N, W) float64 on the CPU."""
    vectors = torch.zeros(len(messages), min(_hidden_size(model), MAX_WIDTH), dtype=torch.float64)
    for row, message in zip(vectors, messages, strict=True):
        row[:] = _folded_to_max_width(_token_mean(model, message.ids[1:]))
    return _with_text_features(vectors, messages)


def early_layer_features(model: AdapterModel, messages: Sequence[TokenizedMessage]) -> Tensor:
    """Return each message's early-layer features, (N, W) float64 on the CPU."""
    rows = [message.ids for message in messages]
    vectors = torch.zeros(len(rows), min(_hidden_size(model), MAX_WIDTH), dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), FEATURE_BATCH):
        chosen = order[start : start + FEATURE_BATCH]
        vectors[chosen] = _folded_to_max_width(_means(model, [rows[i] for i in chosen]))
    return _with_text_features(vectors, messages)


def message_states(model: AdapterModel, text: str) -> Tensor:
    """Return the early states of a message's tokens, (T, H), in the backbone's dtype."""
    (row,) = _token_ids(model, [_keep_ends(text, MAX_CHARACTERS)])
    ids = torch.tensor([_keep_ends(row, MAX_TOKENS)], device=model.backbone.device)
    return model.early_states(ids)[0, 1:]


def feature_width(model: AdapterModel) -> int:
    """Return W, the length of a message's vector."""
    return background_width(model) + NUM_NGRAM_FEATURES


def background_width(model: AdapterModel) -> int:
    """Return B, the number of features before the n-grams."""
    return min(_hidden_size(model), MAX_WIDTH) + NUM_CHARACTER_FEATURES


def _keep_ends(text: Text, max_length: int) -> Text:
    """Return a text, or the two ends of one that is longer than `max_length`."""
    if len(text) <= max_length:
        return text
    return text[: max_length // 2] + text[-(max_length // 2) :]


def _hidden_size(model: AdapterModel) -> int:
    return int(model.backbone.model.get_input_embeddings().weight.shape[1])


def _token_ids(model: AdapterModel, texts: Sequence[str]) -> list[list[int]]:
    """Return each text's token ids after a start token, since a first token's states carry no meaning."""
    tokenizer = model.backbone.tokenizer
    special = ("bos", "eos", "cls", "pad")  # BERT's tokenizers have none of the first two
    special_ids = (getattr(tokenizer, f"{kind}_token_id", None) for kind in special)
    start = [next((i for i in special_ids if i is not None), 0)]
    rows = tokenizer(list(texts), add_special_tokens=False).input_ids
    return [start + row for row in rows]


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
    """Return the weighted mean of tokens' input embeddings, (1, H) float32; zeros without tokens."""
    tokens = torch.tensor([ids], device=model.backbone.device, dtype=torch.long)
    weights = (1 / (1 + TOKEN_WEIGHT_SCALE / (tokens + TOKEN_ID_OFFSET))).float()
    states = _even(model.backbone.model.get_input_embeddings()(tokens))
    return torch.einsum("nth,nt->nh", states, weights) / weights.sum().clamp_min(1e-6)


def _even(states: Tensor) -> Tensor:
    """Return states (N, T, H) in float32, each token's scaled to a mean square of one."""
    states = states.float()
    return states / states.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-6)


def _with_text_features(vectors: Tensor, messages: Sequence[TokenizedMessage]) -> Tensor:
    """Return the backbone's features of messages followed by the features of their texts."""
    features = vectors.new_zeros(len(vectors), NUM_CHARACTER_FEATURES + NUM_NGRAM_FEATURES)
    for row, message in zip(features, messages, strict=True):
        row[:] = message.text_features
    return torch.cat([vectors, features], 1)


def _folded_to_max_width(vectors: Tensor) -> Tensor:
    """Return vectors in float64 on the CPU; wider ones are summed to MAX_WIDTH under fixed random signs."""
    vectors = vectors.cpu().double()
    padding = -vectors.shape[1] % MAX_WIDTH
    if vectors.shape[1] <= MAX_WIDTH:
        return vectors
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, vectors.shape[1:], generator=generator) * 2 - 1
    padded = torch.nn.functional.pad(vectors * signs, (0, padding))
    return padded.reshape(len(vectors), -1, MAX_WIDTH).sum(1)
