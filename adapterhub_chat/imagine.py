"""Texts that the backbone itself makes up: what messages may be about beside the tasks of a pool.

Opened for a user's turn, an instruction-tuned model writes the user's message (arXiv 2406.08464). Half of the
texts begin with a token drawn from the whole vocabulary, for variety. Nothing has to be downloaded.
"""

from __future__ import annotations

import random
from typing import Any

from adapterhub_chat.generate import Request, Sampling, generate
from adapterhub_chat.model import AdapterModel
from adapterhub_chat.types import NO_ADAPTER

LENGTHS = (8, 16, 32, 48)
MARK = "\u2402"
"""Stands for the message when the chat template is cut open there."""


def imagined(model: AdapterModel, count: int, seed: int = 0) -> list[str]:
    """Return about `count` texts sampled from the bare backbone; those that are blank are left out."""
    tokenizer = model.backbone.tokenizer
    start = _opening(tokenizer)
    special, size = set(tokenizer.all_special_ids), len(tokenizer)
    draw = random.Random(seed)
    first = [
        [] if i % 2 else [t for t in [draw.randrange(size)] if t not in special]
        for i in range(count)
    ]
    requests = [
        Request((*start, *own), NO_ADAPTER, Sampling(draw.choice(LENGTHS), 1.0, seed=seed + i))
        for i, own in enumerate(first)
    ]
    texts = [
        tokenizer.decode(own) + text
        for own, text in zip(first, generate(model, requests), strict=True)
    ]
    return [text for text in texts if text.strip()]


def _opening(tokenizer: Any) -> list[int]:
    """Return the ids of a conversation up to where the user's message begins; at least one."""
    rendered = ""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": MARK}]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False).partition(MARK)[0]
    ids = tokenizer(rendered, add_special_tokens=False).input_ids if rendered else []
    return list(ids) or [tokenizer.bos_token_id or tokenizer.eos_token_id]
