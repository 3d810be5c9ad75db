"""Language adapters: an adapter T learns a language or a domain from its text alone, without labels.

Stacked on a source adapter, T adapts it to the target's language (the idea of MAD-X, arXiv 2005.00052).
A language model learns to continue the texts. An encoder learns to restore the bare backbone's features of a
text from a copy in which some tokens are masked (after data2vec, arXiv 2202.03555), so that the features stay
what the source's head expects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adapterhub_chat.config import TrainConfig
from adapterhub_chat.data.chat_template import encode_prompts
from adapterhub_chat.data.encoding import Encoded, messages_of, truncate
from adapterhub_chat.data.packing import in_order
from adapterhub_chat.model.adapter_model import AdapterModel
from adapterhub_chat.model.features import ROWS, capture_blocks, mean_pooled
from adapterhub_chat.training.job import HiddenStates, Job
from adapterhub_chat.types import NO_ADAPTER, Example, PromptContract

LANGUAGE = "language"
"""Name of the method and of its job."""
MASKED_SHARE, NUM_COPIES = 0.3, 2
"""For an encoder: share of a text's tokens that are masked, and number of masked copies of a text."""
LAST_BLOCK = -1
"""The block whose output is restored."""


class FeatureRestoration:
    """The distance of masked texts' features to those of the full texts: an auxiliary loss of one job."""

    layer, stopped = LAST_BLOCK, ""

    def __init__(self, targets: Mapping[Encoded, Tensor]) -> None:
        """Take the target features (H,) of each masked text."""
        self._targets = dict(targets)
        features = torch.stack(list(targets.values()))
        variance = (features - features.mean(0)).square().sum(1).mean()
        self._variance = float(variance.clamp_min(1e-9))

    def loss(self, states: HiddenStates) -> Tensor:
        """Return the mean squared distance over the variance: 1 is the loss of the mean of all texts."""
        targets = torch.stack([self._targets[example] for example in states.examples])
        difference = states.pooled - targets.to(states.pooled.device)
        return difference.square().sum(1).mean() / self._variance


def text_job(
    model: AdapterModel,
    contract: PromptContract,
    texts: Sequence[Example],
    config: TrainConfig,
) -> Job:
    """Return the job of learning from texts; it has no examples if the texts are too short to learn from."""
    plain = [replace(example, contract=None) for example in texts]
    tokenizer: Any = model.backbone.tokenizer
    if model.backbone.encodes:
        prompts = encode_prompts(tokenizer, [messages_of(contract, e) for e in plain])
        full_texts = [truncate(prompt, ((0,),), config.row_length) for prompt in prompts]
        full_by_masked = _masked_copies(tokenizer, full_texts, config.seed)
        features = _features(model, list(dict.fromkeys(full_by_masked.values())), config.row_length)
        targets = {masked: features[full] for masked, full in full_by_masked.items()}
        restoration = FeatureRestoration(targets) if targets else None
        labels = len(contract.labels)
        return Job(LANGUAGE, list(full_by_masked), (), config, auxiliary=restoration, labels=labels)
    bos = tokenizer.bos_token_id
    prompt = (int(tokenizer.eos_token_id if bos is None else bos),)
    rows = tokenizer(["\n".join(e.fields.values()) for e in plain], add_special_tokens=False)
    encoded = [truncate(prompt, (tuple(ids),), config.row_length) for ids in rows.input_ids if ids]
    return Job(LANGUAGE, encoded, (), config)


def _masked_copies(tokenizer: Any, texts: Sequence[Encoded], seed: int) -> dict[Encoded, Encoded]:
    """Return masked copies of the texts, each with its full text; their answers have weight zero."""
    mask_token = tokenizer.mask_token_id
    mask_token = int(tokenizer.unk_token_id if mask_token is None else mask_token)
    special = set(tokenizer.all_special_ids)
    generator = torch.Generator().manual_seed(seed)
    copies = {}
    for text in texts:
        positions = [i for i, token in enumerate(text.prompt) if token not in special]
        for _ in range(NUM_COPIES):
            count = round(MASKED_SHARE * len(positions))
            order = torch.randperm(len(positions), generator=generator)
            masked = {positions[i] for i in order[:count]}
            prompt = tuple(mask_token if i in masked else t for i, t in enumerate(text.prompt))
            if masked:
                copies[replace(text, prompt=prompt, weight=0.0)] = text
    return copies


def _features(model: AdapterModel, texts: Sequence[Encoded], length: int) -> dict[Encoded, Tensor]:
    """Return the bare backbone's features (H,), float32 on the CPU, of each text."""
    features: dict[Encoded, Tensor] = {}
    for rows, indices in in_order(texts, num_rows=ROWS, length=length):
        batch = model.pack(rows, length)
        mixes = [NO_ADAPTER] * batch.num_rows
        with (
            torch.inference_mode(),
            model.mixing(mixes),
            capture_blocks(model, [LAST_BLOCK]) as block_outputs,
        ):
            model.answer_logits(batch)
            vectors = mean_pooled(block_outputs[LAST_BLOCK], batch).cpu()
        features |= {texts[i]: vector.clone() for i, vector in zip(indices, vectors, strict=True)}
    return features
