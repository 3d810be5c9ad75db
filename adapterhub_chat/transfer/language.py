"""T learns a language, or a domain's way of speaking, from its text alone: no labels, no source.

Under a source it then is a stack that has seen the target's language (the idea of MAD-X, arXiv 2005.00052).
A language model learns to continue the texts. An encoder, which continues nothing, learns what a text means
though some of its tokens are covered: the bare backbone's features of the whole text are to be restored
(after data2vec, arXiv 2202.03555). So features stay what a source's head expects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adapterhub_chat.config import TrainConfig
from adapterhub_chat.data.encoding import Encoded, encode_prompts, messages_of, truncate
from adapterhub_chat.data.packing import in_order
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.features import ROWS, capture_blocks, mean_pooled
from adapterhub_chat.training.job import HiddenStates, Job
from adapterhub_chat.types import NO_ADAPTER, Example, PromptContract

LANGUAGE = "language"
"""What the method is called, and its job."""
COVERED, COPIES = 0.3, 2
"""Share of a text's tokens that an encoder does not see, and how often a text is covered anew."""
LAST = -1
"""The block whose states are restored."""


class Restoring:
    """The distance of covered texts' features to those of the whole texts: an auxiliary loss of one job."""

    layer, stopped = LAST, ""

    def __init__(self, whole: Mapping[Encoded, Tensor]) -> None:
        """Take each covered text's wanted features (H,)."""
        self._whole = dict(whole)
        every = torch.stack(list(whole.values()))
        self._spread = float((every - every.mean(0)).square().sum(1).mean().clamp_min(1e-9))

    def loss(self, seen: HiddenStates) -> Tensor:
        """Return the mean squared distance; 1 is what the mean of all texts would be worth."""
        wanted = torch.stack([self._whole[example] for example in seen.examples])
        apart = seen.pooled - wanted.to(seen.pooled.device)
        return apart.square().sum(1).mean() / self._spread


def text_job(
    model: AdapterModel,
    contract: PromptContract,
    texts: Sequence[Example],
    config: TrainConfig,
) -> Job:
    """Return the job of learning from texts; it has no examples where they are too short to learn from."""
    plain = [replace(example, contract=None) for example in texts]
    tokenizer: Any = model.backbone.tokenizer
    if model.backbone.encodes:
        prompts = encode_prompts(tokenizer, [messages_of(contract, e) for e in plain])
        whole = [truncate(prompt, ((0,),), config.row_length) for prompt in prompts]
        covered = _covered(tokenizer, whole, config.seed)
        wanted = _features(model, list(dict.fromkeys(covered.values())), config.row_length)
        restored = (
            Restoring({some: wanted[all_] for some, all_ in covered.items()}) if covered else None
        )
        labels = len(contract.labels)
        return Job(LANGUAGE, list(covered), (), config, auxiliary=restored, labels=labels)
    first = tokenizer.bos_token_id
    before = (int(tokenizer.eos_token_id if first is None else first),)
    rows = tokenizer(["\n".join(e.fields.values()) for e in plain], add_special_tokens=False)
    learnt = [truncate(before, (tuple(ids),), config.row_length) for ids in rows.input_ids if ids]
    return Job(LANGUAGE, learnt, (), config)


def _covered(tokenizer: Any, whole: Sequence[Encoded], seed: int) -> dict[Encoded, Encoded]:
    """Return texts of which some tokens are covered, each with the whole text; none weighs as an answer."""
    cover = tokenizer.mask_token_id
    cover = int(tokenizer.unk_token_id if cover is None else cover)
    special = set(tokenizer.all_special_ids)
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for text in whole:
        places = [i for i, token in enumerate(text.prompt) if token not in special]
        for _ in range(COPIES):
            count = round(COVERED * len(places))
            hidden = {places[i] for i in torch.randperm(len(places), generator=generator)[:count]}
            prompt = tuple(cover if i in hidden else t for i, t in enumerate(text.prompt))
            if hidden:
                found[replace(text, prompt=prompt, weight=0.0)] = text
    return found


def _features(model: AdapterModel, texts: Sequence[Encoded], length: int) -> dict[Encoded, Tensor]:
    """Return the bare backbone's features (H,), float32 on the CPU, of each text."""
    found: dict[Encoded, Tensor] = {}
    for rows, indices in in_order(texts, num_rows=ROWS, length=length):
        batch = model.pack(rows, length)
        mixes = [NO_ADAPTER] * batch.num_rows
        with torch.inference_mode(), model.mixing(mixes), capture_blocks(model, [LAST]) as heard:
            model.answer_logits(batch)
            vectors = mean_pooled(heard[LAST], batch).cpu()
        found |= {texts[i]: vector.clone() for i, vector in zip(indices, vectors, strict=True)}
    return found
