"""What a message looks like: the frozen backbone's early hidden states, and its text. No adapter acts.

A vector is the mean over the message's tokens of the states that enter a block a quarter of the way up,
each token scaled to one size, followed by shares of scripts and signs (the first B numbers), and by its
words. Legend: N messages, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from adapterhub_chat.generate import engine_of
from adapterhub_chat.model import AdapterModel
from adapterhub_chat.spelling import NUM_LETTERS, NUM_WORDS, letters, words

WIDEST = 1024
"""Wider hidden states are folded to this width, so that what a manifest keeps stays small."""
TOKENS, CHARACTERS = 128, 4_000
"""Of a longer message, the beginning and the end are looked at."""
BATCH = 32

Part = TypeVar("Part", str, list[int])


def looks(model: AdapterModel, texts: Sequence[str]) -> Tensor:
    """Return a vector of each message as a user types it, (N, W) float64 on the CPU."""
    cut = [_ends(text, CHARACTERS) for text in texts]
    if not cut:
        return torch.zeros(0, width(model), dtype=torch.float64)
    rows = [_ends(ids, TOKENS) for ids in _ids(model, cut)]
    seen = torch.zeros(len(rows), min(_hidden(model), WIDEST), dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        seen[chosen] = _means(model, [rows[i] for i in chosen])
    told = torch.tensor([letters(text) for text in cut], dtype=torch.float64)
    said = torch.stack([words(text) for text in cut])
    return torch.cat([seen, told, said], dim=1)


def own_states(model: AdapterModel, text: str) -> Tensor:
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
    first = tokenizer.bos_token_id
    before = [tokenizer.eos_token_id if first is None else first]
    rows = tokenizer(list(texts), add_special_tokens=False).input_ids
    return [before + row for row in rows]


def _means(model: AdapterModel, rows: Sequence[list[int]]) -> Tensor:
    """Return the mean state of each row's tokens but the first, (rows, hidden or WIDEST) float64."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [row[0]] * (longest - len(row)) for row in rows])
    states = engine_of(model).decoder.early_states(ids.to(model.backbone.device)).float()
    states = states / states.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
    lengths = torch.tensor([len(row) for row in rows], device=states.device)[:, None]
    place = torch.arange(longest, device=states.device)
    own = ((place > 0) & (place < lengths)).float()
    means = torch.einsum("nth,nt->nh", states, own) / (lengths - 1).clamp_min(1)
    return _folded(means.cpu().double())


def _folded(vectors: Tensor) -> Tensor:
    """Return vectors of at most WIDEST numbers: the rest is added on under fixed random signs."""
    surplus = -vectors.shape[1] % WIDEST
    if vectors.shape[1] <= WIDEST:
        return vectors
    signs = (
        torch.randint(0, 2, vectors.shape[1:], generator=torch.Generator().manual_seed(0)) * 2 - 1
    )
    padded = torch.nn.functional.pad(vectors * signs, (0, surplus))
    return padded.reshape(len(vectors), -1, WIDEST).sum(1)
