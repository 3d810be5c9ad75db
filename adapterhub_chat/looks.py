"""What a message looks like: the frozen backbone's early hidden states, and its letters. No adapter acts.

A vector is the mean over the message's tokens of the states that enter a block a quarter of the way up,
each token scaled to one size, followed by shares of scripts and signs. Legend: N messages, W width.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from adapterhub_chat.model import AdapterModel

SCRIPTS = (
    "LATIN",
    "CJK",
    "HIRAGANA",
    "KATAKANA",
    "HANGUL",
    "CYRILLIC",
    "ARABIC",
    "GREEK",
    "DEVANAGARI",
)
"""First words of the Unicode names of letters: a language's first trace."""
OTHER_LETTER, DIGIT, SPACE, SIGN = range(len(SCRIPTS), len(SCRIPTS) + 4)
MARKS = {"?": 10.0, "\n": 10.0, "@": 10.0, "{}()[]=_;<>": 5.0, ".,!'\"": 5.0}
"""Signs whose share in a message is told, and its weight."""
NUM_LETTERS = SIGN + 1 + 6 + len(MARKS)
"""Numbers that `letters` returns."""
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
    return torch.cat([seen, told], dim=1)


def own_states(model: AdapterModel, text: str) -> Tensor:
    """Return the states of a message's tokens, (T, H), in the backbone's dtype."""
    (row,) = _ids(model, [_ends(text, CHARACTERS)])
    ids = torch.tensor([_ends(row, TOKENS)], device=model.backbone.device)
    return model.early_states(ids)[0, 1:]


def width(model: AdapterModel) -> int:
    """Return W, the length of a message's vector."""
    return min(_hidden(model), WIDEST) + NUM_LETTERS


def letters(text: str) -> list[float]:
    """Return shares of scripts, digits, blanks and signs, and a few habits: NUM_LETTERS numbers."""
    kinds = [0.0] * (SIGN + 1)
    for character in text:
        kinds[_kind(character)] += 1
    size = max(1, len(text))
    words = [c for c in text if c.isalpha()]
    return [
        *(count / size for count in kinds),
        sum(c.isupper() for c in words) / max(1, len(words)),
        math.log1p(len(text)) / 5,
        *(weight * sum(c in marks for c in text) / size for marks, weight in MARKS.items()),
        float(text[:1].isupper()),
        float(text.rstrip()[-1:] == "?"),
        float("\n" in text),
        min(10.0, len(text) / max(1, len(text.split()))) / 10,
    ]


@lru_cache(maxsize=20_000)
def _kind(character: str) -> int:
    if character.isalpha():
        script = unicodedata.name(character, "").partition(" ")[0]
        return SCRIPTS.index(script) if script in SCRIPTS else OTHER_LETTER
    return DIGIT if character.isdigit() else SPACE if character.isspace() else SIGN


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
    states = model.early_states(ids.to(model.backbone.device)).float()
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
