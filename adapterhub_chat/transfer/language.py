"""T learns a language, or a domain's way of speaking, from its text alone: no labels, no source.

Under a source it then is a stack that has seen the target's language (the idea of MAD-X, arXiv 2005.00052).
A language model learns to continue the texts. An encoder learns the cloze (Taylor 1953,
doi.org/10.1177/107769905303000401): one of a text's frequent words is covered, and a head, which is thrown
away afterwards, says from the text's features which one it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from adapterhub_chat.config import TrainConfig
from adapterhub_chat.jobs import Job
from adapterhub_chat.template import Encoded, classifies, encode_prompts, fit, messages_of
from adapterhub_chat.types import Example, PromptContract
from adapterhub_chat.weights import AdapterWeights, Head

WORDS = 256
"""The most frequent tokens, those that the cloze asks for."""
COVERED = 4
"""Tokens of one text that are asked for, one at a time."""
EVERYWHERE = 0.9
"""A token in this share of the prompts or more belongs to the template."""


def text_job(
    tokenizer: Any,
    contract: PromptContract,
    texts: Sequence[Example],
    config: TrainConfig,
    name: str,
) -> Job:
    """Return the job of learning from texts; of an encoder's, `labels` is how many words are asked for.

    It has no examples where the texts are too few or too short to learn anything from.
    """
    plain = [replace(example, contract=None) for example in texts]
    if classifies(tokenizer):
        prompts = encode_prompts(tokenizer, [messages_of(contract, e) for e in plain])
        examples, words = cloze(tokenizer, prompts, config.row_length, config.seed)
        return Job(name, examples, (), config, labels=words)
    first = tokenizer.bos_token_id
    before = (int(tokenizer.eos_token_id if first is None else first),)
    rows = tokenizer(["\n".join(e.fields.values()) for e in plain], add_special_tokens=False)
    learnt = [fit(before, (tuple(ids),), config.row_length) for ids in rows.input_ids if ids]
    return Job(name, learnt, (), config)


def cloze(
    tokenizer: Any, prompts: Sequence[tuple[int, ...]], length: int, seed: int
) -> tuple[list[Encoded], int]:
    """Return prompts with one frequent token covered and its number as the answer; and how many there are."""
    seen = Counter(token for prompt in prompts for token in set(prompt))
    fixed = {token for token, count in seen.items() if count >= EVERYWHERE * len(prompts)}
    counts = Counter(token for prompt in prompts for token in prompt)
    for token in fixed | set(tokenizer.all_special_ids):
        del counts[token]
    numbers = {token: n for n, (token, _) in enumerate(counts.most_common(WORDS))}
    cover = tokenizer.mask_token_id
    cover = int(tokenizer.unk_token_id if cover is None else cover)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for prompt in prompts:
        places = [i for i, token in enumerate(prompt) if token in numbers]
        for pick in torch.randperm(len(places), generator=generator)[:COVERED].tolist():
            at = places[pick]
            covered = (*prompt[:at], cover, *prompt[at + 1 :])
            found.append(fit(covered, ((numbers[prompt[at]],),), length))
    return (found, len(numbers)) if len(numbers) > 1 else ([], 0)


def language_of(learnt: AdapterWeights, labels: int) -> AdapterWeights:
    """Return what learnt a language as T: on an encoder with a head that adds nothing to `labels` labels."""
    if learnt.head is None:
        return learnt
    width = learnt.head.shape[1]
    return replace(learnt, head=Head(torch.zeros(labels, width), torch.zeros(labels)))
