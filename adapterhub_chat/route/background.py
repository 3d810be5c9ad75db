"""Background texts: samples of the bare backbone, kept on disk so that a machine draws them once a backbone.

They depend on the backbone alone, and sampling takes seconds. A file holds the texts and their sha256; one
that is missing or damaged is made anew.
"""

from __future__ import annotations

import hashlib
import json
import random
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapterhub_chat.assets.fetch import cache_dir
from adapterhub_chat.files import write_json
from adapterhub_chat.inference.generate import generate
from adapterhub_chat.inference.requests import Request
from adapterhub_chat.inference.sampling import Sampling
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.backbone import Backbone
from adapterhub_chat.types import NO_ADAPTER

SAMPLER_VERSION = 1
"""Part of the cache key: to be raised when `sample_background` draws other texts."""
SAMPLE_LENGTHS = (8, 16, 32, 48)
"""Lengths of the samples in tokens, drawn at random."""
SAMPLE_TEMPERATURE = 1.0
SAMPLE_SEED = 0
MESSAGE_MARKER = "\u2402"
"""Stands for the message when the chat template is cut there."""


def background_texts(model: AdapterModel, count: int) -> list[str]:
    """Return the texts of `sample_background`, from the cache if they are there."""
    path = cache_file(model.backbone, count)
    texts = _read(path)
    if texts is None:
        texts = sample_background(model, count)
        write_json(path, {"sha256": _digest(texts), "texts": texts})
    return texts


def cache_file(backbone: Backbone, count: int) -> Path:
    """Return the file that keeps `count` texts of a backbone at its precision."""
    key = {
        "version": SAMPLER_VERSION,
        "count": count,
        "lengths": SAMPLE_LENGTHS,
        "temperature": SAMPLE_TEMPERATURE,
        "seed": SAMPLE_SEED,
        "fingerprint": asdict(backbone.fingerprint),
        "precision": backbone.precision,
    }
    return cache_dir() / "background" / f"{_digest(key)}.json"


def _read(path: Path) -> list[str] | None:
    """Return the texts of a cache file, None if it is missing or damaged."""
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        stored = json.loads(path.read_text("utf-8"))
        texts = [str(text) for text in stored["texts"]]
        if texts and stored["sha256"] == _digest(texts):
            return texts
    return None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sample_background(model: AdapterModel, count: int) -> list[str]:
    """Return about `count` texts sampled from the bare backbone; blank ones are left out.

    They continue a conversation at the point where the user's message begins. Half of them start with a
    random token, so that they are not all of the backbone's favourite kind.
    """
    tokenizer = model.backbone.tokenizer
    prefix = _prompt_prefix(tokenizer)
    special, vocab_size = set(tokenizer.all_special_ids), len(tokenizer)
    draw = random.Random(SAMPLE_SEED)
    first_tokens = [
        [] if i % 2 else [t for t in [draw.randrange(vocab_size)] if t not in special]
        for i in range(count)
    ]
    requests = [
        Request(
            (*prefix, *tokens),
            NO_ADAPTER,
            Sampling(draw.choice(SAMPLE_LENGTHS), SAMPLE_TEMPERATURE, seed=SAMPLE_SEED + i),
        )
        for i, tokens in enumerate(first_tokens)
    ]
    texts = [
        tokenizer.decode(tokens) + text
        for tokens, text in zip(first_tokens, generate(model, requests), strict=True)
    ]
    return [text for text in texts if text.strip()]


def _prompt_prefix(tokenizer: Any) -> list[int]:
    """Return the ids of a conversation up to where the user's message begins; at least one."""
    rendered = ""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": MESSAGE_MARKER}]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False).partition(MESSAGE_MARKER)[0]
    ids = tokenizer(rendered, add_special_tokens=False).input_ids if rendered else []
    return list(ids) or [tokenizer.bos_token_id or tokenizer.eos_token_id]
